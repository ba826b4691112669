"""Rows of an optimizer step: the global batch, how it grows over the first tokens, and how ranks share it.

All of it follows from the configuration and the step, so nothing about it needs a checkpoint.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from mlm_dist.schema import ConfigError, setting


@dataclass(frozen=True)
class BatchConfig:
    seq_len: int = setting(512, low=8, high=65536, help="positions in a row")
    global_rows: int = setting(256, low=1, help="rows in an optimizer step, over all ranks")
    micro_rows: int = setting(32, low=1, help="most rows that a rank holds at a time; accumulation follows")
    warmup_rows: int | None = setting(
        None, low=1, help="rows in the first step, where the batch is to grow; they double until they are global_rows"
    )
    warmup_tokens: int | None = setting(None, low=1, help="positions (rows x seq_len) over which the batch grows")

    def __post_init__(self) -> None:
        if (self.warmup_rows is None) != (self.warmup_tokens is None):
            missing = "warmup_rows" if self.warmup_rows is None else "warmup_tokens"
            raise ConfigError(f"a batch that grows needs warmup_rows and warmup_tokens: {missing} is missing")
        if self.warmup_rows is not None and self.warmup_rows >= self.global_rows:
            raise ConfigError(
                f"warmup_rows = {self.warmup_rows} must be less than global_rows = {self.global_rows}, its end"
            )


# ---- growth


class Plateau(NamedTuple):
    """Consecutive steps of the same size."""

    step: int  # the first
    before: int  # rows of all steps before it
    rows: int  # of each of its steps


def plateaus(batch: BatchConfig) -> list[Plateau]:
    """The plateaus in order; the last one, of `global_rows`, doesn't end.

    A ramp rises from `warmup_rows` to `global_rows` in proportion to the positions trained on. A step has the most rows
    of `warmup_rows` x 1, 2, 4, ... and `global_rows` that the ramp has reached when it begins.
    """
    if batch.warmup_rows is None or batch.warmup_tokens is None:
        return [Plateau(0, 0, batch.global_rows)]
    rise = batch.global_rows - batch.warmup_rows
    found, step, before = [], 0, 0
    for rows, following in pairwise(sizes(batch.warmup_rows, batch.global_rows)):
        # in whole numbers: the rows after which the ramp is at `following`, times `scale`
        scale = rise * batch.seq_len
        left = batch.warmup_tokens * (following - batch.warmup_rows) - before * scale
        steps = max(0, -(-left // (rows * scale)))
        if steps:
            found.append(Plateau(step, before, rows))
        step, before = step + steps, before + steps * rows
    return [*found, Plateau(step, before, batch.global_rows)]


def sizes(first: int, last: int) -> list[int]:
    """`first`, doubled again and again, and `last`."""
    found = [first]
    while 2 * found[-1] < last:
        found.append(2 * found[-1])
    return [*found, last] if first < last else [last]


def rows_at(batch: BatchConfig, step: int) -> int:
    """Rows of the step that follows `step` finished ones, over all ranks."""
    return _plateau_at(batch, step).rows


def rows_before(batch: BatchConfig, step: int) -> int:
    """Rows of the first `step` steps together."""
    plateau = _plateau_at(batch, step)
    return plateau.before + (step - plateau.step) * plateau.rows


def _plateau_at(batch: BatchConfig, step: int) -> Plateau:
    return [plateau for plateau in plateaus(batch) if plateau.step <= step][-1]


def steps_of(batch: BatchConfig, rows: int) -> int:
    """The first steps that together have so many rows, or a few more."""
    plateau = [plateau for plateau in plateaus(batch) if plateau.before < max(rows, 1)][-1]
    return plateau.step + -(-(rows - plateau.before) // plateau.rows)


# ---- shares


def micro_rows(batch: BatchConfig, world_size: int, rows: int | None = None) -> int:
    """Rows of a micro-batch: what the configuration says, or a rank's whole share where that is less.

    rows: of the step; none: the full batch
    """
    return min(batch.micro_rows, max(1, (rows or batch.global_rows) // world_size))


def accumulation(batch: BatchConfig, world_size: int, rows: int | None = None) -> int:
    """Micro-batches that each rank takes for one step of `rows`, or of the full batch.

    Raises ConfigError where the full batch can't be split so; for the plateaus on the way to it see `check`.
    """
    if is_even(batch, world_size, rows or batch.global_rows):
        return (rows or batch.global_rows) // (world_size * micro_rows(batch, world_size, rows))
    per_round = world_size * micro_rows(batch, world_size)
    low = batch.global_rows // per_round * per_round
    advice = f"set batch.global_rows to {' or '.join(str(count) for count in (low, low + per_round) if count)}"
    share, remainder = divmod(batch.global_rows, world_size)
    if not remainder:
        divisors = [count for count in range(1, share + 1) if share % count == 0]
        below = max(count for count in divisors if count <= batch.micro_rows)
        above = [count for count in divisors if count > batch.micro_rows][:1]
        advice += f", or batch.micro_rows to {' or '.join(map(str, [below, *above]))}"
    raise ConfigError(
        f"batch.global_rows = {batch.global_rows} can't be split evenly over {world_size} ranks "
        f"x {micro_rows(batch, world_size)} micro_rows: {advice}"
    )


def is_even(batch: BatchConfig, world_size: int, rows: int) -> bool:
    """Whether so many rows are whole micro-batches, as many on each rank."""
    return rows % (world_size * micro_rows(batch, world_size, rows)) == 0


def check(batch: BatchConfig, world_size: int) -> None:
    """Raise ConfigError where the ranks can't share the batch evenly, at its full size or on the way to it."""
    accumulation(batch, world_size)
    first, last = batch.warmup_rows, batch.global_rows
    if first is None:
        return
    uneven = [rows for rows in sizes(first, last) if not is_even(batch, world_size, rows)]
    if uneven:
        starts = range(world_size, last, world_size)
        fitting = [each for each in starts if all(is_even(batch, world_size, rows) for rows in sizes(each, last))]
        nearest = sorted(sorted(fitting, key=lambda each: abs(each - first))[:2])
        advice = f"set batch.warmup_rows to {' or '.join(map(str, nearest))}" if nearest else "take the warm-up out"
        raise ConfigError(
            f"batch.warmup_rows = {first} makes steps of {uneven[0]} rows, which can't be split evenly over "
            f"{world_size} ranks x {micro_rows(batch, world_size, uneven[0])} micro_rows: {advice}"
        )
