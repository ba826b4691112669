"""Models that go wrong, or slowly, on one rank: for `model.factory`."""

import math
import os
import time

from torch import Tensor, nn

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
