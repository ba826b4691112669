"""launch/slurm/pretrain.sbatch on a real SLURM of two nodes, started here: run, be preempted, lose a node, go on."""

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
            assert state not in ("FAILED", "TIMEOUT", "CANCELLED"), said
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
        for file in folder.glob("*.pid"):
            os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.fixture(scope="module")
def uninterrupted(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the same run, launched by DeepSpeed and never stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = pretrain(toy, folder, *RECIPE)
    assert done.returncode == 0, done.stdout
    return metrics(folder, "loss")


def start(cluster: Cluster, toy: Path, folder: Path, log: Path) -> str:
    arguments = ("launch/slurm/pretrain.sbatch", "--config", "configs/quickstart.yaml")
    return cluster.submit(log, *arguments, *overridden(toy, folder, *RECIPE))


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
