"""Optimizers, and what goes on around their step: parameter groups, clipping, steps that change nothing."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mlm_dist.schema import setting


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw"] = setting("adamw", help="optimizer")
    lr: float = setting(1e-3, above=0, help="peak learning rate")
    beta1: float = setting(0.9, low=0, below=1, help="decay of the gradient's running mean")
    beta2: float = setting(0.98, low=0, below=1, help="decay of the squared gradient's running mean")
    eps: float = setting(1e-6, above=0, help="added to the denominator")
    weight_decay: float = setting(0.01, low=0, help="decoupled weight decay, on matrices alone")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices with weight decay; biases and norm gains (fewer than two dimensions) without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def build(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the model's trained parameters."""
    return OPTIMIZERS[config.name](parameter_groups(model, config.weight_decay), config)


def adamw(groups: Iterable[dict], config: OptimConfig) -> torch.optim.Optimizer:
    # the fused kernel is one pass over memory: on a CPU about seven times faster than the default
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


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


OPTIMIZERS: dict[str, Callable[[list[dict], OptimConfig], torch.optim.Optimizer]] = {"adamw": adamw}
