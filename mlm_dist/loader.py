"""Worker processes: each reads its share of a rank's lanes ahead of training and hands over chunks of rows."""

import itertools
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from mlm_dist.lanes import Rows, stack
from mlm_dist.manifest import ShardError
from mlm_dist.mixture import Mixture, places_in

# A lane's next window takes some 10 ms; lanes need theirs at nearly the same time. This many micro-batches bridge that.
CHUNKS_AHEAD = 8


class LaneChunks(IterableDataset):
    """What one worker reads: endless chunks of rows of its lanes, one row of each in turn.

    Yields (rows, bad shards so far with their reasons), or a ShardError, and then ends.
    """

    def __init__(
        self,
        mixture: Mixture,
        seed: int,
        start: Mapping[str, Any],
        lanes: list[int],
        chunk_rows: int,
        max_bad_shards: int,
    ) -> None:
        self.mixture = mixture
        self.seed = seed
        self.start = start
        self.lanes = lanes
        self.chunk_rows = chunk_rows
        self.bad = mixture.bad_shards(start["bad_shards"], max_bad_shards)

    def __iter__(self) -> Iterator[tuple[Rows, dict[str, str]] | ShardError]:
        mixture, starts = self.mixture, self.start["lanes"]
        places = {lane: places_in(starts[lane], len(mixture.readers)) for lane in self.lanes}
        for lane in self.lanes:
            mixture.announce(self.seed, lane, len(starts), places[lane])
        lanes = [mixture.rows(self.seed, lane, len(starts), places[lane], self.bad) for lane in self.lanes]
        turns = itertools.cycle(lanes)
        try:
            while True:
                rows = [next(lane) for lane in itertools.islice(turns, self.chunk_rows)]
                yield stack(rows), dict(self.bad.reasons)
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
