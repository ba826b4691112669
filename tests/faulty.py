"""Models for `model.factory` that go wrong, or slowly, on one rank, or whose disks do."""

import math
import os
import resource
import time
from typing import Any

from torch import Tensor, nn

from mlm_dist import saver
from mlm_dist.encoder import Encoder, EncoderConfig

SHAPE = EncoderConfig(layers=1, width=32, heads=2, mlp_width=48, max_positions=64)


class Faulty(nn.Module):
    """An encoder whose training goes wrong on rank 1, from one of its calls on."""

    def __init__(self, vocab_size: int, first: int, last: int) -> None:
        super().__init__()
        self.encoder = Encoder(SHAPE, vocab_size)
        self.first, self.last, self.calls = first, last, 0

    def forward(self, ids: Tensor, *, segments: Tensor | None = None) -> Tensor:
        logits = self.encoder(ids, segments=segments)
        self.calls += self.training
        wrong = self.training and os.environ["RANK"] == "1" and self.first <= self.calls <= self.last
        return logits * math.nan if wrong else logits


def faulty(vocab_size: int, first: int, last: int) -> nn.Module:
    return Faulty(vocab_size, first, last)


class Slow(nn.Module):
    """An encoder that sleeps at each call of its training, on the ranks given.

    until_restarted: not in a job that SLURM has started again
    """

    def __init__(self, vocab_size: int, seconds: float, ranks: list[int], until_restarted: bool) -> None:
        super().__init__()
        self.encoder = Encoder(SHAPE, vocab_size)
        slow = int(os.environ["RANK"]) in ranks and not (until_restarted and "SLURM_RESTART_COUNT" in os.environ)
        self.seconds = seconds if slow else 0.0

    def forward(self, ids: Tensor, *, segments: Tensor | None = None) -> Tensor:
        if self.training:
            time.sleep(self.seconds)
        return self.encoder(ids, segments=segments)


def slow(vocab_size: int, seconds: float, ranks: list[int], until_restarted: bool = False) -> nn.Module:
    return Slow(vocab_size, seconds, ranks, until_restarted)


def slow_disk(vocab_size: int, seconds: float) -> nn.Module:
    """A model that trains well, on ranks whose files take so much longer to write."""
    write = saver.write_files

    def write_slowly(*args: Any) -> dict:
        time.sleep(seconds)
        return write(*args)

    saver.write_files = write_slowly
    return Faulty(vocab_size, 1, 0)


class FullDisk(Faulty):
    """A model that trains well; from one of its calls on, rank 1 can't write more than 50 kB to a file."""

    def forward(self, ids: Tensor, *, segments: Tensor | None = None) -> Tensor:
        if os.environ["RANK"] == "1" and self.calls >= self.first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        return super().forward(ids, segments=segments)


def full_disk(vocab_size: int, first: int) -> nn.Module:
    return FullDisk(vocab_size, first, 0)
