"""The folder of a run: its lock, how the run stands, what it came from and ran on. No secret stands in any of it."""

import fcntl
import json
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlm_dist.manifest import replace_file
from mlm_dist.redaction import redact, redact_text
from mlm_dist.schema import ConfigError
from mlm_dist.world import World

GIT_SECONDS = 10.0
DIFF = "diff.patch"

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


def cut_lines(path: Path, step: int) -> list[str]:
    """Drop the lines of a .jsonl beyond a step, before the run goes on from there: each step is logged once.

    Returns the lines that stay.
    """
    if not path.exists():
        return []
    # by line feeds alone: a text may hold other signs that end a line, as it is
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = [line for line in lines if is_within(line, step)]
    replace_file(path, "".join(f"{line}\n" for line in kept).encode())
    return kept


def is_within(line: str, step: int) -> bool:
    # a killed run may leave half a line, or half a character
    try:
        return json.loads(line)["step"] <= step
    except json.JSONDecodeError:
        return False


def write_status(folder: Path, status: str, exit_code: int | None, **more: int | None) -> None:
    """Tell in RUN/status.json how the run stands: launchers may hide the exit code."""
    content = {"status": status, "exit_code": exit_code} | more
    replace_file(folder / "status.json", (json.dumps(content) + "\n").encode())


def write_inputs(folder: Path, deepspeed_json: dict[str, Any], facts: Mapping[str, Any], diff: bool) -> dict[str, Any]:
    """Tell what the run comes from, in RUN/environment.json, deepspeed.json and, where `diff` is set, diff.patch.

    facts: what else is to stand in environment.json
    Returns the contents of the first two.
    """
    environment = {
        "command": [redact_text(argument) for argument in sys.argv],
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in LIBRARIES},
        "commit": commit(),
        **facts,
    }
    said = {"environment": environment, "deepspeed": redact(deepspeed_json)}
    for name, content in said.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    if diff:
        (folder / DIFF).write_text(git("diff", "HEAD") or "")
    return said


def commit() -> str | None:
    """The git commit of this code, with "-dirty" where files were changed since; None where there is no clone."""
    said = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return said and said.strip()


def git(*arguments: str) -> str | None:
    """What git prints of the clone that this code stands in; None where there is none."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None  # git would tell of a repository around it
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, check=True, timeout=GIT_SECONDS, text=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
