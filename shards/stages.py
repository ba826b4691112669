"""The stages of a build, each over all processes: train a tokenizer, tokenize into buckets, write a split's shards."""

import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlm_dist import vocab
from mlm_dist.manifest import DTYPES, Manifest, ShardInfo, dtype_for, write_manifest
from mlm_dist.shards import LENGTHS
from mlm_dist.vocab import Vocab
from shards import texts
from shards.buckets import KEYS, Buckets, document_key, is_held_out, write_shard
from shards.pool import Progress, in_order, workers
from shards.texts import Batch, Counts, Reading


@dataclass(frozen=True)
class Settings:
    """How to build. valid_fraction: share of documents held out; sample_bytes: most text to train a tokenizer on."""

    workers: int
    reading: Reading
    seed: int
    valid_fraction: float
    shard_tokens: int
    sample_bytes: int


class Tokenized(NamedTuple):
    """A batch's documents. keys (n,) uint64; lengths (n,) uint32; tokens: theirs, one after the other."""

    keys: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    counts: Counts


# ---- the tokenizer


def train_tokenizer(settings: Settings, files: Sequence[Path], size: int) -> Vocab:
    """Train a tokenizer of `size` tokens on the documents with the smallest keys, none of them held out."""
    share = settings.sample_bytes / max(1, texts.text_bytes(files))
    progress = Progress("sampling text for the tokenizer", disk_bytes(files))
    chosen: list[tuple[int, str]] = []
    with workers(settings.workers) as pool:
        work = functools.partial(sample, settings, share)
        for batch, found in in_order(pool, settings.workers, work, texts.batches(files, settings.reading.longest)):
            chosen += found
            progress.show(batch.position, f"{len(chosen):,} documents")
    progress.close()
    chosen.sort()
    print(f"training a tokenizer of {size:,} tokens on {len(chosen):,} documents", file=sys.stderr, flush=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    return vocab.train(up_to(chosen, settings.sample_bytes), size)


def sample(settings: Settings, share: float, batch: Batch) -> list[tuple[int, str]]:
    """(key, text) of a batch's documents that belong to the tokenizer's share, in a worker."""
    keyed = ((document_key(text, settings.seed), text) for text in texts.documents(batch, settings.reading, Counts()))
    # `share` goes by other bits of the key than `valid_fraction`.
    return [
        (key, text)
        for key, text in keyed
        if (key & 0xFFFFFFFF) / 2**32 < share and not is_held_out(key, settings.valid_fraction)
    ]


def up_to(documents: Sequence[tuple[int, str]], most: int) -> Iterator[str]:
    """The texts from the beginning, until they have `most` bytes."""
    for _, text in documents:
        if most <= 0:
            return
        most -= len(text.encode())
        yield text


# ---- tokens


def fill(
    settings: Settings, tokenizer: Path, files: Sequence[Path], train: Buckets, valid: Buckets, valid_fraction: float
) -> Counts:
    """Tokenize all files with the tokenizer in a folder; documents go to the buckets of one split or of the other."""
    progress = Progress("tokenizing", disk_bytes(files))
    counts = Counts()
    tokens = 0
    with workers(settings.workers) as pool:
        work = functools.partial(tokenize, settings, tokenizer)
        for batch, done in in_order(pool, settings.workers, work, texts.batches(files, settings.reading.longest)):
            held_out = is_held_out(done.keys, valid_fraction)
            train.add(done.keys, done.lengths, done.tokens, ~held_out)
            valid.add(done.keys, done.lengths, done.tokens, held_out)
            counts.add(done.counts)
            tokens += len(done.tokens)
            progress.show(batch.position, f"{tokens:,} tokens")
    train.spill()
    valid.spill()
    progress.close()
    return counts


def tokenize(settings: Settings, tokenizer: Path, batch: Batch) -> Tokenized:
    """The documents of a batch as token ids, in a worker."""
    loaded, counts = load_once(tokenizer), Counts()
    dtype = DTYPES[dtype_for(loaded.size)]
    keys: list[int] = []
    tokens = [np.zeros(0, dtype)]
    for text in texts.documents(batch, settings.reading, counts):
        ids = loaded.encode_batch([text])[0]
        if ids:
            keys.append(document_key(text, settings.seed))
            tokens.append(np.array(ids, dtype))
            counts.text_bytes += len(text.encode())
        else:
            counts.empty += 1
    lengths = np.array([len(document) for document in tokens[1:]], LENGTHS)
    return Tokenized(np.array(keys, KEYS), lengths, np.concatenate(tokens), counts)


@functools.cache
def load_once(tokenizer: Path) -> Vocab:
    """The tokenizer, loaded once a process."""
    return vocab.load(tokenizer)


# ---- shards


def write_split(
    settings: Settings, buckets: Buckets, split_dir: Path, tokenizer: Vocab, about: Mapping[str, object]
) -> Manifest:
    """Write a split's shards, one a bucket, and its manifest. An empty bucket gives no shard."""
    split_dir.mkdir()
    full = np.flatnonzero(buckets.documents).tolist()
    progress = Progress(f"writing {split_dir.name}", len(full))
    written = []
    with workers(settings.workers) as pool:
        work = functools.partial(write_numbered, buckets.folder, split_dir, dtype_for(tokenizer.size))
        for _, shard in in_order(pool, settings.workers, work, enumerate(full)):
            written.append(shard)
            progress.show(len(written), f"{len(written)} of {len(full)} shards")
    progress.close()
    return write_manifest(split_dir, written, tokenizer.size, tokenizer.fingerprint, about)


def write_numbered(
    folder: Path, split_dir: Path, dtype: str, numbered: tuple[int, int]
) -> tuple[ShardInfo, np.ndarray]:
    """Write shard `number` from its bucket, in a worker."""
    number, bucket = numbered
    return write_shard(folder, bucket, split_dir, number, dtype)


def disk_bytes(files: Sequence[Path]) -> int:
    """The files' size as they lie on the disk."""
    return sum(file.stat().st_size for file in files)
