"""Runs: the documents of a build between their tokenizing and their shard, in files that are whole or not there.

A run holds the documents of some 256 MiB of tokens, sorted by bucket, and says how far in the inputs it reaches. A
build that was killed goes on behind its last run; a merge reads a bucket out of all runs.
"""

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from mlm_dist.manifest import DTYPES, sync_folder
from mlm_dist.schema import ConfigError
from mlm_dist.shards import LENGTHS
from shards.texts import BEGINNING, Counts, Cursor

KEYS = np.dtype("<u8")
INDEX = np.dtype([("documents", "<u8"), ("tokens", "<u8"), ("crc32", "<u4")])
TAIL = 8  # bytes at the end of a run: how long the JSON before them is
RUN_BYTES = 256 << 20  # of tokens, kept in memory before they go to the disk


@dataclass(frozen=True)
class Run:
    """One file. index: (buckets,) INDEX; cursor: how far in the inputs it reaches; counts: of its own documents."""

    path: Path
    index: np.ndarray
    cursor: Cursor
    counts: Counts


class Slice(NamedTuple):
    """The documents of one bucket in one run: how many, and the bytes at which their columns lie."""

    path: Path
    documents: int
    tokens: int
    crc32: int
    keys_at: int
    lengths_at: int
    tokens_at: int


class Spill:
    """Documents on their way to the buckets: in memory until there are many, then written to a run.

    runs: those that are there already, from before the build was killed.
    """

    def __init__(self, folder: Path, buckets: int, dtype: str) -> None:
        self.folder, self.buckets, self.dtype = folder, buckets, DTYPES[dtype]
        folder.mkdir(exist_ok=True)
        for left in folder.glob("*.tmp"):
            left.unlink()
        self.runs = read_runs(folder, buckets, dtype)
        self.clear()

    def clear(self) -> None:
        """Forget what is in memory."""
        self.numbers: list[np.ndarray] = []
        self.keys: list[np.ndarray] = []
        self.lengths: list[np.ndarray] = []
        self.documents: list[np.ndarray] = []
        self.counts, self.waiting_bytes = Counts(), 0

    @property
    def cursor(self) -> Cursor:
        """Where the inputs have to be read on from."""
        return self.runs[-1].cursor if self.runs else BEGINNING

    def add(self, numbers: np.ndarray, keys: np.ndarray, lengths: np.ndarray, tokens: np.ndarray) -> None:
        """Take in a batch's documents. numbers: (n,) their buckets; the rest as in stages.Tokenized."""
        ends = np.cumsum(lengths, dtype=np.int64)
        places = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
        self.numbers.append(numbers)
        self.keys.append(keys)
        self.lengths.append(lengths)
        self.documents += [tokens[start:end] for start, end in places]
        self.waiting_bytes += tokens.nbytes

    def commit(self, cursor: Cursor) -> None:
        """Write what is in memory as the next run; from here on a build that is killed goes on from `cursor`."""
        path = self.folder / f"{len(self.runs):06d}.run"
        temporary = path.with_name(path.name + ".tmp")
        try:
            index = self.write(temporary, cursor)
        except BaseException:
            temporary.unlink(missing_ok=True)  # the disk may be full
            raise
        os.replace(temporary, path)
        sync_folder(self.folder)
        self.runs.append(Run(path, index, cursor, self.counts))
        self.clear()

    def write(self, path: Path, cursor: Cursor) -> np.ndarray:
        """A run: columns, index, JSON, and the length of the JSON. Returns the index."""
        with path.open("wb") as file:
            index = self.write_columns(file)
            said = {"cursor": cursor, "counts": vars(self.counts), "index_crc32": zlib.crc32(index.tobytes())}
            said |= {"documents": int(index["documents"].sum()), "tokens": int(index["tokens"].sum())}
            header = json.dumps(said).encode()
            file.write(index.tobytes() + header + len(header).to_bytes(TAIL, "little"))
            file.flush()
            os.fsync(file.fileno())
        return index

    def write_columns(self, file: BinaryIO) -> np.ndarray:
        """Keys, lengths and tokens, sorted by bucket; returns the index."""
        index = np.zeros(self.buckets, INDEX)
        if not self.documents:
            return index
        numbers, keys, lengths = map(np.concatenate, (self.numbers, self.keys, self.lengths))
        order = np.lexsort((keys, numbers))
        keys, lengths = keys[order].astype(KEYS), lengths[order].astype(LENGTHS)
        file.write(keys.data)
        file.write(lengths.data)
        counts = np.bincount(numbers, minlength=self.buckets)
        ends = np.cumsum(counts)
        for number in np.flatnonzero(counts).tolist():
            first, last = int(ends[number] - counts[number]), int(ends[number])
            tokens = np.concatenate([self.documents[place] for place in order[first:last].tolist()]).astype(self.dtype)
            file.write(tokens.data)
            index[number] = (last - first, len(tokens), checksum(keys[first:last], lengths[first:last], tokens))
        return index


def checksum(keys: np.ndarray, lengths: np.ndarray, tokens: np.ndarray) -> int:
    """crc32 of a bucket's columns."""
    return zlib.crc32(tokens.data, zlib.crc32(lengths.data, zlib.crc32(keys.data)))


def read_runs(folder: Path, buckets: int, dtype: str) -> list[Run]:
    """All runs of a folder, in order. Raises ConfigError where one is missing or not what was written."""
    paths = sorted(folder.glob("*.run"))
    for number, path in enumerate(paths):
        if path.name != f"{number:06d}.run":
            raise ConfigError(f"{folder / f'{number:06d}.run'} is missing; remove {folder.parent} and build it again")
    return [read_run(path, buckets, dtype) for path in paths]


def read_run(path: Path, buckets: int, dtype: str) -> Run:
    """A run without its documents. Raises ConfigError where it is cut short or damaged."""
    try:
        with path.open("rb") as file:
            size = file.seek(-TAIL, os.SEEK_END) + TAIL
            length = int.from_bytes(file.read(TAIL), "little")
            file.seek(size - TAIL - length - buckets * INDEX.itemsize)
            index = np.frombuffer(file.read(buckets * INDEX.itemsize), INDEX)
            said = json.loads(file.read(length))
        data = said["documents"] * (KEYS.itemsize + LENGTHS.itemsize) + said["tokens"] * DTYPES[dtype].itemsize
        if size != data + index.nbytes + length + TAIL or zlib.crc32(index.tobytes()) != said["index_crc32"]:
            raise ValueError("its parts don't add up")
        counts = said["counts"]
        counts["replaced"] = Counter(counts["replaced"])
        return Run(path, index, Cursor(*said["cursor"]), Counts(**counts))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{path} is damaged ({error}); remove {path.parent.parent} and build it again") from error


class Shelf:
    """Which bytes of the runs hold a bucket."""

    def __init__(self, runs: Sequence[Run], dtype: str) -> None:
        self.runs, self.itemsize = runs, DTYPES[dtype].itemsize
        self.ends = [(np.cumsum(run.index["documents"]), np.cumsum(run.index["tokens"])) for run in runs]
        self.documents = sum(run.index["documents"] for run in runs)  # (buckets,)

    def slices(self, bucket: int) -> Iterator[Slice]:
        """The bucket's slices, of the runs that have any of it."""
        for run, ends in zip(self.runs, self.ends, strict=True):
            documents, tokens, crc32 = run.index[bucket].tolist()
            if documents:
                all_documents = int(ends[0][-1])
                before, tokens_before = int(ends[0][bucket]) - documents, int(ends[1][bucket]) - tokens
                lengths_at = all_documents * KEYS.itemsize
                tokens_at = lengths_at + all_documents * LENGTHS.itemsize
                yield Slice(
                    path=run.path,
                    documents=documents,
                    tokens=tokens,
                    crc32=crc32,
                    keys_at=before * KEYS.itemsize,
                    lengths_at=lengths_at + before * LENGTHS.itemsize,
                    tokens_at=tokens_at + tokens_before * self.itemsize,
                )


def load(slices: Sequence[Slice], dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys (n,), lengths (n,) and tokens of a bucket. Raises ConfigError where a run has been altered."""
    documents, all_tokens = sum(part.documents for part in slices), sum(part.tokens for part in slices)
    keys, lengths = np.empty(documents, KEYS), np.empty(documents, LENGTHS)
    tokens = np.empty(all_tokens, DTYPES[dtype])
    document = token = 0
    for part in slices:
        columns = (
            (part.keys_at, keys[document : document + part.documents]),
            (part.lengths_at, lengths[document : document + part.documents]),
            (part.tokens_at, tokens[token : token + part.tokens]),
        )
        with part.path.open("rb", buffering=0) as file:
            for at, column in columns:
                read_into(file, at, column)
        if checksum(*(column for _, column in columns)) != part.crc32:
            raise ConfigError(f"{part.path} is altered; remove {part.path.parent.parent} and build it again")
        document += part.documents
        token += part.tokens
    return keys, lengths, tokens


def read_into(file: BinaryIO, at: int, column: np.ndarray) -> None:
    """Fill a column from the bytes at `at`; what the file lacks stays as it is, for the checksum to find."""
    file.seek(at)
    view = memoryview(column).cast("B")
    while view and (count := file.readinto(view)):
        view = view[count:]
