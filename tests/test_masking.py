"""Masking: exact counts, specials left alone, the shares, uniformity, keys, and the same bits everywhere."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from mlm_dist import masking, vocab
from mlm_dist.masking import IGNORED_LABEL, LONGEST_SPAN, POLICIES, Masked, Masker, MaskingConfig
from mlm_dist.mlm import MLM
from mlm_dist.schema import ConfigError, from_mapping

SIZE, PAD, MASK = 60, 0, 4
SPECIALS = {0, 1, 2, 3, MASK}
SHOWN = torch.arange(MASK, SIZE)  # what may stand where a target was: the mask token and the ordinary ids
RATES = st.one_of(st.sampled_from([0.0, 0.15, 0.3, 1 / 3, 2 / 3, 1.0]), st.floats(0, 1))


def word_starts(size: int) -> torch.Tensor:
    return torch.arange(size) % 3 == 0  # two ids in three continue a word


def masker(policy: str = "token", mask_share: float = 8 / 9, random_share: float = 0.1, size: int = SIZE) -> Masker:
    return Masker(MASK, SPECIALS - {MASK}, mask_share, random_share, size, policy, word_starts(size))


def keys(rows: int, step: int = 0) -> torch.Tensor:
    return masking.row_keys_by_rank(1, 0, step, 0, rows, "cpu")


def ordinary_ids(rows: int, length: int, size: int = SIZE) -> torch.Tensor:
    return torch.randint(5, size, (rows, length), generator=torch.Generator().manual_seed(rows))


def target_marks(masked: Masked) -> torch.Tensor:
    """How often each position (B, T) is in a used slot."""
    used = (masked.labels != IGNORED_LABEL).long()
    return torch.zeros(masked.ids.shape, dtype=torch.int64).scatter_add(1, masked.positions, used)


@st.composite
def batches(draw: st.DrawFn) -> torch.Tensor:
    """Ids (B, T) with specials anywhere, padding to the left and the right, rows of nothing else, rows of length 0."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(0, 40))
    token = st.one_of(st.integers(0, 4), st.integers(5, SIZE - 1), st.integers(5, SIZE - 1))
    ids = [draw(st.lists(token, min_size=length, max_size=length)) for _ in range(rows)]
    ids = torch.tensor(ids, dtype=torch.int64).reshape(rows, length)
    ids[:, : draw(st.integers(0, length))] = PAD
    ids[0, draw(st.integers(0, length)) :] = PAD
    return ids


# ---- every policy


@settings(max_examples=200, deadline=None)
@given(batches(), RATES, st.sampled_from(sorted(POLICIES)), st.integers(-(2**63), 2**63 - 1))
def test_every_policy_keeps_the_contract(ids: torch.Tensor, rate: float, policy: str, seed: int) -> None:
    masked = masker(policy)(ids.int(), masking.row_keys_by_sample(seed, torch.arange(len(ids))), rate)
    marks, used = target_marks(masked), masked.labels != IGNORED_LABEL
    targets = marks.bool()
    ordinary = ids >= 5

    exact = Fraction(repr(rate))
    assert marks.sum(1).tolist() == [math.ceil(exact * n) for n in ordinary.sum(1).tolist()]
    assert (marks <= 1).all()  # no position twice
    assert masked.positions.shape == masked.labels.shape == (len(ids), math.ceil(exact * ids.shape[1]))

    assert not (targets & ~ordinary).any()
    assert torch.equal(masked.ids[~targets], ids[~targets])
    assert torch.isin(masked.ids[targets], SHOWN).all()
    assert torch.equal(masked.labels[used], ids.gather(1, masked.positions)[used])
    assert not masked.positions[~used].any()

    assert masked.targets == marks.sum() == masked.by_mask + masked.by_random + masked.kept
    shown, originals = masked.ids[targets], ids[targets]
    assert masked.by_mask == (shown == MASK).sum()
    assert masked.by_random >= ((shown != MASK) & (shown != originals)).sum()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_rows_mask_depends_on_its_ids_and_key_alone(policy: str) -> None:
    ids, row_keys = ordinary_ids(6, 50), keys(6)
    whole = masker(policy)(ids, row_keys, 0.3)
    again = masker(policy)(ids, row_keys, 0.3)
    some = masker(policy)(ids[[4, 1]], row_keys[[4, 1]], 0.3)
    for a, b, c in zip(whole[:3], again[:3], some[:3], strict=True):  # ids, positions, labels
        assert torch.equal(a, b) and torch.equal(a[[4, 1]], c)


@pytest.mark.parametrize("policy", POLICIES)
def test_shares_lie_within_binomial_bounds_over_a_million_targets(policy: str) -> None:
    masked = masker(policy)(ordinary_ids(4096, 512), keys(4096), 0.5)  # 80/10/10
    assert masked.targets == 4096 * 256
    assert_shares(masked, 0.8, 0.1, 0.1)


def assert_shares(masked: Masked, *shares: float) -> None:
    """The shares of mask, random and kept lie within 4.5 standard deviations of a binomial variable."""
    count = masked.targets.item()
    for number, share in zip((masked.by_mask, masked.by_random, masked.kept), shares, strict=True):
        assert abs(number.item() - count * share) < 4.5 * math.sqrt(count * share * (1 - share))


def test_shares_at_their_ends() -> None:
    ids, row_keys = ordinary_ids(64, 130), keys(64)
    assert masker(mask_share=1.0, random_share=0.0)(ids, row_keys, 0.3).by_mask == 64 * 39
    assert masker(mask_share=1.0, random_share=1.0)(ids, row_keys, 0.3).by_random == 64 * 39
    assert masker(mask_share=0.0, random_share=0.0)(ids, row_keys, 0.3).kept == 64 * 39


def test_random_ids_are_uniform_over_the_ordinary_ones() -> None:
    masked = masker(random_share=1.0)(ordinary_ids(1000, 512), keys(1000), 0.5)
    drawn = masked.ids.gather(1, masked.positions).flatten()
    counts = torch.bincount(drawn, minlength=SIZE).double()
    assert not counts[:5].any()
    expected = len(drawn) / (SIZE - 5)
    assert_chi_square(((counts[5:] - expected) ** 2 / expected).sum().item(), SIZE - 5 - 1)


def assert_chi_square(statistic: float, freedom: int) -> None:
    """Neither too uneven nor too even, within 4.5 standard deviations of a chi-square variable."""
    assert abs(statistic - freedom) < 4.5 * math.sqrt(2 * freedom)


# ---- the policies one by one


def test_token_is_uniform_over_positions_pairs_and_neighbouring_rows() -> None:
    rows = 40_000
    ids = ordinary_ids(rows, 64)
    ids[:, 0], ids[:, 20], ids[:, -3:] = 1, 2, PAD
    targets = target_marks(masker()(ids, keys(rows), 0.15)).double()[:, (ids[0] >= 5)]  # (N, m)
    m = targets.shape[1]
    n = math.ceil(Fraction(15, 100) * m)
    share = n / m

    # counts of a fixed total without replacement: variance N p (1-p), covariance -N p (1-p) / (m-1)
    spread = ((targets.sum(0) - rows * share) ** 2).sum() / (rows * share * (1 - share))
    assert_chi_square((spread * (m - 1) / m).item(), m - 1)

    both = n * (n - 1) / (m * (m - 1))
    pairs = (targets.T @ targets / rows)[~torch.eye(m, dtype=torch.bool)]
    assert (pairs - both).abs().max() < 5 * math.sqrt(both * (1 - both) / rows)

    shared = (targets[:-1] * targets[1:]).sum(1).mean().item()
    assert abs(shared - n * share) < 4.5 * math.sqrt(n * share * (1 - share) * (m - n) / (m - 1) / rows)


def words_of(ids: list[int], segments: list[int]) -> list[list[int]]:
    """Positions of each word: a special id, padding or another segment ends one, as does an id that begins one."""
    words: list[list[int]] = []
    open_word = False
    for t, (token, segment) in enumerate(zip(ids, segments, strict=True)):
        if token in SPECIALS or segment == 0:
            open_word = False
            continue
        if open_word and token % 3 != 0 and segment == segments[t - 1]:
            words[-1].append(t)
        else:
            words.append([t])
        open_word = True
    return words


@settings(max_examples=100, deadline=None)
@given(batches(), RATES, st.data())
def test_whole_word_takes_words_whole_but_for_the_last(ids: torch.Tensor, rate: float, data: st.DataObject) -> None:
    segments = torch.ones(ids.shape, dtype=torch.int16)
    for start in data.draw(st.lists(st.integers(0, ids.shape[1]), max_size=3)):
        segments[:, start:] += 1
    segments[:, data.draw(st.integers(0, ids.shape[1])) :] = 0
    targets = target_marks(masker("whole_word")(ids, keys(len(ids)), rate, segments)).tolist()
    for row, marks, numbers in zip(ids.tolist(), targets, segments.tolist(), strict=True):
        words = words_of(row, numbers)
        assert sum(marks) == math.ceil(Fraction(repr(rate)) * sum(map(len, words)))
        taken = [[marks[t] for t in word] for word in words]
        cut = [marks for marks in taken if len(set(marks)) == 2]
        assert len(cut) <= 1 and all(marks == sorted(marks, reverse=True) for marks in cut)


def test_whole_word_gives_each_word_the_same_chance() -> None:
    words = 20  # of 3 tokens each
    ids = (6 + torch.arange(3).repeat(words)).expand(20_000, -1)
    targets = target_marks(masker("whole_word")(ids, keys(len(ids)), 0.3)).double()  # 18 tokens: 6 words
    counts, share = targets[:, ::3].sum(0), 0.3
    spread = ((counts - len(ids) * share) ** 2).sum() / (len(ids) * share * (1 - share))
    assert_chi_square((spread * (words - 1) / words).item(), words - 1)


def span_begins(ids: torch.Tensor, breaks: torch.Tensor, mean_length: float) -> torch.Tensor:
    cut_below = masking.threshold(masking.span_stop(mean_length))
    return POLICIES["span"](masking.Rows(ids, breaks, keys(len(ids)), None, cut_below))


@pytest.mark.parametrize("mean_length", [1.0, 2.0, 3.8, 6.0])
def test_span_lengths_are_geometric_and_cut_at_ten(mean_length: float) -> None:
    ids = ordinary_ids(2000, 300)
    begins = span_begins(ids, torch.arange(300).expand(2000, -1) == 0, mean_length)
    p = masking.span_stop(mean_length)
    expected = torch.tensor([p * (1 - p) ** i for i in range(LONGEST_SPAN - 1)] + [(1 - p) ** (LONGEST_SPAN - 1)])
    assert (expected * torch.arange(1, LONGEST_SPAN + 1)).sum().item() == pytest.approx(mean_length)

    first = torch.stack([torch.nonzero(row).flatten()[:21] for row in begins])  # 20 whole spans of each row
    lengths = first.diff(dim=1).flatten()
    counts = torch.bincount(lengths, minlength=LONGEST_SPAN + 1).double()[1:]
    assert len(counts) == LONGEST_SPAN
    expected = expected.double() * len(lengths)
    likely = expected > 0.5
    assert not counts[~likely].any()
    assert_chi_square(((counts - expected) ** 2 / expected)[likely].sum().item(), max(1, int(likely.sum()) - 1))


def test_spans_end_where_they_must_and_are_taken_whole_but_for_the_last() -> None:
    ids, segments = ordinary_ids(500, 60), torch.ones(500, 60, dtype=torch.int16)
    ids[:, ::13] = 3
    segments[:, 31:] = 2
    breaks = torch.zeros(ids.shape, dtype=torch.bool)
    breaks[:, [0, 31, *range(1, 60, 13)]] = True  # after each special id, and at the new segment
    begins = span_begins(ids, breaks, 3.8)
    assert begins[breaks].all()
    targets = target_marks(masker("span")(ids, keys(500), 0.3, segments))
    number = begins.long().cumsum(1) * (ids >= 5)  # (B, T), 0 at special ids
    cut = 0
    for row, marks in zip(number, targets, strict=True):
        spans = [marks[row == i].tolist() for i in row.unique().tolist() if i]
        partly = [span for span in spans if len(set(span)) == 2]
        assert len(partly) <= 1 and all(span == sorted(span, reverse=True) for span in partly)
        cut += len(partly)
    assert cut > 100  # the count is exact because spans are cut


# ---- counts


@given(st.integers(0, 1 << 20), st.one_of(st.floats(0, 1), st.fractions(0, 1, max_denominator=5000).map(float)))
def test_the_count_is_the_exact_ceiling_everywhere(maskable: int, rate: float) -> None:
    exact = math.ceil(Fraction(repr(rate)) * maskable)
    assert masking.targets_of(maskable, rate) == exact
    assert masking.targets_of(np.array([maskable], np.int32), rate).tolist() == [exact]
    assert masking.targets_of(torch.tensor([maskable], dtype=torch.int32), rate).tolist() == [exact]


def test_the_count_where_float32_is_wrong() -> None:
    assert (torch.tensor(100) * 0.15).ceil() == 16
    assert masking.targets_of(100, 0.15) == 15
    assert masker()(ordinary_ids(1, 100), keys(1), 0.15).targets == 15


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_a_rate_outside_0_to_1_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        masking.targets_of(10, rate)


# ---- keys


def test_the_hash_is_lowbias32() -> None:
    def lowbias32(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    words = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, *range(10**9, 2**32, 10**7)]
    expected = [lowbias32(x) for x in words]
    assert [masking.mix(x) for x in words] == expected
    assert masking.mix(torch.tensor(words)).tolist() == expected


def test_golden_keys_and_draws() -> None:
    by_rank = [8990896366186065536, 8164041992231125249, 4833253274068966918, 741140837388514639]
    assert masking.row_keys_by_rank(1337, 3, 1000, 2, 4, "cpu").tolist() == by_rank
    by_sample = [5483011469831699947, 6426518288469474246, 84307840784746614, 3779958580391795500]
    assert masking.row_keys_by_sample(1337, torch.tensor([0, 1, -1, -(2**63)])).tolist() == by_sample
    assert masking.dropout_seed(1337, 3, 1000, 2) == 1744199044009687854
    assert masking.draw(torch.tensor([0, 7]), masking.UNIT, torch.arange(4)[None]).tolist() == [
        [2763310899, 2216530378, 2814738671, 1631579738],
        [777667164, 1361361476, 2934043099, 3426820315],
    ]


GOLDEN = {
    "token": ([[12, 14, 6, 8, 16, 3], [5, 6, 13, 20, 15, 1]], [[4, 4, 4, 13, 4, 4], [4, 4, 4, 4, 4, 23]]),
    "whole_word": ([[16, 17, 18, 19, 20, 4], [6, 7, 8, 20, 15, 16]], [[4, 4, 4, 4, 4, 9], [4, 4, 4, 4, 4, 4]]),
    "span": ([[14, 15, 16, 17, 18, 19], [6, 7, 8, 9, 13, 14]], [[4, 4, 4, 4, 4, 4], [4, 4, 4, 4, 4, 20]]),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_golden_masks(policy: str) -> None:
    ids = torch.arange(48).view(2, 24) % 20 + 5
    ids[:, 0], ids[:, -3:], ids[1, 10] = 2, PAD, 3
    masked = masker(policy, size=25)(ids, torch.tensor([0, 7]), 0.3)
    positions, shown = GOLDEN[policy]
    assert masked.positions.tolist() == [[*row, 0, 0] for row in positions]
    assert masked.ids.gather(1, masked.positions)[:, :6].tolist() == shown


def test_keys_differ_by_seed_rank_step_micro_step_and_row() -> None:
    grid = [(s, r, t, m) for s in (0, 1, 2**40) for r in range(4) for t in (0, 1, 2, 10**6) for m in range(3)]
    made = torch.cat([masking.row_keys_by_rank(*each, 8, "cpu") for each in grid])
    assert len(made.unique()) == len(made) == len(grid) * 8
    assert (made >= 0).all()
    assert len({masking.dropout_seed(*each) for each in grid} | set(made.tolist())) == len(grid) * 9

    ids = ordinary_ids(1, 200).expand(len(made), -1)
    masks = target_marks(masker()(ids, made, 0.15))
    assert len(masks.unique(dim=0)) == len(made)


def test_keys_from_tensors_equal_those_from_ints() -> None:
    on_device = masking.row_keys_by_rank(5, torch.tensor(2), torch.tensor(70), torch.tensor(1), 3, "cpu")
    assert torch.equal(on_device, masking.row_keys_by_rank(5, 2, 70, 1, 3, "cpu"))


# ---- devices and compilers


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_into_one_graph_with_the_same_result(policy: str, backend: str) -> None:
    torch.compiler.reset()
    module, ids, row_keys = masker(policy), ordinary_ids(4, 64), keys(4)
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend=backend)
    for rate in (0.3, 0.15):
        for a, b in zip(compiled(ids, row_keys, rate), module(ids, row_keys, rate), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", POLICIES)
def test_a_gpu_gives_the_same_bits_and_is_never_waited_for(policy: str) -> None:
    on_cpu = masker(policy)(ordinary_ids(64, 512), keys(64), 0.3)
    module, ids = masker(policy).cuda(), ordinary_ids(64, 512).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = module(ids, masking.row_keys_by_rank(1, 0, 0, 0, 64, "cuda"), 0.3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert torch.equal(a.cpu(), b)


# ---- config


def test_the_rate_moves_in_plateaus() -> None:
    config = MaskingConfig(rate=0.3, rate_end=0.15)
    rates = [masking.rate_at(config, step, 1000) for step in range(1200)]
    assert list(dict.fromkeys(rates)) == [0.3, 0.25, 0.2, 0.15]
    assert rates.index(0.25) == 250 and rates.index(0.15) == 750 and rates[-1] == 0.15
    assert masking.rate_at(config, 10**6, None) == 0.3
    assert {masking.rate_at(MaskingConfig(rate=0.2), step, 10) for step in range(20)} == {0.2}


def test_shares_that_do_not_sum_to_1_are_refused() -> None:
    from_mapping(MaskingConfig, {"mask": 0.7, "random": 0.2, "keep": 0.1})
    with pytest.raises(ConfigError, match=r"mask \+ random \+ keep must be 1, got 0.8 \+ 0.2 \+ 0.1 = 1.1"):
        from_mapping(MaskingConfig, {"random": 0.2})


@pytest.mark.parametrize("policy", POLICIES)
def test_a_config_becomes_keywords_with_the_same_shares(policy: str) -> None:
    tokenizer = vocab.train(["some words of text, in no order"] * 3, 270)
    config = from_mapping(MaskingConfig, {"policy": policy, "mask": 0.6, "random": 0.3, "keep": 0.1, "rate": 0.5})
    words = masking.mlm_keywords(config, tokenizer)
    masked = MLM(torch.nn.Identity(), **words).masker(ordinary_ids(400, 256, tokenizer.size), keys(400), 0.5)
    assert words["mask_prob"] == 0.5 and masked.targets == 400 * 128
    assert_shares(masked, 0.6, 0.3, 0.1)


def test_nothing_but_random_tokens_can_be_asked_for() -> None:
    words = masking.mlm_keywords(MaskingConfig(mask=0.0, random=1.0, keep=0.0), vocab.train(["text"], 261))
    assert (words["replace_prob"], words["random_token_prob"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mask_share": 1.5}, "replace_prob must lie between 0 and 1"),
        ({"mask_share": 1.0, "random_share": -0.1}, "random_token_prob must lie between 0 and 1"),
        ({"mask_share": 1.0, "random_share": 0.1, "num_tokens": 5}, "needs num_tokens"),
        ({"mask_share": 1.0, "policy": "words"}, "token, whole_word, span"),
        ({"mask_share": 1.0, "policy": "whole_word"}, "needs word_starts"),
        ({"mask_share": 1.0, "policy": "span", "span_mean_length": 10.0}, "below 10"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Masker(MASK, {0, 1, 2, 3}, **arguments)


def test_a_stretch_without_spaces_is_no_single_word() -> None:
    """Every position can be a target, in units of at most ten tokens."""
    ids = torch.full((1, 64), 9)
    one_word = Masker(MASK, SPECIALS, 1.0, policy="whole_word", word_starts=torch.zeros(SIZE, dtype=torch.bool))
    met: set[int] = set()
    for step in range(100):
        keys = masking.row_keys_by_rank(0, 0, step, 0, 1, "cpu")
        met.update(one_word(ids, keys, 0.15).positions.flatten().tolist())
    assert met == set(range(64))


def test_whole_words_need_tokens_that_show_them(tmp_path: Path) -> None:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="needs a tokenizer whose tokens show where words begin"):
        masking.mlm_keywords(MaskingConfig(policy="whole_word"), vocab.load(tmp_path))
