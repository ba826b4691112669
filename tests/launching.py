"""Start the real launcher, as a user does."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# what tests that compare a recipe's numbers lay over the shipped one, which may be tuned
PLAIN = (
    "run.steps=1300", "batch.global_rows=16", "optim.name=adamw", "optim.lr=3e-3", "optim.muon.lr_factor=1",
    "engine.zero_stage=auto",
)  # fmt: skip

# a model that trains at hundreds of steps a minute
TINY = (
    "batch.seq_len=32", "batch.global_rows=16", "batch.micro_rows=4",
    "model.encoder.layers=2", "model.encoder.width=32", "model.encoder.heads=2", "model.encoder.mlp_width=48",
    "model.encoder.max_positions=64", "schedule.warmup_steps=2", "log.every_steps=1", "log.wandb=off", "data.workers=0",
    "evaluate.every_steps=1000", "evaluate.max_rows=16", "checkpoint.every_steps=1000",
    "optim.name=adamw", "optim.lr=3e-3", "optim.muon.lr_factor=1",
    "engine.zero_stage=1",  # so that every rank has files of its own
)  # fmt: skip


def environment() -> dict[str, str]:
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def run(*command: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command of this Python in the repository's root; output and errors together in `stdout`."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment() | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def pretrain(shards: Path, folder: Path, *overrides: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """`launch/local.sh launch/pretrain.py` on CPU ranks, with the tiny model and the overrides on top."""
    process = start_pretrain(shards, folder, *overrides, ranks=ranks)
    try:
        said, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, said)


def start_pretrain(shards: Path, folder: Path, *overrides: str, ranks: int = 2) -> subprocess.Popen[str]:
    """The same in the background, in a process group of its own."""
    return subprocess.Popen(
        [
            "launch/local.sh", "launch/pretrain.py", "--config", "configs/quickstart.yaml",
            *overridden(shards, folder, *overrides),
        ],
        cwd=ROOT,
        env=environment() | {"CPU_RANKS": str(ranks)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )  # fmt: skip


def overridden(shards: Path, folder: Path, *overrides: str) -> list[str]:
    """The tiny model's overrides, and others on top."""
    return last_of_each(f"data.shards={shards}", f"run.dir={folder}", *TINY, *overrides)


def plain(*overrides: str) -> list[str]:
    """`PLAIN`, and others on top."""
    return last_of_each(*PLAIN, *overrides)


def last_of_each(*overrides: str) -> list[str]:
    return list({override.partition("=")[0]: override for override in overrides}.values())


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 120) -> None:
    """Return when the condition holds; AssertionError where the process ends or the time is up before it does."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def wait_for_the_end(folder: Path, timeout: float = 120) -> dict[str, Any]:
    """The run's status once it says that it has ended: launchers may end before their ranks do."""
    deadline = time.monotonic() + timeout
    while (status := json.loads((folder / "status.json").read_text()))["status"] == "running":
        assert time.monotonic() < deadline, f"it still runs: {status}"
        time.sleep(0.1)
    return status


def metrics(folder: Path, name: str) -> dict[int, Any]:
    """One metric of a run, by step."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[name] for record in records if name in record}
