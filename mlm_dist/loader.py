"""Worker processes: each reads its share of a rank's lanes ahead of training and hands over blocks of rows."""

import signal
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from mlm_dist.lanes import Planned, Rows
from mlm_dist.manifest import ShardError
from mlm_dist.mixture import LaneTaps, Mixture, places_in
from mlm_dist.signals import STOP_SIGNALS, end_with_parent

# A lane's next window takes some 10 ms; lanes need theirs at nearly the same time. This many blocks bridge that.
BLOCKS_AHEAD = 8
# Several rows of a lane are written out at a time, as far as a block then holds no more positions than this: 1 MB.
MOST_ROUNDS, BLOCK_POSITIONS = 8, 2**18


class LaneBlocks(IterableDataset):
    """What one worker reads: endless blocks of rows of its lanes, one row of each in turn.

    first_rows: rows of a block in the first round, so that the first batch needn't wait for every lane's window;
                blocks grow from there

    Yields (rows, bad shards so far with their reasons), or a ShardError, and then ends.
    """

    def __init__(
        self,
        mixture: Mixture,
        seed: int,
        start: Mapping[str, Any],
        lanes: list[int],
        first_rows: int,
        max_bad_shards: int,
    ) -> None:
        self.mixture = mixture
        self.seed = seed
        self.start = start
        self.lanes = lanes
        self.first_rows = first_rows
        self.bad = mixture.bad_shards(start["bad_shards"], max_bad_shards)

    def __iter__(self) -> Iterator[tuple[Rows, dict[str, str]] | ShardError]:
        mixture, starts = self.mixture, self.start["lanes"]
        places = {lane: places_in(starts[lane], len(mixture.readers)) for lane in self.lanes}
        for lane in self.lanes:
            mixture.announce(self.seed, lane, len(starts), places[lane])
        lanes = [mixture.lane(self.seed, lane, len(starts), places[lane], self.bad) for lane in self.lanes]
        for group, rounds in self.groups(lanes):
            planned, error = plan(group, rounds)
            if planned:
                yield mixture.write_out(planned), dict(self.bad.reasons)
            if error:
                yield error  # as a value: raised, it would reach the parent as a traceback in another error's text
                return

    def groups(self, lanes: list[LaneTaps]) -> Iterator[tuple[list[LaneTaps], int]]:
        """The lanes of each block and the rows that it takes of each, endlessly."""
        for first in range(0, len(lanes), self.first_rows):
            yield lanes[first : first + self.first_rows], 1
        most = max(1, min(MOST_ROUNDS, BLOCK_POSITIONS // (self.mixture.readers[0].seq_len * len(lanes))))
        rounds = 1
        while True:
            rounds = min(2 * rounds, most)
            yield lanes, rounds


def plan(lanes: list[LaneTaps], rounds: int) -> tuple[list[Planned], ShardError | None]:
    """So many rows of each lane, in turn; where a lane fails, those that come before its first missing row."""
    numbers = np.arange(rounds * len(lanes))
    is_planned = np.zeros(len(numbers), bool)
    planned: list[Planned] = []
    errors: dict[int, ShardError] = {}
    for place, lane in enumerate(lanes):
        try:
            for part in lane.take(numbers[place :: len(lanes)]):
                planned.append(part)
                is_planned[part.to] = True
        except ShardError as error:
            errors[place] = error
    if not errors:
        return planned, None
    first = int(np.argmin(is_planned))
    cut = [(part, int(np.searchsorted(part.to, first))) for part in planned]
    before = [Planned(p.window, slice(p.rows.start, p.rows.start + count), p.to[:count]) for p, count in cut if count]
    return before, errors[first % len(lanes)]


def shield(worker: int) -> None:
    """Set up a worker process. The parent decides when it ends: a signal to the whole group must not end it first.

    Where the parent was killed, torch's own would wait for ever for its blocks to be read.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def unchanged(block: Any) -> Any:
    return block


def start_worker(blocks: LaneBlocks) -> Iterator:
    """Read `blocks` in a process of its own.

    Forked, since a spawned one imports everything anew (seconds); it touches neither the GPU nor the process group.
    The arrays come through a pipe: no shared memory that could run out.
    """
    loader = DataLoader(
        blocks,
        batch_size=None,
        collate_fn=unchanged,
        num_workers=1,
        prefetch_factor=BLOCKS_AHEAD,
        worker_init_fn=shield,
        generator=torch.Generator(),  # else it draws from the global one
        multiprocessing_context="fork",
    )
    return iter(loader)
