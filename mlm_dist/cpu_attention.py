"""Attention on a CPU in training, some rows of a head at a time, forward and backward by hand.

Their probabilities fit in the cache, and for rows of moderate length are kept: the backward pass needs no products to
make them again, as flash attention's does. A window layer computes little outside its window.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

QUERIES_TOGETHER = (64, 256)  # at least and at most: fewer waste less outside a window, and make the products slower
SCORES_TOGETHER = 2**19  # 2 MB: more leave the cache, fewer are more calls than they need be
LONGEST_KEPT = 512  # positions in a row; the probabilities of longer ones take much memory, and are made again

aten = torch.ops.aten


class Sight(NamedTuple):
    """Which positions see which, the same for all layers of a kind."""

    mask: Tensor | None  # (B or 1, Q, T): added to the scores
    half_window: int  # positions that a query sees to either side; T - 1 or more: all
    queries: Tensor | None = None  # (B, Q), the positions of the queries; None: they are all, in order

    def of(self, wanted: Tensor) -> "Sight":
        """What the positions `wanted` (B, Q) of each row see."""
        mask = self.mask
        if mask is not None:
            rows = torch.arange(len(wanted))[:, None] if len(mask) > 1 else 0
            mask = mask[rows, wanted]
        return Sight(mask, self.half_window, wanted)


class Part(NamedTuple):
    """Some heads of some rows, a span of their queries, and the keys that these can see."""

    of_queries: tuple[slice, slice, slice]  # of a tensor (H, B, Q, D)
    of_keys: tuple[slice, slice, slice]  # of a tensor (H, B, T, D)
    mask: Tensor | None  # (b or 1, q, t)


def forward(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> tuple[Tensor, list[Tensor]]:
    """softmax(q k' + mask) v, (B, Q, H, D), and what `backward` is told.

    q: (H, B, Q, D), k and v: (H, B, T, D)
    """
    heads, rows, queries, width = q.shape
    out, kept = q.new_empty(rows, queries, heads, width), []
    for part in parts_of(sight, q, k):
        probabilities = attended(part, q, k)
        to = out.permute(2, 0, 1, 3)[part.of_queries]
        to.copy_(torch.bmm(probabilities, matrices(v, part.of_keys)).view(to.shape))
        if k.shape[2] <= LONGEST_KEPT:
            kept.append(probabilities)
    return out, kept


def backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sight: Sight,
    kept: Sequence[Tensor],
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """From the gradient of the output, (H, B, Q, D), those of q, k and v: into tensors shaped as these.

    into: zeros for k and v
    """
    known = iter(kept)
    put = Tensor.copy_ if q.shape[2] <= span_of(sight) else Tensor.add_  # a key may be seen from several spans
    for part in parts_of(sight, q, k):
        probabilities = next(known) if kept else attended(part, q, k)
        coming = matrices(gradient, part.of_queries)
        to_q, to_k, to_v = into[0][part.of_queries], into[1][part.of_keys], into[2][part.of_keys]
        put(to_v, torch.bmm(probabilities.mT, coming).view(to_v.shape))
        to_scores = torch.bmm(coming, matrices(v, part.of_keys).mT)
        aten._softmax_backward_data.out(to_scores, probabilities, -1, torch.float32, grad_input=to_scores)
        to_q.copy_(torch.bmm(to_scores, matrices(k, part.of_keys)).view(to_q.shape))
        put(to_k, torch.bmm(to_scores.mT, matrices(q, part.of_queries)).view(to_k.shape))


def attended(part: Part, q: Tensor, k: Tensor) -> Tensor:
    """The probabilities (h b, q, t) with which a part's queries attend to its keys."""
    scores = torch.bmm(matrices(q, part.of_queries), matrices(k, part.of_keys).mT)
    if part.mask is not None:
        scores.view(-1, len(part.mask), *scores.shape[1:]).add_(part.mask)
    return torch.softmax(scores, dim=2, out=scores)


def matrices(x: Tensor, where: tuple[slice, slice, slice]) -> Tensor:
    """Of x (H, B, N, D) what lies there, (h b, n, D), contiguous: a view would be copied for each of its products."""
    return x[where].flatten(0, 1).contiguous()


# ---- the parts that there are


def parts_of(sight: Sight, q: Tensor, k: Tensor) -> Iterator[Part]:
    (heads, rows, queries, _), length = q.shape, k.shape[2]
    span = span_of(sight)
    scores = min(span, queries) * min(span + 2 * sight.half_window, length)  # of a row and head
    together = max(1, SCORES_TOGETHER // max(1, scores))
    rows_together = max(1, min(together, rows))
    heads_together = max(1, together // rows_together)
    for row in range(0, rows, rows_together):
        some = slice(row, row + rows_together)
        for first in range(0, queries, span):
            here = slice(first, min(first + span, queries))
            keys, mask = keys_seen(sight, some, here, length), sight.mask
            if mask is not None:
                mask = mask[some if len(mask) > 1 else slice(1), here, keys]
            for head in range(0, heads, heads_together):
                of = slice(head, head + heads_together), some
                yield Part((*of, here), (*of, keys), mask)


def span_of(sight: Sight) -> int:
    """How many queries are taken together."""
    least, most = QUERIES_TOGETHER
    return max(least, min(2 * sight.half_window, most))


def keys_seen(sight: Sight, rows: slice, queries: slice, length: int) -> slice:
    """The keys that some of these queries of these rows can see."""
    lowest, highest = queries.start, queries.stop - 1
    if sight.queries is not None:
        lowest, highest = (int(end) for end in sight.queries[rows, queries].aminmax())
    return slice(max(0, lowest - sight.half_window), min(length, highest + 1 + sight.half_window))
