"""Cross entropy of a linear layer's logits on a CPU, without keeping the logits.

A few rows' logits fit in the cache: their losses are read off, the logits become their own gradient in place, and that
is multiplied on at once. Logits of a whole batch would go through the memory seven times. After the chunked loss of
Liger Kernel (Hsu et al., arXiv 2410.10989).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlm_dist.cpu_products import product, weight_gradient

LOGITS_TOGETHER = 2**21  # 8 MB: more leave the cache, fewer are more products and sums than they need be


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ignored: int
) -> tuple[Tensor, Tensor]:
    """(sum of the losses, number of rows whose label has the largest logit) of logits x W' + b.

    x: (N, d) and weight: (V, d), fp32; bias: (V,); labels: (N,), rows labelled `ignored` count for nothing
    """
    return LinearCrossEntropy.apply(x, weight, bias, labels, ignored)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ignored: int
    ) -> tuple[Tensor, Tensor]:
        to_x, to_weight, to_bias = torch.empty_like(x), None, torch.zeros_like(bias)
        loss, correct = x.new_zeros(()), labels.new_zeros(())
        together = max(1, LOGITS_TOGETHER // len(weight))
        for first in range(0, len(x), together):
            rows = slice(first, first + together)
            counts = labels[rows] != ignored
            target = torch.where(counts, labels[rows], 0)[:, None]
            logits = product(x[rows], weight, bias)
            largest = logits.amax(dim=1, keepdim=True)
            of_target = logits.gather(1, target) - largest
            correct += (counts & (of_target == 0)[:, 0]).sum()
            total = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
            loss += torch.where(counts, (total.log() - of_target)[:, 0], 0).sum()
            # what follows is the gradient of the loss by the logits: softmax, less 1 at the label
            counts = counts[:, None].to(x.dtype)
            logits.mul_(counts / total).scatter_add_(1, target, -counts)
            to_x[rows] = product(logits, weight.T)
            of_rows = weight_gradient(logits, x[rows])
            to_weight = of_rows if to_weight is None else to_weight.add_(of_rows)
            to_bias.add_(logits.sum(dim=0))
        ctx.save_for_backward(to_x, torch.zeros_like(weight) if to_weight is None else to_weight, to_bias)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        # new tensors: a backward pass may be run again, and others may keep what they are given
        return *(saved * gradient for saved in ctx.saved_tensors), None, None
