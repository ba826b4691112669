"""Held-out loss: every held-out row once, with masks that are the same at every step and for any number of ranks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mlm_dist.engine import StepSums
from mlm_dist.metrics import HOST_SUMS, METRICS, add_batches, reduce_sums
from mlm_dist.schema import setting
from mlm_dist.stream import Batch
from mlm_dist.world import World


@dataclass(frozen=True)
class EvaluateConfig:
    every_steps: int = setting(500, low=1, help="steps between two evaluations; one more is made at the end")
    rate: float = setting(0.15, above=0, high=1, help="share of the tokens to predict: fixed, so that runs compare")
    max_rows: int | None = setting(None, low=1, help="use only so many held-out rows; none: all")
    seed: int = setting(0, low=0, help="of the held-out masks")


def evaluate(step: Callable[[Batch], StepSums], batches: Iterable[Batch], world: World) -> dict[str, float]:
    """Loss, perplexity, accuracy and the realised masking over all held-out rows. All ranks call it; all get the same.

    step:    a forward pass over one batch, without gradients
    batches: this rank's share, as many on every rank: a sharded model runs on all of them or none
    """
    device_sums, host_sums = None, dict.fromkeys(HOST_SUMS, 0.0)
    for batch in batches:
        add_batches(host_sums, [batch])
        sums = step(batch)
        device_sums = sums if device_sums is None else device_sums + sums
    totals = reduce_sums(world, device_sums, host_sums)
    return {name: metric(totals) for name, metric in METRICS.items()} | {"targets": totals["targets"]}
