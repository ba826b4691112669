"""Cross entropy of a linear layer's logits on a CPU, without keeping the logits.

A few rows' logits fit in the cache: their losses are read off, what becomes of them is their gradient, and that is
multiplied on at once. Logits of a whole batch would go through the memory seven times. After the chunked loss of
Liger Kernel (Hsu et al., arXiv 2410.10989).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        counts = (labels != ignored).nonzero()[:, 0]
        counted, target = x.index_select(0, counts), labels.index_select(0, counts)[:, None]
        to_counted, to_weight, to_bias = torch.empty_like(counted), None, torch.zeros_like(bias)
        loss, correct = x.new_zeros(()), labels.new_zeros(())
        together = max(1, LOGITS_TOGETHER // len(weight))
        for first in range(0, len(counted), together):
            rows = slice(first, first + together)
            logits = torch.mm(counted[rows], weight.T).add_(bias)
            below = logits.gather(1, target[rows])[:, 0] - logits.amax(dim=1)
            correct += (below == 0).sum()
            gradient = torch.softmax(logits, dim=1, out=logits)
            # the largest logit has the largest probability, at least 1 / V: its logarithm is exact
            loss -= (gradient.amax(dim=1).log() + below).sum()
            gradient.scatter_add_(1, target[rows], gradient.new_full((len(gradient), 1), -1))
            torch.mm(gradient, weight, out=to_counted[rows])
            of_rows = torch.mm(gradient.T, counted[rows])
            to_weight = of_rows if to_weight is None else to_weight.add_(of_rows)
            to_bias += gradient.sum(dim=0)
        to_x = torch.zeros_like(x).index_copy_(0, counts, to_counted)
        ctx.save_for_backward(to_x, torch.zeros_like(weight) if to_weight is None else to_weight, to_bias)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        # new tensors: a backward pass may be run again, and others may keep what they are given
        return *(saved * gradient for saved in ctx.saved_tensors), None, None
