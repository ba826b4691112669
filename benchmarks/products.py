"""The matrix-product peak of the machine at the encoder's own shapes: what no training of it can pass."""

import math
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from typing import NamedTuple

import torch
from torch import Tensor

from mlm_dist.cpu_products import product, weight_gradient
from mlm_dist.encoder import EncoderConfig, padded


class Product(NamedTuple):
    """A linear layer: (rows, inputs) -> (rows, outputs), so many of them in the model."""

    rows: int
    inputs: int
    outputs: int
    count: int

    @property
    def flops(self) -> int:
        """Of the forward product and the two of the backward pass, of all layers."""
        return 3 * 2 * self.rows * self.inputs * self.outputs * self.count


def products_of(shape: EncoderConfig, vocab_size: int, positions: int, mask_rate: float) -> list[Product]:
    """The linear layers of the encoder; the head runs on targets alone."""
    d, m, targets = shape.width, shape.mlp_width, round(mask_rate * positions)
    layer = [(d, 3 * d), (d, d), (d, 2 * m), (m, d)]
    head = [(d, d), (d, padded(vocab_size))]
    return [Product(positions, *sides, shape.layers) for sides in layer] + [
        Product(targets, *sides, 1) for sides in head
    ]


def peak_flops(ranks: int, products: list[Product], repeats: int) -> dict[str, float]:
    """FLOP/s of `ranks` processes of one thread each that multiply at the same time, fp32: the best repeat, the median.

    The best is the limit: a stricter one than the median, which other programs on the machine lower.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(ranks)
    with ProcessPoolExecutor(ranks, context, initializer=meet_at, initargs=(barrier,)) as pool:
        seconds = list(pool.map(multiply, [products] * ranks, [repeats] * ranks))
    flops = sum(product.flops for product in products)
    rates = [math.fsum(flops / each for each in together) for together in zip(*seconds, strict=True)]
    return {"best": max(rates), "median": statistics.median(rates)}


# ---- in each process

MEETING: list[Barrier] = []  # a barrier reaches a process of a pool by its initializer alone


def meet_at(barrier: Barrier) -> None:
    MEETING.append(barrier)


def multiply(products: list[Product], repeats: int) -> list[float]:
    """Seconds of each repeat of all products, by torch.mm or as the encoder does them, whichever is faster; a first
    repeat warms up."""
    torch.set_num_threads(1)
    operands = [
        (torch.randn(p.rows, p.inputs), torch.randn(p.outputs, p.inputs), torch.randn(p.rows, p.outputs))
        for p in products
    ]
    results = [tuple(map(torch.empty_like, of)) for of in operands]
    seconds = []
    for _ in range(repeats + 1):
        both = []
        for way in (by_torch, by_encoder):
            MEETING[0].wait(timeout=120)
            started = time.perf_counter()
            for shape, of, to in zip(products, operands, results, strict=True):
                for _ in range(shape.count):
                    way(*of, *to)
            both.append(time.perf_counter() - started)
        seconds.append(min(both))
    return seconds[1:]


def by_torch(x: Tensor, weight: Tensor, gradient: Tensor, to_x: Tensor, to_weight: Tensor, to_out: Tensor) -> None:
    torch.mm(x, weight.T, out=to_out)
    torch.mm(gradient, weight, out=to_x)
    torch.mm(gradient.T, x, out=to_weight)


def by_encoder(x: Tensor, weight: Tensor, gradient: Tensor, to_x: Tensor, to_weight: Tensor, to_out: Tensor) -> None:
    product(x, weight)
    product(gradient, weight.T)
    weight_gradient(gradient, x)
