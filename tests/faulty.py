"""A model that goes wrong on one rank, for `model.factory`."""

import math
import os

from torch import Tensor, nn

from mlm_dist.encoder import Encoder, EncoderConfig


class Faulty(nn.Module):
    """An encoder whose training goes wrong on rank 1, from one of its calls on."""

    def __init__(self, vocab_size: int, first: int, last: int) -> None:
        super().__init__()
        self.encoder = Encoder(EncoderConfig(layers=1, width=32, heads=2, mlp_width=48, max_positions=64), vocab_size)
        self.first, self.last, self.calls = first, last, 0

    def forward(self, ids: Tensor, *, segments: Tensor | None = None) -> Tensor:
        logits = self.encoder(ids, segments=segments)
        self.calls += self.training
        wrong = self.training and os.environ["RANK"] == "1" and self.first <= self.calls <= self.last
        return logits * math.nan if wrong else logits


def faulty(vocab_size: int, first: int, last: int) -> nn.Module:
    return Faulty(vocab_size, first, last)
