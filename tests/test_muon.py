"""Which matrices Muon takes, what it makes of them, and how ranks share them; in the engine: test_optimizers.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM

from mlm_dist import muon, optim, world
from mlm_dist.encoder import Encoder, EncoderConfig
from mlm_dist.muon import Exchange, hidden_matrices, newton_schulz, orthogonalise, share_out
from mlm_dist.optim import OptimConfig
from mlm_dist.pieces import Flat, slices, span, starts

CPU = torch.device("cpu")


def names(model: nn.Module, vocab_size: int | None = None) -> dict[str, int]:
    hidden = hidden_matrices(model, vocab_size)
    return {name: hidden[p] for name, p in model.named_parameters() if p in hidden}


# ---- which matrices


@pytest.mark.parametrize("tie", [True, False])
def test_the_encoders_layers_and_its_heads_dense_are_hidden(tie: bool) -> None:
    model = Encoder(EncoderConfig(layers=2, width=32, heads=2, mlp_width=48, tie=tie), 300)
    parts = {"attn.Wqkv": 3, "attn.Wo": 1, "mlp.Wi": 2, "mlp.Wo": 1}
    expected = {f"model.layers.{i}.{name}.weight": n for i in range(2) for name, n in parts.items()}
    assert names(model) == names(model, 300) == expected | {"head.dense.weight": 1}


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "electra", "distilbert", "deberta-v2", "albert"])
@pytest.mark.parametrize("tie", [True, False])
def test_in_transformers_models_neither_embeddings_nor_output_are_hidden(kind: str, tie: bool) -> None:
    config = AutoConfig.for_model(kind, vocab_size=997, pad_token_id=0, tie_word_embeddings=tie)
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    found = names(model)
    matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2}
    tables = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    outputs = {name for name, p in matrices.items() if 997 in p.shape} - tables
    assert matrices.keys() - found.keys() == (tables | outputs) & matrices.keys() and tables
    stacked = {name.rsplit(".", 2)[-2]: n for name, n in found.items() if n > 1}
    assert stacked == ({"Wqkv": 3, "Wi": 2} if kind == "modernbert" else {})


def test_the_last_layer_as_wide_as_the_vocabulary_makes_the_logits() -> None:
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 16), nn.Linear(16, 4), nn.Linear(4, 16))
    assert names(model, 11) == {"1.weight": 1, "2.weight": 1}
    assert names(model) == {"1.weight": 1, "2.weight": 1, "3.weight": 1}


def test_vectors_convolutions_and_frozen_matrices_are_not_hidden() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3), nn.LayerNorm(4), nn.MultiheadAttention(4, 2))
    model[0].weight.requires_grad_(False)
    assert names(model) == {"3.in_proj_weight": 3, "3.out_proj.weight": 1}


def test_every_parameter_is_in_one_group() -> None:
    model = Encoder(EncoderConfig(layers=1, width=32, heads=2, mlp_width=48), 300)
    optimizer = optim.build(OptimConfig(name="muon", lr=0.5, weight_decay=0.1), model)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    assert [(group["weight_decay"], group["hidden"]) for group in optimizer.param_groups] == [
        (0.1, False), (0.0, False), (0.1, True),
    ]  # fmt: skip


def test_the_learning_rate_of_a_step_reaches_each_half_by_its_factor() -> None:
    config = OptimConfig(name="muon", lr=0.5, muon=muon.MuonConfig(lr_factor=4.0))
    optimizer = optim.build(config, nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4), nn.Linear(4, 4)))
    optim.set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25, 1.0]


# ---- what becomes of them


def matrix_of(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return ((left * values) @ right.T).float()


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (192, 64), (64, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_singular_values_come_near_1_whatever_they_were(
    rows: int, columns: int, dtype: torch.dtype, size: float
) -> None:
    values = torch.logspace(-2, 0, 64, dtype=torch.float64)  # from some 0.3 % of the norm on
    matrix = matrix_of(size * values, rows, columns)
    update = newton_schulz(matrix[None], 5, dtype)[0].double()
    found = torch.linalg.svdvals(update)
    assert 0.6 < found.min() and found.max() < 1.3, found
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    inner = left.T @ update @ right.T
    assert (inner - inner.diag().diag()).abs().max() < (1e-3 if dtype == torch.float32 else 0.15), "the same directions"
    assert inner.diag().min() > 0.5, "not turned around"


def test_nothing_becomes_of_no_gradient() -> None:
    assert torch.equal(newton_schulz(torch.zeros(2, 3, 5), 5, torch.float32), torch.zeros(2, 3, 5))


def test_in_batches_or_one_by_one_they_become_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(8, 8), (8, 12), (8, 8), (12, 8), (8, 12), (8, 8)]
    matrices = [torch.randn(shape) for shape in shapes]
    expected = []
    for matrix in matrices:
        expected.append(matrix.clone())
        orthogonalise(expected[-1:], 5, CPU)
    monkeypatch.setattr(muon, "ELEMENTS_TOGETHER", 128)  # two of 8 x 8, one of the others
    orthogonalise(matrices, 5, CPU)
    for found, wanted in zip(matrices, expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (64, 256), (256, 64)])
def test_an_update_has_the_size_of_adamws(rows: int, columns: int) -> None:
    update = torch.randn(rows, columns)
    orthogonalise([update], 5, CPU)
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_a_stacked_parameter_is_made_orthogonal_matrix_by_matrix() -> None:
    model = Encoder(EncoderConfig(layers=1, width=32, heads=2, mlp_width=48), 300)
    optimizer = optim.build(OptimConfig(name="muon", lr=1.0, weight_decay=0.0), model)
    weight = model.model.layers[0].attn.Wqkv.weight
    before = weight.detach().clone()
    weight.grad = torch.cat([size * torch.randn(32, 32) for size in (1e-4, 1.0, 100.0)])
    optimizer.step()
    for update in (before - weight.detach()).chunk(3):
        values = torch.linalg.svdvals(update) / (0.2 * math.sqrt(32))
        assert values[:30].min() > 0.6 and values.max() < 1.3, "each by itself, large or small"


# ---- how ranks share them


def test_work_is_shared_evenly_where_any_rank_could_do_it() -> None:
    shapes = [torch.Size((8, 8))] * 9 + [torch.Size((8, 16))] * 3
    pieces = [slices([s.numel() for s in shapes], rank, 3) for rank in range(3)]
    owners = share_out(shapes, pieces)
    work = [sum(shapes[n].numel() for n, owner in enumerate(owners) if owner == rank) for rank in range(3)]
    assert max(work) == min(work)


def test_a_whole_matrix_stays_where_it_is() -> None:
    shapes = [torch.Size((4, 4))] * 4
    pieces = [span([16] * 4, starts([16] * 4), rank, 32) for rank in range(2)]
    assert share_out(shapes, pieces) == [0, 0, 1, 1]


SHAPES, STACKED = [(8, 4), (12, 5), (3, 7), (6, 6)], [1, 3, 1, 2]


def come_and_go(stage: int) -> tuple[bool, list[int]]:
    """Whether matrices come together as they are, twice as large go back, and how many this rank had of them."""
    parameters = [nn.Parameter(torch.empty(shape)) for shape in SHAPES]
    sizes = [p.numel() for p in parameters]
    wholes = [torch.arange(size, dtype=torch.float32) + 1000 * n for n, size in enumerate(sizes)]
    with world.join(60) as here:
        length = -(-sum(sizes) // here.size)
        pieces = [
            slices(sizes, rank, here.size) if stage == 3 else span(sizes, starts(sizes), rank, length)
            for rank in range(here.size)
        ]
        flat = torch.full((sum(-(-size // here.size) for size in sizes) if stage == 3 else length,), -1.0)
        for piece in pieces[here.rank]:
            piece.of(flat).copy_(piece.of_whole(wholes[piece.number]))
        stacked = dict(zip(parameters, STACKED, strict=True))
        exchange = Exchange(Flat(flat, parameters, pieces), stacked, here)
        before, matrices = flat.clone(), exchange.gather(flat)
        blocks = [b for w, s, n in zip(wholes, SHAPES, STACKED, strict=True) for b in w.view(s).chunk(n)]
        right = all(torch.equal(matrix, blocks[number]) for number, matrix in matrices.items())
        exchange.scatter({number: 2 * matrix for number, matrix in matrices.items()}, flat)
        expected = F.threshold(2 * before, -1.5, -1.0)  # what is nobody's stays -1
        return right and torch.equal(flat, expected), list(matrices)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("stage", [2, 3])
def test_matrices_come_together_and_go_back(stage: int, size: int) -> None:
    ranks = on_ranks(size, come_and_go, stage)
    assert all(right for right, _ in ranks)
    assert sorted(number for _, mine in ranks for number in mine) == list(range(sum(STACKED)))
