import math
import random

import pytest
import torch
from ranks import on_ranks

from mlm_dist import world
from mlm_dist.engine import StepSums
from mlm_dist.metrics import METRICS, Meter, Spikes, bad_shard_numbers, measured_peak_flops, peak_flops
from mlm_dist.stream import Batch


def sums(loss: float, targets: int, correct: int, by_mask: int, by_random: int) -> StepSums:
    counts = (targets, correct, by_mask, by_random, targets - by_mask - by_random)
    return StepSums(torch.tensor(loss), *(torch.tensor(count) for count in counts))


def batch(maskable: list[int], tokens: int, sources: tuple[int, int] = (0, -1)) -> Batch:
    rows = len(maskable)
    return Batch(
        ids=torch.zeros(rows, 16, dtype=torch.int32),
        segments=torch.ones(rows, 16, dtype=torch.int16),
        maskable=torch.tensor(maskable, dtype=torch.int32),
        row_keys=torch.arange(rows),
        sources=torch.tensor(sources, dtype=torch.int16),
        stand=None,
        tokens=tokens,
        documents=rows,
    )


SEEN = {  # by rank: two steps each, of different sizes
    0: [(sums(20.0, 4, 1, 3, 1), [batch([14, 10], 28)]), (sums(10.0, 4, 2, 4, 0), [batch([12, 12], 30)])],
    1: [(sums(2.0, 1, 1, 1, 0), [batch([4, 0], 6)]), (sums(4.0, 2, 0, 1, 0), [batch([6, 2], 10)])],
}


def report() -> dict[str, float]:
    with world.join(60) as here:
        meter = Meter(here, flops_per_token=1000.0)
        for step_sums, batches in SEEN[here.rank]:
            meter.add(step_sums, batches, data_seconds=1e-6 * (here.rank + 1))
        first = meter.report()
        assert first["step_seconds"] > 0 and 0 < first["data_wait"] < 1
        assert first["mfu"] == pytest.approx(first["tokens_per_second"] * 1000 / (meter.peak_flops * 2))
        meter.add(*SEEN[here.rank][0], data_seconds=0.0)
        second = meter.report()
        return {"first": first, "second": second}


def test_the_numbers_are_those_of_both_ranks_together() -> None:
    one, other = on_ranks(2, report)
    for name in METRICS:
        assert one["first"][name] == other["first"][name]
    first = one["first"]
    assert first["loss"] == pytest.approx(36 / 11)  # not the mean of the ranks' means, 30/8 and 6/3
    assert first["perplexity"] == pytest.approx(math.exp(36 / 11))
    assert first["accuracy"] == pytest.approx(4 / 11)
    assert first["mask_rate"] == pytest.approx(11 / 60)
    assert (first["by_mask"], first["by_random"], first["kept"]) == pytest.approx((9 / 11, 1 / 11, 1 / 11))
    assert first["packing"] == pytest.approx(74 / 128)
    assert one["second"]["loss"] == pytest.approx(22 / 5), "a report starts again"


def report_sources() -> list[dict[str, float]]:
    with world.join(60) as here:
        meter = Meter(here, 1.0, sources=("law", "web"))
        pairs = {0: (0, 0), 1: (1, -1)}  # by rank; -1 is a row of padding
        meter.add(sums(1.0, 1, 1, 1, 0), [batch([4, 4], 8, pairs[here.rank])], 0.0)
        return [meter.report(), meter.report()]


def test_each_sources_share_of_the_rows_of_all_ranks_is_reported() -> None:
    one, other = on_ranks(2, report_sources)
    shares = [{name: value for name, value in report.items() if name.startswith("source/")} for report in one + other]
    assert shares[0] == shares[2] == {"source/law": 2 / 3, "source/web": 1 / 3}
    assert shares[1] == {"source/law": 0.0, "source/web": 0.0}, "a report starts again"


def test_bad_shards_are_counted_in_all_and_by_reason() -> None:
    reasons = {"000001.tar": "altered", "law/000001.tar": "missing", "law/000002.tar": "altered"}
    assert bad_shard_numbers(reasons) == {"bad_shards": 3, "bad_shards/altered": 2, "bad_shards/missing": 1}
    assert bad_shard_numbers({}) == {}


def test_nothing_seen_is_not_a_division_by_zero() -> None:
    [got] = on_ranks(1, report_nothing)
    assert all(math.isnan(got[name]) for name in ("loss", "packing", "perplexity"))


def report_nothing() -> dict[str, float]:
    with world.join(60) as here:
        return Meter(here, 1.0).report()


def test_the_cpu_peak_is_measured() -> None:
    assert 1e8 < measured_peak_flops(torch.device("cpu"), size=256) < 1e14
    assert peak_flops(torch.device("cpu")) > 1e8


def test_a_loss_that_stands_out_is_told_and_the_rest_is_not() -> None:
    draw, spikes = random.Random(0), Spikes()
    falling = [6.0 / (1 + step / 50) + draw.gauss(0, 0.05) for step in range(200)]
    assert [spikes.usual(loss) for loss in falling] == [None] * 200
    assert spikes.usual(falling[-1] * 1.5) == pytest.approx(falling[-1], rel=0.15)
    assert spikes.usual(falling[-1] * 1.7) is not None, "one does not hide the next"
    assert spikes.usual(falling[-1]) is None and spikes.usual(math.nan) is None
    assert Spikes().usual(100.0) is None
