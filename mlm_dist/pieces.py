"""Where ZeRO keeps the parameters: which piece of which one lies where in the flat tensors of every rank.

At stages 1 to 3 an optimizer is given no parameters but flat tensors, one a group and rank, that hold pieces of them
(Rajbhandari et al., arXiv 1910.02054). An optimizer that asks about a whole parameter needs this map.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlm_dist.schema import ConfigError
from mlm_dist.world import World


class Piece(NamedTuple):
    """`count` elements of something, from its `first` on, that stand in a flat tensor from `at` on."""

    number: int  # what they are of: its place among all that the flat tensors of all ranks hold
    first: int
    count: int
    at: int

    def of(self, flat: Tensor) -> Tensor:
        """Them in the flat tensor."""
        return flat[self.at : self.at + self.count]

    def of_whole(self, whole: Tensor) -> Tensor:
        """Them in what they are of, flattened."""
        return whole[self.first : self.first + self.count]

    def cut(self, size: int, number: int) -> list["Piece"]:
        """The same elements as pieces of blocks of so many, which are numbered from `number` on."""
        end, parts = self.first + self.count, []
        for block in range(self.first // size, -(-end // size)):
            first, last = max(self.first, block * size), min(end, (block + 1) * size)
            parts.append(Piece(number + block, first - block * size, last - first, self.at + first - self.first))
        return parts


class Flat(NamedTuple):
    """One of this rank's flat tensors, (n,), and the pieces of the same parameters on every rank."""

    tensor: Tensor
    parameters: list[nn.Parameter]
    pieces: list[list[Piece]]

    def shapes(self) -> list[torch.Size]:
        # stage 3 leaves a parameter itself empty
        return [getattr(p, "ds_shape", p.shape) for p in self.parameters]


class Pieced(torch.optim.Optimizer):
    """An optimizer over whole parameters, or, once `lay_out` was called, over ZeRO's flat tensors.

    found_inf: 0-d, 1 where the coming step is to change nothing, as torch.amp.GradScaler sets it; else 0, or None
    """

    def __init__(self, groups: list[dict], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults | {"fused": True})
        self.found_inf: Tensor | None = None
        self.flats: dict[Tensor, Flat] = {}
        self.world: World | None = None

    def lay_out(self, flats: Sequence[Flat], world: World) -> None:
        """Take the flat tensors of all groups in the place of the parameters."""
        self.flats, self.world = {flat.tensor: flat for flat in flats}, world


def flats_of(zero: Any, stage: int, world: World) -> list[Flat]:
    """What DeepSpeed's optimizer of stage 1, 2 or 3 hands to the one inside it, on this rank (0.19.8).

    Raises ConfigError where the weights are cut in another way than these stages do by themselves.
    """
    ranks = range(world.size)
    if stage == 3:
        flats = [
            Flat(tensor, parameters, [slices([p.ds_numel for p in parameters], rank, world.size) for rank in ranks])
            for tensor, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        ]
        lengths = [sum(-(-p.ds_numel // world.size) for p in flat.parameters) for flat in flats]
    else:
        if hasattr(zero, "bf16_groups"):  # BF16_Optimizer, at stage 1
            tensors, groups = zero.fp32_groups_flat_partition, zero.bf16_groups
            offsets = [starts([p.numel() for p in group]) for group in groups]
        else:
            tensors, groups = zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups
            offsets = zero.round_robin_bit16_offsets
        flats = [
            Flat(tensor, group, [span([p.numel() for p in group], at, rank, tensor.numel()) for rank in ranks])
            for tensor, group, at in zip(tensors, groups, offsets, strict=True)
        ]
        lengths = [tensor.numel() for tensor in tensors]
    for flat, length in zip(flats, lengths, strict=True):
        held = sum(piece.count for pieces in flat.pieces for piece in pieces)
        if flat.tensor.numel() != length or held != sum(shape.numel() for shape in flat.shapes()):
            raise ConfigError(
                "this optimizer doesn't know how DeepSpeed has cut the weights; take what changes that out of "
                "deepspeed.zero_optimization, or set optim.name=adamw"
            )
    return flats


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each begins, of things that lie one after the other."""
    return [sum(sizes[:i]) for i in range(len(sizes))]


def span(sizes: Sequence[int], offsets: Sequence[int], rank: int, length: int) -> list[Piece]:
    """A rank's pieces at stages 1 and 2: parameters lie at offsets in one long tensor, cut into ranks' equal parts."""
    begin, end = rank * length, (rank + 1) * length
    pieces = []
    for number, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        first, last = max(begin, offset), min(end, offset + size)
        if first < last:
            pieces.append(Piece(number, first - offset, last - first, first - begin))
    return pieces


def slices(sizes: Sequence[int], rank: int, ranks: int) -> list[Piece]:
    """A rank's pieces at stage 3: each parameter is cut into ranks' equal parts, the last ones of them short."""
    shares = [-(-size // ranks) for size in sizes]
    pieces = []
    for number, (size, share, at) in enumerate(zip(sizes, shares, starts(shares), strict=True)):
        first, last = min(rank * share, size), min((rank + 1) * share, size)
        if first < last:
            pieces.append(Piece(number, first, last - first, at))
    return pieces
