"""Documents of one window -> rows of T positions: [CLS] piece [SEP] [CLS] piece [SEP] ... [PAD].

A document longer than T - 2 tokens is cut in pieces of T - 2 and a rest. The pieces are placed by best fit decreasing
(Johnson et al., "Worst-case performance bounds for simple one-dimensional packing algorithms", 1974): longest first,
each in the row where the least space is left over. Rows are then put in an order given by a key, so that the pieces of
a long document don't stand in a run.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Plan:
    """Where each of P pieces comes from and goes to; pieces are in the order of their rows and columns."""

    rows: int
    row: np.ndarray  # (P,) int64
    column: np.ndarray  # (P,) int64: position of the piece's [CLS] in the row
    segment: np.ndarray  # (P,) int64: 1, 2, ... in each row
    start: np.ndarray  # (P,) int64: first token, counted over all documents laid end to end
    length: np.ndarray  # (P,) int64: tokens, without [CLS] and [SEP]
    opens: np.ndarray  # (P,) bool: the piece is the first of its document


@dataclass(frozen=True)
class Packed:
    """R rows of T positions."""

    ids: np.ndarray  # (R, T) the tokens' dtype
    segments: np.ndarray  # (R, T) int16: 0 = padding, 1, 2, ... the row's pieces
    tokens: np.ndarray  # (R,) int64: positions that are not padding
    text: np.ndarray  # (R,) int64: positions that hold a document's tokens
    documents: np.ndarray  # (R,) int64: documents that begin in the row


def pack(
    tokens: np.ndarray, lengths: np.ndarray, row_tokens: int, vocab: Vocab, mode: str, key: tuple[int, ...]
) -> Packed:
    """Pack documents into rows.

    tokens:  (sum of lengths,) uint16 or uint32, the documents end to end, without special ids
    lengths: (D,) tokens of each document; one of length 0 leaves no trace
    mode:    "best_fit", or "pad": one piece a row
    key:     decides the order of the rows, and which of equally long pieces goes where
    """
    plan = plan_rows(lengths, row_tokens, mode, key)
    ids, segments = fill(plan, tokens, row_tokens, vocab)
    text = np.bincount(plan.row, plan.length, plan.rows).astype(np.int64)
    return Packed(
        ids=ids,
        segments=segments,
        tokens=text + SPECIALS_PER_PIECE * np.bincount(plan.row, minlength=plan.rows),
        text=text,
        documents=np.bincount(plan.row, plan.opens, plan.rows).astype(np.int64),
    )


def plan_rows(lengths: np.ndarray, row_tokens: int, mode: str, key: tuple[int, ...]) -> Plan:
    """Cut documents of the given lengths in pieces and give each its place. Arguments as for `pack`."""
    start, length, opens = cut(lengths, row_tokens - SPECIALS_PER_PIECE)
    shuffled = permutation(len(length), *key, 0)
    order = shuffled[np.argsort(-length[shuffled], kind="stable")]  # longest first, equals in the key's order
    sizes = length[order] + SPECIALS_PER_PIECE
    row, rows = MODES[mode](sizes, row_tokens)
    row = permutation(rows, *key, 1)[row]

    by_row = np.argsort(row, kind="stable")
    order, row, sizes = order[by_row], row[by_row], sizes[by_row]
    first = np.searchsorted(row, np.arange(rows))  # (R,) each row's first piece
    end = np.cumsum(sizes)
    column = end - sizes - (end - sizes)[first][row]
    segment = np.arange(len(row)) - first[row] + 1
    return Plan(rows, row, column, segment, start[order], length[order], opens[order])


def cut(lengths: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents in pieces of at most `most` tokens -> (start, length, opens) of each piece, in order."""
    lengths = lengths.astype(np.int64)
    pieces = -(-lengths // most)
    document = np.repeat(np.arange(len(lengths)), pieces)
    offset = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * most
    start = (np.cumsum(lengths) - lengths)[document] + offset
    return start, np.minimum(most, lengths[document] - offset), offset == 0


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


def fill(plan: Plan, tokens: np.ndarray, row_tokens: int, vocab: Vocab) -> tuple[np.ndarray, np.ndarray]:
    """Copy the tokens to their places -> ids (R, T) in the tokens' dtype, segments (R, T) int16."""
    cls_at = plan.row * row_tokens + plan.column
    sep_at = cls_at + plan.length + 1
    ids = np.full(plan.rows * row_tokens, vocab.pad_id, tokens.dtype)
    ids[cls_at] = vocab.cls_id
    ids[sep_at] = vocab.sep_id
    # slice by slice: an index for every token would cost several times the tokens' own memory to write and read
    moves = np.stack([cls_at + 1, sep_at, plan.start, plan.start + plan.length], axis=1)
    source, target = memoryview(tokens), memoryview(ids)  # whose slices cost half of numpy's
    for begin, end, first, last in moves.tolist():
        target[begin:end] = source[first:last]

    until = np.append(cls_at[1:], plan.rows * row_tokens)[: len(cls_at)]  # the piece and the padding behind it, if any
    runs = np.stack([sep_at + 1 - cls_at, until - sep_at - 1], axis=1)
    numbers = np.stack([plan.segment, np.zeros_like(plan.segment)], axis=1).astype(np.int16)
    segments = np.repeat(numbers.ravel(), runs.ravel())
    return ids.reshape(plan.rows, row_tokens), segments.reshape(plan.rows, row_tokens)


MODES = {"best_fit": best_fit, "pad": one_per_row}
