"""Sums of all ranks -> the numbers that are logged. One reduction and one wait for the device per report.

docs/metrics.md says of each what it is, its unit, and what to do where it is bad.
"""

import math
import platform
import re
import resource
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from mlm_dist.cursor import Progress, Stand
from mlm_dist.engine import StepSums
from mlm_dist.logs import said
from mlm_dist.pace import PARTS, SlowRank, slowest
from mlm_dist.packing import SPECIALS_PER_PIECE
from mlm_dist.stream import Batch
from mlm_dist.world import World

Sums = dict[str, float]

DEVICE_SUMS = tuple(f.name for f in fields(StepSums))
HOST_SUMS = ("tokens", "text", "positions", "documents", "opened", "steps", "data_seconds")

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
    sources: names of the data's sources in the order of their numbers, if there are several; each is reported on
    slow_rank: the share of a step's time by which a rank lags when it is told of
    progress: counts the epochs that were read
    All ranks make one.
    """

    def __init__(
        self,
        world: World,
        flops_per_token: float,
        sources: Sequence[str] = (),
        slow_rank: float = 0.1,
        progress: Progress | None = None,
    ) -> None:
        self.world, self.progress = world, progress
        self.rows, self.tokens, self.epochs = (
            [f"source/{name}{what}" for name in sources] for what in ("", "/tokens", "/epoch")
        )
        self.epochs = self.epochs or ["epoch"]
        self.flops_per_token = flops_per_token
        self.slow_rank = SlowRank(world.gather(platform.node()), slow_rank)
        # measured, where it is, on all ranks at the same time: they share a machine in training too
        self.peak_flops = math.fsum(world.gather(peak_flops(world.device)))
        self.warning: str | None = None  # of the last report: what to say of a slow rank
        self._clear(time.perf_counter())

    def _clear(self, now: float) -> None:
        self.device_sums: StepSums | None = None
        self.host_sums = dict.fromkeys(HOST_SUMS, 0.0)
        self.by_source = torch.zeros(2, len(self.rows) + 1, dtype=torch.float64)  # rows, tokens; column 0: padding's
        self.stand: Stand | None = None
        self.started = now

    def add(self, sums: StepSums, batches: Sequence[Batch], data_seconds: float) -> None:
        """Take in one step: what the engine added up, its micro-batches, and how long this rank waited for them."""
        self.device_sums = sums if self.device_sums is None else self.device_sums + sums
        add_batches(self.host_sums, batches)
        for batch in batches:
            self.stand = batch.stand
            if self.rows:
                number, count = batch.sources + 1, len(self.rows) + 1
                rows = torch.bincount(number, minlength=count)
                self.by_source += torch.stack([rows, torch.bincount(number, batch.row_tokens, minlength=count)])
        self.host_sums["steps"] += 1
        self.host_sums["data_seconds"] += data_seconds

    @property
    def steps(self) -> int:
        """Steps since the last report."""
        return int(self.host_sums["steps"])

    def leave_out(self, seconds: float) -> None:
        """Don't count so much time (an evaluation, a save) as training."""
        self.started += seconds

    def report(self, parts: Mapping[str, float]) -> dict[str, float]:
        """The metrics of all ranks since the last report, and start again. Every rank calls it; all get the same.

        parts: seconds that each of pace.PARTS took on this rank since then, by the device's clock
        """
        on_device = read(self.device_sums)  # waits: what follows are the seconds that the steps really took
        now = time.perf_counter()
        mine = on_device | self.host_sums | self._of_sources() | {f"time/{part}": parts[part] for part in PARTS}
        mine |= {"seconds": now - self.started, "memory": peak_memory(self.world.device)}
        # the waits of one rank stand in its own log: there may be a thousand
        said.info("waited for data for %.3f of %.3f s", mine["data_seconds"], mine["seconds"])
        by_rank = gather(self.world, mine)
        sums = {name: math.fsum(values) for name, values in by_rank.items()}
        numbers = {name: metric(sums) for name, metric in METRICS.items()}
        numbers |= self._speed(by_rank, sums) | self._mixture(sums)
        numbers["memory_gb"] = max(by_rank["memory"]) / 1e9
        self._clear(now)
        return numbers

    def _of_sources(self) -> Sums:
        """This rank's rows and tokens of each source, and its share of the epochs read."""
        counts = dict(zip(self.rows + self.tokens, self.by_source[:, 1:].flatten().tolist(), strict=True))
        if self.progress is None or self.stand is None:
            return counts
        return counts | dict(zip(self.epochs, self.progress(self.stand), strict=True))

    def _mixture(self, sums: Sums) -> dict[str, float]:
        """Each source's share of the rows and of the tokens, and the epochs that were read of it."""
        numbers = {name: sums[name] for name in self.epochs if name in sums}
        for names in (self.rows, self.tokens):
            total = math.fsum(sums[name] for name in names)
            numbers |= {name: sums[name] / total if total else 0.0 for name in names}
        return numbers

    def _speed(self, by_rank: dict[str, list[float]], sums: Sums) -> dict[str, float]:
        """What the time went to. Sets the warning of a slow rank."""
        steps, seconds, waits = by_rank["steps"][0], max(by_rank["seconds"]), by_rank["data_seconds"]
        own_seconds = [wait + forward for wait, forward in zip(waits, by_rank["time/forward"], strict=True)]
        slowest_rank, lag = slowest(own_seconds)
        self.warning = self.slow_rank.judge(int(steps), seconds, own_seconds)
        tokens_per_second = sums["tokens"] / seconds
        times = {f"time/{part}": sums[f"time/{part}"] for part in PARTS}
        times["time/other"] = sums["seconds"] - math.fsum(times.values())
        return {
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self.flops_per_token / self.peak_flops,
            "step_seconds": seconds / max(steps, 1),
            **{name: total / self.world.size / max(steps, 1) for name, total in times.items()},
            "data_wait": max(waits) / seconds,
            "data_wait_rank": waits.index(max(waits)),
            "slowest_rank": slowest_rank,
            "slowest_rank_lag": lag / seconds,
        }


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
        if not math.isfinite(loss):
            return None  # nor is it kept: what isn't a number can't be sorted among the others
        self.losses.append(loss)
        if len(losses) < LOSSES_COMPARED // 2:
            return None
        median = statistics.median(losses)
        spread = statistics.median(abs(other - median) for other in losses)
        return median if loss > median + max(SPREADS * spread, 0.1 * median) else None


def add_batches(host_sums: Sums, batches: Sequence[Batch]) -> None:
    """Add what the batches say of themselves, on the host, to the sums."""
    for batch in batches:
        host_sums["tokens"] += batch.tokens
        host_sums["text"] += batch.text
        host_sums["positions"] += int((batch.sources >= 0).sum()) * batch.ids.shape[1]  # without rows of padding
        host_sums["documents"] += batch.documents
        host_sums["opened"] += batch.opened


def read(device_sums: StepSums | None) -> Sums:
    """Sums on the device as numbers; zeros where there are none. Waits for the device, once."""
    if device_sums is None:
        return dict.fromkeys(DEVICE_SUMS, 0.0)
    on_host = torch.stack([getattr(device_sums, name).double() for name in DEVICE_SUMS]).tolist()
    return dict(zip(DEVICE_SUMS, on_host, strict=True))


def gather(world: World, mine: Sums) -> dict[str, list[float]]:
    """Each number by rank, in one float64 vector, in the same order on all ranks. All call it with the same names.

    What is added up from it is the same on all ranks, to the last digit, whatever the collective's own order.
    """
    by_rank = world.gather_numbers(torch.tensor(list(mine.values()), dtype=torch.float64))  # (ranks, numbers)
    return dict(zip(mine, by_rank.T.tolist(), strict=True))


def add_up(world: World, mine: Sums) -> Sums:
    """The sum over all ranks of each number. All ranks call it, with the same names in the same order."""
    return {name: math.fsum(values) for name, values in gather(world, mine).items()}


def bad_shard_numbers(reasons: Mapping[str, str]) -> dict[str, int]:
    """How many shards were skipped, in all and for each reason; nothing where there are none."""
    counts = Counter(reasons.values())
    numbers = {"bad_shards": len(reasons)} | {f"bad_shards/{name}": counts[name] for name in sorted(counts)}
    return numbers if reasons else {}


def peak_flops(device: torch.device) -> float:
    """Matrix-product peak of one rank's device, FLOP/s: from the data sheet of a known GPU, measured otherwise."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        # whole words: an L40 is no L4, an A1000 no A100
        known = [peak for part, peak in GPU_PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)]
        if known:
            return known[0]
    return measured_peak_flops(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU since the last call; of a CPU rank what its process ever held at most.

    The latter without the loader's processes, and by Linux's own count, which is the process's alone: what getrusage
    says begins with that of the process that started it.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # sandboxes don't all have the former


def measured_peak_flops(device: torch.device, size: int = 1024, repeats: int = 20) -> float:
    """The best of a few square matrix products of the device, FLOP/s: fp32 on a CPU, bf16 on a GPU."""
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(matrix, matrix)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def ratio(above: str, below: str) -> Callable[[Sums], float]:
    """The metric `above / below`, not a number where nothing was seen."""
    return lambda sums: sums[above] / sums[below] if sums[below] else math.nan


def perplexity(sums: Sums) -> float:
    return math.exp(min(ratio("loss", "targets")(sums), 700.0))


def continued(sums: Sums) -> float:
    """Every piece of a document brings two special ids, and every document has one piece that begins it."""
    pieces = (sums["tokens"] - sums["text"]) / SPECIALS_PER_PIECE
    return 1 - sums["documents"] / pieces if pieces else math.nan


def unknown(sums: Sums) -> float:
    """Of the special ids only the unknown token is ever met in the text of a document."""
    return 1 - sums["maskable"] / sums["text"] if sums["text"] else math.nan


METRICS: dict[str, Callable[[Sums], float]] = {
    "loss": ratio("loss", "targets"),
    "perplexity": perplexity,
    "accuracy": ratio("correct", "targets"),
    "mask_rate": ratio("targets", "maskable"),
    "by_mask": ratio("by_mask", "targets"),
    "by_random": ratio("by_random", "targets"),
    "kept": ratio("kept", "targets"),
    "packing": ratio("tokens", "positions"),
    "document_tokens": ratio("opened", "documents"),
    "continued_pieces": continued,
    "unknown_tokens": unknown,
}
