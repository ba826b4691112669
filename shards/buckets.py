"""A shuffle of any size in bounded memory: documents go to buckets by their key; a bucket, sorted, becomes a shard.

Which bucket a document goes to, and its place there, depend on its text and the seed alone. So the shards are the same
whatever the order of the inputs, the number of processes and the number of parts. Until then documents lie in runs:
files that each hold some 256 MiB of tokens, bucket after bucket.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mlm_dist.manifest import ShardInfo
from mlm_dist.shards import Record, ShardWriter
from shards.runs import Slice, load

RECORD_TOKENS = 8192
BYTES_PER_TOKEN = 4  # of text, roughly: for estimates alone
MANY = 64  # shards, wherever there is text enough: as many lanes as training has
LEAST_TOKENS = 2 * RECORD_TOKENS  # of a shard worth having


def document_key(text: bytes, seed: bytes) -> int:
    """64 bits from the text: the document's place in the shuffle, and its side of the held-out split."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=seed).digest(), "little")


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


def bucket_numbers(keys: np.ndarray, held_out: np.ndarray, train: int, valid: int) -> np.ndarray:
    """The bucket of each document, (n,) int64: `train` buckets of one split, then `valid` of the other."""
    return np.where(held_out, train + keys % np.uint64(valid), keys % np.uint64(train)).astype(np.int64)


def write_shard(slices: Sequence[Slice], split_dir: Path, number: int, dtype: str) -> tuple[ShardInfo, np.ndarray]:
    """Turn a bucket into shard `number` of a split; returns what `write_manifest` wants."""
    with ShardWriter(split_dir, number, dtype) as writer:
        for record in shuffled_records(*load(slices, dtype)):
            writer.write(record)
    return writer.info, writer.records


def shuffled_records(keys: np.ndarray, lengths: np.ndarray, tokens: np.ndarray) -> Iterator[Record]:
    """Documents in the order of their keys, in records of about 8,192 tokens: whole documents, at least one."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    order = shuffled(keys, starts, ends, tokens)
    starts, ends, lengths = starts[order], ends[order], lengths[order]
    # A record takes the documents that begin within the same 8,192 tokens of the shuffled bucket.
    slots = (np.cumsum(lengths, dtype=np.int64) - lengths) // RECORD_TOKENS
    edges = [0, *(np.flatnonzero(np.diff(slots)) + 1).tolist(), len(keys)]
    for first, last in itertools.pairwise(edges):
        places = zip(starts[first:last].tolist(), ends[first:last].tolist(), strict=True)
        yield Record(np.concatenate([tokens[start:end] for start, end in places]), lengths[first:last])


def shuffled(keys: np.ndarray, starts: np.ndarray, ends: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The order of the documents, by key; of those that share one by chance, by their tokens."""
    order = np.argsort(keys, kind="stable")
    tied = np.concatenate([[False], np.diff(keys[order]) == 0, [False]])
    edges = np.flatnonzero(np.diff(tied.astype(np.int8)))  # where ties begin and end, in turn
    for first, last in edges.reshape(-1, 2).tolist():
        among = order[first : last + 1].tolist()
        order[first : last + 1] = sorted(among, key=lambda place: tokens[starts[place] : ends[place]].tobytes())
    return order
