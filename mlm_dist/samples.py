"""Text in ordinary WebDataset tars: members, samples, and the text of each.

A sample is the consecutive members with the same key: the path up to the first dot of its last part. Its text is in
its .txt, or under a key of the object in its .json; other members are passed over, never read. Headers are parsed here
because `tarfile` takes a damaged one for the end of the tar, and what follows is lost without a word.
"""

import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlm_dist.manifest import ShardError, TextContent
from mlm_dist.vocab import Vocab

# One thread a process: there are loader workers enough, and a process whose tokenizer has threads can't be forked.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BLOCK = 512  # a tar member is a header of one block, then its bytes in whole blocks
LONG_NAME, PAX, PAX_GLOBAL = b"L", (b"x", b"X"), b"g"
SAID_AHEAD = (LONG_NAME, b"K", *PAX, PAX_GLOBAL)  # these hold what does not fit into the header behind them
MOST_SAID_AHEAD = 1 << 20  # bytes
GZIP = b"\x1f\x8b"


class Member(NamedTuple):
    """A file in a tar. offset: of its header, or of what is said ahead of that; data: of its bytes."""

    name: str
    offset: int
    data: int
    size: int


class Sample(NamedTuple):
    """offset: of its first member; extensions: of its members, in lower case; data: of the text's, none if it lacks."""

    key: str
    offset: int
    extensions: frozenset[str]
    data: bytes | None


# ---- the tar


def members(path: Path, file: io.BufferedReader, begin: int, end: int, last: bool) -> Iterator[Member]:
    """The regular files whose headers lie in the bytes `begin` ... `end - 1`; `last`: the tar must end there.

    Raises ShardError for anything that is not a whole tar.
    """
    size = file.seek(0, io.SEEK_END)
    start = offset = begin
    ahead: dict[str, str] = {}
    while offset < end:
        header = read(path, file, offset, BLOCK)
        if header == bytes(BLOCK):
            ends(path, file, offset, end)
            return
        info = parsed(path, header, offset)
        if info.type in SAID_AHEAD:
            if info.size > MOST_SAID_AHEAD:
                raise ShardError(
                    path, f"has a damaged header at byte {offset} (a name of {info.size:,} bytes)", "altered"
                )
            ahead |= said_ahead(path, info.type, read(path, file, offset + BLOCK, info.size), offset)
            offset += BLOCK + blocks(info.size)
            continue
        if info.type == tarfile.GNUTYPE_SPARSE or any(name.startswith("GNU.sparse") for name in ahead):
            raise ShardError(
                path, f"holds a sparse file at byte {offset}, which isn't read: pack it without --sparse", "malformed"
            )
        length = int(ahead.get("size", info.size))
        held = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        following = offset + BLOCK + (blocks(length) if held else 0)
        if following > size:
            raise ShardError(path, f"is cut short at byte {size:,}: a member ends at {following:,}", "truncated")
        if info.isreg():
            yield Member(ahead.get("path", info.name), start, offset + BLOCK, length)
        start = offset = following
        ahead = {}
    if last:
        raise ShardError(
            path, f"is cut short at byte {offset:,}: a tar's end is marked, and this one's isn't", "truncated"
        )


def read(path: Path, file: io.BufferedReader, offset: int, size: int) -> bytes:
    """`size` bytes at `offset`, all of them."""
    if file.tell() != offset:
        file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise ShardError(path, f"is cut short at byte {offset + len(data):,}", "truncated")
    return data


def parsed(path: Path, header: bytes, offset: int) -> tarfile.TarInfo:
    """A header, its checksum compared."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        if offset == 0 and header.startswith(GZIP):
            raise ShardError(
                path, "is compressed, and there is no seeking in it: unpack it with gunzip", "malformed"
            ) from error
        raise ShardError(path, f"has a damaged header at byte {offset:,} ({error})", "altered") from error
    if info.size < 0:
        raise ShardError(path, f"has a damaged header at byte {offset:,} (a size of {info.size})", "altered")
    return info


def said_ahead(path: Path, kind: bytes, data: bytes, offset: int) -> dict[str, str]:
    """The name, size and so on of the file behind, from a GNU long name or from pax records, `LENGTH KEY=VALUE\\n`."""
    if kind == LONG_NAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    said = {}
    while kind in PAX and data and data[:1] != b"\0":
        record = re.match(rb"([1-9][0-9]{0,6}) ([^=]+)=", data)
        length = int(record[1]) if record else 0
        if record is None or length <= record.end() or data[length - 1 : length] != b"\n":
            raise ShardError(path, f"has a damaged header at byte {offset:,} (no pax records)", "altered")
        said[record[2].decode("utf-8", "replace")] = data[record.end() : length - 1].decode("utf-8", "surrogateescape")
        data = data[length:]
    if not re.fullmatch("[0-9]{1,18}", said.get("size", "0")):
        raise ShardError(path, f"has a damaged header at byte {offset:,} (a size of {said['size']!r})", "altered")
    return said


def ends(path: Path, file: io.BufferedReader, offset: int, end: int) -> None:
    """Raise ShardError where anything stands behind the end of a tar, which others would not read."""
    at = offset
    while at < end:
        data = read(path, file, at, min(1 << 20, end - at))
        if data.strip(b"\0"):
            raise ShardError(
                path, f"ends at byte {offset:,} and holds more behind: zeroed, or two tars in one file", "malformed"
            )
        at += len(data)


def blocks(size: int) -> int:
    """`size` bytes rounded up to whole tar blocks."""
    return -(-size // BLOCK) * BLOCK


# ---- samples


def samples(path: Path, file: io.BufferedReader, begin: int, end: int, last: bool, member: str) -> Iterator[Sample]:
    """The samples that begin in a stretch of a tar, with the bytes of their `member`; arguments as for `members`.

    Raises ShardError for damage, for a member that comes twice, and for a name that leads out of its folder.
    """
    key, offset, data = "", begin, None
    extensions: set[str] = set()
    for found in members(path, file, begin, end, last):
        if found.name.startswith("/") or ".." in found.name.split("/"):
            raise ShardError(
                path, f"names a member {found.name!r}, which leads out of its folder: such a tar is no data"
            )
        stem, extension = split_name(found.name)
        if not stem:
            continue
        if stem != key:
            if key:
                yield Sample(key, offset, frozenset(extensions), data)
            key, offset, data = stem, found.offset, None
            extensions = set()
        if extension in extensions:
            raise ShardError(path, f"sample {key!r} has two members {extension!r}", "malformed")
        extensions.add(extension)
        if extension == member:
            data = read(path, file, found.data, found.size)
    if key:
        yield Sample(key, offset, frozenset(extensions), data)


def split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member; ("", "") for one that belongs to no sample, as webdataset has it."""
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    if not stem or not dot or re.match(r"__[^/]*__(/|$)", name):
        return "", ""
    return folder + slash + stem, extension.lower()


def text_of(data: bytes, content: TextContent) -> tuple[str, int]:
    """(text, characters that became U+FFFD) of a .txt or .json. Raises ValueError for a .json without the text."""
    text, replaced = utf8(data)
    if content.member == "json":
        try:
            said = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not JSON ({error})") from error
        if not isinstance(said, dict) or not isinstance(said.get(content.text_key), str):
            raise ValueError(f"has no text under {content.text_key!r}: {what(said)}; see --text-key")
        # \ud800 and its like: half a character, which JSON can spell and UTF-8 can't
        text, lone = re.subn("[\ud800-\udfff]", "\ufffd", said[content.text_key])
        replaced += lone
    return text, replaced


def utf8(data: bytes) -> tuple[str, int]:
    """(text without a byte order mark, bytes that are not UTF-8 and became U+FFFD)."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff"), 0
    except UnicodeDecodeError:
        bad = len(data) - len(data.decode("utf-8", "ignore").encode())
        return data.decode("utf-8", "replace").removeprefix("\ufeff"), bad


def what(said: object) -> str:
    """What a .json holds, in a few words."""
    if not isinstance(said, dict):
        return f"it is a {type(said).__name__}, not an object"
    return (
        f"it has {', '.join(f'{key!r} ({type(value).__name__})' for key, value in list(said.items())[:8]) or 'no keys'}"
    )


def encode(vocab: Vocab, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text; none for white space alone, which is no document."""
    return [ids if text.strip() else [] for text, ids in zip(texts, vocab.encode_batch(texts), strict=True)]


# ---- records


def read_documents(
    path: Path,
    file: io.BufferedReader,
    rows: np.ndarray,
    first: int,
    count: int,
    size: int,
    content: TextContent,
    vocab: Vocab,
) -> Iterator[list[list[int]]]:
    """The documents of the records `first` ... `first + count - 1` of a shard, as token ids.

    rows: the shard's part of records.npy; size: bytes of the shard. Every header's checksum, the texts' crc32 and the
    counts are checked: raises ShardError at the first thing that is not as the manifest says.
    """
    for index in range(first, first + count):
        _, begin, documents, tokens, expected = rows[index].tolist()
        last = index + 1 == len(rows)
        end = size if last else int(rows[index + 1]["offset"])
        crc, texts = 0, []
        for sample in samples(path, file, begin, end, last, content.member):
            if sample.data is None:
                raise ShardError(path, f"record {index}: sample {sample.key!r} has no .{content.member}", "malformed")
            crc = zlib.crc32(sample.data, crc)
            try:
                texts.append(text_of(sample.data, content)[0])
            except ValueError as error:
                raise ShardError(
                    path, f"record {index}: the .json of sample {sample.key!r} {error}", "malformed"
                ) from error
        if crc != expected:
            raise ShardError(path, f"record {index} fails its crc32", "altered")
        found = [ids for ids in encode(vocab, texts) if ids]
        if (len(found), sum(map(len, found))) != (documents, tokens):
            raise ShardError(
                f"{path}: record {index} gives {len(found)} documents of {sum(map(len, found))} tokens, not "
                f"{documents} of {tokens}: the text is whole, so another version of tokenizers cuts it; write the "
                "manifest again"
            )
        yield found
