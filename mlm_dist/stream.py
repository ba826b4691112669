"""Shards -> batches, in an order that nothing but (manifest, seed, lanes, batch shape) decides.

Each worker process reads its share of the rank's lanes and hands over chunks of rows, in the order in which they are
wanted; every row brings the place of its lane after it. The parent deals the chunks into micro-batches, so that the
cursor in a Batch says what was delivered, however far the workers have read ahead.
"""

import itertools
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from mlm_dist.lanes import (
    BadShards,
    Reader,
    Rows,
    announce,
    concatenate,
    lane_rows,
    make_reader,
    one_by_one,
    own_lanes,
    resolve_lanes,
    stack,
    windows_in_order,
)
from mlm_dist.manifest import Manifest, ShardError
from mlm_dist.packing import hashed
from mlm_dist.schema import ConfigError, setting
from mlm_dist.vocab import Vocab

# {"rows": rows delivered over all ranks, "lanes": [[epoch, window, row], ...], "bad_shards": [name, ...]}: plain JSON.
# The lanes of other ranks are None until `merge_cursors` has put the ranks' cursors together.
Cursor = dict[str, Any]

# A lane's next window takes some 10 ms; lanes need theirs at nearly the same time. This many micro-batches bridge that.
CHUNKS_AHEAD = 8


@dataclass(frozen=True)
class DataConfig:
    shards: str = setting(help="the folder that shards/build.py made, or its URL: https, http, s3, gs, ...")
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


@dataclass(frozen=True)
class BatchConfig:
    seq_len: int = setting(512, low=8, high=65536, help="positions in a row")
    global_rows: int = setting(256, low=1, help="rows in an optimizer step, over all ranks")
    micro_rows: int = setting(32, low=1, help="most rows that a rank holds at a time; accumulation follows")


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: B rows of T positions."""

    ids: torch.Tensor  # (B, T) int32: tokens with [CLS], [SEP] and [PAD]
    segments: torch.Tensor  # (B, T) int16: 0 = padding, 1, 2, ... the pieces of documents in the row
    maskable: torch.Tensor  # (B,) int32, on the host: tokens that are no special id
    row_keys: torch.Tensor  # (B,) int64: names the row in any world size: hash of (epoch, lane, window, row)
    cursor: Cursor | None  # stands after this batch; none in held-out batches
    tokens: int  # positions that are not padding
    documents: int  # documents that begin in the batch
    bad_shards: tuple[str, ...] = ()  # shards that this rank has skipped so far


class Tap:
    """Rows from an iterator of blocks, as many at a time as are wanted."""

    def __init__(self, blocks: Iterator[Rows]) -> None:
        self.blocks = blocks
        self.left: Rows | None = None

    def take(self, count: int) -> Rows:
        parts = []
        while count:
            if not self.left:
                self.left = next(self.blocks)
            parts.append(self.left[:count])
            self.left = self.left[count:]
            count -= len(parts[-1])
        return concatenate(parts)


class LaneChunks(IterableDataset):
    """What one worker reads: endless chunks of rows of its lanes, one row of each in turn.

    Yields (rows, names of bad shards so far), or a ShardError, and then ends.
    """

    def __init__(
        self, reader: Reader, seed: int, start: Cursor, lanes: list[int], chunk_rows: int, max_bad_shards: int
    ) -> None:
        self.reader = reader
        self.seed = seed
        self.start = start
        self.lanes = lanes
        self.chunk_rows = chunk_rows
        self.bad = BadShards(start["bad_shards"], max_bad_shards, reader.manifest)

    def __iter__(self) -> Iterator[tuple[Rows, tuple[str, ...]] | ShardError]:
        reader, places = self.reader, self.start["lanes"]
        for lane in self.lanes:
            announce(reader, self.seed, lane, len(places), places[lane])
        lanes = [lane_rows(reader, self.seed, lane, len(places), places[lane], self.bad) for lane in self.lanes]
        turns = itertools.cycle([one_by_one(lane) for lane in lanes])
        try:
            while True:
                rows = [next(lane) for lane in itertools.islice(turns, self.chunk_rows)]
                yield stack(rows), tuple(self.bad.names)
        except ShardError as error:
            yield error  # as a value: raised here, it would reach the parent as a traceback in another error's text


def shield(worker: int) -> None:
    """Set up a worker process. The parent decides when it ends: a signal to the whole group must not end it first."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def unchanged(chunk: Any) -> Any:
    return chunk


def start_worker(chunks: LaneChunks) -> Iterator:
    """Read `chunks` in a process of its own.

    Forked, since a spawned one imports everything anew (seconds); it touches neither the GPU nor the process group.
    The arrays come through a pipe: no shared memory that could run out.
    """
    loader = DataLoader(
        chunks,
        batch_size=None,
        collate_fn=unchanged,
        num_workers=1,
        prefetch_factor=CHUNKS_AHEAD,
        worker_init_fn=shield,
        generator=torch.Generator(),  # else it draws from the global one
        multiprocessing_context="fork",
    )
    return iter(loader)


# ---- batches


def micro_rows(batch: BatchConfig, world_size: int) -> int:
    """Rows of a micro-batch: what the configuration says, or a rank's whole share where that is less."""
    return min(batch.micro_rows, max(1, batch.global_rows // world_size))


def accumulation(batch: BatchConfig, world_size: int) -> int:
    """Micro-batches that each rank takes for one optimizer step. Raises ConfigError where that is no whole number."""
    per_round = world_size * micro_rows(batch, world_size)
    if batch.global_rows % per_round == 0:
        return batch.global_rows // per_round
    low = batch.global_rows // per_round * per_round
    advice = f"set batch.global_rows to {' or '.join(str(count) for count in (low, low + per_round) if count)}"
    share, remainder = divmod(batch.global_rows, world_size)
    if not remainder:
        divisors = [count for count in range(1, share + 1) if share % count == 0]
        below = max(count for count in divisors if count <= batch.micro_rows)
        above = [count for count in divisors if count > batch.micro_rows][:1]
        advice += f", or batch.micro_rows to {' or '.join(map(str, [below, *above]))}"
    raise ConfigError(
        f"batch.global_rows = {batch.global_rows} can't be split evenly over {world_size} ranks "
        f"x {micro_rows(batch, world_size)} micro_rows: {advice}"
    )


def check(manifest: Manifest, vocab: Vocab, data: DataConfig, batch: BatchConfig, world_size: int) -> None:
    """Raise ConfigError if `train_batches` would."""
    make_reader(manifest, vocab, batch.seq_len, data.packing, data.window_records)
    resolve_lanes(len(manifest.shards), data.lanes, world_size)
    accumulation(batch, world_size)


def check_held_out(manifest: Manifest, vocab: Vocab, data: DataConfig, batch: BatchConfig) -> None:
    """Raise ConfigError if `held_out_batches` would."""
    make_reader(manifest, vocab, batch.seq_len, data.packing, data.window_records)


def first_cursor(lanes: int) -> Cursor:
    """The cursor of a run that begins."""
    return {"rows": 0, "lanes": [[0, 0, 0]] * lanes, "bad_shards": []}


def merge_cursors(cursors: Sequence[Cursor]) -> Cursor:
    """The ranks' cursors of the same moment as one, from which any number of ranks can go on."""
    assert len({cursor["rows"] for cursor in cursors}) == 1, "cursors of different steps"
    lanes = [
        next((place for place in places if place), None) for places in zip(*(c["lanes"] for c in cursors), strict=True)
    ]
    assert all(lanes), "a rank's cursor is missing"
    bad_shards = sorted({name for cursor in cursors for name in cursor["bad_shards"]})
    return {"rows": cursors[0]["rows"], "lanes": lanes, "bad_shards": bad_shards}


def train_batches(
    manifest: Manifest,
    vocab: Vocab,
    data: DataConfig,
    batch: BatchConfig,
    seed: int,
    world_rank: int,
    world_size: int,
    start: Cursor | None = None,
) -> "TrainBatches":
    """One rank's batches from a cursor on, or from the beginning.

    The cursor may come from a run with other ranks, workers and micro-batches. Raises ConfigError as `check` does.
    """
    check(manifest, vocab, data, batch, world_size)
    lanes = resolve_lanes(len(manifest.shards), data.lanes, world_size)
    start = start or first_cursor(lanes)
    if len(start["lanes"]) != lanes:
        raise ConfigError(f"the run began with {len(start['lanes'])} lanes, not {lanes}: set data.lanes back to that")
    reader = make_reader(manifest, vocab, batch.seq_len, data.packing, data.window_records)
    return TrainBatches(reader, data, micro_rows(batch, world_size), seed, world_rank, world_size, start)


class TrainBatches(Iterator[Batch]):
    """One rank's endless micro-batches; close it, or use it as a context manager, to end its workers."""

    def __init__(
        self,
        reader: Reader,
        data: DataConfig,
        micro_rows: int,
        seed: int,
        world_rank: int,
        world_size: int,
        start: Cursor,
    ) -> None:
        self.reader = reader
        self.micro_rows = micro_rows
        self.world_size = world_size
        self.start = start
        self.lanes = own_lanes(start["rows"], len(start["lanes"]), world_rank, world_size)
        self.places = np.array([start["lanes"][lane] for lane in self.lanes])  # (own lanes, 3): where each stands
        self.delivered = 0
        self.bad = BadShards(start["bad_shards"], data.max_bad_shards, reader.manifest)

        readers = max(1, min(data.workers, len(self.lanes)))
        chunk_rows = -(-micro_rows // readers)
        shares = [
            LaneChunks(reader, seed, start, self.lanes[worker::readers], chunk_rows, data.max_bad_shards)
            for worker in range(readers)
        ]
        self.workers = [start_worker(share) for share in shares] if data.workers else []
        self.taps = [Tap(self.receive(chunks)) for chunks in self.workers or map(iter, shares)]

    def receive(self, chunks: Iterator) -> Iterator[Rows]:
        """The rows of one worker's chunks; raises the error that it met."""
        for chunk in chunks:
            if isinstance(chunk, ShardError):
                raise chunk
            rows, bad_shards = chunk
            for name in bad_shards:
                path = self.reader.manifest.place(name)
                self.bad.add(name, ShardError(path, "is damaged or missing, and one more than data.max_bad_shards"))
            yield rows

    def __next__(self) -> Batch:
        """The rank's next micro-batch.

        Raises ShardError for a damaged shard, RuntimeError where a worker process has died.
        """
        turns = (self.delivered + np.arange(self.micro_rows)) % len(self.lanes)  # (B,) index into own lanes
        if len(self.taps) == 1:
            rows = self.taps[0].take(self.micro_rows)
        else:
            rows = self.reader.blank_rows(self.micro_rows)
            for worker, tap in enumerate(self.taps):
                mine = np.flatnonzero(turns % len(self.taps) == worker)
                if len(mine):
                    rows[mine] = tap.take(len(mine))
        self.delivered += self.micro_rows
        last = slice(-len(self.lanes), None)
        self.places[turns[last]] = rows.facts["after"][last]
        return as_batch(rows, self.cursor(), tuple(sorted(self.bad.names)))

    def cursor(self) -> Cursor:
        """Where the run stands after the rows delivered so far; the other ranks' lanes are None."""
        lanes: list[list[int] | None] = [None] * len(self.start["lanes"])
        for lane, place in zip(self.lanes, self.places.tolist(), strict=True):
            lanes[lane] = place
        rows = self.start["rows"] + self.delivered * self.world_size
        return {"rows": rows, "lanes": lanes, "bad_shards": sorted(self.bad.names)}

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


def as_batch(rows: Rows, cursor: Cursor | None, bad_shards: tuple[str, ...] = ()) -> Batch:
    """Rows as tensors; in pinned memory where they will be copied to a GPU."""
    pin = torch.cuda.is_initialized()
    ids = torch.empty(rows.ids.shape, dtype=torch.int32, pin_memory=pin)
    segments = torch.empty(rows.segments.shape, dtype=torch.int16, pin_memory=pin)
    ids.numpy()[:] = rows.ids
    segments.numpy()[:] = rows.segments
    return Batch(
        ids=ids,
        segments=segments,
        maskable=torch.from_numpy(rows.facts["maskable"].copy()),
        row_keys=torch.from_numpy(rows.facts["key"].copy()),
        cursor=cursor,
        tokens=int(rows.facts["tokens"].sum()),
        documents=int(rows.facts["documents"].sum()),
        bad_shards=bad_shards,
    )


def held_out_batches(
    manifest: Manifest,
    vocab: Vocab,
    data: DataConfig,
    batch: BatchConfig,
    world_rank: int,
    world_size: int,
    max_rows: int | None = None,
) -> Iterator[Batch]:
    """One pass over the held-out rows, or the first `max_rows` of them: this rank's share.

    Row g goes to rank g % world_size. All ranks get the same number of batches; what is missing in the last is padding.
    Every rank reads all windows: the shares are then even to a row, and no rank waits for another's last batch.
    """
    reader = make_reader(manifest, vocab, batch.seq_len, data.packing, data.window_records)
    pending = reader.blank_rows(0)
    rows = batches = 0
    for number, window in enumerate(windows_in_order(manifest, data.window_records)):
        block = reader.read(window, window.shard, window.first)
        block.facts["key"] = hashed(0, 0, number, np.arange(len(block))).view(np.int64)
        if max_rows is not None:
            block = block[: max_rows - rows]
        pending = concatenate([pending, block[(world_rank - rows) % world_size :: world_size]])
        rows += len(block)
        while len(pending) >= batch.micro_rows:
            yield as_batch(pending[: batch.micro_rows], None)
            pending = pending[batch.micro_rows :]
            batches += 1
        if rows == max_rows:
            break
    if batches * batch.micro_rows * world_size < rows:
        last = reader.blank_rows(batch.micro_rows)
        last[: len(pending)] = pending
        yield as_batch(last, None)
