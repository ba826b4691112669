"""Shards -> batches, in an order that nothing but (manifest, seed, lanes, batch shape) decides.

Each worker process reads its share of the rank's lanes and hands over blocks of rows, in the order in which they are
wanted; every row brings the place of its lane after it. The parent deals the blocks into micro-batches, so that the
cursor in a Batch says what was delivered, however far the workers have read ahead.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import numpy as np
import torch

from mlm_dist import batch_size
from mlm_dist.batch_size import BatchConfig
from mlm_dist.cursor import Cursor, Stand, first_cursor
from mlm_dist.lanes import (
    AFTER,
    DOCUMENTS,
    FACTS,
    KEY,
    MASKABLE,
    OPENED,
    SOURCE,
    TEXT,
    TOKENS,
    Planned,
    Rows,
    Tap,
    join,
    own_lanes,
    windows_in_order,
)
from mlm_dist.loader import LaneBlocks, start_worker
from mlm_dist.manifest import Manifest, ShardError
from mlm_dist.mixture import (
    Mixture,
    SourceConfig,
    Sources,
    as_sources,
    lanes_of,
    mix,
    places_in,
)
from mlm_dist.packing import hashed
from mlm_dist.schema import ConfigError, setting
from mlm_dist.vocab import Vocab


@dataclass(frozen=True)
class DataConfig:
    shards: str | None = setting(
        None, help="the folder that shards/build.py made, or its URL: https, http, s3, gs, ..."
    )
    sources: dict[str, SourceConfig] | None = field(
        default=None, metadata={"help": "or several folders with weights, by names of your own"}
    )
    packing: Literal["best_fit", "pad"] = setting("best_fit", help="several documents a row, or one and padding")
    lanes: int | None = setting(
        None, low=1, help="streams that the order is made of; none: the largest power of two up to 64 and the shards"
    )
    window_records: int = setting(64, low=1, help="records (of about 8k tokens) that are shuffled and packed together")
    workers: int = setting(1, low=0, help="loader processes a rank; 0: read in the training process")
    max_bad_shards: int = setting(0, low=0, help="damaged or missing shards to skip before the run ends")
    cache_dir: str | None = setting(
        None, help="where remote shards are kept, on a disk of each machine; none: mlm_dist in the user's cache folder"
    )
    cache_gb: float = setting(50.0, above=0, help="most that the shards there take, in 10^9 bytes")
    fetch_seconds: float = setting(600.0, above=0, help="how long a remote file is tried before it counts as missing")

    def __post_init__(self) -> None:
        if bool(self.shards) == bool(self.sources):
            given = "both are given (null takes a parent's back)" if self.shards else "neither is given"
            raise ConfigError(
                f"name the data once, as shards: FOLDER or as sources: {{NAME: {{shards: FOLDER, weight: 1}}}}: {given}"
            )
        for name in self.sources or {}:
            if not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
                raise ConfigError(f"sources.{name}: a source's name is made of letters, digits, _ and -; rename it")

    def folders(self) -> dict[str, SourceConfig]:
        """The sources by name; a single folder is one without a name."""
        return self.sources or {"": SourceConfig(self.shards or "")}


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: B rows of T positions."""

    ids: torch.Tensor  # (B, T) int32: tokens with [CLS], [SEP] and [PAD]
    segments: torch.Tensor  # (B, T) int16: 0 = padding, 1, 2, ... the pieces of documents in the row
    maskable: torch.Tensor  # (B,) int32, on the host: tokens that are no special id
    row_keys: torch.Tensor  # (B,) int64: names the row in any world size: hash of (epoch, lane, window, row)
    sources: torch.Tensor  # (B,) int16, on the host: number of the row's source, by name; -1 = a row of padding
    stand: Stand | None  # none in held-out batches
    row_tokens: torch.Tensor  # (B,) int32, on the host: positions of the row that are not padding
    tokens: int  # the same of the batch
    text: int  # of those, the tokens of documents
    documents: int  # documents that begin in the batch
    opened: int  # tokens of those documents, wherever they stand
    bad_shards: Mapping[str, str] = field(default_factory=dict)  # skipped on this rank so far: label -> reason

    @property
    def cursor(self) -> Cursor | None:
        """Stands after this batch, plain JSON; the other ranks' lanes are None until `merge_cursors`."""
        return self.stand.cursor() if self.stand else None


# ---- batches


def check(shards: Manifest | Sources, vocab: Vocab, data: DataConfig, batch: BatchConfig, world_size: int) -> None:
    """Raise ConfigError if `train_batches` would."""
    check_held_out(shards, vocab, data, batch)
    lanes_of(as_sources(shards), data.lanes, world_size)
    batch_size.check(batch, world_size)


def check_held_out(shards: Manifest | Sources, vocab: Vocab, data: DataConfig, batch: BatchConfig) -> None:
    """Raise ConfigError if `held_out_batches` would."""
    mix(as_sources(shards), vocab, batch.seq_len, data.packing, data.window_records)


def train_batches(
    shards: Manifest | Sources,
    vocab: Vocab,
    data: DataConfig,
    batch: BatchConfig,
    seed: int,
    world_rank: int,
    world_size: int,
    start: Cursor | None = None,
) -> "TrainBatches":
    """One rank's batches from a cursor on, or from the beginning.

    shards: a manifest, or several sources of the same tokenizer
    start:  may come from a run with other ranks, workers and micro-batches

    Raises ConfigError as `check` does.
    """
    check(shards, vocab, data, batch, world_size)
    sources = as_sources(shards)
    lanes = lanes_of(sources, data.lanes, world_size)
    start = start or first_cursor(lanes, len(sources))
    if len(start["lanes"]) != lanes:
        raise ConfigError(f"the run began with {len(start['lanes'])} lanes, not {lanes}: set data.lanes back to that")
    mixture = mix(sources, vocab, batch.seq_len, data.packing, data.window_records)
    return TrainBatches(mixture, data, batch_size.micro_rows(batch, world_size), seed, world_rank, world_size, start)


class TrainBatches(Iterator[Batch]):
    """One rank's endless micro-batches; close it, or use it as a context manager, to end its workers.

    micro_rows: rows of each; `draw` gives as many as are asked for
    """

    def __init__(
        self,
        mixture: Mixture,
        data: DataConfig,
        micro_rows: int,
        seed: int,
        world_rank: int,
        world_size: int,
        start: Cursor,
    ) -> None:
        self.mixture = mixture
        self.micro_rows = micro_rows
        self.world_size = world_size
        self.start = start
        self.lanes = own_lanes(start["rows"], len(start["lanes"]), world_rank, world_size)
        places = [places_in(start["lanes"][lane], len(mixture.readers)) for lane in self.lanes]
        self.places = np.array(places)  # (own lanes, sources, 4): epoch, window, row, rows taken
        self.delivered = 0
        self.bad = mixture.bad_shards(start["bad_shards"], data.max_bad_shards)

        readers = max(1, min(data.workers, len(self.lanes)))
        first_rows = -(-micro_rows // readers)
        shares = [
            LaneBlocks(mixture, seed, start, self.lanes[worker::readers], first_rows, data.max_bad_shards)
            for worker in range(readers)
        ]
        self.workers = [start_worker(share) for share in shares] if data.workers else []
        self.taps = [Tap(self.receive(blocks)) for blocks in self.workers or map(iter, shares)]

    def receive(self, blocks: Iterator) -> Iterator[tuple[Rows, int]]:
        """One worker's blocks, as a Tap wants them; raises the error that it met."""
        for block in blocks:
            if isinstance(block, ShardError):
                raise block
            rows, bad_shards = block
            for label in bad_shards.keys() - self.bad.reasons.keys():
                reason = bad_shards[label]
                problem = f"can't be used ({reason.replace('_', ' ')}), and is one more than data.max_bad_shards"
                self.bad.add(label, ShardError(self.mixture.path(label), problem, reason))
            yield as_tensors(rows), 0

    def __next__(self) -> Batch:
        """The rank's next micro-batch, as `draw` has it."""
        return self.draw(self.micro_rows)

    def draw(self, count: int) -> Batch:
        """The rank's next `count` rows as a micro-batch. All ranks must draw as many.

        Raises ShardError for a damaged shard, RuntimeError where a worker process has died.
        """
        turns = (self.delivered + np.arange(count)) % len(self.lanes)  # (B,) index into own lanes
        rows = self.take(turns)
        self.delivered += count
        sources = rows.facts[:, SOURCE]
        self.places[turns, sources, :3] = rows.facts[:, AFTER]  # of a lane's rows of a source, the last one stands
        np.add.at(self.places, (turns, sources, 3), 1)
        delivered = self.start["rows"] + self.delivered * self.world_size
        bad = dict(sorted(self.bad.reasons.items()))
        return as_batch(rows, Stand(delivered, len(self.start["lanes"]), self.lanes, self.places.copy(), bad), bad)

    def take(self, turns: np.ndarray) -> Rows:
        """A row of each of these lanes (B,), by their places among this rank's."""
        taken = None
        for worker, tap in enumerate(self.taps):
            mine = np.flatnonzero(turns % len(self.taps) == worker)
            for block, where in tap.take(len(mine)):
                part = block[where]
                if len(part) == len(turns):
                    return part
                taken = taken or empty_tensors(len(turns), part.ids.shape[1])
                taken[mine[: len(part)]] = part
                mine = mine[len(part) :]
        assert taken is not None, "a micro-batch has rows"
        return taken

    def close(self) -> None:
        """End the worker processes. Nothing can be taken after it."""
        self.taps.clear()
        for loader in self.workers:
            # what the iterator's __del__ does; but while an exception is on its way its traceback holds the iterator
            loader._shutdown_workers()
            for process in loader._workers:
                process.kill()  # one that is stuck, and deaf to SIGTERM; the others have ended
        self.workers.clear()

    def __enter__(self) -> "TrainBatches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def as_tensors(rows: Rows) -> Rows:
    """Rows whose ids and segments are tensors."""
    tensors = empty_tensors(*rows.ids.shape)
    tensors.ids.numpy()[:] = rows.ids
    tensors.segments.numpy()[:] = rows.segments
    tensors.facts[:] = rows.facts
    return tensors


def empty_tensors(rows: int, seq_len: int) -> Rows:
    """The same, to be filled; in pinned memory where they will be copied to a GPU."""
    pin = torch.cuda.is_initialized()
    ids = torch.empty((rows, seq_len), dtype=torch.int32, pin_memory=pin)
    segments = torch.empty((rows, seq_len), dtype=torch.int16, pin_memory=pin)
    return Rows(ids, segments, np.empty((rows, FACTS), np.int64))


def as_batch(rows: Rows, stand: Stand | None, bad_shards: Mapping[str, str] | None = None) -> Batch:
    """Rows of tensors as a micro-batch."""
    sums = np.add.reduce(rows.facts)
    facts = rows.facts.T
    return Batch(
        ids=rows.ids,
        segments=rows.segments,
        maskable=torch.from_numpy(facts[MASKABLE].astype(np.int32)),
        row_keys=torch.from_numpy(facts[KEY].copy()),
        sources=torch.from_numpy(facts[SOURCE].astype(np.int16)),
        stand=stand,
        row_tokens=torch.from_numpy(facts[TOKENS].astype(np.int32)),
        tokens=int(sums[TOKENS]),
        text=int(sums[TEXT]),
        documents=int(sums[DOCUMENTS]),
        opened=int(sums[OPENED]),
        bad_shards=bad_shards or {},
    )


def held_out_batches(
    shards: Manifest | Sources,
    vocab: Vocab,
    data: DataConfig,
    batch: BatchConfig,
    world_rank: int,
    world_size: int,
    max_rows: int | None = None,
) -> Iterator[Batch]:
    """One pass over the held-out rows, or `max_rows` of them: this rank's share.

    Sources are read one after the other; the first rows of each make an equal part of `max_rows`.
    Row g goes to rank g % world_size. All ranks get the same number of batches; what is missing in the last is padding.
    Every rank reads all windows: the shares are then even to a row, and no rank waits for another's last batch.
    """
    mixture = mix(as_sources(shards), vocab, batch.seq_len, data.packing, data.window_records)
    pending = mixture.blank_rows(0)
    rows = batches = 0
    for block in held_out_rows(mixture, max_rows):
        pending = join(pending, block[(world_rank - rows) % world_size :: world_size])
        rows += len(block)
        while len(pending) >= batch.micro_rows:
            yield as_batch(as_tensors(pending[: batch.micro_rows]), None)
            pending = pending[batch.micro_rows :]
            batches += 1
    if batches * batch.micro_rows * world_size < rows:
        last = mixture.blank_rows(batch.micro_rows)
        last[: len(pending)] = pending
        yield as_batch(as_tensors(last), None)


def held_out_rows(mixture: Mixture, max_rows: int | None) -> Iterator[Rows]:
    """All held-out rows, or so many of them, window by window."""
    count = len(mixture.readers)
    for place, reader in enumerate(mixture.readers):
        left = None if max_rows is None else max_rows * (place + 1) // count - max_rows * place // count
        for number, window in enumerate(windows_in_order(reader.manifest, reader.window_records)):
            if left == 0:
                break
            read = reader.read(window, window.shard, window.first)
            read.facts[:, KEY] = hashed(0, reader.source, number, np.arange(len(read))).view(np.int64)
            if not len(read):
                continue
            block = mixture.write_out([Planned(read, slice(0, len(read)), np.arange(len(read)))])[:left]
            left = None if left is None else left - len(block)
            yield block
