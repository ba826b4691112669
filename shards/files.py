"""The input files of build.py: find them, estimate how much text they hold, and deal them out to parts."""

import fnmatch
import heapq
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlm_dist.schema import ConfigError

TEXT = (".txt", ".md", ".rst", ".py")
HTML = (".html", ".htm")
JSON_LINES = ".jsonl"
PARQUET = ".parquet"
PACKED = (".gz", ".zst")
READ = f"{', '.join((*TEXT, *HTML))} and {JSON_LINES}, each also with .gz or .zst, and {PARQUET}"
RATIO = {".gz": 4, ".zst": 4, PARQUET: 2}  # of text to what it takes on the disk, roughly: for estimates alone
PIECE_BYTES = 256 << 20  # a file that can be read from the middle is dealt out in pieces of about this size


@dataclass(frozen=True)
class Piece:
    """A file, or a stretch of it: the lines that begin at bytes `start` to `stop`, or row groups `start` to `stop`.

    stop: None for the end; size: in bytes on the disk; held_out: whether it is of --valid-input.
    """

    file: Path
    held_out: bool
    size: int
    start: int = 0
    stop: int | None = None


# ---- finding


def find(paths: Sequence[Path], exclude: Sequence[str] = ()) -> list[Path]:
    """The files to read: those named, and those under the folders named, in order, each file once.

    Hidden entries, `__pycache__` and what matches a glob of `exclude` (by name, or by path below its folder) are left
    out; links to folders are not followed. Raises ConfigError where a path doesn't exist or nothing is found.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise ConfigError(f"input {path} doesn't exist")
        if not path.is_dir() and not is_read(path):
            raise ConfigError(f"input {path} is of a kind that isn't read: {READ}")
        for file in walk(path, exclude) if path.is_dir() else [path]:
            found.setdefault(os.path.realpath(file), file)
    if not found:
        raise ConfigError(f"no text in {', '.join(map(str, paths))}: the files read are {READ}")
    return list(found.values())


def walk(root: Path, exclude: Sequence[str]) -> Iterator[Path]:
    """The files to read below a folder, sorted."""

    def fail(error: OSError) -> None:
        raise error  # which os.walk would pass over

    def wanted(folder: str, name: str) -> bool:
        below = os.path.relpath(os.path.join(folder, name), root)
        hidden = name.startswith(".") or name == "__pycache__"
        return not hidden and not any(fnmatch.fnmatch(part, glob) for part in (name, below) for glob in exclude)

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = sorted(name for name in subfolders if wanted(folder, name))
        files = (Path(folder, name) for name in sorted(names) if wanted(folder, name))
        yield from (file for file in files if is_read(file) and file.is_file())


def is_read(path: Path) -> bool:
    """True for the kinds of files that are read."""
    kind = plain_suffix(path)
    return kind in (*TEXT, *HTML, JSON_LINES) or (kind == PARQUET and not packing(path))


def packing(path: Path) -> str:
    """.gz, .zst, or nothing for a file that isn't compressed."""
    suffix = path.suffix.lower()
    return suffix if suffix in PACKED else ""


def plain_suffix(path: Path) -> str:
    """The suffix without .gz or .zst, in lower case."""
    return Path(path.name.lower().removesuffix(packing(path))).suffix


def text_bytes(files: Sequence[Path]) -> int:
    """About how many bytes of text the files hold."""
    return sum(file.stat().st_size * RATIO.get(file.suffix.lower(), 1) for file in files)


# ---- dealing


def pieces(files: Sequence[Path], held_out: bool) -> list[Piece]:
    """The files in the order of their real paths, whatever order they were named in; big ones in several pieces."""
    return [piece for file in sorted(files, key=os.path.realpath) for piece in split(file, held_out)]


def split(file: Path, held_out: bool) -> list[Piece]:
    """A file in pieces of about 256 MiB where it can be read from the middle, else in one."""
    size = file.stat().st_size
    if size > PIECE_BYTES and file.suffix.lower() == PARQUET:
        from shards.parquet import row_group_bytes

        sizes = row_group_bytes(file)
        groups = max(1, PIECE_BYTES * len(sizes) // size)
        return [Piece(file, held_out, sum(sizes[i : i + groups]), i, i + groups) for i in range(0, len(sizes), groups)]
    if size > PIECE_BYTES and file.suffix.lower() == JSON_LINES:
        edges = range(0, size, PIECE_BYTES)
        return [Piece(file, held_out, min(PIECE_BYTES, size - i), i, i + PIECE_BYTES) for i in edges]
    return [Piece(file, held_out, size)]


def deal(whole: Sequence[Piece], parts: int) -> list[list[Piece]]:
    """The pieces of each part, in order: about as much text for each, and every piece in exactly one."""
    loads = [(0, part) for part in range(parts)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    weights = [piece.size * RATIO.get(piece.file.suffix.lower(), 1) for piece in whole]
    for number in sorted(range(len(whole)), key=lambda number: (-weights[number], number)):
        load, part = heapq.heappop(loads)
        dealt[part].append(number)
        heapq.heappush(loads, (load + weights[number], part))
    return [[whole[number] for number in sorted(numbers)] for numbers in dealt]
