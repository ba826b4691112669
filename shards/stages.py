"""The stages of a build, each over all processes: train a tokenizer, tokenize into runs, write a split's shards.

The last two go on where they were when they were killed.
"""

import functools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlm_dist import vocab
from mlm_dist.manifest import DTYPES, RECORDS, Manifest, ShardInfo, dtype_for, replace_file, write_manifest
from mlm_dist.shards import LENGTHS
from mlm_dist.vocab import Vocab
from shards import texts
from shards.buckets import bucket_numbers, document_key, is_held_out, write_shard
from shards.files import Piece, text_bytes
from shards.pool import Progress, in_order, workers
from shards.runs import KEYS, RUN_BYTES, Shelf, Slice, Spill
from shards.texts import Batch, Counts, Cursor, Reading

TOGETHER_BYTES = 1 << 18  # of text handed to the tokenizer at once: it has an object for each token of it


@dataclass(frozen=True)
class Settings:
    """How to build. valid_fraction: share of documents held out; sample_bytes: most text to train a tokenizer on."""

    workers: int
    reading: Reading
    seed: int
    valid_fraction: float
    sample_bytes: int


class Tokenized(NamedTuple):
    """A batch's documents. keys (n,) uint64; lengths (n,) uint32; tokens: theirs, one after the other."""

    keys: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    counts: Counts


# ---- the tokenizer


def train_tokenizer(settings: Settings, pieces: Sequence[Piece], size: int) -> Vocab:
    """Train a tokenizer of `size` tokens on the documents with the smallest keys, none of them held out."""
    share = settings.sample_bytes / max(1, text_bytes(sorted({piece.file for piece in pieces})))
    progress = Progress("sampling text for the tokenizer", disk_bytes(pieces))
    chosen: list[tuple[int, str]] = []
    with workers(settings.workers) as pool:
        work = functools.partial(sample, settings, share)
        for batch, found in in_order(pool, settings.workers, work, texts.batches(pieces, settings.reading)):
            chosen += found
            progress.show(batch.position, f"{len(chosen):,} documents")
    progress.close()
    chosen.sort()
    print(f"training a tokenizer of {size:,} tokens on {len(chosen):,} documents", file=sys.stderr, flush=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    return vocab.train(up_to(chosen, settings.sample_bytes), size)


def sample(settings: Settings, share: float, batch: Batch) -> list[tuple[int, str]]:
    """(key, text) of a batch's documents that belong to the tokenizer's share, in a worker."""
    seed = str(settings.seed).encode()
    keyed = ((document_key(text.encode(), seed), text) for text in texts.documents(batch, settings.reading, Counts()))
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


def fill(settings: Settings, tokenizer: Path, pieces: Sequence[Piece], buckets: tuple[int, int], spill: Spill) -> None:
    """Tokenize all pieces with the tokenizer in a folder, into runs; what the runs hold already is not done again.

    buckets: how many of train and of valid.
    """
    if spill.cursor.piece == len(pieces) and spill.runs:
        return
    progress = Progress("tokenizing", disk_bytes(pieces))
    tokens = sum(int(run.index["tokens"].sum()) for run in spill.runs)
    with workers(settings.workers) as pool:
        work = functools.partial(tokenize, settings, tokenizer)
        batches = texts.batches(pieces, settings.reading, spill.cursor)
        for batch, done in in_order(pool, settings.workers, work, batches):
            held_out = is_held_out(done.keys, 1.0 if batch.held_out else settings.valid_fraction)
            spill.add(bucket_numbers(done.keys, held_out, *buckets), done.keys, done.lengths, done.tokens)
            spill.counts.add(done.counts)
            if spill.waiting_bytes >= RUN_BYTES:
                spill.commit(batch.end)
            tokens += len(done.tokens)
            progress.show(batch.position, f"{tokens:,} tokens")
    spill.commit(Cursor(len(pieces), 0))
    progress.close()


def tokenize(settings: Settings, tokenizer: Path, batch: Batch) -> Tokenized:
    """The documents of a batch as token ids, in a worker."""
    loaded, counts, seed = load_once(tokenizer), Counts(), str(settings.seed).encode()
    dtype = DTYPES[dtype_for(loaded.size)]
    keys: list[int] = []
    tokens = [np.zeros(0, dtype)]
    for group in grouped(texts.documents(batch, settings.reading, counts)):
        for text, ids in zip(group, loaded.encode_batch(group), strict=True):
            if ids:
                data = text.encode()
                keys.append(document_key(data, seed))
                tokens.append(np.array(ids, dtype))
                counts.text_bytes += len(data)
            else:
                counts.empty += 1
    lengths = np.array([len(document) for document in tokens[1:]], LENGTHS)
    return Tokenized(np.array(keys, KEYS), lengths, np.concatenate(tokens), counts)


def grouped(documents: Iterator[str]) -> Iterator[list[str]]:
    """The documents, as many at a time as the tokenizer takes together."""
    group: list[str] = []
    size = 0
    for text in documents:
        group.append(text)
        size += len(text)
        if size >= TOGETHER_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


@functools.cache
def load_once(tokenizer: Path) -> Vocab:
    """The tokenizer, loaded once a process."""
    return vocab.load(tokenizer)


# ---- shards


class Task(NamedTuple):
    """A shard to be made: its number in the split, and where its documents lie."""

    number: int
    slices: tuple[Slice, ...]


def write_split(
    processes: int,
    shelf: Shelf,
    buckets: range,
    split_dir: Path,
    tokenizer: Vocab,
    about: Mapping[str, object],
) -> Manifest | None:
    """Write a split's shards, one a bucket, and its manifest; None for no documents. An empty bucket gives no shard."""
    full = [bucket for bucket in buckets if shelf.documents[bucket]]
    if not full:
        return None
    split_dir.mkdir(exist_ok=True)
    journal = split_dir.parent / "finished" / split_dir.name
    journal.mkdir(parents=True, exist_ok=True)
    progress = Progress(f"writing {split_dir.name}", len(full))
    written = []
    with workers(processes) as pool:
        work = functools.partial(write_once, journal, split_dir, dtype_for(tokenizer.size))
        tasks = (Task(number, tuple(shelf.slices(bucket))) for number, bucket in enumerate(full))
        for _, shard in in_order(pool, processes, work, tasks):
            written.append(shard)
            progress.show(len(written), f"{len(written)} of {len(full)} shards")
    progress.close()
    return write_manifest(split_dir, written, tokenizer.size, tokenizer.fingerprint, about)


def write_once(journal: Path, split_dir: Path, dtype: str, task: Task) -> tuple[ShardInfo, np.ndarray]:
    """Write a shard and note that it is finished, in a worker; one that is finished already is left as it is."""
    note = journal / f"{task.number:06d}.json"
    if note.exists():
        said = json.loads(note.read_bytes())
        info = ShardInfo(**said["info"])
        shard = split_dir / info.name
        if shard.exists() and shard.stat().st_size == info.bytes:
            return info, np.array([tuple(row) for row in said["records"]], RECORDS)
    info, records = write_shard(task.slices, split_dir, task.number, dtype)
    replace_file(note, json.dumps({"info": asdict(info), "records": records.tolist()}).encode())
    return info, records


def disk_bytes(pieces: Sequence[Piece]) -> int:
    """The pieces' size as they lie on the disk."""
    return sum(piece.size for piece in pieces)
