"""The two halves of an encoder layer on a CPU, each forward and backward by hand.

Autograd would go through the memory once for every addition, split, concatenation and copy between the products, some
thirty times a layer. Here what can be done in place is, and the gradients of q, k and v are made where they are wanted.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlm_dist import cpu_attention
from mlm_dist.cpu_attention import Sight

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
        (rows, length, width), x = x.shape, x.flatten(0, 1)
        queries = length if wanted is None else wanted.shape[1]
        normal, mean, rstd = normalise(x, gain, eps)
        asking, index, turns, sight = normal, None, place.turns, place.sight
        if wanted is not None:
            of_row = torch.arange(rows)[:, None]
            index = (wanted + of_row * length).flatten()
            asking = normal.index_select(0, index)
            turns = turns.expand(rows, -1, -1)[of_row, wanted]
            sight = sight.of(wanted)
        paired = interleave(weight, heads)
        (q,) = by_head((asking @ paired[:width].T).view(rows, queries, width), heads, 1)
        k, v = by_head((normal @ paired[width:].T).view(rows, length, 2 * width), heads, 2)
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
        (rows, heads, length, _), width = k.shape, paired.shape[1]
        (coming,) = by_head(gradient, heads, 1)
        for_q, for_kv = torch.empty_like(asking), x.new_zeros(len(x), 2 * width)
        into = *by_head(for_q.view(gradient.shape), heads, 1), *by_head(for_kv.view(rows, length, 2 * width), heads, 2)
        cpu_attention.backward(coming, q, k, v, ctx.sight, kept, into)
        for turned, turns in zip(into, ctx.turns, strict=False):  # not v's
            rotate(turned, turns.conj().resolve_conj())
        to_paired = torch.cat((for_q.T @ asking, for_kv.T @ normal))
        to_x, to_gain = for_kv @ paired[width:], None
        if index is None:
            to_x.addmm_(for_q, paired[:width])
        else:
            to_x.index_add_(0, index, for_q @ paired[:width])
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
        to_widen = torch.cat((to_value.T @ normal, to_gate.T @ normal))
        of_value, of_gate = widen.chunk(2)
        to_normal = (to_value @ of_value).addmm_(to_gate, of_gate)
        to_x, to_gain = denormalise(to_normal, middle, gain, mean, rstd)
        to_x += gradient
        to_project, to_attended = to_x.T @ attended, to_x @ project
        return to_x.view(shape), to_attended.view(shape), to_project, to_gain, to_widen, to_narrow, None


def by_head(x: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """The parts, (B, H, T, D) each, of x (B, T, parts H D)."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def rotate(x: Tensor, turns: Tensor) -> None:
    """Multiply the pairs of x (B, H, T, D), in place, by turns (B or 1, T, D / 2)."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turns[:, None])
