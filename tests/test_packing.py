"""Packing: every token once, in order, inside its row, with its document's number."""

import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from mlm_dist.batch_size import BatchConfig
from mlm_dist.manifest import load_manifest
from mlm_dist.packing import MODES, Stretch, hashed, lay_out, pack, permutation
from mlm_dist.shards import read_records, write_split
from mlm_dist.stream import DataConfig, train_batches
from mlm_dist.vocab import Vocab, load
from shards import build

SPECIALS = {"pad_id": 9, "cls_id": 2, "sep_id": 3, "mask_id": 4, "unk_id": 1, "special_ids": (1, 2, 3, 4, 9)}
VOCAB = Vocab(Tokenizer(models.BPE()), 60_000, **SPECIALS)
FIRST_TOKEN = 10


def documents_of(lengths: list[int], dtype: str = "uint16") -> np.ndarray:
    """Tokens that are all different, so that each can be followed to its place."""
    return np.arange(FIRST_TOKEN, FIRST_TOKEN + sum(lengths)).astype(dtype)


class Result(NamedTuple):
    """A window's rows, written out."""

    ids: np.ndarray
    segments: np.ndarray
    tokens: np.ndarray
    openings: np.ndarray
    opened: np.ndarray


def written(tokens: np.ndarray, lengths: np.ndarray, row_tokens: int, mode: str, key: tuple[int, ...]) -> Result:
    planned = pack(tokens, lengths, row_tokens, mode, key)
    rows = len(planned)
    ids, segments = lay_out([Stretch(planned, slice(0, rows), np.arange(rows))], row_tokens, VOCAB)
    return Result(ids, segments, planned.tokens, planned.openings, planned.opened)


def packed(lengths: list[int], row_tokens: int, mode: str = "best_fit", key: tuple[int, ...] = (1,)) -> Result:
    return written(documents_of(lengths), np.array(lengths, np.uint32), row_tokens, mode, key)


def pieces_of(result: Result) -> list[list[int]]:
    """The pieces as rows and segments state them; checks [CLS], [SEP] and padding on the way."""
    pieces = []
    for ids, segments in zip(result.ids.tolist(), result.segments.tolist(), strict=True):
        used = sum(number > 0 for number in segments)
        assert set(ids[used:]) <= {VOCAB.pad_id} and not any(segments[used:])
        assert segments[:used] == sorted(segments[:used]) and set(segments[:used]) == set(range(1, max(segments) + 1))
        for number in range(1, max(segments) + 1):
            first, last = segments.index(number), segments.index(number) + segments.count(number) - 1
            assert ids[first] == VOCAB.cls_id and ids[last] == VOCAB.sep_id and last - first >= 2
            pieces.append(ids[first + 1 : last])
    return pieces


def expected_pieces(lengths: list[int], most: int) -> list[list[int]]:
    tokens, start, pieces = documents_of(lengths).tolist(), 0, []
    for length in lengths:
        document = tokens[start : start + length]
        pieces += [document[first : first + most] for first in range(0, length, most)]
        start += length
    return pieces


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 12), st.integers(0, 200)), max_size=60),
    row_tokens=st.integers(3, 70),
    mode=st.sampled_from(sorted(MODES)),
    key=st.integers(0, 2**63),
)
def test_every_piece_stands_once_in_some_row(lengths, row_tokens, mode, key):
    result = packed(lengths, row_tokens, mode, (key,))
    assert sorted(pieces_of(result)) == expected_pieces(lengths, row_tokens - 2)
    assert result.ids.shape == result.segments.shape == (len(result.tokens), row_tokens)
    assert (result.tokens == (result.segments > 0).sum(axis=1)).all()
    firsts, starts = {}, np.cumsum([0, *lengths]) + FIRST_TOKEN  # length of each document by its first token
    for start, length in zip(starts.tolist(), lengths, strict=False):
        firsts |= {start: length} if length else {}
    begun = [[firsts[token] for token in row if token in firsts] for row in result.ids.tolist()]
    assert result.openings.tolist() == [len(row) for row in begun]
    assert result.opened.tolist() == [sum(row) for row in begun]
    assert result.openings.sum() == len(firsts) and result.opened.sum() == sum(lengths)


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80), row_tokens=st.integers(10, 50))
def test_no_two_rows_could_be_one(lengths, row_tokens):
    used = sorted(packed(lengths, row_tokens).tokens.tolist())
    assert len(used) < 2 or used[0] + used[1] > row_tokens


@pytest.mark.parametrize("length", [0, 1, 29, 30, 31, 60, 61, 10_000])
def test_lengths_at_the_edges_of_a_row(length):
    result = packed([length], 32)
    assert sorted(pieces_of(result)) == expected_pieces([length], 30)
    assert len(result.ids) == -(-length // 30)
    assert result.openings.sum() == (length > 0)


def test_nothing_to_pack_gives_no_rows():
    for lengths in ([], [0, 0]):
        result = packed(lengths, 16)
        assert result.ids.shape == (0, 16) and result.ids.dtype == np.uint16


def test_best_fit_takes_the_row_with_the_least_space_left():
    # with [CLS] and [SEP] 12, 10, 4, 3, 3: the 4 belongs behind the 12, or the last 3 needs a third row
    result = packed([10, 8, 2, 1, 1], 16)
    assert result.tokens.tolist() == [16, 16]


def test_pad_mode_gives_each_piece_its_own_row():
    result = packed([5, 40, 1], 16, mode="pad")
    assert result.segments.max() == 1
    assert sorted((result.tokens - 2).tolist()) == sorted(len(piece) for piece in expected_pieces([5, 40, 1], 14))


def test_the_same_key_gives_the_same_rows_and_another_key_another_order():
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist()
    first, again, other = (packed(lengths, 64, key=key) for key in ((1, 2), (1, 2), (1, 3)))
    assert np.array_equal(first.ids, again.ids)
    assert not np.array_equal(first.ids, other.ids)
    assert sorted(pieces_of(first)) == sorted(pieces_of(other))


def test_pieces_of_a_long_document_do_not_stand_in_a_run():
    result = packed([30 * 200, *[30] * 200], 32)
    of_long = result.ids[:, 1] < FIRST_TOKEN + 30 * 200
    runs = np.diff(np.flatnonzero(np.diff(of_long.astype(int), prepend=-1, append=-1)))
    assert of_long.sum() == 200 and runs.max() < 20


def test_full_rows_and_shared_rows_are_mixed():
    result = packed([30] * 200 + [13] * 400, 32)
    full = np.flatnonzero(result.segments.max(axis=1) == 1)
    assert len(full) == 200 and len(result.ids) == 400 and 170 < full.mean() < 230


def test_rows_of_several_windows_are_written_out_in_turn():
    lengths = [[20, 9, 3, 40], [5, 60, 2], [31]]
    windows = [pack(documents_of(some), np.array(some), 16, "best_fit", (1,)) for some in lengths]
    alone = [packed(some, 16) for some in lengths]
    taken = [slice(1, 4), slice(0, 3), slice(0, 3)]
    to = [np.array([0, 3, 8]), np.array([1, 4, 7]), np.array([2, 5, 6])]
    ids, segments = lay_out([Stretch(*each) for each in zip(windows, taken, to, strict=True)], 16, VOCAB)
    for result, rows, where in zip(alone, taken, to, strict=True):
        assert np.array_equal(ids[where], result.ids[rows]) and np.array_equal(segments[where], result.segments[rows])


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_ids_keep_their_type(dtype):
    lengths = [100, 3]
    tokens = documents_of(lengths, dtype)
    if dtype == "uint32":
        tokens += 1_000_000
    result = written(tokens, np.array(lengths), 32, "best_fit", (0,))
    assert result.ids.dtype == dtype and result.ids.max() == tokens.max()


def test_text_like_lengths_fill_at_least_98_percent():
    lengths = np.random.default_rng(0).lognormal(5.2, 1.0, 1500).astype(int) + 1  # mean about 300
    for row_tokens in (128, 512, 1024):
        result = written(np.zeros(lengths.sum(), np.uint16), lengths, row_tokens, "best_fit", (0,))
        assert result.tokens.sum() >= 0.98 * result.ids.size


def test_permutation_is_a_permutation_that_the_key_decides():
    assert sorted(permutation(1000, 1, 2).tolist()) == list(range(1000))
    assert permutation(1000, 1, 2).tolist() == permutation(1000, 1, 2).tolist()
    assert permutation(1000, 1, 2).tolist() != permutation(1000, 2, 1).tolist()
    assert permutation(0, 1).tolist() == []


def test_the_hash_is_frozen_and_spreads_evenly():
    """Data order and masks hang on these values: a change of the hash would change every run that is resumed."""
    assert hashed(1, 2, 3).tolist() == [15020427595393229491]
    values = hashed(7, np.arange(100_000))
    assert len(np.unique(values)) == 100_000
    bits = (values[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.01


@pytest.mark.slow
def test_real_text_fills_at_least_98_percent(tmp_path):
    """Python's own library, as the quickstart reads it, in windows as full as those of a corpus."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    options = ["--out", str(tmp_path), "--tokenizer", "train:2048", "--valid-fraction", "0"]
    assert build.main(["--input", *map(str, library), *options]) == 0
    small, vocab = load_manifest(tmp_path / "train"), load(tmp_path / "tokenizer")
    records = [record for shard in range(len(small.shards)) for record in read_records(small, shard)]
    manifest = write_split(tmp_path / "one" / "train", [records], vocab.size, vocab.fingerprint)
    for row_tokens in (128, 512, 1024):
        data, batch = DataConfig(shards=str(tmp_path), workers=0), BatchConfig(row_tokens, 8, 8)
        tokens = positions = documents = 0
        with train_batches(manifest, vocab, data, batch, 0, 0, 1) as batches:
            while documents < manifest.documents:
                taken = next(batches)
                tokens, positions = tokens + taken.tokens, positions + taken.ids.numel()
                documents += taken.documents
        assert tokens >= 0.98 * positions, (row_tokens, tokens / positions)
