"""Where a run stands in its data: the cursor that it goes on from, and how many epochs of each source that comes to."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlm_dist.lanes import LaneEpoch, Reader
from mlm_dist.mixture import Mixture, cursor_lane, first_lane, source_seed
from mlm_dist.packing import SPECIALS_PER_PIECE

# Plain JSON: {"rows": rows delivered over all ranks, "lanes": [lane, ...], "bad_shards": {label: reason}}. A lane is
# [epoch, window, row]; of several sources, [epoch, window, row, rows taken] for each in the order of their names. The
# lanes of other ranks are None until `merge_cursors` has put the ranks' cursors together.
Cursor = dict[str, Any]


class Stand(NamedTuple):
    """Where a run stands after a batch of one rank; cheaper to keep with every batch than the cursor that it makes."""

    rows: int  # delivered over all ranks
    lanes: int
    own: Sequence[int]  # the lanes of this rank
    places: np.ndarray  # (own lanes, sources, 4) int64: epoch, window, row, rows taken
    bad_shards: Mapping[str, str]

    def cursor(self) -> Cursor:
        """The cursor; the other ranks' lanes are None."""
        lanes: list[list | None] = [None] * self.lanes
        for lane, places in zip(self.own, self.places.tolist(), strict=True):
            lanes[lane] = cursor_lane(places)
        return {"rows": self.rows, "lanes": lanes, "bad_shards": dict(self.bad_shards)}


def first_cursor(lanes: int, sources: int = 1) -> Cursor:
    """The cursor of a run that begins."""
    return {"rows": 0, "lanes": [first_lane(sources)] * lanes, "bad_shards": {}}


def upgraded(cursor: Cursor) -> Cursor:
    """A saved cursor as one of today: earlier ones list the bad shards without their reasons."""
    if isinstance(cursor["bad_shards"], list):
        return cursor | {"bad_shards": dict.fromkeys(cursor["bad_shards"], "unreadable")}
    return cursor


def merge_cursors(cursors: Sequence[Cursor]) -> Cursor:
    """The ranks' cursors of the same moment as one, from which any number of ranks can go on."""
    assert len({cursor["rows"] for cursor in cursors}) == 1, "cursors of different steps"
    lanes = [
        next((place for place in places if place), None) for places in zip(*(c["lanes"] for c in cursors), strict=True)
    ]
    assert all(lanes), "a rank's cursor is missing"
    bad_shards = {label: reason for cursor in cursors for label, reason in cursor["bad_shards"].items()}
    return {"rows": cursors[0]["rows"], "lanes": lanes, "bad_shards": dict(sorted(bad_shards.items()))}


class Progress:
    """How many epochs of each source have been read, parts of them counted: the mean over the lanes.

    Within its epoch a lane has read the share of its records that stand before its window, and of the window the rows
    it has taken out of those that the window should have: the manifest tells tokens and documents, and a window isn't
    packed for a number. A shard that was skipped counts as read.
    """

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self.readers, self.seed = mixture.readers, seed
        self.orders: dict[tuple[int, int], tuple[int, LaneEpoch]] = {}  # the last one of each source and lane

    def __call__(self, stand: Stand) -> list[float]:
        """This rank's share of the mean, by source: the ranks' shares add up to it."""
        own = list(zip(stand.own, stand.places.tolist(), strict=True))
        return [
            sum(self._lane(source, lane, stand.lanes, places[source]) for lane, places in own) / stand.lanes
            for source in range(len(self.readers))
        ]

    def _lane(self, source: int, lane: int, lanes: int, place: Sequence[int]) -> float:
        epoch, window, row, _ = place
        reader, order = self.readers[source], self._order(source, lane, lanes, epoch)
        where = order[window]
        before = sum(order.samples[: order.shards.index(where.shard)]) + where.first
        read = min(row / expected_rows(reader, where.shard, where.first, where.count), 1.0) * where.count
        return epoch + (before + read) / sum(order.samples)

    def _order(self, source: int, lane: int, lanes: int, epoch: int) -> LaneEpoch:
        kept_epoch, order = self.orders.get((source, lane), (-1, None))
        if order is None or kept_epoch != epoch:
            reader = self.readers[source]
            seed = source_seed(self.seed, reader.source)
            order = LaneEpoch(reader.manifest, reader.window_records, seed, epoch, lane, lanes)
            self.orders[source, lane] = epoch, order
        return order


def expected_rows(reader: Reader, shard: int, first: int, count: int) -> float:
    """The rows that consecutive records of a shard should be packed in, at least 1.

    A document of n tokens is n / (T - 2) pieces of a row's length and half a one more, or one where it is shorter.
    """
    begin = reader.manifest.shards[shard].first_record + first
    records = reader.manifest.records[begin : begin + count]
    tokens, documents = int(records["tokens"].sum()), int(records["documents"].sum())
    pieces = max(documents, tokens / (reader.seq_len - SPECIALS_PER_PIECE) + documents / 2)
    rows = pieces if reader.packing == "pad" else (tokens + SPECIALS_PER_PIECE * pieces) / reader.seq_len
    return max(rows, 1.0)
