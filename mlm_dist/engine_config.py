"""The section `engine`, what its `auto`s come to, and the JSON that DeepSpeed is told."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from mlm_dist.batch_size import BatchConfig, accumulation, micro_rows
from mlm_dist.schema import ConfigError, setting

# Numbers that a collective takes together: DeepSpeed's own 5e8 make a buffer of 2 GB in fp32 beside any model.
BUCKET_NUMBERS = 50_000_000

# What the typed sections decide; the `deepspeed:` mapping may not say it a second time.
OWNED_KEYS = {
    "train_batch_size": "batch.global_rows",
    "train_micro_batch_size_per_gpu": "batch.micro_rows",
    "gradient_accumulation_steps": "batch.global_rows and batch.micro_rows",
    "managed_gradient_accumulation": "batch.global_rows and batch.micro_rows",
    "gradient_clipping": "engine.clip",
    "optimizer": "optim.name",
    "scheduler": "schedule.name",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
    "data_types.grad_accum_dtype": "engine.precision",
    "steps_per_print": "log.every_steps",
    "wandb": "log.wandb",
    "checkpoint": "the section checkpoint and the number of ranks",
}


@dataclass(frozen=True)
class EngineConfig:
    zero_stage: Literal["auto", 0, 1, 2, 3] = setting(
        "auto",
        help="0: nothing sharded; 1: optimizer; 2: gradients too; 3: weights too; auto: 0 on a CPU, 1 on a GPU and "
        "with offload_optimizer",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", help="auto: bf16 on a GPU, fp32 on a CPU")
    compile: Literal["auto", True, False] = setting(
        "auto", help="the model as one graph of torch.compile's, at zero_stage 0 to 2; auto: on a GPU"
    )
    clip: float = setting(1.0, low=0, help="largest norm of the gradient; 0 turns clipping off")
    offload_optimizer: bool = setting(
        False, help="keep the optimizer's state and step in host memory (zero_stage 1 to 3)"
    )
    timeout_seconds: float = setting(1800.0, above=0, help="time without a step after which a run ends as hung")
    max_non_finite_steps: int = setting(
        10, low=1, help="steps in a row that are skipped for gradients that aren't finite before the run ends"
    )


def resolve_precision(config: EngineConfig, device: torch.device) -> str:
    """The precision a run really has: fp32, bf16 or fp16. Raises ConfigError for what DeepSpeed does not support."""
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("engine.precision=fp16 needs a GPU; set engine.precision=auto, which is fp32 on a CPU")
    if config.zero_stage == 0 and precision != "fp32":
        raise ConfigError(
            f"engine.zero_stage=0 with {precision} can't add gradients up in fp32 under DeepSpeed; "
            "set engine.zero_stage=1 (as fast, less memory) or engine.precision=fp32"
        )
    if config.zero_stage == 0 and config.offload_optimizer:
        raise ConfigError("engine.offload_optimizer needs engine.zero_stage 1, 2 or 3")
    return precision


def resolve_stage(config: EngineConfig, device: torch.device) -> EngineConfig:
    """The configuration with the ZeRO stage that a run really has: on a CPU sharding costs more than it saves."""
    if config.zero_stage != "auto":
        return config
    return replace(config, zero_stage=0 if device.type == "cpu" and not config.offload_optimizer else 1)


def clips_itself(config: EngineConfig, precision: str) -> bool:
    """Whether the engine clips, not DeepSpeed: at stage 0 in fp32 that keeps the norm to itself, and rounds it."""
    return config.zero_stage == 0 and precision == "fp32"


def deepspeed_json(
    config: EngineConfig, batch: BatchConfig, precision: str, world_size: int, extra: dict[str, Any]
) -> dict[str, Any]:
    """The configuration handed to DeepSpeed: what the typed sections say, and the `deepspeed:` mapping on top.

    Its batch is the full one; while the batch grows, `Engine.train_step` tells which micro-batch is a step's last.
    """
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": BUCKET_NUMBERS,
        "allgather_bucket_size": BUCKET_NUMBERS,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    made = {
        "train_micro_batch_size_per_gpu": micro_rows(batch, world_size),
        "gradient_accumulation_steps": accumulation(batch, world_size),
        "gradient_clipping": 0.0 if clips_itself(config, precision) else config.clip,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU before and after each micro-batch
    }
    return merge(made, extra)


def merge(made: dict[str, Any], extra: dict[str, Any], path: str = "") -> dict[str, Any]:
    """`extra` over `made`, mapping by mapping. Raises ConfigError for a key that a typed section owns."""
    merged = dict(made)
    for key, value in extra.items():
        dotted = f"{path}{key}"
        if dotted in OWNED_KEYS:
            raise ConfigError(f"deepspeed.{dotted} is decided by {OWNED_KEYS[dotted]}; set that instead")
        inside = [owner for key, owner in OWNED_KEYS.items() if key.startswith(f"{dotted}.")]
        if inside and not isinstance(value, dict):
            raise ConfigError(f"deepspeed.{dotted} can't be set as a whole: {inside[0]} decides a part of it")
        if isinstance(value, dict):
            inner = merged.get(key, {})
            merged[key] = merge(inner if isinstance(inner, dict) else {}, value, f"{dotted}.")
        else:
            merged[key] = value
    return merged
