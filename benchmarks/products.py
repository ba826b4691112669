"""The limit: how fast the machine's matrix products alone would do what an encoder's training needs of them.

Needed is what the loss and its gradients depend on: in the last layer queries, output and MLP of the targets alone, in
window layers the keys of the window, in the head the targets, as if each row were one document. A window's keys are
multiplied as if all queries had the same ones, which no kernel can do: the limit is the stricter for it.
"""

import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.synchronize import Barrier
from typing import NamedTuple

import torch

from mlm_dist.cpu_products import use_faster_library
from mlm_dist.encoder import EncoderConfig, padded
from mlm_dist.linear_loss import LOGITS_TOGETHER

Call = Callable[[], object]


class Product(NamedTuple):
    """A product of matrices (batch, rows, inner) and (batch, inner, columns), and the two of its backward pass.

    The second matrix is a weight, which lies in memory as (columns, inner), unless it is `as_is`.
    """

    batch: int
    rows: int
    inner: int
    columns: int
    count: float = 1  # how often it is needed
    as_is: bool = False

    @property
    def flops(self) -> float:
        return 3 * 2 * self.batch * self.rows * self.inner * self.columns * self.count


def products_of(shape: EncoderConfig, vocab_size: int, rows: int, length: int, mask_rate: float) -> list[Product]:
    """What a micro-batch needs of the encoder, of so many rows of `length` positions."""
    d, m, positions, targets = shape.width, shape.mlp_width, rows * length, round(mask_rate * rows * length)
    last = shape.layers - 1
    after = [(d, d), (d, 2 * m), (m, d)]  # of attention
    found = [Product(1, positions, *sides, last) for sides in ((d, 3 * d), *after)]
    found += [Product(1, positions, d, 2 * d), Product(1, targets, d, d)]  # the last layer's keys and values; queries
    found += [Product(1, targets, *sides) for sides in (*after, (d, d))]  # and the head's first
    vocabulary = padded(vocab_size)
    together = max(1, min(targets, LOGITS_TOGETHER // vocabulary))  # all of them would leave the cache
    found.append(Product(1, together, d, vocabulary, count=targets / together))
    for layer in range(shape.layers):
        keys = length if shape.is_global(layer) else keys_in_window(length, shape.window // 2)
        queries = length if layer < last else round(mask_rate * length)
        found.append(Product(shape.heads, queries, shape.head_width, keys, count=rows))
        found.append(Product(shape.heads, queries, keys, shape.head_width, count=rows, as_is=True))
    return found


def keys_in_window(length: int, half_window: int) -> int:
    """How many a query sees on average: fewer at a row's ends."""
    return round(sum(1 + min(i, half_window) + min(length - 1 - i, half_window) for i in range(length)) / length)


def seconds_of(ranks: int, products: list[Product], repeats: int) -> float:
    """Of `ranks` processes of one thread each that do all products at the same time, in fp32, the slowest's.

    Each product at its best of `repeats`, by the faster of the libraries, and the gradient of a weight the faster way
    round: a limit, and no mean.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(ranks)
    with ProcessPoolExecutor(ranks, context, initializer=meet_at, initargs=(barrier,)) as pool:
        return max(map(math.fsum, pool.map(multiply, [products] * ranks, [repeats] * ranks)))


# ---- in each process

MEETING: list[Barrier] = []  # a barrier reaches a process of a pool by its initializer alone


def meet_at(barrier: Barrier) -> None:
    MEETING.append(barrier)


def multiply(products: list[Product], repeats: int) -> list[float]:
    """Seconds of each product and of each gradient, `count` of it."""
    torch.set_num_threads(1)
    calls = [(product.count, either) for product in products for either in calls_of(product)]
    ways = [best_of(calls, repeats)]
    if use_faster_library():
        ways.append(best_of(calls, repeats))
    return [min(seconds) for seconds in zip(*ways, strict=True)]


def best_of(calls: list[tuple[float, tuple[Call, ...]]], repeats: int) -> list[float]:
    """Of each product the least seconds in which one of its calls was made `count` times; a first repeat warms up."""
    repeated = []
    for _ in range(repeats + 1):
        MEETING[0].wait(timeout=120)
        repeated.append([min(timed(count, call) for call in either) for count, either in calls])
    return [min(seconds) for seconds in zip(*repeated[1:], strict=True)]


def timed(count: float, call: Call) -> float:
    times = math.ceil(count)
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) * count / times


def calls_of(product: Product) -> list[tuple[Call, ...]]:
    """The product and its two gradients, into tensors that are there already; a weight's either way round."""
    batch, rows, inner, columns = product[:4]
    left, out = torch.randn(batch, rows, inner), torch.randn(batch, rows, columns)
    right = torch.randn(batch, inner, columns) if product.as_is else torch.randn(batch, columns, inner).mT
    to_out, to_left, to_right = map(torch.empty_like, (out, left, right))
    of_right = [partial(torch.bmm, left.mT, out, out=to_right.contiguous())]
    if not product.as_is:
        of_right.append(partial(torch.bmm, out.mT, left, out=to_right.mT))
    of_left = partial(torch.bmm, out, right.mT, out=to_left)
    return [(partial(torch.bmm, left, right, out=to_out),), (of_left,), tuple(of_right)]
