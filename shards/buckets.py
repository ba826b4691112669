"""A shuffle of any size in bounded memory: documents go to buckets by their key; a bucket, sorted, becomes a shard.

Which bucket a document goes to, and its place there, depend on its text and the seed alone. So the shards are the same
whatever the order of the inputs and the number of processes.
"""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlm_dist.manifest import DTYPES, ShardInfo
from mlm_dist.shards import LENGTHS, Record, ShardWriter

KEYS = np.dtype("<u8")
RECORD_TOKENS = 8192
SPILL_BYTES = 256 << 20  # kept in memory before it goes to the disk
BYTES_PER_TOKEN = 4  # of text, roughly: for estimates alone
MANY = 64  # shards, wherever there is text enough: as many lanes as training has
LEAST_TOKENS = 2 * RECORD_TOKENS  # of a shard worth having


def document_key(text: str, seed: int) -> int:
    """64 bits from the text: the document's place in the shuffle, and its side of the held-out split."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest(), "little")


def is_held_out(keys: int | np.ndarray, fraction: float) -> bool | np.ndarray:
    """True for about `fraction` of the keys, element by element; equal texts are always on the same side."""
    return (keys >> 11) * 2.0**-53 < fraction


def bucket_count(text_bytes: float, shard_tokens: int) -> int:
    """How many shards to make, of about `shard_tokens` each: a multiple of 64, or for little text a power of two.

    64 is the number of lanes that training deals shards to: none of them gets more than the others.
    """
    tokens = text_bytes / BYTES_PER_TOKEN
    if tokens >= MANY * LEAST_TOKENS:
        return MANY * max(1, round(tokens / shard_tokens / MANY))
    return 1 << (max(1, int(tokens / LEAST_TOKENS)).bit_length() - 1)


class Buckets:
    """Documents on their way to the buckets of one split: in memory until there are many, then appended to files."""

    def __init__(self, folder: Path, count: int, dtype: str) -> None:
        self.folder, self.count, self.dtype = folder, count, DTYPES[dtype]
        self.documents = np.zeros(count, np.int64)
        self.waiting: dict[int, list[tuple[np.uint64, np.ndarray]]] = {}
        self.waiting_bytes = 0
        folder.mkdir(parents=True)

    def add(self, keys: np.ndarray, lengths: np.ndarray, tokens: np.ndarray, taken: np.ndarray) -> None:
        """Take in the documents of a batch that are `taken`, (n,) bool; the rest as in stages.Tokenized."""
        numbers = (keys % self.count).astype(np.int64)
        self.documents += np.bincount(numbers[taken], minlength=self.count)
        ends = np.cumsum(lengths, dtype=np.int64)
        for place in np.flatnonzero(taken).tolist():
            document = tokens[ends[place] - lengths[place] : ends[place]]
            self.waiting.setdefault(int(numbers[place]), []).append((keys[place], document))
            self.waiting_bytes += document.nbytes
        if self.waiting_bytes >= SPILL_BYTES:
            self.spill()

    def spill(self) -> None:
        """Append what is in memory to the files."""
        for number, documents in self.waiting.items():
            keys, texts = zip(*documents, strict=True)
            columns = {
                "keys": np.array(keys, KEYS),
                "lengths": np.array([len(text) for text in texts], LENGTHS),
                "tokens": np.concatenate(texts).astype(self.dtype),
            }
            for name, column in columns.items():
                with spill_file(self.folder, number, name).open("ab") as file:
                    file.write(column.data)
        self.waiting.clear()
        self.waiting_bytes = 0


def spill_file(folder: Path, number: int, column: str) -> Path:
    """Where a bucket's keys, lengths or tokens lie until it becomes a shard."""
    return folder / f"{number:06d}.{column}"


def write_shard(folder: Path, bucket: int, split_dir: Path, number: int, dtype: str) -> tuple[ShardInfo, np.ndarray]:
    """Turn a spilled bucket into shard `number` of a split and remove it; returns what `write_manifest` wants."""
    files = {name: spill_file(folder, bucket, name) for name in ("keys", "lengths", "tokens")}
    types = {"keys": KEYS, "lengths": LENGTHS, "tokens": DTYPES[dtype]}
    columns = {name: np.fromfile(file, types[name]) for name, file in files.items()}
    with ShardWriter(split_dir, number, dtype) as writer:
        for record in shuffled_records(**columns):
            writer.write(record)
    for file in files.values():
        file.unlink()
    return writer.info, writer.records


def shuffled_records(keys: np.ndarray, lengths: np.ndarray, tokens: np.ndarray) -> Iterator[Record]:
    """Documents in the order of their keys, in records of about 8,192 tokens: whole documents, at least one."""
    order = np.argsort(keys, kind="stable")
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    starts, ends, lengths = starts[order], ends[order], lengths[order]
    # A record takes the documents that begin within the same 8,192 tokens of the shuffled bucket.
    slots = (np.cumsum(lengths, dtype=np.int64) - lengths) // RECORD_TOKENS
    edges = [0, *(np.flatnonzero(np.diff(slots)) + 1).tolist(), len(keys)]
    for first, last in itertools.pairwise(edges):
        places = zip(starts[first:last].tolist(), ends[first:last].tolist(), strict=True)
        yield Record(np.concatenate([tokens[start:end] for start, end in places]), lengths[first:last])
