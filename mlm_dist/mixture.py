"""Several sources of shards with weights: which of them gives the next row of a lane.

Every lane of the run has a lane of its own in each source, with its own epochs: a source is read as if it were alone.
The source of a lane's next row is a function of the rows that the lane took from each so far, in whole numbers, so that
the order is the same everywhere and goes on from those counts. A lane begins a row later in it than the lane before,
so that the rows of one round over the lanes are mixed as well.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import repeat
from pathlib import Path

import numpy as np

from mlm_dist import remote
from mlm_dist.cache import Cache
from mlm_dist.lanes import (
    MOST_LANES,
    BadShards,
    Planned,
    Reader,
    Rows,
    Tap,
    WindowRows,
    announce,
    lane_rows,
    make_reader,
    resolve_lanes,
    source_of,
    write_out,
)
from mlm_dist.manifest import Manifest
from mlm_dist.packing import hashed
from mlm_dist.schema import ConfigError, setting
from mlm_dist.vocab import Vocab


@dataclass(frozen=True)
class SourceConfig:
    shards: str = setting(help="the folder that shards/build.py made")
    weight: float = setting(1.0, above=0, help="the source's share of the rows, against the others' weights")


@dataclass(frozen=True)
class Source:
    """One split of one source. `number`: its place among the sources of the run, by name."""

    manifest: Manifest
    name: str = ""
    weight: float = 1.0
    number: int = 0


Sources = tuple[Source, ...]


def open_sources(folders: Mapping[str, SourceConfig], split: str, cache: Cache) -> Sources:
    """The sources that have such a split ("train" or "valid"), by name; every source must have a "train" split.

    Raises ConfigError for a folder that is not whole, and where two have different tokenizers.
    """
    sources = ()
    for number, (name, folder) in enumerate(sorted(folders.items())):
        address = remote.join(folder.shards, split)
        if not remote.is_remote(folder.shards) and (Path(folder.shards) / "manifest.json").exists():
            raise ConfigError(f"{folder.shards} is one split; give the folder that it stands in, with its tokenizer")
        manifest = (remote.open_split if split == "train" else remote.find_split)(address, cache)
        if manifest is not None:
            sources += (Source(manifest, name, folder.weight, number),)
    for other in sources[1:]:
        one, two = sources[0].manifest, other.manifest
        if (one.tokenizer_sha256, one.vocab_size, one.dtype) != (two.tokenizer_sha256, two.vocab_size, two.dtype):
            raise ConfigError(
                f"the shards in {one.place()} and {two.place()} were built with different tokenizers ({one.vocab_size} "
                f"and {two.vocab_size} ids): build one of them again with `--tokenizer` and the folder of the other's"
            )
    remotes = sum(source.manifest.source is not None for source in sources)
    return tuple(replace(source, manifest=remote.shared(source.manifest, remotes)) for source in sources)


def is_roomy(sources: Sources, lanes: int | None) -> bool:
    """Whether the cache holds two shards of every lane and remote source."""
    count = lanes_of(sources, lanes, 1)
    remotes = [source.manifest.source for source in sources if source.manifest.source]
    return all(each.roomy(count) for each in remotes)


def named(sources: Sources) -> dict[int, str]:
    """The sources that have a name, by number: a single folder has none."""
    return {source.number: source.name for source in sources if source.name}


def hash_of(sources: Sources) -> str:
    """What tells the contents of the sources from any others: of a single one its manifest's hash."""
    if len(sources) == 1:
        return sources[0].manifest.hash
    return hashlib.sha256(json.dumps([[s.name, s.manifest.hash] for s in sources]).encode()).hexdigest()


def counts(sources: Sources) -> dict[str, dict[str, int]]:
    """How much each source holds, by its name."""
    parts = {source.name: source.manifest for source in sources}
    return {
        name: {"shards": len(part.shards), "documents": part.documents, "tokens": part.tokens}
        for name, part in parts.items()
    }


def lanes_of(sources: Sources, lanes: int | None, world_size: int) -> int:
    """The number of lanes, bounded by the source with the fewest shards. Raises ConfigError as `resolve_lanes` does."""
    smallest = min(sources, key=lambda source: len(source.manifest.shards))
    return resolve_lanes(len(smallest.manifest.shards), lanes, world_size, smallest.name)


# ---- whose turn it is


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportions of the weights, as these are written: 0.7, 0.3 -> 7, 3."""
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return tuple(weight // math.gcd(*whole) for weight in whole)


class Turns(Iterator[int]):
    """The sources of a lane's rows in turn, endlessly, by the rows that were taken of each.

    Of the k sources that are at least 1 / (2k - 2) rows behind their share, the one that can wait the least. After any
    number of rows each source is then within 1 - 1 / (2k - 2) rows of its share, the best that is possible for all
    weights (Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980).
    """

    def __init__(self, weights: Sequence[int], taken: Sequence[int]) -> None:
        self.weights, self.total = weights, sum(weights)
        self.periods = [math.lcm(*weights) // weight for weight in weights]  # rows between two turns, to scale
        self.twice = 2 * len(weights) - 2
        self.taken = list(taken)
        self.rows = sum(taken)

    def __next__(self) -> int:
        self.rows += 1
        chosen = earliest = None
        for source, (weight, taken) in enumerate(zip(self.weights, self.taken, strict=True)):
            if self.twice * (weight * self.rows - self.total * taken) >= self.total:
                latest = (self.twice * (taken + 1) - 1) * self.periods[source]
                if earliest is None or latest < earliest:
                    chosen, earliest = source, latest
        assert chosen is not None, "the shares add up to one row a turn"
        self.taken[chosen] += 1
        return chosen


def turns_of(weights: Sequence[int], lane: int, taken: Sequence[int]) -> Turns:
    """The turns of one lane that has taken so many rows of each source."""
    turns = Turns(weights, [0] * len(weights))
    for _ in range(lane % MOST_LANES):
        next(turns)
    return Turns(weights, [before + since for before, since in zip(turns.taken, taken, strict=True)])


# ---- the rows of a lane

# Where a lane stands in a source: [epoch, window, row, rows taken]. The order of one source takes no count of rows, and
# its lanes are [epoch, window, row].
Place = list[int]


def places_in(lane: Sequence, sources: int) -> list[Place]:
    """A lane of a cursor as its place in each source."""
    if sources == 1:
        return [[*lane, 0]]
    assert len(lane) == sources, "the cursor is of other sources"
    return [list(place) for place in lane]


def cursor_lane(places: list[Place]) -> list:
    """The same the other way round."""
    return places[0][:3] if len(places) == 1 else places


def first_lane(sources: int) -> list:
    """A lane of a cursor at its beginning."""
    return cursor_lane([[0, 0, 0, 0]] * sources)


@dataclass(frozen=True)
class Mixture:
    """The sources of a run, ready to read. weights: whole numbers, one for each reader."""

    readers: tuple[Reader, ...]
    weights: tuple[int, ...]

    def write_out(self, planned: Sequence[Planned]) -> Rows:
        return write_out(planned, self.readers[0].seq_len, self.readers[0].vocab)

    def blank_rows(self, count: int) -> Rows:
        return self.readers[0].blank_rows(count)

    def bad_shards(self, reasons: Mapping[str, str], most: int) -> BadShards:
        """The count of shards given up, from those that are known on."""
        return BadShards(reasons, most, {reader.name: len(reader.manifest.shards) for reader in self.readers})

    def path(self, label: str) -> str | Path:
        """The place of a shard, by its label."""
        source = source_of(label)
        manifest = next(reader.manifest for reader in self.readers if reader.name == source)
        return manifest.place(label.removeprefix(f"{source}/") if source else label)

    def announce(self, seed: int, lane: int, lanes: int, places: list[Place]) -> None:
        """Have the shards fetched at which a lane begins, where they are remote."""
        for reader, place in zip(self.readers, places, strict=True):
            announce(reader, source_seed(seed, reader.source), lane, lanes, place[:3])

    def lane(self, seed: int, lane: int, lanes: int, places: list[Place], bad: BadShards) -> "LaneTaps":
        """The rows of one lane from its place in each source on, endlessly."""
        taps = [
            Tap(lane_rows(reader, source_seed(seed, reader.source), lane, lanes, place[:3], bad))
            for reader, place in zip(self.readers, places, strict=True)
        ]
        turns = repeat(0) if len(taps) == 1 else turns_of(self.weights, lane, [place[3] for place in places])
        return LaneTaps(taps, turns)


@dataclass(frozen=True)
class LaneTaps:
    """A lane's rows of each source, and whose turn it is."""

    taps: list[Tap[WindowRows]]
    turns: Iterator[int]

    def take(self, to: np.ndarray) -> Iterator[Planned]:
        """The lane's next rows, to become the rows `to` (n,) of a block. Raises as `lane_rows` does."""
        if len(self.taps) == 1:
            shares = [to]
        else:
            sources = np.fromiter(self.turns, np.int64, len(to))
            shares = [to[sources == source] for source in range(len(self.taps))]
        for tap, share in zip(self.taps, shares, strict=True):
            done = 0
            for window, rows in tap.take(len(share)):
                count = rows.stop - rows.start
                yield Planned(window, rows, share[done : done + count])
                done += count


def source_seed(seed: int, source: int) -> int:
    """The seed of a source's order: sources with equally many shards are dealt differently."""
    return seed if source == 0 else int(hashed(seed, source)[0] >> np.uint64(1))


def mix(sources: Sources, vocab: Vocab, seq_len: int, packing: str, window_records: int) -> Mixture:
    """Sources that belong to the tokenizer as a Mixture. Raises ConfigError for others."""
    readers = tuple(
        make_reader(source.manifest, vocab, seq_len, packing, window_records, source.number, source.name)
        for source in sources
    )
    return Mixture(readers, whole_weights([source.weight for source in sources]))


def as_sources(shards: Manifest | Sources) -> Sources:
    """A manifest alone is the only source."""
    return (Source(shards),) if isinstance(shards, Manifest) else tuple(shards)
