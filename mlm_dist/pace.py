"""What a step's time goes to, and which rank is slow.

Slow is who takes long for its own work, without the time in which it waits for the others.

A step takes equally long on all ranks, since its collectives wait for the slowest. A rank's own work is what is left
without them: the wait for its data, and its forward passes. Those have no collective in them at ZeRO stages 0 to 2; at
stage 3 they wait for the other ranks' weights, and the watch stands still meanwhile. The backward pass is no such work:
its collectives are within it, and who is slow there is slow in the forward pass too.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# What a step is made of, each by a watch of its own. The rest is agreeing with the other ranks, and the loop itself.
PARTS = ("data", "forward", "backward", "optimizer")

# at least: who is slow over two such stretches in a row is told. Within a second or two of a crowded CPU one rank may
# well come off worse, over longer ones the ranks get equal shares of it.
STEPS_JUDGED = 10
SECONDS_JUDGED = 5.0
SMALLEST_LAG_SECONDS = 0.005  # a step; less is not worth a word
SECONDS_TO_REPEAT = 3600.0


class Stopwatch:
    """Seconds that laps of a device's work take, by its own clock: nothing waits for the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: list[tuple[Any, Any]] = []
        self.since: Any = None  # while it runs
        self.in_lap = False

    @contextmanager
    def lap(self) -> Iterator[None]:
        """Run while the `with` block does."""
        self.in_lap = True
        self.go_on()
        try:
            yield
        finally:
            self.stand_still()
            self.in_lap = False

    def stand_still(self, *_: object) -> None:
        if self.since is not None:
            self.spans.append((self.since, self._mark()))
            self.since = None

    def go_on(self, *_: object) -> None:
        if self.in_lap:
            self.since = self._mark()

    def leave_out_hooks_of(self, model: nn.Module) -> None:
        """Stand still, from here on, while the hooks run that stand before the forward pass of a part of the model."""
        for module in model.modules():
            module.register_forward_pre_hook(self.stand_still, prepend=True)
            module.register_forward_pre_hook(self.go_on)

    def read(self) -> float:
        """Seconds of all laps since the last reading. Waits for the device."""
        spans, self.spans = self.spans, []
        if not self.on_gpu:
            return sum(end - start for start, end in spans)
        if spans:
            spans[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1000

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def slowest(own_seconds: Sequence[float]) -> tuple[int, float]:
    """The rank whose own work takes longest, and by how many seconds longer than the median rank's.

    own_seconds: by rank. Of an even number of ranks the lower median counts: of two ranks the other one.
    """
    rank = max(range(len(own_seconds)), key=own_seconds.__getitem__)
    return rank, own_seconds[rank] - statistics.median_low(own_seconds)


class SlowRank:
    """Tells when a rank is slow, once; again an hour later while it lasts, and when it is over.

    Slow is who takes longer for its own work than the median rank, by `margin` of a step's time and by
    SMALLEST_LAG_SECONDS, over two stretches in a row of at least STEPS_JUDGED steps and SECONDS_JUDGED: a hiccup is
    not told.

    hosts: the name of each rank's machine
    """

    def __init__(self, hosts: Sequence[str], margin: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.hosts, self.margin, self.clock = hosts, margin, clock
        self.steps, self.seconds, self.own_seconds = 0, 0.0, [0.0] * len(hosts)
        self.suspect: int | None = None
        self.told: int | None = None
        self.told_at = 0.0

    def judge(self, steps: int, seconds: float, own_seconds: Sequence[float]) -> str | None:
        """Take in what so many steps took, in all and by rank. Returns the sentence to say, if there is one."""
        self.steps, self.seconds = self.steps + steps, self.seconds + seconds
        self.own_seconds = [a + b for a, b in zip(self.own_seconds, own_seconds, strict=True)]
        if self.steps < STEPS_JUDGED or self.seconds < SECONDS_JUDGED:
            return None
        rank, lag = slowest(self.own_seconds)
        lag_a_step, share = lag / self.steps, lag / self.seconds
        slow = rank if lag_a_step >= SMALLEST_LAG_SECONDS and share >= self.margin else None
        self.steps, self.seconds, self.own_seconds = 0, 0.0, [0.0] * len(self.hosts)
        suspect, self.suspect = self.suspect, slow
        if slow != suspect:
            return None
        return self._tell(slow, lag_a_step, share)

    def _tell(self, slow: int | None, lag: float, share: float) -> str | None:
        told, now = self.told, self.clock()
        if slow == told and (slow is None or now - self.told_at < SECONDS_TO_REPEAT):
            return None
        self.told, self.told_at = slow, now
        if slow is None:
            return f"rank {told} (host {self.hosts[told]}) keeps up with the others again"
        return (
            f"rank {slow} (host {self.hosts[slow]}) is slow: its own work, data and forward passes, takes "
            f"{lag:.3f} s a step longer than the median rank's, {100 * share:.0f} % of a step; all wait for it"
        )
