"""The two halves of an encoder layer on a CPU, each forward and backward by hand.

Autograd would go through the memory once for every addition, split, concatenation and copy between the products, some
thirty times a layer. Here a few rows at a time go from product to product while they are in the cache, residuals are
added by the product itself, the gradients of q, k and v are made in the place where they are wanted, and a window layer
computes little outside its window.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

POSITIONS_TOGETHER = 1024  # a few hundred would fit the cache better, and make the products slower
QUERIES_TOGETHER = 64  # of a window layer: fewer waste less outside the window, and make the products slower

aten = torch.ops.aten
attend = aten._scaled_dot_product_flash_attention_for_cpu.default
attend_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Place(NamedTuple):
    """What attention needs to know of the rows: the same for all layers of a kind."""

    turns: Tensor  # (B or 1, T, D / 2) complex64: e^(i angle), by which pairs of q's and k's dimensions are multiplied
    mask: Tensor | None  # (B or 1, 1, T, T): added to the scores
    half_window: int  # positions that a query sees to either side; T - 1 or more: all


def usable(x: Tensor) -> bool:
    """Whether hidden states x are in training, in fp32 on a CPU, and nobody traces them."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def interleave(weight: Tensor, heads: int, back: bool = False) -> Tensor:
    """Wqkv (3 d, d) with dimension i of each head of q and k beside i + D/2, its partner in a rotation; or back again.

    Scores are the same in any order of the dimensions, and pairs that lie together are complex numbers.
    """
    q_k, v = weight.split((2 * len(weight) // 3, len(weight) // 3))
    pairs = q_k.view(2 * heads, -1, 2, weight.shape[1]) if back else q_k.view(2 * heads, 2, -1, weight.shape[1])
    return torch.cat((pairs.transpose(1, 2).reshape(q_k.shape), v))


def chunks(total: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, total)) for first in range(0, total, size))


def rows_together(length: int) -> int:
    return max(1, POSITIONS_TOGETHER // length)


def spans(place: Place, at: slice, length: int) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Queries, the keys that they can see, and the mask between them, for the rows `at`."""
    mask, half = of_rows(place.mask, at), place.half_window
    if half >= length - 1:
        yield slice(0, length), slice(0, length), mask
        return
    assert mask is not None
    for queries in chunks(length, QUERIES_TOGETHER):
        keys = slice(max(0, queries.start - half), min(length, queries.stop + half))
        yield queries, keys, mask[:, :, queries, keys]


def normalise(x: Tensor, gain: Tensor, eps: float, out: list[Tensor]) -> Tensor:
    """LayerNorm of x (n, d) without bias, into out: itself, the mean and the inverse deviation, both (n, 1)."""
    return aten.native_layer_norm.out(x, gain.shape, gain, None, eps, out0=out[0], out1=out[1], out2=out[2])[0]


def denormalise(gradient: Tensor, x: Tensor, gain: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the gain, from that of the LayerNorm's output."""
    wanted = (True, True, False)  # there is no bias
    return aten.native_layer_norm_backward(gradient, x, gain.shape, mean, rstd, gain, None, wanted)[:2]


class Attend(torch.autograd.Function):
    """LayerNorm, Wqkv, rotation and attention: x (B, T, d) -> what Wo is for, (B, T, d).

    gain: of the LayerNorm, (d,), None where there is none
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor | None, weight: Tensor, place: Place, heads: int, eps: float
    ) -> Tensor:
        rows, length, width = x.shape
        paired = interleave(weight, heads)
        normal, out = (x if gain is None else torch.empty_like(x)), torch.empty_like(x)
        moments = [x.new_empty(rows, length, 1) for _ in range(2)]
        qkv, sums = x.new_empty(rows, length, 3 * width), []
        for at in chunks(rows, rows_together(length)):
            if gain is not None:
                normalise(x[at], gain, eps, [normal[at], *(m[at] for m in moments)])
            torch.mm(normal[at].flatten(0, 1), paired.T, out=qkv[at].flatten(0, 1))
            rotate(qkv[at], heads, of_rows(place.turns, at))
            q, k, v = by_head(qkv[at], heads)
            (to,) = by_head(out[at], heads, 1)
            for queries, keys, mask in spans(place, at, length):
                part, of_part = attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], attn_mask=mask)
                to[:, :, queries] = part
                sums.append(of_part)
        ctx.place, ctx.heads = place, heads
        ctx.save_for_backward(x, gain, weight, normal, *moments, qkv, out, *sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, weight, normal, mean, rstd, qkv, out, *sums = ctx.saved_tensors
        (rows, length, _), place, heads = x.shape, ctx.place, ctx.heads
        paired, back = interleave(weight, heads), place.turns.conj().resolve_conj()
        to_x, to_weight = torch.empty_like(x), torch.zeros_like(weight)
        to_gain = None if gain is None else torch.zeros_like(gain)
        size = rows_together(length)
        buffers = torch.empty_like(qkv[:size]), torch.empty_like(x[:size])
        for at in chunks(rows, size):
            to_qkv, to_normal = (buffer[: at.stop - at.start] for buffer in buffers)
            q, k, v, to_q, to_k, to_v = *by_head(qkv[at], heads), *by_head(to_qkv, heads)
            done, coming = by_head(out[at], heads, 1)[0], by_head(gradient[at], heads, 1)[0]
            to_qkv.zero_()  # keys and values have gradients from several spans
            for queries, keys, mask in spans(place, at, length):
                parts = q[:, :, queries], k[:, :, keys], v[:, :, keys], done[:, :, queries], sums.pop(0)
                of_parts = attend_backward(coming[:, :, queries], *parts, 0.0, False, attn_mask=mask)
                to_q[:, :, queries] = of_parts[0]
                to_k[:, :, keys] += of_parts[1]
                to_v[:, :, keys] += of_parts[2]
            rotate(to_qkv, heads, of_rows(back, at))
            flat = to_qkv.flatten(0, 1)
            to_weight.addmm_(flat.T, normal[at].flatten(0, 1))
            torch.mm(flat, paired, out=(to_x[at] if gain is None else to_normal).flatten(0, 1))
            if gain is not None:
                to_x[at], of_gain = denormalise(to_normal, x[at], gain, mean[at], rstd[at])
                to_gain += of_gain
        return to_x, to_gain, interleave(to_weight, heads, back=True), None, None, None


class Feed(torch.autograd.Function):
    """What comes after attention: with h = x + attended x Wo', the gated MLP h + (GELU(a) * b) x Wo'.

    a, b: halves of LayerNorm(h) x Wi'. x and attended: (B, T, d) -> (B, T, d)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, attended: Tensor, project: Tensor, gain: Tensor, widen: Tensor, narrow: Tensor, eps: float
    ) -> Tensor:
        shape, inner = x.shape, narrow.shape[1]
        x, attended = x.flatten(0, 1), attended.flatten(0, 1)
        total = len(x)
        middle, normal, out = (torch.empty_like(x) for _ in range(3))
        moments = [x.new_empty(total, 1) for _ in range(2)]
        wide, active = x.new_empty(total, 2 * inner), x.new_empty(total, inner)
        buffer = x.new_empty(min(POSITIONS_TOGETHER, total), inner)
        for at in chunks(total, POSITIONS_TOGETHER):
            torch.addmm(x[at], attended[at], project.T, out=middle[at])
            normalise(middle[at], gain, eps, [normal[at], *(m[at] for m in moments)])
            value, gate = torch.mm(normal[at], widen.T, out=wide[at]).split(inner, dim=1)
            aten.gelu.out(value, out=active[at])
            gated = torch.mul(active[at], gate, out=buffer[: len(gate)])
            torch.addmm(middle[at], gated, narrow.T, out=out[at])
        ctx.save_for_backward(attended, project, gain, widen, narrow, middle, normal, *moments, wide, active)
        return out.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        attended, project, gain, widen, narrow, middle, normal, mean, rstd, wide, active = ctx.saved_tensors
        (total, inner), shape, gradient = active.shape, gradient.shape, gradient.flatten(0, 1)
        to_x, to_attended = torch.empty_like(middle), torch.empty_like(middle)
        to_project, to_gain, to_widen, to_narrow = map(torch.zeros_like, (project, gain, widen, narrow))
        most = min(POSITIONS_TOGETHER, total)
        buffers = active.new_empty(most, inner), active.new_empty(most, inner), torch.empty_like(wide[:most])
        narrow_buffer = torch.empty_like(middle[:most])
        for at in chunks(total, POSITIONS_TOGETHER):
            coming = gradient[at]
            gated, to_gated, to_wide = (buffer[: len(coming)] for buffer in buffers)
            value, gate = wide[at].split(inner, dim=1)
            torch.mul(active[at], gate, out=gated)
            to_narrow.addmm_(coming.T, gated)
            torch.mm(coming, narrow, out=to_gated)
            torch.mul(to_gated, active[at], out=to_wide[:, inner:])
            aten.gelu_backward.grad_input(to_gated.mul_(gate), value, grad_input=to_wide[:, :inner])
            to_widen.addmm_(to_wide.T, normal[at])
            to_normal = torch.mm(to_wide, widen, out=narrow_buffer[: len(coming)])
            of_middle, of_gain = denormalise(to_normal, middle[at], gain, mean[at], rstd[at])
            to_gain += of_gain
            torch.add(of_middle, coming, out=to_x[at])
            to_project.addmm_(to_x[at].T, attended[at])
            torch.mm(to_x[at], project, out=to_attended[at])
        return to_x.view(shape), to_attended.view(shape), to_project, to_gain, to_widen, to_narrow, None


def rotate(qkv: Tensor, heads: int, turns: Tensor) -> None:
    """Multiply the pairs of q and k in qkv (B, T, 3 d) by turns (B or 1, T, D / 2), in place."""
    pairs = qkv.unflatten(2, (3 * heads, -1, 2))[:, :, : 2 * heads]  # (B, T, 2 H, D / 2, 2)
    torch.view_as_complex(pairs).mul_(turns[:, :, None])


def by_head(x: Tensor, heads: int, parts: int = 3) -> tuple[Tensor, ...]:
    """The parts, q, k and v say, (B, H, T, D) each, of x (B, T, parts d)."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def of_rows(shared: Tensor | None, at: slice) -> Tensor | None:
    """The part for some rows of what is there for each row, or once for all."""
    return shared if shared is None or len(shared) == 1 else shared[at]
