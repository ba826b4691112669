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
    decay_fraction: float = setting(
        0.2, low=0, high=1, help="wsd: the share of the steps after warm-up that the final decay takes"
    )
    decay_steps: int | None = setting(None, low=1, help="wsd: the steps of the final decay, instead of its share")
    decay_shape: Literal["sqrt", "linear"] = setting("sqrt", help="wsd: the final decay as 1 - sqrt, or linear")
    final: float = setting(0.0, low=0, high=1, help="learning rate at the end, as a share of the peak")


def lr_at(optim: OptimConfig, schedule: ScheduleConfig, step: int, total_steps: int | None) -> float:
    """Learning rate of the step that follows `step` finished ones.

    total_steps: length of the run, None while a run measured in hours does not know it yet (the peak holds).
    """
    if step < schedule.warmup_steps:
        return optim.lr * (step + 1) / (schedule.warmup_steps + 1)
    if total_steps is None:
        return optim.lr
    length = max(1, total_steps - schedule.warmup_steps)
    shape = SCHEDULES[schedule.name](min(step - schedule.warmup_steps, length), length, schedule)
    return optim.lr * (schedule.final + (1 - schedule.final) * shape)


def check(schedule: ScheduleConfig, total_steps: int | None) -> None:
    """Raise ConfigError where warm-up and decay don't fit in the run, or the decay is of another schedule."""
    warmup, decay = schedule.warmup_steps, schedule.decay_steps
    if decay is not None and schedule.name != "wsd":
        raise ConfigError(
            f"schedule.decay_steps = {decay} means nothing with schedule.name = {schedule.name}, "
            "which falls over the whole run or not at all; set schedule.name=wsd, or decay_steps to null"
        )
    if total_steps is None:
        return
    if warmup >= total_steps:
        raise ConfigError(
            f"schedule.warmup_steps = {warmup} leaves nothing of a run of {total_steps} steps; "
            f"set it to {total_steps // 10}, say"
        )
    if decay is not None and warmup + decay > total_steps:
        raise ConfigError(
            f"schedule.decay_steps = {decay} and warmup_steps = {warmup} are more than the run of {total_steps} steps; "
            f"set decay_steps to {total_steps - warmup} or less"
        )


# ---- shapes: the share of the peak after `after` of the `length` steps that follow the warm-up


def wsd(after: int, length: int, schedule: ScheduleConfig) -> float:
    """Warm-up, stable, decay: flat, then down to the end (Hägele et al., arXiv 2405.18392)."""
    decay = schedule.decay_fraction * length if schedule.decay_steps is None else min(schedule.decay_steps, length)
    left = length - after
    return 1.0 if left >= decay else DECAYS[schedule.decay_shape](1 - left / decay)


def cosine(after: int, length: int, schedule: ScheduleConfig) -> float:
    return (1 + math.cos(math.pi * after / length)) / 2


def linear(after: int, length: int, schedule: ScheduleConfig) -> float:
    return 1 - after / length


def constant(after: int, length: int, schedule: ScheduleConfig) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[int, int, ScheduleConfig], float]] = {
    "wsd": wsd,
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
}

# by how much of it is over
DECAYS: dict[str, Callable[[float], float]] = {
    "sqrt": lambda progress: 1 - math.sqrt(progress),
    "linear": lambda progress: 1 - progress,
}
