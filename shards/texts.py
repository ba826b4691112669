"""The inputs of build.py: find the files, cut them into batches of whole lines, and read documents out of a batch.

The finding and the cutting are done by one process, quickly; a batch is parsed by whichever worker process gets it.
"""

import fnmatch
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mlm_dist.schema import ConfigError

TEXT = (".txt", ".md", ".rst", ".py")
JSON_LINES = ".jsonl"
READ = f"{', '.join(TEXT)} and {JSON_LINES}, each also with .gz"
BATCH_BYTES = 1 << 20
LONGEST_LINE = 256 << 20  # of a .jsonl; a longer one is no line but a file of another kind
GZIP_RATIO = 4  # what text shrinks to, roughly: for estimates alone


@dataclass(frozen=True)
class Chunk:
    """A stretch of one file: one document, or whole lines of a .jsonl of which `line` is the first."""

    file: str
    line: int
    data: bytes


@dataclass(frozen=True)
class Batch:
    """What one worker parses at a time. position: bytes of all inputs read so far, as they lie on the disk."""

    chunks: list[Chunk]
    position: int


@dataclass(frozen=True)
class Reading:
    """How documents are read. longest: bytes after which one is cut; strict: refuse what isn't UTF-8."""

    text_key: str
    longest: int
    strict: bool


@dataclass
class Counts:
    """What was met on the way."""

    text_bytes: int = 0  # of the documents that gave tokens
    empty: int = 0  # documents without a token
    replaced: Counter[str] = field(default_factory=Counter)  # bytes that aren't UTF-8, by file

    def add(self, other: "Counts") -> None:
        """Add another worker's counts to these."""
        self.text_bytes += other.text_bytes
        self.empty += other.empty
        self.replaced += other.replaced


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
    return plain_suffix(path) in (*TEXT, JSON_LINES)


def plain_suffix(path: Path) -> str:
    """The suffix without .gz, in lower case."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def text_bytes(files: Sequence[Path]) -> int:
    """About how many bytes of text the files hold."""
    return sum(file.stat().st_size * (GZIP_RATIO if file.suffix.lower() == ".gz" else 1) for file in files)


# ---- cutting


def batches(files: Sequence[Path], longest: int) -> Iterator[Batch]:
    """All of the files in batches of about 1 MiB; a text file of more than `longest` bytes gives several documents."""
    chunks: list[Chunk] = []
    size = before = 0
    for file in files:
        with file.open("rb") as raw:
            for chunk in read_chunks(file, raw, longest):
                chunks.append(chunk)
                size += len(chunk.data)
                if size >= BATCH_BYTES:
                    yield Batch(chunks, before + raw.tell())
                    chunks, size = [], 0
            before += raw.tell()
    if chunks:
        yield Batch(chunks, before)


def read_chunks(file: Path, raw: BinaryIO, longest: int) -> Iterator[Chunk]:
    """One file's chunks. Raises ConfigError for a damaged .gz and for a .jsonl that has no lines."""
    packed = file.suffix.lower() == ".gz"
    stream = io.BufferedReader(gzip.GzipFile(fileobj=raw), BATCH_BYTES) if packed else raw
    try:
        yield from line_chunks(file, stream) if plain_suffix(file) == JSON_LINES else text_chunks(file, stream, longest)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{file} is not a whole gzip file ({error})") from error


def text_chunks(file: Path, stream: BinaryIO, longest: int) -> Iterator[Chunk]:
    """A text file as one document, or as several of at most `longest` bytes."""
    buffer = b""
    while buffer := buffer + stream.read(longest + 1 - len(buffer)):
        end = cut(buffer, longest)
        yield Chunk(str(file), 0, buffer[:end])
        buffer = buffer[end:]


def line_chunks(file: Path, stream: BinaryIO) -> Iterator[Chunk]:
    """A .jsonl in stretches of whole lines, about 1 MiB each."""
    lines: list[bytes] = []
    first, size = 1, 0
    while line := stream.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE:
            number = first + len(lines)
            raise ConfigError(f"{file}:{number} is longer than {LONGEST_LINE >> 20} MiB: is it really JSON lines?")
        lines.append(line)
        size += len(line)
        if size >= BATCH_BYTES:
            yield Chunk(str(file), first, b"".join(lines))
            first, lines, size = first + len(lines), [], 0
    if lines:
        yield Chunk(str(file), first, b"".join(lines))


def cut(data: bytes, longest: int) -> int:
    """How many bytes the first document takes, at most `longest`: to a line's end, else a space, else any character."""
    if len(data) <= longest:
        return len(data)
    for separator in (b"\n", b" "):
        at = data.rfind(separator, 0, longest) + 1
        if at > 0:
            return at
    at = longest
    while at > longest - 3 and data[at] & 0xC0 == 0x80:  # inside a UTF-8 sequence
        at -= 1
    return at


# ---- parsing, in the workers


def documents(batch: Batch, reading: Reading, counts: Counts) -> Iterator[str]:
    """The documents of a batch; those of white space alone are counted and left out.

    Raises ConfigError for what must not be guessed at: a line that is not JSON or has no text, a strict file that isn't
    UTF-8.
    """
    for chunk in batch.chunks:
        if plain_suffix(Path(chunk.file)) == JSON_LINES:
            texts = json_texts(chunk, reading, counts)
        else:
            texts = iter([decoded(chunk.data, chunk.file, chunk.file, reading, counts)])
        for text in texts:
            if text.strip():
                yield text
            else:
                counts.empty += 1


def json_texts(chunk: Chunk, reading: Reading, counts: Counts) -> Iterator[str]:
    """The text of each line of a .jsonl, cut where it is too long."""
    for number, line in enumerate(chunk.data.split(b"\n"), chunk.line):
        where = f"{chunk.file}:{number}"
        text = decoded(line, chunk.file, where, reading, counts)
        if not text.strip():
            continue
        try:
            said = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is not JSON ({error})") from error
        if not isinstance(said, dict) or not isinstance(said.get(reading.text_key), str):
            raise ConfigError(f"{where} has no text under {reading.text_key!r}: {what(said)}; see --text-key")
        text, lone = re.subn("[\ud800-\udfff]", "\ufffd", said[reading.text_key])
        if lone:
            replaced(lone, chunk.file, where, reading, counts)
        data = text.encode()
        while len(data) > reading.longest:
            end = cut(data, reading.longest)
            yield data[:end].decode()
            data = data[end:]
        yield data.decode()


def what(said: object) -> str:
    """What a line of JSON holds instead of a text, in a few words."""
    if not isinstance(said, dict):
        return f"it is a {type(said).__name__}, not an object"
    return (
        f"it has {', '.join(f'{key!r} ({type(value).__name__})' for key, value in list(said.items())[:8]) or 'no keys'}"
    )


def decoded(data: bytes, file: str, where: str, reading: Reading, counts: Counts) -> str:
    """UTF-8 as text, without a byte order mark; what isn't UTF-8 becomes U+FFFD and is counted."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        replaced(len(data) - len(data.decode("utf-8", "ignore").encode()), file, where, reading, counts)
        return data.decode("utf-8", "replace").removeprefix("\ufeff")


def replaced(count: int, file: str, where: str, reading: Reading, counts: Counts) -> None:
    """Count bytes that were replaced, or refuse them."""
    if reading.strict:
        raise ConfigError(
            f"{where} is not UTF-8; convert it, exclude it, or leave out --strict to have U+FFFD in its place"
        )
    counts.replaced[file] += count
