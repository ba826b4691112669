"""Muon: momentum, made orthogonal, for the matrices between embeddings and logits; AdamW for all else.

Jordan et al., https://kellerjordan.github.io/posts/muon; that one learning rate serves both halves is from Liu et al.,
arXiv 2502.16982. At ZeRO stages 1 to 3 the ranks share the work: each matrix is put together on one of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlm_dist.adam import adamw_step
from mlm_dist.pieces import Flat, Piece, Pieced
from mlm_dist.schema import setting
from mlm_dist.world import World

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of Jordan's quintic: steepest at 0, so that 5 steps do
RMS = 0.2  # of an update's elements: what AdamW's usually have
ELEMENTS_TOGETHER = 2**24  # of matrices that are orthogonalised in one batch

# Parameters that hold several matrices one above the other, by the end of their name: ModernBERT's and our encoder's
# queries, keys and values, their gated MLP's two halves, and what torch.nn.MultiheadAttention has.
STACKED = {"Wqkv.weight": 3, "Wi.weight": 2, "in_proj_weight": 3}


@dataclass(frozen=True)
class MuonConfig:
    momentum: float = setting(0.95, low=0, below=1, help="decay of the gradient's running mean, for hidden matrices")
    ns_steps: int = setting(5, low=1, help="Newton-Schulz steps that make the update orthogonal")
    lr_factor: float = setting(1.0, above=0, help="learning rate of the hidden matrices, as a factor of optim.lr")


# ---- which matrices


def hidden_matrices(model: nn.Module, vocab_size: int | None = None) -> dict[nn.Parameter, int]:
    """The trained matrices that are neither an embedding nor make the logits; and how many each holds (`STACKED`).

    vocab_size: at least how many logits there are; needed where no part of the model tells its output layer by
    `get_output_embeddings`, as transformers' models and our encoder do: it's the last linear layer of that width
    """
    ends = {m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    told = [m.get_output_embeddings() for m in model.modules() if hasattr(m, "get_output_embeddings")]
    outputs = [layer for layer in told if layer is not None]
    if not outputs and vocab_size is not None:
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features >= vocab_size]
        outputs = linear[-1:]
    ends |= {parameter for layer in outputs for parameter in layer.parameters()}
    hidden = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim == 2 and parameter not in ends:
            parts = next((n for ending, n in STACKED.items() if f".{name}".endswith(f".{ending}")), 1)
            hidden[parameter] = 1 if parameter.shape[0] % parts else parts
    return hidden


# ---- making them orthogonal


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Matrices (n, r, c) with their singular values, whatever they were, brought near 1; those of 0 stay.

    Each step puts x -> a x + b x^3 + c x^5 on the singular values; after 5 they lie between some 0.7 and 1.2, but for
    those below some thousandth of the matrix's norm.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # (n, r, c) with r <= c
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-12)).to(dtype)
    for _ in range(steps):
        squared = x @ x.mT  # (n, r, r)
        x = a * x + (b * squared + c * squared @ squared) @ x
    return x.mT if tall else x


def orthogonalise(matrices: Sequence[Tensor], steps: int, device: torch.device) -> None:
    """Make of each matrix (r, c) an update, in place: orthogonal, with elements of RMS 0.2 where r x c is wide or tall.

    The factor is 0.2 sqrt(max(r, c)) (Liu et al., arXiv 2502.16982). Computed on `device`: in bf16 on a
    GPU, which the iteration bears, else in fp32.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    for shape, alike in by_shape.items():
        together = max(1, ELEMENTS_TOGETHER // shape.numel())
        for first in range(0, len(alike), together):
            some = alike[first : first + together]
            done = newton_schulz(torch.stack(some).to(device), steps, dtype)
            torch._foreach_copy_(some, list(done))
            torch._foreach_mul_(some, RMS * math.sqrt(max(shape)))


# ---- the matrices in ZeRO's flat tensors


def share_out(shapes: Sequence[torch.Size], pieces: Sequence[Sequence[Piece]]) -> list[int]:
    """For each matrix the rank that makes it orthogonal, from the pieces on every rank: the same on all of them.

    One that holds much of it, at least half as much as any other; of those the one with the least to do so far.
    """
    held = [[0] * len(pieces) for _ in shapes]
    for rank, mine in enumerate(pieces):
        for piece in mine:
            held[piece.number][rank] += piece.count
    able = [[rank for rank, count in enumerate(counts) if 2 * count >= max(counts)] for counts in held]
    work = [shape.numel() * min(shape) for shape in shapes]
    load, owners = [0] * len(pieces), [0] * len(shapes)
    # those that can choose come last, and even out what the others left
    for number in sorted(range(len(shapes)), key=lambda n: (len(able[n]), -work[n])):
        owners[number] = min(able[number], key=load.__getitem__)
        load[owners[number]] += work[number]
    return owners


class Exchange:
    """How the matrices of one flat tensor come together, each on the rank that makes it orthogonal, and go back."""

    def __init__(self, flat: Flat, stacked: dict[nn.Parameter, int], world: World) -> None:
        counts = [stacked[parameter] for parameter in flat.parameters]
        shapes, firsts = [], []  # of the matrices; the number of each parameter's first one
        for (rows, columns), parts in zip(flat.shapes(), counts, strict=True):
            firsts.append(len(shapes))
            shapes += [torch.Size((rows // parts, columns))] * parts
        pieces = [
            [part for p in mine for part in p.cut(shapes[firsts[p.number]].numel(), firsts[p.number])]
            for mine in flat.pieces
        ]
        owners, ranks, rank = share_out(shapes, pieces), range(world.size), world.rank
        self.world = world
        self.shapes = {number: shape for number, shape in enumerate(shapes) if owners[number] == rank}
        # both sides in the same order: by the other rank, then as they lie on the one that sends
        self.leaving = sorted(pieces[rank], key=lambda p: owners[p.number])
        self.coming = [p for mine in pieces for p in mine if owners[p.number] == rank]
        self.sent = [sum(p.count for p in pieces[rank] if owners[p.number] == other) for other in ranks]
        self.received = [sum(p.count for p in pieces[other] if owners[p.number] == rank) for other in ranks]
        self.stays = all(owners[p.number] == other for other in ranks for p in pieces[other])

    def gather(self, flat: Tensor) -> dict[int, Tensor]:
        """The matrices that are this rank's to make orthogonal, from all ranks' flat tensors."""
        parts = torch.cat([flat[:0], *(piece.of(flat) for piece in self.leaving)])
        parts = self._swap(parts, self.sent, self.received)
        matrices = {number: flat.new_empty(shape) for number, shape in self.shapes.items()}
        for piece, part in zip(self.coming, parts.split([p.count for p in self.coming]), strict=True):
            piece.of_whole(matrices[piece.number].view(-1)).copy_(part)
        return matrices

    def scatter(self, matrices: dict[int, Tensor], flat: Tensor) -> None:
        """Put them back where they came from."""
        parts = [piece.of_whole(matrices[piece.number].view(-1)) for piece in self.coming]
        mine = self._swap(torch.cat([flat[:0], *parts]), self.received, self.sent)
        for piece, part in zip(self.leaving, mine.split([p.count for p in self.leaving]), strict=True):
            piece.of(flat).copy_(part)

    def _swap(self, parts: Tensor, sent: list[int], received: list[int]) -> Tensor:
        if self.stays:  # on every rank
            return parts
        got = parts.new_empty(sum(received))
        dist.all_to_all_single(got, parts, received, sent, group=self.world.group_of(parts))
        return got


# ---- the optimizer


class Muon(Pieced):
    """Groups with `hidden` True hold hidden matrices alone; for the others it is AdamW.

    stacked: how many matrices each of the hidden parameters holds, one above the other
    """

    def __init__(self, groups: list[dict], stacked: dict[nn.Parameter, int], defaults: dict, ns_steps: int) -> None:
        super().__init__(groups, defaults)
        self.stacked, self.ns_steps = stacked, ns_steps
        self.exchanges: dict[Tensor, Exchange] = {}

    def lay_out(self, flats: Sequence[Flat], world: World) -> None:
        super().lay_out(flats, world)
        hidden = [flat for flat in flats if flat.parameters[0] in self.stacked]
        self.exchanges = {flat.tensor: Exchange(flat, self.stacked, world) for flat in hidden}

    def drop_second_moments(self) -> None:
        """Forget the second moments of hidden matrices, which there are none of: those of a universal checkpoint."""
        for tensor in self.exchanges:
            self.state[tensor].pop("exp_avg_sq", None)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            if group["hidden"]:
                self._step(group)
            else:
                adamw_step(self, group)

    def _step(self, group: dict) -> None:
        tensors = [p for p in group["params"] if p.grad is not None]
        updates = [self._momentum(tensor, group["momentum"]) for tensor in tensors]
        if self.exchanges:
            for tensor, update in zip(tensors, updates, strict=True):
                exchange = self.exchanges[tensor]
                matrices = exchange.gather(update)
                orthogonalise(list(matrices.values()), self.ns_steps, exchange.world.device)
                exchange.scatter(matrices, update)
        else:
            pairs = zip(tensors, updates, strict=True)
            matrices = [part for tensor, update in pairs for part in update.chunk(self.stacked[tensor])]
            orthogonalise(matrices, self.ns_steps, tensors[0].device if tensors else torch.device("cpu"))
        lr = group["lr"] if self.found_inf is None else group["lr"] * (1 - self.found_inf)
        for tensor, update in zip(tensors, updates, strict=True):
            tensor.mul_(1 - lr * group["weight_decay"]).sub_(update.mul_(lr))

    def _momentum(self, tensor: Tensor, decay: float) -> Tensor:
        """Move the gradient's running mean on; Nesterov's estimate of it, of the tensor's shape."""
        state = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), device=tensor.device)
            state["exp_avg"] = torch.zeros_like(tensor)
        mean, gradient = state["exp_avg"], tensor.grad
        if self.found_inf is None:
            state["step"] += 1
        else:  # a gradient that equals the mean leaves it as it is
            state["step"] += 1 - self.found_inf
            gradient = torch.where(self.found_inf > 0, mean, gradient)
        mean.lerp_(gradient, 1 - decay)
        return torch.lerp(gradient, mean, decay)
