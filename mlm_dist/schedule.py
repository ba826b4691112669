"""Learning-rate schedules as pure functions of the step: nothing about them needs a checkpoint."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mlm_dist.optim import OptimConfig
from mlm_dist.schema import ConfigError, setting


@dataclass(frozen=True)
class ScheduleConfig:
    name: Literal["wsd", "cosine", "linear", "constant"] = setting(
        "wsd", help="shape of the learning rate after warm-up"
    )
    warmup_steps: int = setting(0, low=0, help="steps of linear warm-up from zero")
    decay_fraction: float = setting(0.2, low=0, high=1, help="wsd: the share of the run that the final decay takes")
    final: float = setting(0.0, low=0, high=1, help="learning rate at the end, as a share of the peak")


def lr_at(optim: OptimConfig, schedule: ScheduleConfig, step: int, total_steps: int | None) -> float:
    """Learning rate of the step that follows `step` finished ones.

    total_steps: length of the run, None while a run measured in hours does not know it yet (the peak holds).
    """
    if step < schedule.warmup_steps:
        return optim.lr * (step + 1) / (schedule.warmup_steps + 1)
    if total_steps is None:
        return optim.lr
    progress = (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
    shape = SCHEDULES[schedule.name](min(progress, 1.0), schedule)
    return optim.lr * (schedule.final + (1 - schedule.final) * shape)


def check(schedule: ScheduleConfig, total_steps: int | None) -> None:
    """Raise ConfigError where the warm-up alone is as long as the run."""
    if total_steps is not None and schedule.warmup_steps >= total_steps:
        raise ConfigError(
            f"schedule.warmup_steps = {schedule.warmup_steps} leaves nothing of a run of {total_steps} steps; "
            f"set it to {total_steps // 10}, say"
        )


def wsd(progress: float, schedule: ScheduleConfig) -> float:
    """Warm-up, stable, decay: flat, then 1 - sqrt over the last `decay_fraction` (Hägele et al., arXiv 2405.18392)."""
    if schedule.decay_fraction == 0 or progress <= 1 - schedule.decay_fraction:
        return 1.0
    return 1 - math.sqrt((progress - 1 + schedule.decay_fraction) / schedule.decay_fraction)


def cosine(progress: float, schedule: ScheduleConfig) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def linear(progress: float, schedule: ScheduleConfig) -> float:
    return 1 - progress


def constant(progress: float, schedule: ScheduleConfig) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float, ScheduleConfig], float]] = {
    "wsd": wsd,
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
}
