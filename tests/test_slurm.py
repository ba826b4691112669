"""launch/slurm/pretrain.sbatch on a real SLURM of two nodes, started here: preempted, out of time, a node lost, on."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import ROOT, environment, metrics, overridden, pretrain

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"SLURM is not installed: no {', '.join(MISSING)}"),
    pytest.mark.skipif(os.getuid() != 0, reason="starting a SLURM takes root"),
]

STEPS = 400
RECIPE = (f"run.steps={STEPS}", "checkpoint.every_steps=50", "engine.zero_stage=1", "data.workers=2")


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.environ["PATH"] + ":/usr/sbin"
        self.env = environment() | {"SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1", "PATH": path}

    def __call__(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def submit(self, log: Path, *arguments: str, **options: str) -> str:
        """The id of a job of two nodes with a task each."""
        given = {"nodes": "2", "ntasks-per-node": "1", "cpus-per-task": "1", "gpus-per-node": "0", "time": "30"}
        given |= {"output": str(log)} | {name.replace("_", "-"): value for name, value in options.items()}
        flags = [f"--{name}={value}" for name, value in given.items()]
        return self("sbatch", "--parsable", *flags, *arguments).strip().partition(";")[0]

    def field(self, job: str, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", self("scontrol", "show", "job", job))
        assert found is not None
        return found[1]

    def wait(self, job: str, log: Path, condition: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            state = self.field(job, "JobState")
            said = log.read_text() if log.exists() else ""
            assert state not in ("FAILED", "TIMEOUT", "CANCELLED") or condition(), said
            assert time.monotonic() < deadline, f"{state}: waited in vain\n{said}"
            time.sleep(0.3)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = min(probe.getsockname()[1], 65000)
    cluster = Cluster(folder)
    try:
        cluster("tests/slurm_up.sh", str(folder), str(port))
        yield cluster
    finally:
        # jobs that a failed test left would outlive the daemons
        subprocess.run(["scancel", "--user=root"], env=cluster.env, capture_output=True)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and "root" in str(
            subprocess.run(["squeue"], env=cluster.env, capture_output=True).stdout
        ):
            time.sleep(0.5)
        for file in folder.glob("*.pid"):
            os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.fixture(scope="module")
def uninterrupted(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the same run, launched by DeepSpeed and never stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = pretrain(toy, folder, *RECIPE)
    assert done.returncode == 0, done.stdout
    return metrics(folder, "loss")


def start(cluster: Cluster, toy: Path, folder: Path, log: Path, *overrides: str, **options: str) -> str:
    arguments = ("launch/slurm/pretrain.sbatch", "--config", "configs/quickstart.yaml")
    return cluster.submit(log, *arguments, *overridden(toy, folder, *RECIPE, *overrides), **options)


def steps_done(folder: Path) -> int:
    return max(metrics(folder, "loss"), default=0) if (folder / "metrics.jsonl").exists() else 0


def test_a_preempted_job_saves_is_requeued_and_ends_as_if_nothing_had_happened(
    cluster: Cluster, uninterrupted: dict[int, float], toy: Path, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    job = start(cluster, toy, folder, log)
    cluster.wait(job, log, lambda: steps_done(folder) >= 20)
    (tmp_path / "urgent").write_text("#!/bin/sh\nsleep 5\n")
    urgent = cluster.submit(tmp_path / "urgent.log", str(tmp_path / "urgent"), partition="urgent", cpus_per_task="4")
    cluster.wait(urgent, tmp_path / "urgent.log", lambda: cluster.field(urgent, "JobState") == "COMPLETED")
    cluster.wait(job, log, lambda: cluster.field(job, "JobState") == "COMPLETED")
    said = log.read_text()
    assert cluster.field(job, "Restarts") == "1", said
    assert "stopped by SIGUSR1" in said or "stopped by SIGTERM" in said, said
    stopped_at = int(re.search(r"at step (\d+); start again", said)[1])
    assert f"resumed from step {stopped_at}" in said, "nothing was trained twice"
    assert metrics(folder, "loss") == uninterrupted


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint_alone(
    cluster: Cluster, uninterrupted: dict[int, float], toy: Path, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    job = start(cluster, toy, folder, log)
    cluster.wait(job, log, lambda: steps_done(folder) >= 60)
    cluster("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    try:
        cluster.wait(job, log, lambda: int(cluster.field(job, "Restarts")) == 1)
    finally:  # it may have come back by itself
        subprocess.run(["scontrol", "update", "nodename=n2", "state=resume"], env=cluster.env, capture_output=True)
    cluster.wait(job, log, lambda: cluster.field(job, "JobState") == "COMPLETED")
    assert "resumed from step" in log.read_text()
    assert metrics(folder, "loss") == uninterrupted


def slowly(seconds: float, steps: int) -> tuple[str, ...]:
    """Overrides for steps that take twice so long, until the job is started again."""
    return (
        "model.kind=factory", "model.factory=tests.faulty:slow", f"model.options.seconds={seconds}",
        "model.options.ranks=[0, 1]", "model.options.until_restarted=true", f"run.steps={steps}",
    )  # fmt: skip


def test_a_job_is_told_ahead_of_its_time_limit_is_requeued_and_ends(
    cluster: Cluster, toy: Path, tmp_path: Path
) -> None:
    """A minute is the shortest limit there is, and the warning may come half a minute early; 80 s don't fit in."""
    folder, log = tmp_path / "run", tmp_path / "log"
    job = start(cluster, toy, folder, log, *slowly(0.5, 80), time="1", signal="B:USR1@10")
    cluster.wait(job, log, lambda: cluster.field(job, "JobState") == "COMPLETED")
    said = log.read_text()
    stopped = re.search(r"stopped by SIGUSR1 at step (\d+); start again", said)
    assert stopped is not None and int(stopped[1]) > 0, said
    assert "stopped at a checkpoint after 0 restarts: requeued" in said
    assert f"resumed from step {stopped[1]}" in said and "done: 80 steps" in said
    assert int(cluster.field(job, "Restarts")) >= 1
    assert cluster.field(job, "ExitCode") == "0:0"
    assert sorted(metrics(folder, "loss")) == list(range(1, 81)), "each step once"


def test_the_next_job_of_an_array_goes_on_where_the_cap_on_restarts_ended_one(
    cluster: Cluster, uninterrupted: dict[int, float], toy: Path, tmp_path: Path
) -> None:
    folder, logs = tmp_path / "run", [tmp_path / f"log-{task}" for task in range(3)]
    first = start(cluster, toy, folder, tmp_path / "log-%a", array="0-2%1", export="ALL,MAX_RESTARTS=0")
    jobs = [f"{first}_{task}" for task in range(3)]
    cluster.wait(jobs[0], logs[0], lambda: steps_done(folder) >= 20)
    # it may try again after the signal got through, and find the job gone
    subprocess.run(["scancel", "--signal=USR1", "--batch", cluster.field(jobs[0], "JobId")], env=cluster.env)
    for job, log, state in zip(jobs, logs, ("FAILED", "COMPLETED", "COMPLETED"), strict=True):
        cluster.wait(job, log, lambda job=job, state=state: cluster.field(job, "JobState") == state)
    said = [log.read_text() for log in logs]
    assert cluster.field(jobs[0], "ExitCode") == "85:0" and cluster.field(jobs[0], "Restarts") == "0"
    assert "restarted 0 times already: not again (MAX_RESTARTS)" in said[0]
    stopped_at = int(re.search(r"stopped by SIGUSR1 at step (\d+)", said[0])[1])
    assert f"resumed from step {stopped_at}" in said[1] and f"done: {STEPS} steps" in said[1]
    assert f"is complete: {STEPS} steps" in said[2]
    assert metrics(folder, "loss") == uninterrupted


def test_what_is_wrong_with_the_configuration_is_not_tried_again(cluster: Cluster, toy: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = ("launch/slurm/pretrain.sbatch", "--config", "configs/quickstart.yaml")
    job = cluster.submit(log, *arguments, *overridden(toy, tmp_path / "run", "optim.learning_rate=1"))
    deadline = time.monotonic() + 120
    while cluster.field(job, "JobState") != "FAILED":
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)
    assert cluster.field(job, "ExitCode") == "2:0" and cluster.field(job, "Restarts") == "0"
    assert "optim.learning_rate" in log.read_text()
