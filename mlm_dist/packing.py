"""Documents of one window -> rows of T positions: [CLS] piece [SEP] [CLS] piece [SEP] ... [PAD].

A document longer than T - 2 tokens is cut in pieces of T - 2 and a rest. The pieces are placed by best fit decreasing
(Johnson et al., "Worst-case performance bounds for simple one-dimensional packing algorithms", 1974): longest first,
each in the row where the least space is left over. Rows are then put in an order given by a key, so that the pieces of
a long document don't stand in a run.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from mlm_dist.vocab import Vocab

SPECIALS_PER_PIECE = 2  # [CLS] and [SEP]
SMALLEST_PIECE = 1 + SPECIALS_PER_PIECE
LAST_64_BITS = 2**64 - 1


def hashed(*parts: int | np.ndarray) -> np.ndarray:
    """A 64-bit hash of non-negative integers, the same on any platform (SplitMix64's mixer, Steele et al. 2014).

    Parts that are arrays are hashed element by element: returns uint64 of the parts' broadcast shape, at least 1-D.
    """
    state = 0
    for place, part in enumerate(parts):
        if isinstance(part, np.ndarray):
            return _hashed_arrays(np.array([state], np.uint64), parts[place:])
        # as Python's integers: a tenth of the time that numpy takes for a single number
        state = ((state ^ int(part)) + 0x9E3779B97F4A7C15) & LAST_64_BITS
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & LAST_64_BITS
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & LAST_64_BITS
        state = state ^ (state >> 31)
    return np.array([state], np.uint64)


def _hashed_arrays(state: np.ndarray, parts: Sequence[int | np.ndarray]) -> np.ndarray:
    """The rest of `hashed`, from the first part on that is an array."""
    for part in parts:
        state = (state ^ np.asarray(part, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def permutation(count: int, *key: int) -> np.ndarray:
    """The numbers 0 .. count - 1 in an order that is a function of the key alone. (count,) int64"""
    return np.argsort(hashed(*key, np.arange(count)), kind="stable")


class Pieces(NamedTuple):
    """P pieces of documents, each with its place."""

    row: np.ndarray  # (P,) int64
    column: np.ndarray  # (P,) int64: position of the piece's [CLS] in the row
    segment: np.ndarray  # (P,) int64: 1, 2, ... in each row
    start: np.ndarray  # (P,) int64: first token, counted over all documents laid end to end
    length: np.ndarray  # (P,) int64: tokens, without [CLS] and [SEP]


@dataclass(frozen=True)
class Packed:
    """Documents that have their places in R rows; `lay_out` puts them there."""

    documents: np.ndarray  # (tokens,) uint16 or uint32, end to end
    pieces: np.ndarray  # (5, P) int64: Pieces, in the order of rows and columns
    first: list[int]  # (R + 1,) each row's first piece, and P
    tokens: np.ndarray  # (R,) int64: positions that are not padding
    text: np.ndarray  # (R,) int64: positions that hold a document's tokens
    openings: np.ndarray  # (R,) int64: documents that begin in the row
    opened: np.ndarray  # (R,) int64: tokens of those documents, as a whole

    def __len__(self) -> int:
        return len(self.tokens)


def pack(documents: np.ndarray, lengths: np.ndarray, row_tokens: int, mode: str, key: tuple[int, ...]) -> Packed:
    """Give documents their places in rows.

    documents: (sum of lengths,) uint16 or uint32, the documents end to end, without special ids
    lengths:   (D,) tokens of each document; one of length 0 leaves no trace
    mode:      "best_fit", or "pad": one piece a row
    key:       decides the order of the rows, and which of equally long pieces goes where
    """
    start, length, opened = cut(lengths, row_tokens - SPECIALS_PER_PIECE)
    shuffled = permutation(len(length), *key, 0)
    order = shuffled[np.argsort(-length[shuffled], kind="stable")]  # longest first, equals in the key's order
    sizes = length[order] + SPECIALS_PER_PIECE
    row, rows = MODES[mode](sizes, row_tokens)
    row = permutation(rows, *key, 1)[row]

    by_row = np.argsort(row, kind="stable")
    order, row, sizes = order[by_row], row[by_row], sizes[by_row]
    first = np.searchsorted(row, np.arange(rows + 1))
    end = np.cumsum(sizes)
    column = end - sizes - (end - sizes)[first[:-1]][row]
    segment = np.arange(len(row)) - first[row] + 1
    text = np.bincount(row, length[order], rows).astype(np.int64)
    return Packed(
        documents=documents,
        pieces=np.stack(Pieces(row, column, segment, start[order], length[order])),
        first=first.tolist(),
        tokens=text + SPECIALS_PER_PIECE * np.diff(first),
        text=text,
        openings=np.bincount(row, opened[order] > 0, rows).astype(np.int64),
        opened=np.bincount(row, opened[order], rows).astype(np.int64),
    )


def cut(lengths: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents in pieces of at most `most` tokens -> (start, length, opened) of each piece, in order.

    opened: tokens of the document that begins with the piece; 0 where it goes on with one
    """
    lengths = lengths.astype(np.int64)
    pieces = -(-lengths // most)
    document = np.repeat(np.arange(len(lengths)), pieces)
    offset = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * most
    start = (np.cumsum(lengths) - lengths)[document] + offset
    whole = lengths[document]
    return start, np.minimum(most, whole - offset), whole * (offset == 0)


def best_fit(sizes: np.ndarray, row_tokens: int) -> tuple[np.ndarray, int]:
    """Best fit for sizes that stand in falling order -> (row of each piece, number of rows)."""
    alone = int(np.count_nonzero(sizes > row_tokens - SMALLEST_PIECE))  # these fill their rows: nothing else fits in
    placed = list(range(alone))
    rows = alone
    open_rows: defaultdict[int, list[int]] = defaultdict(list)  # rows by the space left in them
    spaces = 0  # bit s is set where open_rows[s] is not empty
    for size in sizes[alone:].tolist():
        fits = spaces >> size
        if fits:
            space = size + (fits & -fits).bit_length() - 1  # the lowest set bit: the least space that holds the piece
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces ^= 1 << space
        else:
            row, space = rows, row_tokens
            rows += 1
        placed.append(row)
        left = space - size
        if left >= SMALLEST_PIECE:
            open_rows[left].append(row)
            spaces |= 1 << left
    return np.array(placed, np.int64), rows


def one_per_row(sizes: np.ndarray, row_tokens: int) -> tuple[np.ndarray, int]:
    """No packing: each piece has a row of its own."""
    return np.arange(len(sizes)), len(sizes)


class Stretch(NamedTuple):
    """Consecutive rows of a Packed, and the rows of a block that they become."""

    packed: Packed
    rows: slice
    to: np.ndarray  # (rows,) int64


def lay_out(stretches: Sequence[Stretch], row_tokens: int, vocab: Vocab) -> tuple[np.ndarray, np.ndarray]:
    """Write rows out as a block, every row of which is some stretch's: of one, or of as many lanes as there are.

    Returns ids (R, T) in the documents' dtype, and segments (R, T) int16: 0 = padding, 1, 2, ... the row's pieces.
    Rows are written when they are wanted, not when they are planned: they are then written once, into a block that
    the processor's cache still holds.
    """
    to = np.concatenate([stretch.to for stretch in stretches])  # (R,)
    parts = [packed.pieces[:, packed.first[rows.start] : packed.first[rows.stop]] for packed, rows, _ in stretches]
    counts = [part.shape[1] for part in parts]
    pieces = Pieces(*np.concatenate(parts, axis=1))
    before = np.cumsum([len(stretch.to) for stretch in stretches])
    shift = [end - stretch.rows.stop for end, stretch in zip(before.tolist(), stretches, strict=True)]
    cls_at = to[pieces.row + np.repeat(shift, counts)] * row_tokens + pieces.column
    sep_at = cls_at + pieces.length + 1

    ids = np.full(len(to) * row_tokens, vocab.pad_id, stretches[0].packed.documents.dtype)
    ids[cls_at] = vocab.cls_id
    ids[sep_at] = vocab.sep_id
    # slice by slice: an index for every token would cost several times the tokens' own memory to write and read
    ends = pieces.start + pieces.length
    moves = zip((cls_at + 1).tolist(), sep_at.tolist(), pieces.start.tolist(), ends.tolist(), strict=True)
    target = memoryview(ids)  # whose slices cost half of numpy's
    for stretch, count in zip(stretches, counts, strict=True):
        source = memoryview(stretch.packed.documents)
        for begin, end, first, last in islice(moves, count):
            target[begin:end] = source[first:last]

    in_order = np.argsort(cls_at)
    begins = cls_at[in_order]
    runs = np.empty((len(begins), 2), np.int64)  # positions of each piece and of the padding behind it, if any
    runs[:, 0] = pieces.length[in_order] + SPECIALS_PER_PIECE
    runs[:, 1] = np.append(begins[1:], len(ids))[: len(begins)] - begins - runs[:, 0]
    numbers = np.zeros((len(begins), 2), np.int16)
    numbers[:, 0] = pieces.segment[in_order]
    segments = np.repeat(numbers.ravel(), runs.ravel())
    return ids.reshape(-1, row_tokens), segments.reshape(-1, row_tokens)


MODES = {"best_fit": best_fit, "pad": one_per_row}
