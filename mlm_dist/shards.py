"""What is inside a shard: write it, read it.

A shard is a WebDataset tar. A record is two members, `NNNNNNNN.bin` (the token ids of several whole documents, no
special ids) and `NNNNNNNN.len` (their lengths, uint32). Tars of text hold what their owner put there (`samples`);
`read_records` gives the records of both.
"""

import io
import itertools
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

# Turns off webdataset's own pickle, torch and pipe: readers, none of which is reached from here.
os.environ.setdefault("WDS_SECURE", "1")

import webdataset as wds
from webdataset.tariterators import group_by_keys, tar_file_expander

from mlm_dist.manifest import DTYPES, RECORDS, Manifest, ShardError, ShardInfo, dtype_for, sha256_of, write_manifest
from mlm_dist.samples import BLOCK, blocks, read_documents
from mlm_dist.vocab import Vocab

LENGTHS = np.dtype("<u4")
READ_AHEAD = 16  # records fetched from the file at once

# A member's header, but for its name, size and checksum: mode 0644, no owners, no time, a regular file.
OWNERS, MTIME = b"0000644\0" + 2 * b"0000000\0", b"00000000000\0"
REST = (b"0" + bytes(100) + b"ustar\0" + b"00").ljust(BLOCK - 156, b"\0")
CONSTANT_SUM = sum(OWNERS + MTIME + REST) + 8 * ord(" ")  # the checksum's own field counts as spaces


class Record(NamedTuple):
    """Several whole documents. tokens: (tokens,) uint16 or uint32; lengths: (documents,) uint32, summing to tokens."""

    tokens: np.ndarray
    lengths: np.ndarray


# ---- writing


class ShardWriter:
    """Writes one shard, `NNNNNN.tar`, through webdataset: the same records give the same bytes.

    After the `with` block `info` and `records` say what was written, for `write_manifest`. The file is then on disk.
    """

    def __init__(self, split_dir: str | Path, number: int, dtype: str) -> None:
        self.path = Path(split_dir) / f"{number:06d}.tar"
        self.dtype = DTYPES[dtype]
        self.rows: list[tuple[int, int, int, int, int]] = []
        self.number, self.offset = number, 0
        self.file = self.path.open("wb")
        # Names, owners and times that depend on nothing but the records.
        limits = {"maxcount": 2**62, "maxsize": 2**62, "start_shard": number}
        plain = {"encoder": False, "user": "", "group": "", "mode": 0o644, "mtime": 0}
        self.writer = wds.ShardWriter("%06d.tar", opener=lambda _: self.file, verbose=0, **limits, **plain)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.writer.close()
                self.file.flush()
                os.fsync(self.file.fileno())
        finally:
            self.file.close()

    def write(self, record: Record) -> None:
        """Append one record. Documents must be non-empty; the ids must fit the dtype."""
        assert len(record.lengths) and record.lengths.min() > 0 and record.lengths.sum() == len(record.tokens)
        tokens = np.ascontiguousarray(record.tokens, dtype=self.dtype).tobytes()
        lengths = np.ascontiguousarray(record.lengths, dtype=LENGTHS).tobytes()
        crc = zlib.crc32(lengths, zlib.crc32(tokens))
        self.writer.write({"__key__": record_key(len(self.rows)), "bin": tokens, "len": lengths})
        self.rows.append((self.number, self.offset, len(record.lengths), len(record.tokens), crc))
        self.offset += 2 * BLOCK + blocks(len(tokens)) + blocks(len(lengths))

    @property
    def records(self) -> np.ndarray:
        """(samples,) RECORDS: the shard's part of records.npy."""
        return np.array(self.rows, dtype=RECORDS)

    @property
    def info(self) -> ShardInfo:
        """What the manifest says of the shard; `first_record` is set by `write_manifest`."""
        rows = self.records
        return ShardInfo(
            name=self.path.name,
            samples=len(rows),
            documents=int(rows["documents"].sum()),
            tokens=int(rows["tokens"].sum()),
            bytes=self.path.stat().st_size,
            sha256=sha256_of(self.path),
            first_record=0,
        )


def write_split(
    split_dir: str | Path, shards: Iterable[Iterable[Record]], vocab_size: int, tokenizer_sha256: str
) -> Manifest:
    """Write a whole split in one call, a shard for each inner iterable of records."""
    split_dir = Path(split_dir)
    split_dir.mkdir(parents=True, exist_ok=True)
    written = []
    for number, records in enumerate(shards):
        with ShardWriter(split_dir, number, dtype_for(vocab_size)) as writer:
            for record in records:
                writer.write(record)
        written.append((writer.info, writer.records))
    return write_manifest(split_dir, written, vocab_size, tokenizer_sha256, {})


def record_key(index: int) -> str:
    """The WebDataset key of the shard's record number `index`."""
    return f"{index:08d}"


# ---- reading


def read_records(
    manifest: Manifest, shard: int, first: int = 0, count: int | None = None, vocab: Vocab | None = None
) -> Iterator[Record]:
    """The records `first` ... `first + count - 1` of a shard, in order, without reading what comes before them.

    Every record's key, members, counts and crc32 are checked. The arrays are read-only views. Shards of text are
    tokenized here, with `vocab`, which must be that of the manifest.
    Raises ShardError at the first thing that is not as the manifest says.
    """
    info = manifest.shards[shard]
    count = info.samples - first if count is None else count
    assert 0 <= first and 0 <= count and first + count <= info.samples
    path = manifest.place(info.name)
    rows = manifest.records[info.first_record : info.first_record + info.samples]
    dtype = DTYPES[manifest.dtype]
    try:
        with manifest.open(shard) as file:
            if manifest.text:
                assert vocab is not None and vocab.fingerprint == manifest.tokenizer_sha256
                for found in read_documents(path, file, rows, first, count, info.bytes, manifest.text, vocab):
                    lengths = np.array([len(ids) for ids in found], LENGTHS)
                    yield Record(np.fromiter(itertools.chain.from_iterable(found), dtype, int(lengths.sum())), lengths)
                return
            for start in range(first, first + count, READ_AHEAD):
                stop = min(start + READ_AHEAD, first + count)
                data = read_range(path, file, rows, start, stop, dtype)
                yield from decode(path, data, rows[start:stop], start, dtype)
    except OSError as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        raise ShardError(path, f"can't be read ({error.strerror or error})", reason) from error


def read_range(path: str, file: BinaryIO, rows: np.ndarray, start: int, stop: int, dtype: np.dtype) -> bytes:
    """The bytes of the tar that hold the records `start` ... `stop - 1`."""
    last = rows[stop - 1]
    begin = int(rows[start]["offset"])
    size = blocks(int(last["tokens"]) * dtype.itemsize) + blocks(int(last["documents"]) * LENGTHS.itemsize)
    end = int(last["offset"]) + 2 * BLOCK + size
    file.seek(begin)
    data = file.read(end - begin)
    if len(data) < end - begin:
        size = os.fstat(file.fileno()).st_size
        problem = f"is cut short at byte {size}, record {start} to {stop - 1} end at {end}"
        raise ShardError(path, problem, "truncated" if size else "empty")
    return data


def decode(path: str, data: bytes, rows: np.ndarray, start: int, dtype: np.dtype) -> Iterator[Record]:
    """The records in a stretch of tar; `rows` say what they must be, `start` is the number of the first.

    Headers that are to the byte those that ShardWriter writes need no parsing. Whatever differs, be it damage or a tar
    from another writer, webdataset reads.
    """
    records = decode_as_written(data, rows, start, dtype)
    return iter(records) if records is not None else decode_any(path, data, rows, start, dtype)


def decode_as_written(data: bytes, rows: np.ndarray, start: int, dtype: np.dtype) -> list[Record] | None:
    """The records in a stretch of tar, or None unless all are there, written by ShardWriter and undamaged."""
    records = []
    at = 0
    for index, (_, _, documents, tokens, crc) in enumerate(rows.tolist(), start):
        sizes = tokens * dtype.itemsize, documents * LENGTHS.itemsize
        first, second = at + BLOCK, at + 2 * BLOCK + blocks(sizes[0])
        key = record_key(index).encode()
        named = data.startswith(header(key + b".bin", sizes[0]), at)
        if not named or not data.startswith(header(key + b".len", sizes[1]), second - BLOCK):
            return None
        at = second + blocks(sizes[1])
        if at > len(data):
            return None
        ids = np.frombuffer(data, dtype, tokens, first)
        lengths = np.frombuffer(data, LENGTHS, documents, second)
        if zlib.crc32(lengths, zlib.crc32(ids)) != crc or np.add.reduce(lengths, dtype=np.int64) != tokens:
            return None
        records.append(Record(ids, lengths))
    return records


def header(name: bytes, size: int) -> bytes:
    """The tar header that ShardWriter gives a member (the ustar format of POSIX.1-1988)."""
    octal = b"%011o\0" % size
    checksum = b"%06o\0 " % (CONSTANT_SUM + sum(name) + sum(octal))
    return b"".join((name.ljust(100, b"\0"), OWNERS, octal, MTIME, checksum, REST))


def decode_any(path: str, data: bytes, rows: np.ndarray, start: int, dtype: np.dtype) -> Iterator[Record]:
    """The records in a stretch of tar, read by webdataset; raises ShardError at the first that is not as `rows` say."""
    source = [{"url": path, "stream": io.BytesIO(data)}]
    samples = group_by_keys(tar_file_expander(source), lcase=False)
    for index, (_, _, documents, tokens, crc) in enumerate(rows.tolist(), start):
        try:
            sample = next(samples, None)
        except ValueError as error:  # webdataset's, of a member that comes twice
            raise ShardError(path, f"record {index} is damaged ({error})", "malformed") from error
        except (tarfile.TarError, EOFError) as error:
            raise ShardError(path, f"record {index} is damaged ({error})", "altered") from error
        if sample is None:
            # where records follow, tarfile takes a header whose checksum is wrong for the end
            reason = "altered" if index or any(data[:BLOCK]) else "empty"
            raise ShardError(path, f"record {index} is missing: found the end of the tar in its place", reason)
        if sample["__key__"] != record_key(index):
            raise ShardError(path, f"record {index} is missing: found {sample['__key__']!r} in its place", "malformed")
        # Only the two members of our own are looked at, as raw numbers; nothing else is ever decoded.
        foreign = sample.keys() - {"__key__", "__url__", "bin", "len"}
        if foreign or "bin" not in sample or "len" not in sample:
            what = f"has the unexpected member {sorted(foreign)[0]!r}" if foreign else "lacks its .bin or .len"
            raise ShardError(path, f"record {index} {what}", "foreign_member" if foreign else "malformed")
        if zlib.crc32(sample["len"], zlib.crc32(sample["bin"])) != crc:
            raise ShardError(path, f"record {index} fails its crc32", "altered")
        record = Record(np.frombuffer(sample["bin"], dtype), np.frombuffer(sample["len"], LENGTHS))
        if len(record.tokens) != tokens or len(record.lengths) != documents or record.lengths.sum() != tokens:
            problem = f"record {index} doesn't hold its {documents} documents and {tokens} tokens"
            raise ShardError(path, problem, "malformed")
        yield record
