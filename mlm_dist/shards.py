"""What is inside a shard: write it, read it, and the manifest that says what must be there.

A split is a folder of WebDataset tars. A record is two members, `NNNNNNNN.bin` (the token ids of several whole
documents, no special ids) and `NNNNNNNN.len` (their lengths, uint32). `records.npy` holds the place, the counts and the
crc32 of every record; `manifest.json`, written last, holds the counts and the sha256 of every file.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Turns off webdataset's own pickle, torch and pipe: readers, none of which is reached from here.
os.environ.setdefault("WDS_SECURE", "1")

import webdataset as wds
from webdataset.tariterators import group_by_keys, tar_file_expander

from mlm_dist.schema import ConfigError

FORMAT = 1
RECORDS = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("documents", "<u4"), ("tokens", "<u8"), ("crc32", "<u4")])
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
LENGTHS = np.dtype("<u4")
BLOCK = 512  # a tar member is a header of one block, then its bytes in whole blocks
READ_AHEAD = 16  # records fetched from the file at once
REBUILD = (
    "copy this file again from where the shards were built, rebuild them with shards/build.py, "
    "or let training skip bad shards with data.max_bad_shards"
)


class ShardError(RuntimeError):
    """A shard that is not what its manifest says: `ShardError(file, what is wrong)`, or a whole sentence."""

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}; {REBUILD}" if len(self.args) == 2 else str(self.args[0])


class Record(NamedTuple):
    """Several whole documents. tokens: (tokens,) uint16 or uint32; lengths: (documents,) uint32, summing to tokens."""

    tokens: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class ShardInfo:
    """One tar of a split. samples: its records; bytes: of the file; first_record: its first row of records.npy."""

    name: str
    samples: int
    documents: int
    tokens: int
    bytes: int
    sha256: str
    first_record: int


@dataclass(frozen=True)
class Manifest:
    """A split of the shards: what every file must hold. `hash` is the sha256 of manifest.json's bytes."""

    path: Path
    shards: tuple[ShardInfo, ...]
    dtype: str
    vocab_size: int
    tokenizer_sha256: str
    hash: str
    records: np.ndarray = field(compare=False, repr=False)  # (samples,) RECORDS, memory mapped
    about: dict[str, Any] = field(compare=False, repr=False)  # how it was built: versions, counts

    def __reduce__(self) -> tuple[Callable[[Path], "Manifest"], tuple[Path]]:
        return load_manifest, (self.path,)  # so that a worker process maps records.npy instead of copying it

    @property
    def samples(self) -> int:
        return len(self.records)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


# ---- writing


def dtype_for(vocab_size: int) -> str:
    """The name of the smallest stored type that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


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


def write_manifest(
    split_dir: str | Path,
    written: Sequence[tuple[ShardInfo, np.ndarray]],
    vocab_size: int,
    tokenizer_sha256: str,
    about: Mapping[str, Any],
) -> Manifest:
    """Write records.npy and then manifest.json, atomically: from here on the split is whole.

    written: `(info, records)` of every shard, shard 0 first; about: how it was built, kept for the reader.
    """
    split_dir = Path(split_dir)
    shards = []
    first = 0
    for number, (info, rows) in enumerate(written):
        assert info.name == f"{number:06d}.tar" and len(rows) == info.samples and (rows["shard"] == number).all()
        shards.append(asdict(info) | {"first_record": first})
        first += info.samples
    records = io.BytesIO()
    np.save(records, np.concatenate([np.zeros(0, RECORDS), *(rows for _, rows in written)]), allow_pickle=False)
    replace_file(split_dir / "records.npy", records.getvalue())
    manifest = {
        "format": FORMAT,
        "dtype": dtype_for(vocab_size),
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_sha256,
        "records_sha256": hashlib.sha256(records.getvalue()).hexdigest(),
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "about": dict(about),
        "shards": shards,
    }
    replace_file(split_dir / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    return load_manifest(split_dir)


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


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader, or a crash, meets the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def record_key(index: int) -> str:
    """The WebDataset key of the shard's record number `index`."""
    return f"{index:08d}"


def blocks(size: int) -> int:
    """`size` bytes rounded up to whole tar blocks."""
    return -(-size // BLOCK) * BLOCK


# ---- reading


def load_manifest(split_dir: str | Path) -> Manifest:
    """The manifest of a split (OUT/train, OUT/valid). Raises ConfigError for a folder that is not a whole split."""
    split_dir = Path(split_dir)
    file = split_dir / "manifest.json"
    if re.match(r"\w[\w+.-]*:", str(split_dir)) and not split_dir.exists():
        raise ConfigError(
            f"shards are read from a local folder, not from {str(split_dir)!r}; copy them, give the folder"
        )
    if (split_dir / "train" / "manifest.json").exists():
        raise ConfigError(f"{split_dir} holds several splits; give {split_dir / 'train'} or {split_dir / 'valid'}")
    if not file.exists():
        state = "is a build that did not finish: it has no manifest.json" if split_dir.is_dir() else "doesn't exist"
        raise ConfigError(f"{split_dir} {state}; build it with `python shards/build.py --input TEXT --out FOLDER`")
    raw = file.read_bytes()
    try:
        said = json.loads(raw)
        if said["format"] != FORMAT:
            raise ConfigError(f"{file} is of format {said['format']}, this version reads {FORMAT}; rebuild the shards")
        shards = tuple(ShardInfo(**shard) for shard in said["shards"])
        manifest = Manifest(
            path=split_dir,
            shards=shards,
            dtype=said["dtype"],
            vocab_size=said["vocab_size"],
            tokenizer_sha256=said["tokenizer_sha256"],
            hash=hashlib.sha256(raw).hexdigest(),
            records=load_records(split_dir / "records.npy", said["records_sha256"]),
            about=said["about"],
        )
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is damaged ({error!r}); copy it again or rebuild the shards") from error
    check(manifest)
    return manifest


def load_records(file: Path, sha256: str) -> np.ndarray:
    """records.npy, memory mapped. Raises ConfigError where it is missing or altered."""
    if not file.exists():
        raise ConfigError(f"{file} is missing; copy it again or rebuild the shards")
    if sha256_of(file) != sha256:
        raise ConfigError(f"{file} is not the file its manifest was written for; copy it again or rebuild the shards")
    records = np.load(file, mmap_mode="r", allow_pickle=False)
    if records.dtype != RECORDS:
        raise ConfigError(f"{file} has columns {records.dtype}, expected {RECORDS}; rebuild the shards")
    return records


def check(manifest: Manifest) -> None:
    """Raises ConfigError where a manifest contradicts itself or names a file outside its folder."""
    first = 0
    wrong = "" if manifest.dtype in DTYPES else f"dtype {manifest.dtype!r}"
    for number, shard in enumerate(manifest.shards):
        rows = manifest.records[first : first + shard.samples]
        counts = (shard.first_record, len(rows), int(rows["documents"].sum()), int(rows["tokens"].sum()))
        if shard.name != f"{number:06d}.tar":
            wrong = f"shard {number} is named {shard.name!r}"
        elif counts != (first, shard.samples, shard.documents, shard.tokens) or (rows["shard"] != number).any():
            wrong = f"{shard.name} and records.npy count differently"
        first += shard.samples
    if first != len(manifest.records):
        wrong = f"{first} records in the shards, {len(manifest.records)} in records.npy"
    if wrong:
        raise ConfigError(f"{manifest.path / 'manifest.json'} contradicts itself: {wrong}; rebuild the shards")


def read_records(manifest: Manifest, shard: int, first: int = 0, count: int | None = None) -> Iterator[Record]:
    """The records `first` ... `first + count - 1` of a shard, in order, without reading what comes before them.

    webdataset reads the tar from the first record's offset; every record's key, members, counts and crc32 are checked.
    The arrays are read-only views. Raises ShardError at the first thing that is not as the manifest says.
    """
    info = manifest.shards[shard]
    count = info.samples - first if count is None else count
    assert 0 <= first and 0 <= count and first + count <= info.samples
    path = manifest.path / info.name
    rows = manifest.records[info.first_record : info.first_record + info.samples]
    dtype = DTYPES[manifest.dtype]
    try:
        with path.open("rb") as file:
            for start in range(first, first + count, READ_AHEAD):
                stop = min(start + READ_AHEAD, first + count)
                data = read_range(path, file, rows, start, stop, dtype)
                yield from decode(path, data, rows[start:stop], start, dtype)
    except OSError as error:
        raise ShardError(path, f"can't be read ({error.strerror or error})") from error


def read_range(path: Path, file: io.BufferedReader, rows: np.ndarray, start: int, stop: int, dtype: np.dtype) -> bytes:
    """The bytes of the tar that hold the records `start` ... `stop - 1`."""
    last = rows[stop - 1]
    begin = int(rows[start]["offset"])
    size = blocks(int(last["tokens"]) * dtype.itemsize) + blocks(int(last["documents"]) * LENGTHS.itemsize)
    end = int(last["offset"]) + 2 * BLOCK + size
    file.seek(begin)
    data = file.read(end - begin)
    if len(data) < end - begin:
        raise ShardError(path, f"is cut short at byte {begin + len(data)}, record {start} to {stop - 1} end at {end}")
    return data


def decode(path: Path, data: bytes, rows: np.ndarray, start: int, dtype: np.dtype) -> Iterator[Record]:
    """The records in a stretch of tar; `rows` say what they must be, `start` is the number of the first."""
    source = [{"url": str(path), "stream": io.BytesIO(data)}]
    samples = group_by_keys(tar_file_expander(source), lcase=False)
    for index, (_, _, documents, tokens, crc) in enumerate(rows.tolist(), start):
        try:
            sample = next(samples, None)
        except (tarfile.TarError, ValueError, EOFError) as error:
            raise ShardError(path, f"record {index} is damaged ({error})") from error
        if sample is None or sample["__key__"] != record_key(index):
            found = "the end of the tar" if sample is None else repr(sample["__key__"])
            raise ShardError(path, f"record {index} is missing: found {found} in its place")
        # Only the two members of our own are looked at, as raw numbers; nothing else is ever decoded.
        foreign = sample.keys() - {"__key__", "__url__", "bin", "len"}
        if foreign or "bin" not in sample or "len" not in sample:
            what = f"has the unexpected member {sorted(foreign)[0]!r}" if foreign else "lacks its .bin or .len"
            raise ShardError(path, f"record {index} {what}")
        if zlib.crc32(sample["len"], zlib.crc32(sample["bin"])) != crc:
            raise ShardError(path, f"record {index} fails its crc32")
        record = Record(np.frombuffer(sample["bin"], dtype), np.frombuffer(sample["len"], LENGTHS))
        if len(record.tokens) != tokens or len(record.lengths) != documents or record.lengths.sum() != tokens:
            raise ShardError(path, f"record {index} doesn't hold its {documents} documents and {tokens} tokens")
        yield record


def verify(manifest: Manifest) -> list[str]:
    """What is wrong with the shards' files, one sentence each: every size and sha256 compared. Empty if all is well."""
    problems = []
    for shard in manifest.shards:
        path = manifest.path / shard.name
        if not path.exists():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != shard.bytes:
            problems.append(f"{path} has {path.stat().st_size:,} bytes, the manifest says {shard.bytes:,}")
        elif sha256_of(path) != shard.sha256:
            problems.append(f"{path} is altered: its sha256 is not the manifest's")
    return problems


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
