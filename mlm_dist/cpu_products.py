"""Products of matrices on a CPU, fp32, by whichever of torch's two libraries is faster there.

torch.mm is MKL's, which uses AVX-512 on Intel's processors alone: on those of AMD that have it oneDNN takes less than
half the time. The choice depends on the processor and on nothing measured, so that a run can be repeated bit for bit.
A compiler can take none of these calls: what is compiled doesn't come here.
"""

import torch
from torch import Tensor


def onednn_is_faster() -> bool:
    """Whether this is a processor of AMD's with AVX-512."""
    cpu = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and "AMD" in cpu.get("cpu_name", "") and cpu.get("avx512_f", False)


BY_ONEDNN = onednn_is_faster()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight' + bias, (n, m), for x (n, k), weight (m, k) and bias (m,).

    x and weight: contiguous or transposed; oneDNN multiplies other views many hundred times slower
    """
    if BY_ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)


def product_plus(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """x weight' + other (n, m), as in `product`."""
    if BY_ONEDNN:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, None, "add")
    return torch.addmm(other, x, weight.T)


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient' x (m, k), maybe transposed in memory, for gradient (n, m) and x (n, k), both contiguous."""
    if BY_ONEDNN and len(x) > 0:  # it has no sums of nothing
        # the first factor is copied: the smaller one. torch's mkldnn_linear_backward_weights copies both.
        if x.shape[1] <= gradient.shape[1]:
            return product(x.T, gradient.T).T
        return product(gradient.T, x.T)
    return torch.mm(gradient.T, x)
