"""The folder of a run: its lock, how the run stands, what it ran on."""

import fcntl
import json
import platform
import subprocess
import sys
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import torch

from mlm_dist.manifest import replace_file
from mlm_dist.schema import ConfigError
from mlm_dist.world import World

LIBRARIES = ("torch", "deepspeed", "webdataset", "transformers", "tokenizers", "wandb", "numpy")


def open_folder(folder: Path, here: World, stack: ExitStack) -> Path:
    """Make the run folder and hold its lock while the run lasts: two launches must not share it.

    Raises ConfigError on every rank where it can't be made or another launch holds it.
    """
    problem = None
    if here.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / "lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"{folder} is in use by another launch; wait for it to end, or set another run.dir"
        except OSError as error:
            problem = f"run.dir = {folder} can't be written to ({error.strerror}); set another run.dir"
    problem = here.broadcast(problem)
    if problem:
        raise ConfigError(problem)
    return folder


def write_status(folder: Path, status: str, exit_code: int | None, **more: int | None) -> None:
    """Tell in RUN/status.json how the run stands: launchers may hide the exit code."""
    content = {"status": status, "exit_code": exit_code} | more
    replace_file(folder / "status.json", (json.dumps(content) + "\n").encode())


def write_environment(folder: Path, here: World) -> None:
    """Tell in RUN/environment.json what the run ran on: command, commit, ranks, versions, platform."""
    content = {
        "command": sys.argv,
        "commit": commit(),
        "ranks": here.size,
        "device": torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else here.device.type,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    (folder / "environment.json").write_text(json.dumps(content, indent=1) + "\n")


def commit() -> str | None:
    """The git commit of this code, with "-dirty" where files were changed since; None where there is no clone."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None  # git would tell of a repository around it
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
