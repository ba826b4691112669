"""The documents of build.py's inputs: cut files into batches of whole lines, and read documents out of a batch.

The cutting is done by one process, quickly; a batch is parsed by whichever worker process gets it.
"""

import contextlib
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard

from mlm_dist.samples import utf8, what
from mlm_dist.schema import ConfigError
from shards.files import HTML, JSON_LINES, PARQUET, Piece, packing, plain_suffix
from shards.markup import html_text

BATCH_BYTES = 1 << 20
LONGEST_LINE = 256 << 20  # of a .jsonl; a longer one is no line but a file of another kind
LONGEST_PAGE = 64 << 20  # of an .html, which is parsed as a whole
ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` needs
READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Chunk:
    """A stretch of one file: one document, whole lines of a .jsonl, or rows of a .parquet.

    line: number of the first line or row, lines counted from byte `origin` of the file; lengths: bytes of each row.
    """

    file: str
    line: int
    data: bytes
    origin: int = 0
    lengths: tuple[int, ...] = ()


class Cursor(NamedTuple):
    """How far the inputs have been read: pieces that are done, and chunks of the piece after them."""

    piece: int
    chunks: int


BEGINNING = Cursor(0, 0)


@dataclass(frozen=True)
class Batch:
    """What one worker parses at a time: wholly of held-out inputs, or not at all.

    position: bytes of all inputs read so far, as they lie on the disk; end: where the next batch begins.
    """

    chunks: list[Chunk]
    held_out: bool
    position: int
    end: Cursor


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


# ---- cutting


def batches(pieces: Sequence[Piece], reading: Reading, start: Cursor = BEGINNING) -> Iterator[Batch]:
    """The pieces from `start` on in batches of about 1 MiB, the same ones wherever a batch before them ended."""
    chunks: list[Chunk] = []
    size = 0
    before = sum(piece.size for piece in pieces[: start.piece])
    for number, piece in enumerate(pieces[start.piece :], start.piece):
        if chunks and piece.held_out != pieces[number - 1].held_out:
            yield Batch(chunks, pieces[number - 1].held_out, before, Cursor(number, 0))
            chunks, size = [], 0
        with piece.file.open("rb") as raw:
            for count, chunk in enumerate(read_chunks(piece, raw, reading), 1):
                if number == start.piece and count <= start.chunks:
                    continue
                chunks.append(chunk)
                size += len(chunk.data)
                if size >= BATCH_BYTES:
                    read = min(max(raw.tell() - piece.start, 0), piece.size)
                    yield Batch(chunks, piece.held_out, before + read, Cursor(number, count))
                    chunks, size = [], 0
        before += piece.size
    if chunks:
        yield Batch(chunks, pieces[-1].held_out, before, Cursor(len(pieces), 0))


def read_chunks(piece: Piece, raw: BinaryIO, reading: Reading) -> Iterator[Chunk]:
    """One piece's chunks. Raises ConfigError for a damaged file and for a .jsonl that has no lines."""
    file, kind = piece.file, plain_suffix(piece.file)
    with unpacked(file, raw) as stream:
        if kind == PARQUET:
            yield from row_chunks(piece, raw, reading)
        elif kind == JSON_LINES:
            yield from line_chunks(piece, stream)
        elif kind in HTML:
            yield page_chunk(file, stream)
        else:
            yield from text_chunks(file, stream, reading.longest)


@contextlib.contextmanager
def unpacked(file: Path, raw: BinaryIO) -> Iterator[BinaryIO]:
    """The file's bytes without its compression. Raises ConfigError where they turn out to be damaged."""
    how = packing(file)
    try:
        if how == ".gz":
            yield io.BufferedReader(gzip.GzipFile(fileobj=raw), BATCH_BYTES)
        elif how == ".zst":
            yield io.BufferedReader(ZstdFile(raw), BATCH_BYTES)
        else:
            yield raw
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ConfigError(f"{file} is not a whole {'gzip' if how == '.gz' else 'zstd'} file ({error})") from error


class ZstdFile(io.RawIOBase):
    """Decompresses frame after frame; a file that ends inside one raises EOFError, where zstandard's own stops."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        self.frame: zstandard.ZstdDecompressionObj | None = None
        self.packed, self.ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        """As in io.RawIOBase: 0 at the end of the file."""
        while not self.ready:
            self.packed = self.packed or self.raw.read(READ_BYTES)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            self.ready = memoryview(self.frame.decompress(self.packed))
            self.packed = self.frame.unused_data if self.frame.eof else b""
            self.frame = None if self.frame.eof else self.frame
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count


def text_chunks(file: Path, stream: BinaryIO, longest: int) -> Iterator[Chunk]:
    """A text file as one document, or as several of at most `longest` bytes."""
    buffer = b""
    while buffer := buffer + stream.read(longest + 1 - len(buffer)):
        end = cut(buffer, longest)
        yield Chunk(str(file), 0, buffer[:end])
        buffer = buffer[end:]


def page_chunk(file: Path, stream: BinaryIO) -> Chunk:
    """An .html as one chunk: it is cut when it is text."""
    data = stream.read(LONGEST_PAGE + 1)
    if len(data) > LONGEST_PAGE:
        raise ConfigError(f"{file} is longer than {LONGEST_PAGE >> 20} MiB: is it really a page? Split or --exclude it")
    return Chunk(str(file), 0, data)


def line_chunks(piece: Piece, stream: BinaryIO) -> Iterator[Chunk]:
    """A .jsonl, or the lines that begin in a piece of one, in stretches of whole lines, about 1 MiB each."""
    file, place = piece.file, piece.start
    if place:  # to the end of the line that the piece before this one has begun
        stream.seek(place - 1)
        place += len(read_line(file, stream, place - 1, 1)) - 1
    origin, first, size = place, 1, 0
    lines: list[bytes] = []
    while piece.stop is None or place < piece.stop:
        if not (line := read_line(file, stream, origin, first + len(lines))):
            break
        lines.append(line)
        place += len(line)
        size += len(line)
        if size >= BATCH_BYTES:
            yield Chunk(str(file), first, b"".join(lines), origin)
            first, lines, size = first + len(lines), [], 0
    if lines:
        yield Chunk(str(file), first, b"".join(lines), origin)


def read_line(file: Path, stream: BinaryIO, origin: int, number: int) -> bytes:
    """The next line with its end, empty at the end of the file. Raises ConfigError where it doesn't end."""
    line = stream.readline(LONGEST_LINE)
    if len(line) == LONGEST_LINE:
        name = where(Chunk(str(file), 0, b"", origin), number)
        raise ConfigError(f"{name} is longer than {LONGEST_LINE >> 20} MiB: is it really JSON lines?")
    return line


def row_chunks(piece: Piece, raw: BinaryIO, reading: Reading) -> Iterator[Chunk]:
    """A .parquet's texts in stretches of whole rows, about 1 MiB each."""
    from shards.parquet import rows  # pyarrow takes a second to import, and few builds need it

    texts: list[bytes] = []
    first, size = 0, 0
    for row, text in rows(piece.file, raw, reading.text_key, piece.start, piece.stop):
        first = first if texts else row
        texts.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield Chunk(str(piece.file), first, b"".join(texts), lengths=tuple(map(len, texts)))
            texts, size = [], 0
    if texts:
        yield Chunk(str(piece.file), first, b"".join(texts), lengths=tuple(map(len, texts)))


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
        kind = plain_suffix(Path(chunk.file))
        if kind == JSON_LINES:
            texts = json_texts(chunk, reading, counts)
        elif kind == PARQUET:
            texts = row_texts(chunk, reading, counts)
        elif kind in HTML:
            texts = pieces_of(html_text(decoded(chunk.data, chunk, 0, reading, counts)), reading.longest)
        else:
            texts = iter([decoded(chunk.data, chunk, 0, reading, counts)])
        for text in texts:
            if text.strip():
                yield text
            else:
                counts.empty += 1


def json_texts(chunk: Chunk, reading: Reading, counts: Counts) -> Iterator[str]:
    """The text of each line of a .jsonl, cut where it is too long."""
    for number, line in enumerate(chunk.data.split(b"\n"), chunk.line):
        text = decoded(line, chunk, number, reading, counts)
        if not text.strip():
            continue
        try:
            said = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where(chunk, number)} is not JSON ({error})") from error
        if not isinstance(said, dict) or not isinstance(said.get(reading.text_key), str):
            raise ConfigError(
                f"{where(chunk, number)} has no text under {reading.text_key!r}: {what(said)}; see --text-key"
            )
        text, lone = re.subn("[\ud800-\udfff]", "\ufffd", said[reading.text_key])
        if lone:
            replaced(lone, chunk, number, reading, counts)
        yield from pieces_of(text, reading.longest)


def row_texts(chunk: Chunk, reading: Reading, counts: Counts) -> Iterator[str]:
    """The text of each row of a .parquet, cut where it is too long."""
    at = 0
    for number, length in enumerate(chunk.lengths, chunk.line):
        yield from pieces_of(decoded(chunk.data[at : at + length], chunk, number, reading, counts), reading.longest)
        at += length


def pieces_of(text: str, longest: int) -> Iterator[str]:
    """A text, or several of at most `longest` bytes."""
    if len(text) * 4 <= longest:  # whatever its characters
        yield text
        return
    data = text.encode()
    while len(data) > longest:
        end = cut(data, longest)
        yield data[:end].decode()
        data = data[end:]
    yield data.decode()


def where(chunk: Chunk, number: int) -> str:
    """FILE:LINE of a chunk's line, FILE, row ROW, or FILE for number 0: for errors, since it may read the file."""
    if not number or chunk.lengths:
        return f"{chunk.file}, row {number}" if number else chunk.file
    with open(chunk.file, "rb") as file:
        left = chunk.origin
        while left and (data := file.read(min(left, BATCH_BYTES))):
            left -= len(data)
            number += data.count(b"\n")
    return f"{chunk.file}:{number}"


def decoded(data: bytes, chunk: Chunk, number: int, reading: Reading, counts: Counts) -> str:
    """UTF-8 as text, without a byte order mark; what isn't UTF-8 becomes U+FFFD and is counted."""
    text, bad = utf8(data)
    if bad:
        replaced(bad, chunk, number, reading, counts)
    return text


def replaced(count: int, chunk: Chunk, number: int, reading: Reading, counts: Counts) -> None:
    """Count bytes that were replaced, or refuse them."""
    if reading.strict:
        raise ConfigError(
            f"{where(chunk, number)} is not UTF-8; convert it, exclude it, or leave out --strict to have U+FFFD in its "
            "place"
        )
    counts.replaced[chunk.file] += count
