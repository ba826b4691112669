"""AdamW by torch's fused kernel, for parameters or pieces of them, and StableAdamW on top of it."""

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_dist.pieces import Flat, Piece, Pieced


def state_of(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor, as torch.optim.AdamW names it; of a first step, zeros."""
    state = optimizer.state[tensor]
    if not state:
        state["step"] = torch.zeros((), device=tensor.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
    return state


def count(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Count a step that `fused_adamw` is to take, unless it will change nothing."""
    torch._foreach_add_(steps, 1)
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))


def fused_adamw(
    weights: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    group: dict,
    lr: float | Tensor,
    found_inf: Tensor | None,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) in one pass over memory, in place.

    steps: 0-d, this one counted; group: betas, eps and weight_decay; found_inf: where it is 1, nothing changes
    """
    (beta1, beta2), eps, decay = group["betas"], group["eps"], group["weight_decay"]
    torch._fused_adamw_(
        weights, gradients, means, squares, [], steps, lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps,
        amsgrad=False, maximize=False, grad_scale=None, found_inf=found_inf,
    )  # fmt: skip


def adamw_step(optimizer: Pieced, group: dict) -> None:
    """AdamW for all tensors of a group that have a gradient."""
    tensors = [p for p in group["params"] if p.grad is not None]
    if not tensors:
        return
    states = [state_of(optimizer, tensor) for tensor in tensors]
    means, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    count(steps, optimizer.found_inf)
    gradients = [tensor.grad for tensor in tensors]
    fused_adamw(tensors, gradients, means, squares, steps, group, group["lr"], optimizer.found_inf)


class StableAdamW(Pieced):
    """AdamW whose learning rate is lowered, parameter by parameter, where the second moment lags behind the gradient.

    It is divided by max(1, RMS), RMS being the root of the parameter's mean of g^2 / max(v, eps^2), where v is the
    second moment with the bias corrected: update clipping of AdaFactor in AdamW (Wortsman et al., arXiv 2304.13013),
    as ModernBERT was trained with (Warner et al., arXiv 2412.13663). The decay is lowered with it.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._step(tensor, group)

    def _step(self, tensor: Tensor, group: dict) -> None:
        state = state_of(self, tensor)
        count([state["step"]], self.found_inf)
        weight, mean, square = (t.view(-1) for t in (tensor, state["exp_avg"], state["exp_avg_sq"]))
        gradient = tensor.grad.reshape(-1)
        flat = self.flats.get(tensor)
        pieces = flat.pieces[self.world.rank] if flat else [Piece(0, 0, tensor.numel(), 0)]
        lr = group["lr"] / self._excess(gradient, square, state["step"], group, pieces, flat)
        for piece in pieces:
            views = ([piece.of(t)] for t in (weight, gradient, mean, square))
            fused_adamw(*views, [state["step"]], group, lr[piece.number], self.found_inf)

    def _excess(
        self, gradient: Tensor, square: Tensor, step: Tensor, group: dict, pieces: list[Piece], flat: Flat | None
    ) -> Tensor:
        """max(1, RMS) of each parameter that this tensor has pieces of on any rank: (parameters,)."""
        sizes = [shape.numel() for shape in flat.shapes()] if flat else [gradient.numel()]
        beta2 = group["betas"][1]
        ratio = gradient.square()
        moment = torch.lerp(ratio, square, beta2).div_(1 - beta2**step)
        ratio.div_(moment.clamp_(min=group["eps"] ** 2))
        means = gradient.new_zeros(len(sizes))
        for piece in pieces:
            means[piece.number] = piece.of(ratio).sum() / sizes[piece.number]
        if flat:
            dist.all_reduce(means, group=self.world.group_of(means))
        return means.sqrt_().clamp_(min=1)
