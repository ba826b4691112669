"""Held-out loss: every held-out row once, with masks that are the same at every step and for any number of ranks."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mlm_dist.engine import StepSums
from mlm_dist.masking import IGNORED_LABEL
from mlm_dist.metrics import DEVICE_SUMS, HOST_SUMS, METRICS, Sums, add_batches, add_up, ratio, read
from mlm_dist.predictions import Picker
from mlm_dist.schema import setting
from mlm_dist.stream import Batch
from mlm_dist.vocab import Vocab
from mlm_dist.world import World


@dataclass(frozen=True)
class EvaluateConfig:
    every_steps: int = setting(500, low=1, help="steps between two evaluations; one more is made at the end")
    rate: float = setting(0.15, above=0, high=1, help="share of the tokens to predict: fixed, so that runs compare")
    max_rows: int | None = setting(None, low=1, help="use only so many held-out rows; none: all")
    seed: int = setting(0, low=0, help="of the held-out masks")
    predictions: int = setting(8, low=0, help="held-out texts whose masks are filled at each evaluation, to be read")


def evaluate(
    step: Callable[[Batch], Mapping[str, Tensor]],
    batches: Iterable[Batch],
    world: World,
    vocab: Vocab,
    names: Mapping[int, str],
    picker: Picker | None = None,
) -> dict[str, float]:
    """The metrics of all held-out rows, in total and by source. All ranks call it; all get the same.

    step:    a forward pass over one batch, as `engine.held_out_pass`
    batches: this rank's share, as many on every rank: a sharded model runs on all of them or none
    names:   of the sources that have one, by number
    picker:  looks at every batch
    Returns `loss`, `perplexity`, `accuracy`, `bits_per_byte`, the realised masking, ..., and of each source the first
    four and `targets` as `NAME/loss`, ...
    """
    device_sums, host_sums = None, dict.fromkeys(HOST_SUMS, 0.0)
    token_bytes = torch.from_numpy(vocab.token_bytes()).to(world.device)  # (V,)
    by_source = torch.zeros(max(names, default=0) + 2, len(OF_A_ROW), dtype=torch.float64, device=world.device)
    for batch in batches:
        add_batches(host_sums, [batch])
        seen = step(batch)
        sums = StepSums(**{name: seen[name] for name in DEVICE_SUMS})
        device_sums = sums if device_sums is None else device_sums + sums
        if picker is not None:
            picker.look(batch, seen)
        by_source.index_add_(0, (batch.sources + 1).long().to(world.device), of_rows(seen, token_bytes))
    mine = read(device_sums) | host_sums
    for number, row in enumerate(by_source.tolist(), start=-1):  # -1: rows of padding
        mine |= {f"{number}/{name}": value for name, value in zip(OF_A_ROW, row, strict=True)}
    totals = add_up(world, mine)
    parts = {number: {name: totals[f"{number}/{name}"] for name in OF_A_ROW} for number in range(len(by_source) - 1)}
    totals |= {name: math.fsum(part[name] for part in parts.values()) for name in OF_A_ROW}
    numbers = {name: metric(totals) for name, metric in (METRICS | HELD_OUT).items()}
    for number, name in names.items():
        numbers |= {f"{name}/{kind}": metric(parts[number]) for kind, metric in HELD_OUT.items()}
    return numbers


def of_rows(seen: Mapping[str, Tensor], token_bytes: Tensor) -> Tensor:
    """What each row adds up to, (B, OF_A_ROW) float64, of a pass with details. token_bytes: (V,)"""
    labels = seen["labels"]  # (B, K)
    used = labels != IGNORED_LABEL
    correct = seen["logits"].argmax(dim=-1).view_as(labels) == labels
    stands_for = token_bytes[labels.clamp(min=0)] * used
    return torch.stack([each.double().sum(dim=1) for each in (seen["losses"], used, correct, stands_for)], dim=1)


def bits_per_byte(sums: Sums) -> float:
    """Bits that the targets' loss comes to, for each byte of text that the targets stand for (`Vocab.token_bytes`).

    The loss in nats depends on how much text a token is; bits per byte compare models of different vocabularies of one
    kind. They are not those of a left-to-right model, which predicts all of a text from the part before it.
    """
    return ratio("loss", "bytes")(sums) / math.log(2)


OF_A_ROW = ("loss", "targets", "correct", "bytes")

HELD_OUT: dict[str, Callable[[Sums], float]] = {
    "loss": METRICS["loss"],
    "perplexity": METRICS["perplexity"],
    "accuracy": METRICS["accuracy"],
    "bits_per_byte": bits_per_byte,
    "targets": lambda sums: sums["targets"],
}
