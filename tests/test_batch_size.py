from itertools import accumulate, pairwise

import pytest

from mlm_dist import batch_size
from mlm_dist.batch_size import BatchConfig, accumulation
from mlm_dist.schema import ConfigError

GROWING = BatchConfig(seq_len=16, global_rows=96, micro_rows=4, warmup_rows=8, warmup_tokens=10_000)
SHAPES = [
    GROWING,
    BatchConfig(seq_len=128, global_rows=4608, warmup_rows=768, warmup_tokens=10**8),
    BatchConfig(seq_len=128, global_rows=1000, warmup_rows=1, warmup_tokens=5_000),
    BatchConfig(seq_len=128, global_rows=1000, warmup_rows=999, warmup_tokens=1),
    BatchConfig(seq_len=128, global_rows=7),
]


@pytest.mark.parametrize("batch", SHAPES)
def test_the_batch_follows_a_ramp_over_the_tokens(batch: BatchConfig) -> None:
    first, warmup = batch.warmup_rows or batch.global_rows, batch.warmup_tokens or 1
    doubled = [first * 2**n for n in range(20) if first * 2**n < batch.global_rows]
    positions = 0
    for step in range(3000):
        rows = batch_size.rows_at(batch, step)
        # the ramp's height, times `warmup`
        height = min(warmup, positions) * (batch.global_rows - first) + first * warmup
        assert rows == max(n for n in [*doubled, batch.global_rows] if n * warmup <= height), step
        positions += rows * batch.seq_len
        if rows == batch.global_rows and step > 100:
            break


@pytest.mark.parametrize("batch", SHAPES)
def test_rows_steps_and_plateaus_tell_the_same(batch: BatchConfig) -> None:
    sums = [0, *accumulate(batch_size.rows_at(batch, step) for step in range(2000))]
    assert [batch_size.rows_before(batch, step) for step in range(2001)] == sums
    for before, after in list(pairwise(sums))[:200]:
        steps = sums.index(after)
        assert batch_size.steps_of(batch, before + 1) == batch_size.steps_of(batch, after) == steps
    for plateau in batch_size.plateaus(batch):
        assert sums[min(plateau.step, 2000)] == plateau.before or plateau.step > 2000
        assert batch_size.rows_at(batch, plateau.step) == plateau.rows


def test_a_batch_that_does_not_grow_has_one_plateau() -> None:
    assert batch_size.plateaus(BatchConfig(global_rows=7)) == [(0, 0, 7)]


def test_accumulation_follows_from_the_rows() -> None:
    assert accumulation(BatchConfig(16, 64, 8), 2) == 4
    assert [accumulation(GROWING, 2, rows) for rows in (8, 16, 32, 64, 96)] == [1, 2, 4, 8, 12]
    assert [batch_size.micro_rows(GROWING, 4, rows) for rows in (8, 16, 96)] == [2, 4, 4], "a rank's share may be less"


@pytest.mark.parametrize(
    ("global_rows", "micro_rows", "world", "expected"),
    [
        (100, 8, 4, "set batch.global_rows to 96 or 128, or batch.micro_rows to 5 or 25"),
        (9, 16, 2, "set batch.global_rows to 8 or 16"),
        (10, 1, 4, "set batch.global_rows to 8 or 12"),
    ],
)
def test_a_global_batch_that_does_not_divide_is_refused_with_those_that_do(
    global_rows: int, micro_rows: int, world: int, expected: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        batch_size.check(BatchConfig(16, global_rows, micro_rows), world)
    assert str(refused.value).endswith(expected)


@pytest.mark.parametrize(
    ("warmup_rows", "world", "expected"),
    [
        (12, 8, "makes steps of 12 rows, which can't be split evenly over 8 ranks x 1 micro_rows"),
        (12, 8, "set batch.warmup_rows to 8 or 16"),
        (24, 4, "makes steps of 24 rows, which can't be split evenly over 4 ranks x 4 micro_rows"),
        (7, 1, "set batch.warmup_rows to 4 or 8"),
        (1, 64, "take the warm-up out"),
    ],
)
def test_a_start_that_does_not_divide_is_refused_with_those_that_do(
    warmup_rows: int, world: int, expected: str
) -> None:
    batch = BatchConfig(16, 64, 4, warmup_rows, 10_000)
    with pytest.raises(ConfigError) as refused:
        batch_size.check(batch, world)
    assert expected in str(refused.value)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_what_the_advice_says_works(world: int) -> None:
    for warmup_rows in (8, 16, 32):
        batch_size.check(BatchConfig(16, 64, 4, warmup_rows, 10_000), world)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"warmup_rows": 4}, "warmup_tokens is missing"),
        ({"warmup_tokens": 4}, "warmup_rows is missing"),
        ({"warmup_rows": 64, "warmup_tokens": 9}, "warmup_rows = 64 must be less than global_rows = 64"),
    ],
)
def test_half_a_warm_up_is_refused(arguments: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        BatchConfig(16, 64, 4, **arguments)
