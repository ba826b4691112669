"""The folder a build works in: one build at a time, which goes on where it was killed; and the moving into place.

A workplace says in plan.json of what build it is. The same build goes on with what it finds there; any other one
starts over.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from mlm_dist.manifest import replace_file, sync_folder
from mlm_dist.schema import ConfigError

# In OUT: where shards are made, where parts wait to be merged, where a tokenizer alone is trained.
BUILDING, PARTS, TOKENIZER = ".building", ".parts", ".tokenizer"
OUTPUT = ("tokenizer", "valid", "train")  # what comes out; `train` comes into place last
MADE = re.compile(r"(\d{6,}\.tar|records\.npy|manifest\.json|tokenizer\.json|tokenizer_config\.json)(\.tmp)?")
LOCK_SECONDS = 5.0  # the workers of a build that was killed hold its lock for an instant longer
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
SAID = {
    "inputs": "the input files",
    "tokenizer": "the tokenizer",
    "versions": "the version of Python or of a library",
    "format": "the version of the format",
    "part": "what is built",
}
Plan = Mapping[str, Any]


class Workplace:
    """A folder that this process alone works in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.adopted = False

    @property
    def plan(self) -> Plan | None:
        """What the folder holds a build of, if any."""
        return read_json(self.folder / "plan.json")

    @property
    def outcome(self) -> dict[str, Any] | None:
        """What `conclude` was given, once everything is made and only has to be moved into place."""
        return read_json(self.folder / "outcome.json")

    @property
    def holds_work(self) -> bool:
        """True where something is finished that a build could go on with."""
        trained = str((self.plan or {}).get("tokenizer")).startswith("train:") and (self.folder / "tokenizer").exists()
        return (
            trained
            or self.outcome is not None
            or any(any(self.folder.glob(glob)) for glob in ("runs/*.run", "finished/*/*.json"))
        )

    def adopt(self, plan: Plan) -> None:
        """Make this the place of a build: with what is there if it is of the very same build, else empty."""
        found = self.plan
        changed = None if found is None else difference(found, plan)
        if found is not None and changed is None:
            print(f"going on where the build in {self.folder} was stopped", file=sys.stderr, flush=True)
        else:
            if changed:
                print(
                    f"starting over: {changed} changed since the build in {self.folder} was stopped",
                    file=sys.stderr,
                    flush=True,
                )
            self.clear()
            replace_file(self.folder / "plan.json", json.dumps(plan, indent=1).encode())
        self.adopted = True

    def clear(self) -> None:
        """Remove everything but the lock; what says of which build it is goes first, so that no half is taken up."""
        for name in ("outcome.json", "plan.json"):
            (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def concluded(self, plan: Plan) -> bool:
        """True where everything of this build is made."""
        return self.outcome is not None and difference(self.plan or {}, plan) is None

    def conclude(self, outcome: Mapping[str, Any]) -> None:
        """Note that everything is made: `outcome["output"]` names the folders that are to be moved."""
        for name in outcome["output"]:
            sync_folder(self.folder / name)
        replace_file(self.folder / "outcome.json", json.dumps(outcome).encode())

    def publish(self, out: Path) -> None:
        """Move what was made to OUT, and what stands there into this folder; after a kill it can be done again.

        Without `train` no build is whole: the old one goes first, the new one comes last.
        """
        assert self.outcome is not None
        made = self.outcome["output"]
        for name in reversed(OUTPUT):
            new, old, aside = self.folder / name, out / name, self.folder / f"replaced-{name}"
            stays = new.exists() and name == "tokenizer" and same_files(new, old)  # the next command may name it
            if old.exists() and not stays and (new.exists() or name not in made):
                shutil.rmtree(aside, ignore_errors=True)
                old.rename(aside)
        for name in OUTPUT:
            if (self.folder / name).exists() and not (out / name).exists():
                (self.folder / name).rename(out / name)
        sync_folder(out)


@contextlib.contextmanager
def occupied(folder: Path) -> Iterator[Workplace]:
    """The folder as this process's workplace. Afterwards it is gone if it holds nothing that a build could go on with.

    Raises ConfigError where another process works there. A ConfigError within, which the same command would meet again,
    leaves nothing of the build behind.
    """
    with locked(folder):
        place = Workplace(folder)
        try:
            yield place
        except ConfigError:
            if place.adopted:
                place.clear()
            raise
        finally:
            if place.plan is None or not place.holds_work:
                shutil.rmtree(folder, ignore_errors=True)
                if folder.parent.name == PARTS:
                    with contextlib.suppress(OSError):  # other parts are in it
                        folder.parent.rmdir()


@contextlib.contextmanager
def locked(folder: Path, wait_seconds: float | None = None) -> Iterator[None]:
    """Hold the lock of a folder, which is made. Raises ConfigError where another process holds it."""
    deadline = time.monotonic() + (LOCK_SECONDS if wait_seconds is None else wait_seconds)
    while (lock := try_lock(folder)) is None:
        if time.monotonic() > deadline:
            raise ConfigError(f"another build is writing to {folder}; wait for it, or give another --out")
        time.sleep(0.05)
    with lock:
        yield


def try_lock(folder: Path) -> TextIO | None:
    """The open lock file of a folder, or None where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = (folder / "lock").open("w")
    except FileNotFoundError:  # the other one has just removed the folder
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        if error.errno in NO_LOCKS:
            print(f"note: {folder} can't be locked: see that no two builds write to it", file=sys.stderr, flush=True)
            return lock
        raise
    lock.close()
    return None


def difference(one: Plan, other: Plan, but: Sequence[str] = ()) -> str | None:
    """What two plans differ in, as the user calls it; None where they are the same, `but` for some keys."""
    keys = [key for key in other if key not in but] + [key for key in one if key not in other]
    for key in keys:
        if one.get(key) != other.get(key):
            return SAID.get(key, f"--{key.replace('_', '-')}")
    return None


def check_free(out: Path, force: bool, place: Workplace, plan: Plan) -> None:
    """Raises ConfigError where OUT holds shards already, unless they are this very build's."""
    moved = place.concluded(plan) and not (place.folder / "train").exists()
    if (out / "train" / "manifest.json").exists() and not force and not moved:
        raise ConfigError(f"{out} already holds shards; give another --out, or --force to replace them")


def check_ours(out: Path) -> None:
    """Raises ConfigError where OUT holds files that no build made and that would be lost."""
    if strange := [path for name in OUTPUT for path in strangers(out / name)]:
        raise ConfigError(f"{strange[0]} is no part of a build, and would be lost; give another --out")


def strangers(part: Path) -> list[Path]:
    """What stands in the place of a part of the output, or in it, that no build made."""
    if not part.is_dir():
        return [part] if part.exists() else []
    if not is_built(part) and (tars := sorted(part.glob("*.tar"))):
        return tars
    return sorted(path for path in part.iterdir() if path.is_dir() or not MADE.fullmatch(path.name))


def is_built(split_dir: Path) -> bool:
    """False for tars that no build wrote: without a manifest, or with one from --index."""
    said = read_json(split_dir / "manifest.json")
    return isinstance(said, dict) and "content" not in said


def same_files(one: Path, other: Path) -> bool:
    """True for two folders with the same files, small ones."""
    if not other.is_dir():
        return False
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other)]
    return files[0] == files[1]


def read_json(file: Path) -> Any:
    """A file of JSON, or None where there is none that can be read."""
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
