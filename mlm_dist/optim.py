"""Optimizers, and what goes on around their step: parameter groups, clipping, steps that change nothing."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from mlm_dist.adam import StableAdamW
from mlm_dist.muon import Muon, MuonConfig, hidden_matrices
from mlm_dist.pieces import Pieced, flats_of
from mlm_dist.schema import ConfigError, setting
from mlm_dist.world import World


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "stable_adamw", "muon"] = setting(
        "adamw", help="optimizer; muon: for hidden matrices, AdamW for the rest"
    )
    lr: float = setting(1e-3, above=0, help="peak learning rate")
    beta1: float = setting(0.9, low=0, below=1, help="decay of the gradient's running mean")
    beta2: float = setting(0.999, low=0, below=1, help="decay of the squared gradient's running mean")
    eps: float = setting(1e-8, above=0, help="added to the denominator")
    weight_decay: float = setting(0.01, low=0, help="decoupled weight decay, on matrices alone")
    muon: MuonConfig = field(default_factory=MuonConfig)


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Two groups: matrices with weight decay; biases and norm gains (fewer than two dimensions) without.

    A group's learning rate is that of the step times its `lr_factor`.
    """
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay, "lr_factor": 1.0},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "lr_factor": 1.0},
    ]


def build(config: OptimConfig, model: nn.Module, vocab_size: int | None = None) -> torch.optim.Optimizer:
    """The optimizer over the model's trained parameters. vocab_size: as `hidden_matrices` has it.

    Raises ConfigError where there are none.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("no parameter of the model is trained (requires_grad is False everywhere); set it on some")
    return OPTIMIZERS[config.name](config, model, vocab_size)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def lay_out(optimizer: torch.optim.Optimizer, zero: Any, stage: int, world: World) -> None:
    """Tell an optimizer that asks about whole parameters where DeepSpeed's optimizer of this stage has put them."""
    if isinstance(optimizer, Pieced) and stage > 0:
        optimizer.lay_out(flats_of(zero, stage, world), world)


def with_one_moment(config: OptimConfig, model: nn.Module, vocab_size: int) -> int:
    """How many of the model's numbers have one number of state in the optimizer, where the others have two."""
    hidden = hidden_matrices(model, vocab_size) if config.name == "muon" else {}
    return sum(parameter.numel() for parameter in hidden)


# ---- the optimizers


def adam_options(config: OptimConfig) -> dict[str, Any]:
    return {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}


def adamw(config: OptimConfig, model: nn.Module, vocab_size: int | None) -> torch.optim.Optimizer:
    # the fused kernel is one pass over memory: on a CPU about seven times faster than the default
    groups = parameter_groups(model.parameters(), config.weight_decay)
    return torch.optim.AdamW(groups, **adam_options(config), fused=True)


def stable_adamw(config: OptimConfig, model: nn.Module, vocab_size: int | None) -> torch.optim.Optimizer:
    return StableAdamW(parameter_groups(model.parameters(), config.weight_decay), adam_options(config))


def muon(config: OptimConfig, model: nn.Module, vocab_size: int | None) -> torch.optim.Optimizer:
    hidden = hidden_matrices(model, vocab_size)
    others = parameter_groups((p for p in model.parameters() if p not in hidden), config.weight_decay)
    matrices = {
        "params": list(hidden),
        "weight_decay": config.weight_decay,
        "lr_factor": config.muon.lr_factor,
        "momentum": config.muon.momentum,
    }
    groups = [*({**group, "hidden": False} for group in others), {**matrices, "hidden": True}]
    return Muon(groups, hidden, adam_options(config), config.muon.ns_steps)


# ---- around a step


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> torch.Tensor:
    """Scale gradients so that their common norm is at most `largest` (0: leave them); their norm before, 0-d float64.

    The norm is added up in float64, as DeepSpeed's sharded stages do: in float32 a million squares leave an error that
    a run shows after some dozen steps.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if largest > 0:
        scale = (largest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
    return norm


def skip_unless(optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
    """Have the coming step change nothing, neither weights nor state, where `finite` (0-d bool) is False.

    Fused kernels look at `found_inf`, as torch.amp.GradScaler sets it: nothing waits for the device.
    """
    assert optimizer.defaults["fused"], "other kernels don't look at it"
    optimizer.found_inf = (~finite).float()


OPTIMIZERS: dict[str, Callable[[OptimConfig, nn.Module, int | None], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "stable_adamw": stable_adamw,
    "muon": muon,
}
