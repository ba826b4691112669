"""A build in parts: where each part lies, and whether all of them fit together."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlm_dist.schema import ConfigError
from shards.files import Piece
from shards.runs import Run, read_runs
from shards.workplace import PARTS, Plan, difference, locked, read_json

NAME = re.compile(r"(\d{5,})-of-(\d{5,})")
OWN = ("part", "pieces")  # in which the parts of one build differ


class Part(NamedTuple):
    """The `number`th of `count` parts, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def folder(self, out: Path) -> Path:
        """Where it lies until the merge."""
        return out / PARTS / f"{self.number:05d}-of-{self.count:05d}"


class Whole(NamedTuple):
    """All parts of a build, finished. plan: what they have in common; tokenizer: a folder."""

    plan: dict[str, Any]
    runs: list[Run]
    tokenizer: Path


def part_of(text: str) -> Part:
    """A Part from "i/n". Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    part = Part(int(found[1]), int(found[2])) if found else Part(0, 0)
    if not 1 <= part.number <= part.count:
        raise ConfigError(f"--part {text} is not i/n with i from 1 to n, as in 3/16 for the third of sixteen parts")
    return part


def inputs_hash(pieces: Sequence[Piece]) -> str:
    """sha256 of the names, sizes and times of change of the files, and of how they are dealt out."""
    digest = hashlib.sha256()
    for piece in pieces:
        state = piece.file.stat()
        said = (os.path.realpath(piece.file), piece.held_out, piece.start, state.st_size, state.st_mtime_ns)
        digest.update(f"{said!r}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def whole_parts(out: Path) -> Iterator[Whole]:
    """The parts in OUT, all of them locked. Raises ConfigError, by name, unless each is there, whole and fits."""
    parts = parts_in(out)
    with contextlib.ExitStack() as locks:
        plans = []
        for part in parts:
            try:
                locks.enter_context(locked(part.folder(out), 0.0))
            except ConfigError as error:
                raise ConfigError(f"part {part} is still being made; merge when it has finished") from error
            plans.append(read_json(part.folder(out) / "plan.json"))
        for part, plan in zip(parts, plans, strict=True):
            check_fit(part, plan, parts[0], plans[0])
        runs: list[Run] = []
        for part, plan in zip(parts, plans, strict=True):
            runs += finished_runs(part, part.folder(out), plan)
        common = {key: value for key, value in plans[0].items() if key not in OWN}
        yield Whole(common, runs, parts[0].folder(out) / "tokenizer")


def parts_in(out: Path) -> list[Part]:
    """The parts in OUT, in order. Raises ConfigError where some are missing, or where they are of several builds."""
    names = [NAME.fullmatch(path.name) for path in (out / PARTS).iterdir()] if (out / PARTS).is_dir() else []
    parts = sorted(Part(int(name[1]), int(name[2])) for name in names if name)
    if not parts:
        raise ConfigError(f"{out} holds no parts to merge; make them with --part 1/N ... --part N/N")
    counts = sorted({part.count for part in parts})
    if len(counts) > 1:
        raise ConfigError(
            f"{out / PARTS} holds parts of {counts[0]} and parts of {counts[1]}; remove the folders that are not meant"
        )
    missing = [str(Part(i, counts[0])) for i in range(1, counts[0] + 1) if Part(i, counts[0]) not in parts]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ConfigError(f"part {', '.join(missing[:5])}{more} is missing from {out / PARTS}; run it, then merge")
    return parts


def check_fit(part: Part, plan: Plan | None, first: Part, first_plan: Plan | None) -> None:
    """Raises ConfigError where a part was never begun, or not with what the first one was."""
    if plan is None:
        raise ConfigError(f"part {part} has not finished; run it again with the same command, then merge")
    assert first_plan is not None
    if changed := difference(first_plan, plan, OWN):
        raise ConfigError(f"part {part} and part {first} differ in {changed}; run one of them again, then merge")


def finished_runs(part: Part, folder: Path, plan: Plan) -> list[Run]:
    """The runs of a part. Raises ConfigError where it has not come to the end of its inputs."""
    runs = read_runs(folder / "runs", sum(plan["buckets"]), plan["dtype"])
    if not runs or runs[-1].cursor.piece != plan["pieces"]:
        raise ConfigError(f"part {part} has not finished; run it again with the same command, then merge")
    return runs
