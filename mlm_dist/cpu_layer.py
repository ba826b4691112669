"""The two halves of an encoder layer on a CPU, each forward and backward by hand.

Autograd would go through the memory once for every addition, split, concatenation and copy between the products, some
thirty times a layer. Here what can be done in place is, and q, k and v come a head after another, as attention wants.
The gradient of a weight with more rows than columns is made the other way round, and turned: oneDNN is faster at it.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlm_dist import cpu_attention
from mlm_dist.cpu_attention import Sight
from mlm_dist.cpu_products import onednn_multiplies

aten = torch.ops.aten


class Place(NamedTuple):
    """What attention needs to know of the rows: the same for all layers of a kind."""

    turns: Tensor  # (B or 1, T, D / 2) complex64: e^(i angle), by which pairs of q's and k's dimensions are multiplied
    sight: Sight


def usable(x: Tensor) -> bool:
    """Whether hidden states x are in training, in fp32 on a CPU, and nobody traces them."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def interleave(weight: Tensor, heads: int, back: bool = False) -> Tensor:
    """Wqkv (3 d, d) as `Attend` wants it; or its gradient back again.

    Dimension i of each head of q and k comes to lie beside i + D/2, its partner in a rotation: scores are the same in
    any order of the dimensions, and pairs that lie together are complex numbers. q is scaled by 1 / sqrt(D).
    """
    width = weight.shape[1]
    q_k = weight[: 2 * width]
    pairs = q_k.view(2 * heads, -1, 2, width) if back else q_k.view(2 * heads, 2, -1, width)
    made = torch.cat((pairs.transpose(1, 2).reshape(q_k.shape), weight[2 * width :]))
    made[:width] *= (width // heads) ** -0.5
    return made


def normalise(x: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of x (n, d) without bias, with its mean and inverse deviation, (n, 1) each; x without a gain."""
    if gain is None:
        return x, x.new_empty(0), x.new_empty(0)
    return aten.native_layer_norm(x, gain.shape, gain, None, eps)


def denormalise(gradient: Tensor, x: Tensor, gain: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the gain, from that of the LayerNorm's output."""
    wanted = (True, True, False)  # there is no bias
    return aten.native_layer_norm_backward(gradient, x, gain.shape, mean, rstd, gain, None, wanted)[:2]


class Attend(torch.autograd.Function):
    """LayerNorm, Wqkv, rotation and attention: x (B, T, d) -> what Wo is for, (B, Q, d), at the positions `wanted`.

    gain: of the LayerNorm, (d,), None where there is none
    wanted: (B, Q), or None: all
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        wanted: Tensor | None,
        gain: Tensor | None,
        weight: Tensor,
        place: Place,
        heads: int,
        eps: float,
    ) -> Tensor:
        (rows, length, _), x = x.shape, x.flatten(0, 1)
        normal, mean, rstd = normalise(x, gain, eps)
        asking, index, turns, sight = normal, None, place.turns, place.sight
        if wanted is not None:
            of_row = torch.arange(rows)[:, None]
            index = (wanted + of_row * length).flatten()
            asking = normal.index_select(0, index)
            turns = turns.expand(rows, -1, -1)[of_row, wanted]
            sight = sight.of(wanted)
        paired = interleave(weight, heads)
        of_q, of_k, of_v = paired.chunk(3)
        queries = length if wanted is None else wanted.shape[1]
        q = by_head(asking, of_q, heads).unflatten(1, (rows, queries))
        k, v = (by_head(normal, part, heads).unflatten(1, (rows, length)) for part in (of_k, of_v))
        rotate(q, turns)
        rotate(k, place.turns)
        out, kept = cpu_attention.forward(q, k, v, sight)
        ctx.turns, ctx.sight = (turns, place.turns), sight
        ctx.save_for_backward(x, gain, paired, normal, mean, rstd, asking, index, q, k, v, *kept)
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, paired, normal, mean, rstd, asking, index, q, k, v, *kept = ctx.saved_tensors
        (heads, rows, length, _), width = k.shape, paired.shape[1]
        coming = gradient.unflatten(2, (heads, -1)).permute(2, 0, 1, 3)
        into = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        cpu_attention.backward(coming, q, k, v, ctx.sight, kept, into)
        for turned, turns in zip(into, ctx.turns, strict=False):  # not v's
            rotate(turned, turns.conj().resolve_conj())
        if index is None:
            for_all = by_position(*into)
            del into, turned
            to_paired, to_x = (normal.T @ for_all).T, for_all @ paired
        else:
            for_q, for_kv = by_position(into[0]), by_position(*into[1:])
            to_paired, to_x = torch.cat((asking.T @ for_q, normal.T @ for_kv), dim=1).T, for_kv @ paired[width:]
            to_x.index_add_(0, index, for_q @ paired[:width])
        to_gain = None
        if gain is not None:
            to_x, to_gain = denormalise(to_x, x, gain, mean, rstd)
        to_weight = interleave(to_paired, heads, back=True)
        return to_x.view(rows, length, width), None, to_gain, to_weight, None, None, None


class Feed(torch.autograd.Function):
    """What comes after attention: with h = x + attended x Wo', the gated MLP h + (GELU(a) * b) x Wo'.

    a, b: halves of LayerNorm(h) x Wi'. x and attended: (B, T, d) -> (B, T, d)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, attended: Tensor, project: Tensor, gain: Tensor, widen: Tensor, narrow: Tensor, eps: float
    ) -> Tensor:
        shape, x, attended = x.shape, x.flatten(0, 1), attended.flatten(0, 1)
        middle = (attended @ project.T).add_(x)
        normal, mean, rstd = normalise(middle, gain, eps)
        # two products: GELU of what isn't contiguous takes three times as long
        value, gate = (normal @ half.T for half in widen.chunk(2))
        active = F.gelu(value)
        gated = active * gate
        kept = middle, normal, mean, rstd, value, gate, active, gated
        ctx.save_for_backward(attended, project, gain, widen, narrow, *kept)
        return (gated @ narrow.T).add_(middle).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        attended, project, gain, widen, narrow, *kept = ctx.saved_tensors
        middle, normal, mean, rstd, value, gate, active, gated = kept
        shape, gradient = gradient.shape, gradient.flatten(0, 1).contiguous()
        to_narrow, to_gated = gradient.T @ gated, gradient @ narrow
        to_gate = to_gated * active
        to_value = aten.gelu_backward(to_gated.mul_(gate), value)
        to_both = torch.cat((to_value, to_gate), dim=1)
        del to_gate, to_value, to_gated
        to_widen, to_normal = (normal.T @ to_both).T, to_both @ widen
        to_x, to_gain = denormalise(to_normal, middle, gain, mean, rstd)
        to_x += gradient
        to_project, to_attended = to_x.T @ attended, to_x @ project
        return to_x.view(shape), to_attended.view(shape), to_project, to_gain, to_widen, to_narrow, None


def by_head(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """x W', of x (n, d) and W (H D, d), as (H, n, D)."""
    width = len(weight) // heads
    if not onednn_multiplies():  # MKL takes up to a fifth longer for a product a head
        return (x @ weight.T).unflatten(1, (heads, width)).transpose(0, 1).contiguous()
    out = x.new_empty(heads, len(x), width)
    for part, to in zip(weight.chunk(heads), out, strict=True):
        torch.mm(x, part.T, out=to)
    return out


def by_position(*parts: Tensor) -> Tensor:
    """Parts (H, B, T, D) beside one another, (B T, parts H D): one product of all is faster than one of each."""
    return torch.stack([part.permute(1, 2, 0, 3) for part in parts], dim=2).flatten(0, 1).flatten(1)


def rotate(x: Tensor, turns: Tensor) -> None:
    """Multiply the pairs of x (H, B, T, D), in place, by turns (B or 1, T, D / 2)."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turns)
