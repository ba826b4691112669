"""RunConfig: one section per module, and the checks that span sections."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mlm_dist import batch_size, compiling, models, optim, schedule, schema
from mlm_dist.batch_size import BatchConfig, accumulation, micro_rows
from mlm_dist.checkpoint import CheckpointConfig
from mlm_dist.engine_config import EngineConfig, deepspeed_json, resolve_precision, resolve_stage
from mlm_dist.evaluate import EvaluateConfig
from mlm_dist.masking import MaskingConfig
from mlm_dist.models import ModelConfig
from mlm_dist.optim import OptimConfig
from mlm_dist.schedule import ScheduleConfig
from mlm_dist.schema import ConfigError, setting
from mlm_dist.stream import DataConfig
from mlm_dist.tracker import LogConfig

# What may differ between a run and its resumption, by key or section; every other change is refused by name.
MAY_CHANGE = (
    "run.dir",
    "run.steps",
    "run.tokens",
    "run.hours",
    "data.shards",  # the folder may move: its contents are compared instead
    "data.sources.*.shards",
    "data.workers",
    "data.max_bad_shards",
    "data.cache_dir",
    "data.cache_gb",
    "data.fetch_seconds",
    "batch.micro_rows",
    "model.encoder.max_documents",
    "model.encoder.recompute",
    "engine.compile",
    "engine.timeout_seconds",
    "log",
    "checkpoint",
    "evaluate",
)

# And what else may differ between a run and the one that it starts from (`run.from`).
MAY_DIFFER = (
    "run",
    "data",
    "batch",
    "masking",
    "schedule",
    "optim.lr",
    "optim.beta*",
    "optim.eps",
    "optim.weight_decay",
    "optim.muon",
    "engine.clip",
    "engine.max_non_finite_steps",
    "model.encoder.rope_theta",
    "model.encoder.rope_theta_local",
    "model.encoder.rope_factor",
    "model.encoder.rope_factor_local",
    "model.encoder.max_positions",
)


@dataclass(frozen=True)
class RunSection:
    dir: str = setting(help="the run folder: checkpoints, metrics and all that the run leaves")
    from_: str | None = setting(
        None, help="a run folder, for its newest checkpoint, or one checkpoint: what a new run starts from"
    )
    seed: int = setting(1337, low=0, help="of the weights, the data order and the masks")
    steps: int | None = setting(None, low=1, help="length of the run in optimizer steps")
    tokens: int | None = setting(None, low=1, help="length of the run in positions (rows x seq_len)")
    hours: float | None = setting(None, above=0, help="length of the run in hours of training, over all its launches")

    def __post_init__(self) -> None:
        given = [name for name in ("steps", "tokens", "hours") if self.__dict__[name] is not None]
        if len(given) != 1:
            raise ConfigError(
                f"state the length once, as steps, tokens or hours: given is {' and '.join(given) or 'none of them'} "
                "(null takes a parent's back)"
            )
        if self.from_ and Path(self.from_).resolve().is_relative_to(Path(self.dir).resolve()):
            raise ConfigError(
                f"from = {self.from_} stands in dir = {self.dir}, where a run goes on by itself; set another run.dir"
            )


@dataclass(frozen=True)
class RunConfig:
    run: RunSection
    data: DataConfig
    batch: BatchConfig
    masking: MaskingConfig
    model: ModelConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    engine: EngineConfig
    log: LogConfig
    checkpoint: CheckpointConfig
    evaluate: EvaluateConfig
    deepspeed: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "passed through to DeepSpeed; keys that a section owns are refused"}
    )

    def __post_init__(self) -> None:
        check_length(self, total_steps(self))
        models.check(self.model, self.batch.seq_len)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file with its parents and overrides. Raises ConfigError with one sentence."""
    return schema.load(RunConfig, path, overrides)


def total_steps(config: RunConfig) -> int | None:
    """Length of the run in steps; None for one measured in hours."""
    if config.run.tokens is not None:
        return batch_size.steps_of(config.batch, math.ceil(config.run.tokens / config.batch.seq_len))
    return config.run.steps


def check_length(config: RunConfig, steps: int | None) -> None:
    """Raise ConfigError where warm-up, decay or a growing batch don't fit in a run of so many steps, if it is known."""
    schedule.check(config.schedule, steps)
    if steps is not None and batch_size.rows_at(config.batch, steps - 1) < config.batch.global_rows:
        raise ConfigError(
            f"batch.warmup_tokens = {config.batch.warmup_tokens} is more than the run: the batch would never grow to "
            f"{config.batch.global_rows} rows; lower it, or make the run longer"
        )


def changes(saved: dict[str, Any], now: dict[str, Any], allowed: Sequence[str]) -> dict[str, str]:
    """What differs from the saved resolved configuration, but for what is allowed to: a sentence for each key.

    A key that the saved one doesn't know, being older, counts as its default.
    """
    try:
        saved = schema.to_mapping(schema.from_mapping(RunConfig, saved))
    except ConfigError:
        pass  # it has a key or a value that is no longer known: that is the change to be named
    before, after = schema.flatten(saved), schema.flatten(now)
    return {
        key: f"{key} was {before.get(key)!r} and is {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not is_among(key, allowed)
    }


def is_among(key: str, names: Sequence[str]) -> bool:
    """Whether a key is one of these keys, or in one of these sections."""
    return any(fnmatchcase(key, name) or key.startswith(f"{name}.") for name in names)


def memory_by_stage(parameters: int, precision: str, world_size: int, with_one_moment: int = 0) -> dict[int, float]:
    """GiB a rank for weights, gradients and the optimizer's state, without activations (arXiv 1910.02054).

    fp32: 4 + 4 + 8 bytes a parameter; bf16 and fp16: 2 + 4 (summed in fp32) + 12 (with the fp32 master weights).
    with_one_moment: parameters for which the optimizer keeps one number of 4 bytes, not two
    """
    of_one = (4, 4, 8) if precision == "fp32" else (2, 4, 12)
    weights, gradients, state = (parameters * size for size in of_one)
    state -= 4 * with_one_moment
    in_bytes = {
        0: weights + gradients + state,
        1: weights + gradients + state / world_size,
        2: weights + (gradients + state) / world_size,
        3: (weights + gradients + state) / world_size,
    }
    return {stage: size / 2**30 for stage, size in in_bytes.items()}


def shares(batch: BatchConfig, world_size: int, rows: int) -> str:
    """How the ranks share a step of so many rows, in words."""
    count = accumulation(batch, world_size, rows)
    return f"{world_size} x {count} micro-batches x {micro_rows(batch, world_size, rows)} rows"


def describe(config: RunConfig, world_size: int, device: torch.device, vocab_size: int) -> str:
    """What a run would be, without starting it: the text of --dry-run."""
    engine = resolve_stage(config.engine, device)
    precision = resolve_precision(engine, device)
    is_compiled = compiling.wanted(engine.compile, engine.zero_stage, device)
    with torch.device("meta"):
        model = models.build(config.model, vocab_size, config.batch.seq_len, packing=config.data.packing)
    parameters = models.count_parameters(model)
    flops = models.flops_per_token(config.model, model, vocab_size, config.batch.seq_len, config.masking.rate)
    one_moment = optim.with_one_moment(config.optim, model, vocab_size)
    memory = memory_by_stage(parameters, precision, world_size, one_moment)
    steps = total_steps(config)
    tokens = batch_size.rows_before(config.batch, steps) * config.batch.seq_len if steps else None
    rows = config.batch.global_rows
    json_text = json.dumps(deepspeed_json(engine, config.batch, precision, world_size, config.deepspeed), indent=2)
    lines = [
        schema.to_yaml(config).rstrip(),
        "",
        f"parameters           {parameters:,} (vocabulary {vocab_size:,})",
        f"FLOPs per token      {flops:,.0f} (forward and backward)",
        f"tokens per step      {rows * config.batch.seq_len:,} = {rows} rows x {config.batch.seq_len}",
        f"ranks                {shares(config.batch, world_size, rows)}, {precision} on {device.type}"
        + (", compiled" if is_compiled else ""),
        *(
            f"batch warm-up        steps {one.step + 1:,} to {two.step:,}: {one.rows} rows, "
            f"{shares(config.batch, world_size, one.rows)}"
            for one, two in pairwise(batch_size.plateaus(config.batch))
        ),
        "length               " + (f"{steps:,} steps, {tokens:,} tokens" if steps else f"{config.run.hours} hours"),
        "memory per rank      "
        + ", ".join(f"stage {stage}: {size:.2f} GiB" for stage, size in memory.items())
        + "  (weights, gradients, optimizer; activations come on top)",
        "",
        "DeepSpeed configuration:",
        json_text,
    ]
    return "\n".join(lines)
