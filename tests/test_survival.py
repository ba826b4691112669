"""What runs survive, on real ranks: another number of them, gradients that aren't finite, one that answers no more."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import (
    ROOT,
    environment,
    metrics,
    overridden,
    pretrain,
    run,
    start_pretrain,
    wait_for,
    wait_for_the_end,
)
from ranks import on_ranks

from mlm_dist import checkpoint, config, train, world
from mlm_dist.world import EXIT_HANG, EXIT_NON_FINITE, EXIT_STOPPED, StopFlag

pytestmark = pytest.mark.slow


# ---- another number of ranks


def go_on(toy: Path, folder: Path, name: str, steps: int) -> None:
    """On this rank, at each stage: train, or go on, up to a step, with masks and a schedule that depend on neither."""
    with world.join(120) as here, StopFlag() as stop:
        for stage in (0, 1, 2, 3):
            overrides = overridden(
                toy, folder / f"{name}{stage}", f"run.steps={steps}", "schedule.name=constant",
                f"engine.zero_stage={stage}", "masking.seed_by=sample",
            )  # fmt: skip
            assert train.train_on(config.load(ROOT / "configs/quickstart.yaml", overrides), here, stop) == 0


def test_another_number_of_ranks_goes_on_where_the_run_stood(toy: Path, tmp_path: Path) -> None:
    """2 ranks, then 1, then 4, then 2, beside 2 that were never stopped; the sums differ in their last digits alone."""
    on_ranks(2, go_on, toy, tmp_path, "whole", 8)
    for ranks, steps in ((2, 3), (1, 5), (4, 7), (2, 8)):
        on_ranks(ranks, go_on, toy, tmp_path, "parts", steps)
    for stage in (0, 1, 2, 3):
        whole, parts = tmp_path / f"whole{stage}", tmp_path / f"parts{stage}"
        assert metrics(parts, "tokens") == metrics(whole, "tokens"), "the data go on exactly where they stood"
        assert list(metrics(parts, "loss").values()) == pytest.approx(list(metrics(whole, "loss").values()), abs=5e-6)
        one, other = (checkpoint.full_weights(checkpoint.find(folder)) for folder in (whole, parts))
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=5e-6, rtol=1e-5, msg=f"stage {stage}, {name}")
        assert not list((parts / "checkpoints").glob("tmp-*"))


# ---- gradients that aren't finite


def options(first: int, last: int) -> tuple[str, ...]:
    """Overrides for steps of two calls a rank, and one logged line for each."""
    return (
        "model.kind=factory", "model.factory=tests.faulty:faulty", f"model.options.first={first}",
        f"model.options.last={last}", "checkpoint.every_steps=2", "engine.max_non_finite_steps=4",
    )  # fmt: skip


def test_steps_that_go_wrong_on_one_rank_are_skipped_and_told(toy: Path, tmp_path: Path) -> None:
    done = pretrain(toy, tmp_path, *options(5, 8), "run.steps=8")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("gradients that are not finite") == 2
    assert metrics(tmp_path, "skipped_steps") == {1: 0, 2: 0, 3: 1, 4: 2, 5: 2, 6: 2, 7: 2, 8: 2}
    losses = metrics(tmp_path, "loss")
    assert losses[3] is None and losses[4] is None and losses[8] < losses[1]


def test_a_run_that_only_goes_wrong_ends_and_its_checkpoint_stands(toy: Path, tmp_path: Path) -> None:
    ended = pretrain(toy, tmp_path, *options(9, 999), "run.steps=50")
    assert ended.returncode == EXIT_NON_FINITE, ended.stdout
    assert "the last 4 steps were skipped: the run ends" in ended.stdout and "Traceback" not in ended.stdout
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["status"], status["exit_code"], status["step"]) == ("failed", EXIT_NON_FINITE, 8)
    weights = checkpoint.full_weights(checkpoint.find(tmp_path))
    assert all(weight.isfinite().all() for weight in weights.values())


# ---- a signal before there is anything to save


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_rank_that_is_told_to_stop_while_it_starts_may_be_started_again(
    toy: Path, tmp_path: Path, number: signal.Signals
) -> None:
    starting = subprocess.Popen(
        [sys.executable, "launch/pretrain.py", *overridden(toy, tmp_path / "run")],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    status = Path(f"/proc/{starting.pid}/status")
    wait_for(lambda: int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> 9 & 1, starting)  # USR1
    starting.send_signal(number)
    said, _ = starting.communicate(timeout=60)
    assert (starting.returncode, said) == (EXIT_STOPPED, "")


def test_a_run_that_nobody_listens_to_goes_on(toy: Path, tmp_path: Path) -> None:
    """As where the connection to the machine that launched it is cut."""
    launcher = start_pretrain(toy, tmp_path, "run.steps=100000")
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(metrics(tmp_path, "loss")) >= 3, launcher)
    launcher.stdout.close()
    heard = len(metrics(tmp_path, "loss"))
    wait_for(lambda: len(metrics(tmp_path, "loss")) >= heard + 20, launcher)
    os.killpg(launcher.pid, signal.SIGTERM)
    status = wait_for_the_end(tmp_path)  # the launcher doesn't wait for its ranks
    assert (status["status"], status["exit_code"]) == ("stopped", EXIT_STOPPED)
    assert checkpoint.find(tmp_path).name == checkpoint.step_name(status["step"])


# ---- a rank that answers no more


def pid_of_rank(launcher: int, rank: int) -> int:
    """The process of a rank: the oldest of the launcher's group with that rank in its environment."""
    found = []
    for process in (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()):
        with contextlib.suppress(OSError):  # it has ended
            variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            if os.getpgid(process) == os.getpgid(launcher) and f"RANK={rank}".encode() in variables:
                found.append(process)
    return min(found)


def test_a_stopped_rank_ends_the_run_and_is_named(toy: Path, tmp_path: Path) -> None:
    launcher = start_pretrain(toy, tmp_path, "run.steps=100000", "engine.timeout_seconds=15")
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(metrics(tmp_path, "loss")) >= 3, launcher)
    os.kill(pid_of_rank(launcher.pid, 1), signal.SIGSTOP)
    said, _ = launcher.communicate(timeout=150)
    assert "no progress for 15 s: rank 1 doesn't answer" in said, said
    assert "rank 0, at step" in said and "train.py" in said, "the stack of the one that waits"
    assert launcher.returncode == EXIT_HANG
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == EXIT_HANG


# ---- what is there


def test_checkpoints_are_listed_with_what_is_wrong(toy: Path, tmp_path: Path) -> None:
    assert pretrain(toy, tmp_path, "run.steps=4", "checkpoint.every_steps=2").returncode == 0
    state = tmp_path / "checkpoints/step_00000002/state.json"
    state.write_text(state.read_text() + " ")
    listed = run("launch/checkpoints.py", str(tmp_path))
    assert listed.returncode == 0, listed.stdout
    first, second = listed.stdout.splitlines()[1:3]
    assert first.startswith("step_00000004") and first.endswith("whole")
    assert second.startswith("step_00000002") and "state.json has" in second
    assert listed.stdout.endswith("latest: step_00000004\n")
    assert run("launch/checkpoints.py", str(tmp_path / "none")).returncode == 2


# ---- told to stop inside a library, where Python runs no handler


def test_told_to_stop_while_it_waits_for_a_rank_that_never_comes(toy: Path, tmp_path: Path) -> None:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "launch/pretrain.py", "--config", "configs/quickstart.yaml"]
    process = subprocess.Popen(
        [*command, *overridden(toy, tmp_path / "run")],
        cwd=ROOT,
        env=environment() | alone | {"MASTER_PORT": str(world.free_port())},
    )
    time.sleep(12)  # past its imports
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=10) == EXIT_STOPPED


def test_a_second_ctrl_c_ends_a_rank_that_waits_for_one_that_hangs(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start_pretrain(toy, folder, "run.steps=100000")
    try:
        wait_for(lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder, "loss")) > 2, process)
        ranks = {rank: pid for pid, rank in ranks_of(process.pid).items()}
        os.kill(ranks[1], signal.SIGSTOP)
        time.sleep(1)
        os.kill(ranks[0], signal.SIGINT)
        time.sleep(world.SECONDS_TO_INSIST + 1)
        os.kill(ranks[0], signal.SIGINT)
        wait_for(lambda: not Path(f"/proc/{ranks[0]}").exists() or is_zombie(ranks[0]), process, timeout=15)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ranks_of(launcher: int) -> dict[int, int]:
    """The rank of each process that a launcher's group has started, by its pid."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(path.name)) == launcher and b"--local_rank=" in (path / "cmdline").read_bytes():
                told = re.search(rb"--local_rank=(\d+)", (path / "cmdline").read_bytes())
                found[int(path.name)] = int(told[1])
    return found


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_refused_resume_is_told_in_the_status(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert pretrain(toy, folder, "run.steps=3").returncode == 0
    assert pretrain(toy, folder, "run.steps=5", "optim.lr=0.5").returncode == 2
    assert json.loads((folder / "status.json").read_text()) == {"status": "failed", "exit_code": 2}
