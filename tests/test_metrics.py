import math
import random
import time

import pytest
import torch
from ranks import on_ranks

from mlm_dist import metrics, world
from mlm_dist.engine import StepSums
from mlm_dist.metrics import METRICS, Meter, Spikes, bad_shard_numbers, peak_flops, peak_memory
from mlm_dist.stream import Batch


def sums(loss: float, maskable: int, targets: int, correct: int, by_mask: int, by_random: int) -> StepSums:
    counts = (maskable, targets, correct, by_mask, by_random, targets - by_mask - by_random)
    return StepSums(torch.tensor(loss), *(torch.tensor(count) for count in counts))


PARTS = {"data": 0.01, "forward": 0.02, "backward": 0.03, "optimizer": 0.04}


def batch(maskable: list[int], tokens: int, sources: tuple[int, int] = (0, 0)) -> Batch:
    rows = len(maskable)
    return Batch(
        ids=torch.zeros(rows, 16, dtype=torch.int32),
        segments=torch.ones(rows, 16, dtype=torch.int16),
        maskable=torch.tensor(maskable, dtype=torch.int32),
        row_keys=torch.arange(rows),
        sources=torch.tensor(sources, dtype=torch.int16),
        stand=None,
        row_tokens=torch.tensor([tokens - 1, 1], dtype=torch.int32),
        tokens=tokens,
        text=tokens - 4,  # two pieces, one of which begins a document of 50 tokens
        documents=1,
        opened=50,
    )


SEEN = {  # by rank: two steps each, of different sizes
    0: [(sums(20.0, 24, 4, 1, 3, 1), [batch([14, 10], 28)]), (sums(10.0, 24, 4, 2, 4, 0), [batch([12, 12], 30)])],
    1: [(sums(2.0, 4, 1, 1, 1, 0), [batch([4, 0], 8)]), (sums(4.0, 8, 2, 0, 1, 0), [batch([6, 2], 12)])],
}


def report() -> dict[str, float]:
    with world.join(60) as here:
        meter = Meter(here, flops_per_token=1000.0)
        started = time.perf_counter()
        time.sleep(0.1)
        for step_sums, batches in SEEN[here.rank]:
            meter.add(step_sums, batches, data_seconds=0.02 * (here.rank + 1))
        parts = {part: seconds * (1 + 2 * here.rank) for part, seconds in PARTS.items()}
        seconds = time.perf_counter() - started  # before the report, which waits for the other rank
        first = meter.report(parts)
        meter.add(*SEEN[here.rank][0], data_seconds=0.0)
        meter.add(SEEN[here.rank][1][0].unless(True), SEEN[here.rank][1][1], data_seconds=0.0)
        second = meter.report(parts)
        return {"first": first, "second": second, "seconds": seconds, "peak": meter.peak_flops}


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
    assert first["packing"] == pytest.approx(78 / 128)
    assert first["document_tokens"] == 50 and first["continued_pieces"] == pytest.approx(1 / 2)
    assert first["unknown_tokens"] == pytest.approx(1 - 60 / (78 - 16))
    assert one["second"]["loss"] == pytest.approx(22 / 5), "a report starts again"
    assert one["second"]["mask_rate"] == pytest.approx(5 / 28), "of a step that was skipped neither counts"


def test_the_times_are_those_of_both_ranks_together() -> None:
    one, other = on_ranks(2, report)
    first = one["first"]
    assert first == other["first"], "all ranks get the same"
    for part, seconds in PARTS.items():  # of two steps, and three times as much on rank 1
        assert first[f"time/{part}"] == pytest.approx(seconds), part
    parts = [first[f"time/{part}"] for part in (*PARTS, "other")]
    seconds = max(one["seconds"], other["seconds"])
    assert sum(parts) <= first["step_seconds"] * (1 + 1e-9) and first["step_seconds"] == pytest.approx(seconds / 2, 0.1)
    assert sum(parts) == pytest.approx(first["step_seconds"], rel=0.2)
    assert first["tokens_per_second"] == pytest.approx(78 / (2 * first["step_seconds"]))
    assert one["peak"] == other["peak"] == pytest.approx(first["tokens_per_second"] * 1000 / first["mfu"])
    assert first["data_wait"] == pytest.approx(0.08 / (2 * first["step_seconds"])) and first["data_wait_rank"] == 1
    # a rank's own work: 0.04 + 0.02 and 0.08 + 0.06 seconds
    assert first["slowest_rank"] == 1
    assert first["slowest_rank_lag"] == pytest.approx(0.08 / (2 * first["step_seconds"]))


def report_sources() -> list[dict[str, float]]:
    with world.join(60) as here:
        meter = Meter(here, 1.0, sources=("law", "web"))
        pairs = {0: (0, 0), 1: (1, -1)}  # by rank; -1 is a row of padding
        meter.add(sums(1.0, 8, 1, 1, 1, 0), [batch([4, 4], 8, pairs[here.rank])], 0.0)
        return [meter.report(PARTS), meter.report(PARTS)]


def test_each_sources_share_of_the_rows_of_all_ranks_is_reported() -> None:
    one, other = on_ranks(2, report_sources)
    shares = [{name: value for name, value in report.items() if name.startswith("source/")} for report in one + other]
    # tokens: rows of 7 and 1, and one of 7
    expected = {"source/law": 2 / 3, "source/web": 1 / 3, "source/law/tokens": 8 / 15, "source/web/tokens": 7 / 15}
    assert shares[0] == shares[2] == pytest.approx(expected)
    assert shares[1] == dict.fromkeys(expected, 0.0), "a report starts again"


def test_bad_shards_are_counted_in_all_and_by_reason() -> None:
    reasons = {"000001.tar": "altered", "law/000001.tar": "missing", "law/000002.tar": "altered"}
    assert bad_shard_numbers(reasons) == {"bad_shards": 3, "bad_shards/altered": 2, "bad_shards/missing": 1}
    assert bad_shard_numbers({}) == {}


def test_nothing_seen_is_not_a_division_by_zero() -> None:
    [got] = on_ranks(1, report_nothing)
    assert all(math.isnan(got[name]) for name in METRICS)


def report_nothing() -> dict[str, float]:
    with world.join(60) as here:
        return Meter(here, 1.0).report(PARTS)


def test_the_cpu_peak_is_that_of_a_ranks_threads() -> None:
    """Of one thread, whatever the machine has; against a small product, which a busy machine lets through undisturbed.

    More threads than one can't be had for sure on a machine that others use.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured, matrix, seconds = peak_flops(torch.device("cpu")), torch.randn(512, 512), math.inf
        assert torch.get_num_threads() == 1
        for _ in range(100):
            started = time.perf_counter()
            torch.mm(matrix, matrix)
            seconds = min(seconds, time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    assert measured == pytest.approx(2 * 512**3 / seconds, rel=0.6)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_a_gpu_s_peak_is_that_of_its_name(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(metrics, "measured_peak_flops", lambda device: 1.0)
    assert peak_flops(torch.device("cuda")) == (peak or 1.0), "one that isn't known is measured"


def held_by_each() -> tuple[float, int]:
    with world.join(60) as here:
        held = torch.ones(here.rank * 2**27)  # 512 MiB on rank 1
        meter = Meter(here, 1.0)
        told = meter.report(PARTS)["memory_gb"]
        del held
        return told, peak_memory(here.device)


def test_the_memory_is_that_of_the_rank_that_took_most() -> None:
    (one, small), (other, large) = on_ranks(2, held_by_each)
    assert one == other and large - small > 0.7 * 2**29
    assert one * 1e9 == pytest.approx(large, rel=0.1) and one * 1e9 > small + 0.6 * 2**29


def test_a_loss_that_stands_out_is_told_and_the_rest_is_not() -> None:
    draw, spikes = random.Random(0), Spikes()
    falling = [6.0 / (1 + step / 50) + draw.gauss(0, 0.05) for step in range(200)]
    assert [spikes.usual(loss) for loss in falling] == [None] * 200
    assert spikes.usual(falling[-1] * 1.5) == pytest.approx(falling[-1], rel=0.15)
    assert spikes.usual(falling[-1] * 1.7) is not None, "one does not hide the next"
    assert spikes.usual(falling[-1]) is None and spikes.usual(math.nan) is None
    assert Spikes().usual(100.0) is None
    assert [spikes.usual(math.nan) for _ in range(40)] == [None] * 40
    assert spikes.usual(falling[-1] * 1.6) is not None, "nor do steps that were skipped"
