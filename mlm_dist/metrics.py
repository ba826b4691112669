"""Sums of all ranks -> the numbers that are logged. One reduction and one wait for the device per report."""

import math
import platform
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import torch

from mlm_dist.engine import StepSums
from mlm_dist.pace import SlowRank, slowest
from mlm_dist.stream import Batch
from mlm_dist.world import World

Sums = dict[str, float]

DEVICE_SUMS = tuple(f.name for f in fields(StepSums))
HOST_SUMS = ("maskable", "tokens", "positions", "documents", "steps", "data_seconds")

# Dense bf16 matrix-product peaks in FLOP/s, from NVIDIA's data sheets; the name as torch.cuda.get_device_name gives it.
GPU_PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
}


LOSSES_COMPARED = 32
SPREADS = 8.0


class Meter:
    """Adds up what the steps since the last report saw, on this rank.

    flops_per_token: training arithmetic of one real token (forward and backward), for the utilisation
    sources: names of the data's sources in the order of their numbers; each one's share of the rows is reported
    slow_rank: the share of a step's time by which a rank lags when it is told of
    All ranks make one.
    """

    def __init__(
        self, world: World, flops_per_token: float, sources: Sequence[str] = (), slow_rank: float = 0.1
    ) -> None:
        self.world = world
        self.sources = [f"source/{name}" for name in sources]
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops(world.device)
        self.slow_rank = SlowRank(world.gather(platform.node()), slow_rank)
        self.warning: str | None = None  # of the last report: what to say of a slow rank
        self._clear()

    def _clear(self) -> None:
        self.device_sums: StepSums | None = None
        self.host_sums = dict.fromkeys([*HOST_SUMS, *self.sources], 0.0)
        self.started = time.perf_counter()

    def add(self, sums: StepSums, batches: Sequence[Batch], data_seconds: float) -> None:
        """Take in one step: what the engine added up, its micro-batches, and how long this rank waited for them."""
        self.device_sums = sums if self.device_sums is None else self.device_sums + sums
        add_batches(self.host_sums, batches)
        for batch in batches if self.sources else ():
            rows = torch.bincount(batch.sources + 1, minlength=len(self.sources) + 1)[1:]  # -1 is padding
            for name, count in zip(self.sources, rows.tolist(), strict=True):
                self.host_sums[name] += count
        self.host_sums["steps"] += 1
        self.host_sums["data_seconds"] += data_seconds

    def leave_out(self, seconds: float) -> None:
        """Don't count so much time (an evaluation, a save) as training."""
        self.started += seconds

    def report(self, forward_seconds: float = 0.0) -> dict[str, float]:
        """The metrics of all ranks since the last report, and start again. Every rank calls it; all get the same.

        forward_seconds: what the forward passes of this rank took since then, without waiting for others
        """
        sums = reduce_sums(self.world, self.device_sums, self.host_sums)
        # after the reduction, which waited for the device: the seconds that the steps really took
        seconds = time.perf_counter() - self.started
        steps, data_seconds = self.host_sums["steps"], self.host_sums["data_seconds"]
        mine = torch.tensor([seconds, data_seconds, data_seconds + forward_seconds], dtype=torch.float64)
        by_rank = self.world.gather_numbers(mine)  # (ranks, 3)
        most_seconds, most_data_seconds, _ = by_rank.amax(0).tolist()
        own_seconds = by_rank[:, 2].tolist()
        slowest_rank, lag = slowest(own_seconds)
        self.warning = self.slow_rank.judge(int(steps), most_seconds, own_seconds)
        numbers = {name: metric(sums) for name, metric in METRICS.items()}
        tokens_per_second = sums["tokens"] / most_seconds
        numbers |= {
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self.flops_per_token / (self.peak_flops * self.world.size),
            "step_seconds": most_seconds / max(steps, 1),
            "data_wait": most_data_seconds / most_seconds,
            "slowest_rank": slowest_rank,
            "slowest_rank_lag": lag / most_seconds,
        }
        rows = sum(sums[name] for name in self.sources)
        numbers |= {name: sums[name] / rows if rows else 0.0 for name in self.sources}
        self._clear()
        return numbers


class Spikes:
    """Tells a loss that stands out above those that were reported before it."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=LOSSES_COMPARED)

    def usual(self, loss: float) -> float | None:
        """The median of the last losses where `loss` is a spike; None where it is not, or where too few are known.

        A spike lies above the median by a tenth of it and by SPREADS times the median distance from it. Medians, so
        that one spike does not hide the next.
        """
        losses = sorted(self.losses)
        self.losses.append(loss)
        if len(losses) < LOSSES_COMPARED // 2 or not math.isfinite(loss):
            return None
        median = statistics.median(losses)
        spread = statistics.median(abs(other - median) for other in losses)
        return median if loss > median + max(SPREADS * spread, 0.1 * median) else None


def add_batches(host_sums: Sums, batches: Sequence[Batch]) -> None:
    """Add what the batches say of themselves, on the host, to the sums."""
    for batch in batches:
        host_sums["maskable"] += int(batch.maskable.sum())
        host_sums["tokens"] += batch.tokens
        host_sums["positions"] += batch.ids.numel()
        host_sums["documents"] += batch.documents


def reduce_sums(world: World, device_sums: StepSums | None, host_sums: Sums) -> Sums:
    """All sums over all ranks, in one float64 vector, each in the same order. Waits for the device once."""
    if device_sums is None:
        on_host = [0.0] * len(DEVICE_SUMS)
    else:
        on_host = torch.stack([getattr(device_sums, name).double() for name in DEVICE_SUMS]).tolist()
    vector = torch.tensor(on_host + list(host_sums.values()), dtype=torch.float64)
    return dict(zip([*DEVICE_SUMS, *host_sums], world.sum(vector).tolist(), strict=True))


def bad_shard_numbers(reasons: Mapping[str, str]) -> dict[str, int]:
    """How many shards were skipped, in all and for each reason; nothing where there are none."""
    counts = Counter(reasons.values())
    numbers = {"bad_shards": len(reasons)} | {f"bad_shards/{name}": counts[name] for name in sorted(counts)}
    return numbers if reasons else {}


def peak_flops(device: torch.device) -> float:
    """Matrix-product peak of one rank's device, FLOP/s: from the data sheet of a known GPU, measured otherwise."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [peak for part, peak in GPU_PEAK_FLOPS.items() if part in name]
        if known:
            return known[0]
    return measured_peak_flops(device)


def measured_peak_flops(device: torch.device, size: int = 1024, repeats: int = 5) -> float:
    """The best of a few square matrix products of the device, FLOP/s: fp32 on a CPU, bf16 on a GPU."""
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def ratio(above: str, below: str) -> Callable[[Sums], float]:
    """The metric `above / below`, not a number where nothing was seen."""
    return lambda sums: sums[above] / sums[below] if sums[below] else math.nan


def perplexity(sums: Sums) -> float:
    return math.exp(min(ratio("loss", "targets")(sums), 700.0))


METRICS: dict[str, Callable[[Sums], float]] = {
    "loss": ratio("loss", "targets"),
    "perplexity": perplexity,
    "accuracy": ratio("correct", "targets"),
    "mask_rate": ratio("targets", "maskable"),
    "by_mask": ratio("by_mask", "targets"),
    "by_random": ratio("by_random", "targets"),
    "kept": ratio("kept", "targets"),
    "packing": ratio("tokens", "positions"),
}
