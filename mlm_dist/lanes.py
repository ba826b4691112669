"""The order of training: shards dealt to lanes, lanes read window by window, and the cursor that says where one stands.

A lane is an endless sequence of rows. Each epoch a keyed permutation deals all shards to the lanes; a lane goes through
its shards window by window and begins its next epoch by itself. Which window comes next follows from the manifest's
counts alone, so a run goes on from a cursor without reading what came before. Row `g` of the run is the next row of
lane `g % lanes`, so the order does not depend on who reads it: rank `r` of `n` owns the lanes `r::n` and delivers the
rows with `g % n == r`.
"""

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from mlm_dist.manifest import Manifest, ShardError
from mlm_dist.packing import Packed, Pieces, Stretch, hashed, lay_out, pack, permutation
from mlm_dist.schema import ConfigError
from mlm_dist.shards import read_records
from mlm_dist.vocab import Vocab

Block = TypeVar("Block", bound=Sized)

MOST_LANES = 64

# What is known of a row beside its tokens: one int64 in each of these columns. TOKENS counts the positions that are not
# padding, TEXT those that hold tokens of documents; OPENED, the tokens of the documents that begin in the row, wherever
# the rest of them stands. EPOCH, WINDOW and ROW are the place that follows it in its lane; SOURCE is the number of the
# source that it comes from, -1 for a row of padding.
KEY, MASKABLE, TOKENS, TEXT, DOCUMENTS, OPENED, SOURCE, EPOCH, WINDOW, ROW = range(10)
FACTS = 10
AFTER = slice(EPOCH, ROW + 1)


@dataclass(frozen=True)
class Window:
    """Consecutive records of one shard, read in one go and packed together."""

    shard: int
    first: int  # record in the shard
    count: int


def window_of(shard: int, samples: int, part: int, parts: int) -> Window:
    """Window `part` of a shard that is cut in `parts` of nearly equal size."""
    first = samples * part // parts
    return Window(shard, first, samples * (part + 1) // parts - first)


class LaneEpoch:
    """One lane's share of one epoch: its shards in order, as a sequence of windows of at most `window_records`."""

    def __init__(self, manifest: Manifest, window_records: int, seed: int, epoch: int, lane: int, lanes: int) -> None:
        self.shards = permutation(len(manifest.shards), seed, epoch)[lane::lanes].tolist()
        self.samples = [manifest.shards[shard].samples for shard in self.shards]
        self.windows = [-(-samples // window_records) for samples in self.samples]
        self.ends = np.cumsum(self.windows)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, window: int) -> Window:
        place = np.searchsorted(self.ends, window, side="right")
        part = window - int(self.ends[place]) + self.windows[place]
        return window_of(self.shards[place], self.samples[place], part, self.windows[place])

    def shard_after(self, window: int) -> int | None:
        """The shard that comes after this window's; None where that is the epoch's last."""
        place = int(np.searchsorted(self.ends, window, side="right")) + 1
        return self.shards[place] if place < len(self.shards) else None

    def after_shard_of(self, window: int) -> int:
        """The first window of the shard that comes after this window's."""
        return int(self.ends[np.searchsorted(self.ends, window, side="right")])


def windows_in_order(manifest: Manifest, window_records: int) -> Iterator[Window]:
    """All windows of all shards, unshuffled: the held-out order."""
    for shard, info in enumerate(manifest.shards):
        parts = -(-info.samples // window_records)
        yield from (window_of(shard, info.samples, part, parts) for part in range(parts))


def resolve_lanes(shards: int, lanes: int | None, world_size: int, source: str = "") -> int:
    """The number of lanes: as stated, or the largest power of two that is at most 64 and at most the number of shards.

    Of several sources it's the one with the fewest shards that counts; errors name it. Raises ConfigError where the
    ranks cannot share the lanes evenly, or there are more than shards.
    """
    held = f"{shards} shard{'' if shards == 1 else 's'}{source and f' of data.sources.{source}'}"
    if shards < world_size:
        # build.py makes more than 64 only as --shard-tokens says, and fewer only for want of text or of documents
        remedy = (
            "build them again with lower --shard-tokens"
            if shards >= MOST_LANES
            else "build them from more text, or where that is a few large documents with lower --document-bytes"
        )
        raise ConfigError(
            f"{held} can't feed {world_size} ranks, each of which needs one of its own: {remedy}, "
            "or start fewer ranks (on CPUs: CPU_RANKS=1 launch/local.sh ...)"
        )
    count = lanes or 1 << (min(MOST_LANES, shards).bit_length() - 1)
    if count <= shards and count % world_size == 0:
        return count
    fitting = range(world_size, shards + 1, world_size)
    nearest = sorted(sorted(fitting, key=lambda other: abs(other - count))[:4])
    problem = f"exceeds the {held}" if count > shards else f"can't be shared evenly by {world_size} ranks"
    raise ConfigError(f"data.lanes = {count} {problem}; lanes that work here: {', '.join(map(str, nearest))}")


def own_lanes(rows: int, lanes: int, world_rank: int, world_size: int) -> list[int]:
    """This rank's lanes in the order of their turns, after `rows` rows have been delivered over all ranks."""
    return sorted(range(world_rank, lanes, world_size), key=lambda lane: (lane - rows) % lanes)


# ---- reading


@dataclass(frozen=True)
class Rows:
    """n rows on their way to a batch; ids and segments as arrays, or as the tensors of a batch."""

    ids: Any  # (n, T) uint16 or uint32; int32 in a tensor
    segments: Any  # (n, T) int16
    facts: np.ndarray  # (n, FACTS) int64

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, where: slice) -> "Rows":
        return Rows(self.ids[where], self.segments[where], self.facts[where])

    def __setitem__(self, where: slice | np.ndarray, rows: "Rows") -> None:
        self.ids[where], self.segments[where], self.facts[where] = rows.ids, rows.segments, rows.facts


def join(one: Rows, two: Rows) -> Rows:
    """Rows one after the other."""
    return Rows(
        *(np.concatenate([getattr(part, name) for part in (one, two)]) for name in ("ids", "segments", "facts"))
    )


@dataclass(frozen=True)
class WindowRows:
    """The rows of one window, planned and not yet written out."""

    packed: Packed
    facts: np.ndarray  # (n, FACTS) int64

    def __len__(self) -> int:
        return len(self.facts)


class Tap(Generic[Block]):
    """Rows from an iterator of blocks, each with the number of the first row that is wanted of it."""

    def __init__(self, blocks: Iterator[tuple[Block, int]]) -> None:
        self.blocks = blocks
        self.block: Block | None = None
        self.at = self.end = 0  # its rows that are still to be taken

    def take(self, count: int) -> Iterator[tuple[Block, slice]]:
        """The next `count` rows, as slices of blocks."""
        while count:
            while self.at == self.end:
                self.block, self.at = next(self.blocks)
                self.end = len(self.block)
            first, self.at = self.at, min(self.at + count, self.end)
            count -= self.at - first
            yield self.block, slice(first, self.at)


class Planned(NamedTuple):
    """Rows of a window, and the rows of a block that they become."""

    window: WindowRows
    rows: slice
    to: np.ndarray  # (rows,) int64


def write_out(planned: Sequence[Planned], seq_len: int, vocab: Vocab) -> Rows:
    """A block of rows, every one of which must be planned."""
    ids, segments = lay_out([Stretch(part.window.packed, part.rows, part.to) for part in planned], seq_len, vocab)
    facts = np.empty((len(ids), FACTS), np.int64)
    facts[np.concatenate([part.to for part in planned])] = np.concatenate(
        [part.window.facts[part.rows] for part in planned]
    )
    return Rows(ids, segments, facts)


class BadShards:
    """The shards that were given up, each with its reason, against the number that may be.

    reasons: those that are known already, by label: `000003.tar`, or `law/000003.tar` of a source with a name
    most:    how many may be given up
    shards:  number of shards of each source, by name
    """

    def __init__(self, reasons: Mapping[str, str], most: int, shards: Mapping[str, int]) -> None:
        self.reasons = dict(reasons)
        self.most = most
        self.shards = shards

    def add(self, label: str, error: ShardError) -> None:
        """Count a shard; raises the error where the budget is spent, or nothing is left of a source to go on with."""
        if not error.of_the_shard:
            raise error
        reasons = {label: error.reason} | self.reasons
        source = source_of(label)
        lost = sum(source_of(other) == source for other in reasons)
        if len(reasons) > self.most:
            raise error
        if lost >= self.shards[source]:
            of_it = f" of source {source}" if source else ""
            raise ShardError(
                f"{error.args[0]}: {error.args[1]}, and no other shard{of_it} is left: put the shards right"
            )
        self.reasons = reasons


def source_of(label: str) -> str:
    """The source's name in a shard's label."""
    name, slash, _ = label.partition("/")
    return name if slash and name != ".." else ""  # tars of text may stand one folder up


@dataclass(frozen=True)
class Reader:
    """Reads windows of shards and packs them."""

    manifest: Manifest
    vocab: Vocab
    seq_len: int
    packing: str  # a key of packing.MODES
    window_records: int
    plain: np.ndarray  # (V,) bool: the id is no special one
    source: int  # its number among the sources, 0 where there is one
    name: str  # of the source, empty where there is one

    def label(self, shard: int) -> str:
        """What a shard is called in the log and the cursor."""
        return f"{self.name}{self.name and '/'}{self.manifest.shards[shard].name}"

    def read(self, window: Window, *key: int) -> WindowRows:
        """The window's documents as rows, their order a function of the key; KEY and AFTER are left to the caller.

        Raises ShardError where the shard is damaged, missing or holds ids that the tokenizer doesn't have.
        """
        stretch = (self.manifest, window.shard, window.first, window.count, self.vocab)
        try:
            records = list(read_records(*stretch))
        except ShardError:
            if not self.manifest.mended(window.shard):
                raise
            records = list(read_records(*stretch))
        tokens = np.concatenate([record.tokens for record in records])
        lengths = np.concatenate([record.lengths for record in records])
        if len(tokens) and tokens.max() >= self.vocab.size:
            raise ShardError(
                self.manifest.place(self.manifest.shards[window.shard].name),
                f"holds token id {tokens.max()}, and the tokenizer only has {self.vocab.size} ids: they don't match",
                "foreign_ids",
            )
        packed = pack(tokens, lengths, self.seq_len, self.packing, key)
        facts = np.empty((len(packed), FACTS), np.int64)
        facts[:, MASKABLE] = packed.text - self.specials(packed)
        facts[:, TOKENS] = packed.tokens
        facts[:, TEXT] = packed.text
        facts[:, DOCUMENTS] = packed.openings
        facts[:, OPENED] = packed.opened
        facts[:, SOURCE] = self.source
        return WindowRows(packed, facts)

    def specials(self, packed: Packed) -> np.ndarray | int:
        """The special ids in the text of each row: rare, and mostly outside the range of the others."""
        tokens = packed.documents
        if not len(tokens) or self.plain[tokens.min() :].all():
            return 0
        before = np.concatenate([[0], np.cumsum(~self.plain[tokens])])
        pieces = Pieces(*packed.pieces)
        held = before[pieces.start + pieces.length] - before[pieces.start]
        return np.bincount(pieces.row, held, len(packed)).astype(np.int64)

    def blank_rows(self, count: int) -> Rows:
        """Rows of padding alone."""
        shape = (count, self.seq_len)
        ids = np.full(shape, self.vocab.pad_id, self.manifest.dtype)
        facts = np.zeros((count, FACTS), np.int64)
        facts[:, SOURCE] = -1
        return Rows(ids, np.zeros(shape, np.int16), facts)


def make_reader(
    manifest: Manifest,
    vocab: Vocab,
    seq_len: int,
    packing: str,
    window_records: int,
    source: int = 0,
    name: str = "",
) -> Reader:
    """A Reader for shards that belong to the tokenizer; raises ConfigError for others."""
    if (manifest.tokenizer_sha256, manifest.vocab_size) != (vocab.fingerprint, vocab.size):
        raise ConfigError(
            f"the tokenizer does not match the shards in {manifest.place()}: they were built with another "
            f"({manifest.vocab_size} ids, this one has {vocab.size}); use the one beside them, or build them again"
        )
    if not manifest.tokens:
        raise ConfigError(f"the shards in {manifest.place()} hold no tokens; build them from text that isn't empty")
    plain = np.ones(vocab.size, bool)
    plain[list(vocab.special_ids)] = False
    return Reader(manifest, vocab, seq_len, packing, window_records, plain, source, name)


def announce(reader: Reader, seed: int, lane: int, lanes: int, place: Sequence[int]) -> None:
    """Have the shard fetched at which a lane begins, where it is remote."""
    if reader.manifest.source is None:
        return
    epoch, window, _ = place
    order = LaneEpoch(reader.manifest, reader.window_records, seed, epoch, lane, lanes)
    reader.manifest.ahead(order[window].shard, lanes)


def announce_next(reader: Reader, order: LaneEpoch, window: int, seed: int, epoch: int, lane: int, lanes: int) -> None:
    """Have the shard fetched that a lane reads after that of this window."""
    following = order.shard_after(window)
    if following is not None:
        reader.manifest.ahead(following, lanes)
    else:
        announce(reader, seed, lane, lanes, (epoch + 1, 0, 0))


def lane_rows(
    reader: Reader, seed: int, lane: int, lanes: int, place: Sequence[int], bad: BadShards
) -> Iterator[tuple[WindowRows, int]]:
    """The rows of one lane from `place` (epoch, window, row) on, endlessly: windows, each with its first row to take.

    Nothing that came before the place is read again. Raises the ShardError that `bad` refuses.
    """
    epoch, window, row = place
    name = reader.source * lanes + lane  # a lane of another source has another name, and so do its rows
    announced = False
    while True:
        order = LaneEpoch(reader.manifest, reader.window_records, seed, epoch, lane, lanes)
        while window < len(order):
            where = order[window]
            if where.first == 0 or not announced:
                announced = True
                announce_next(reader, order, window, seed, epoch, lane, lanes)
            try:
                rows = reader.read(where, seed, epoch, where.shard, where.first)
            except ShardError as error:
                bad.add(reader.label(where.shard), error)
                window, row = order.after_shard_of(window), 0
                continue
            assert row <= len(rows), "the cursor is of other shards, or of rows of another length"
            numbers = np.arange(len(rows))
            rows.facts[:, KEY] = hashed(epoch, name, window, numbers).view(np.int64)
            rows.facts[:, AFTER] = epoch, window, 0
            rows.facts[:, ROW] = numbers + 1
            window += 1
            rows.facts[-1:, AFTER] = (epoch, window, 0) if window < len(order) else (epoch + 1, 0, 0)
            yield rows, row
            row = 0
        epoch, window = epoch + 1, 0
