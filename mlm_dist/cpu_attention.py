"""Attention on a CPU in training, one head of one row after another, forward and backward by hand.

A head's probabilities fit in the cache, and for rows of moderate length are kept: the backward pass needs no products
to make them again, as flash attention's does. A window layer computes little outside its window.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlm_dist.cpu_products import product, product_plus

QUERIES_TOGETHER = 256  # fewer waste less outside a window, and make the products slower
LONGEST_KEPT = 512  # positions in a row; the probabilities of longer ones take much memory, and are made again

aten = torch.ops.aten


class Sight(NamedTuple):
    """Which positions see which, the same for all layers of a kind."""

    mask: Tensor | None  # (B or 1, 1, Q, T): added to the scores
    half_window: int  # positions that a query sees to either side; T - 1 or more: all
    queries: Tensor | None = None  # (B, Q), the positions of the queries; None: they are all, in order

    def of(self, wanted: Tensor) -> "Sight":
        """What the positions `wanted` (B, Q) of each row see."""
        mask = self.mask
        if mask is not None:
            rows = torch.arange(len(wanted))[:, None] if len(mask) > 1 else 0
            mask = mask[rows, 0, wanted][:, None]
        return Sight(mask, self.half_window, wanted)


def forward(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> tuple[Tensor, list[Tensor]]:
    """softmax(q k' + mask) v, (B, Q, H, D), and what `backward` is told.

    q: (B, H, Q, D), k and v: (B, H, T, D), contiguous
    """
    rows, heads, queries, width = q.shape
    out, kept = q.new_empty(rows, queries, heads, width), []
    for span, of_q, of_k, of_v, to in each(sight, q, k, v, out.transpose(1, 2)):
        probabilities = attended(of_q[span.queries], of_k[span.keys], span.mask)
        to[span.queries] = product(probabilities, of_v[span.keys].T)
        if k.shape[2] <= LONGEST_KEPT:
            kept.append(probabilities)
    return out, kept


def backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, sight: Sight, kept: Sequence[Tensor], to_v: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of q and k, shaped as these, from that of the output, (B, H, Q, D), contiguous.

    to_v: where the gradient of v goes, shaped as v
    """
    to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), to_v.zero_()
    known = iter(kept)
    put = Tensor.copy_ if q.shape[2] <= QUERIES_TOGETHER else Tensor.add_  # a key may be seen from several spans
    for span, of_q, of_k, of_v, coming, into_q, into_k, into_v in each(sight, q, k, v, gradient, to_q, to_k, to_v):
        queries, keys = span.queries, span.keys
        probabilities = next(known) if kept else attended(of_q[queries], of_k[keys], span.mask)
        of_out = coming[queries]
        put(into_v[keys], product(of_out.T, probabilities.T).T)
        to_scores = product(of_out, of_v[keys])
        to_scores = aten._softmax_backward_data(to_scores, probabilities, -1, torch.float32)
        into_q[queries] = product(to_scores, of_k[keys].T)
        put(into_k[keys], product(of_q[queries].T, to_scores.T).T)
    return to_q, to_k


def attended(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """The probabilities (Q, K) with which queries q (Q, D) attend to keys k (K, D)."""
    return torch.softmax(product(q, k) if mask is None else product_plus(q, k, mask), dim=1)


# ---- the products that there are: by row, head and span


class Span(NamedTuple):
    queries: slice
    keys: slice  # that the queries can see
    mask: Tensor | None  # (Q, K), contiguous


def each(sight: Sight, q: Tensor, k: Tensor, *others: Tensor) -> Iterator[tuple[Span, *tuple[Tensor, ...]]]:
    """Row by row, head by head and span by span: the span, and the head's matrix of each tensor (B, H, Q or T, D)."""
    for row, of_row in enumerate(zip(*(tensor.unbind() for tensor in (q, k, *others)), strict=True)):
        spans = list(spans_of(sight, row, q.shape[2], k.shape[2]))
        for of_head in zip(*(tensor.unbind() for tensor in of_row), strict=True):
            for span in spans:
                yield span, *of_head


def spans_of(sight: Sight, row: int, queries: int, length: int) -> Iterator[Span]:
    mask = sight.mask if sight.mask is None else sight.mask[min(row, len(sight.mask) - 1), 0]
    for first in range(0, queries, QUERIES_TOGETHER):
        last = min(first + QUERIES_TOGETHER, queries)
        lowest, highest = first, last - 1
        if sight.queries is not None:
            lowest, highest = (int(end) for end in sight.queries[row, first:last].aminmax())
        keys = slice(max(0, lowest - sight.half_window), min(length, highest + 1 + sight.half_window))
        yield Span(slice(first, last), keys, None if mask is None else mask[first:last, keys].contiguous())
