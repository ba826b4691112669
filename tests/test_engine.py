"""The engine against plain torch: one process with the whole batch, the same masks, the same optimizer."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from ranks import on_ranks
from torch import nn

from mlm_dist import batch_size, cpu_layer, masking, optim, stream, vocab, world
from mlm_dist.batch_size import BatchConfig
from mlm_dist.encoder import Encoder, EncoderConfig
from mlm_dist.engine import Engine
from mlm_dist.engine_config import EngineConfig
from mlm_dist.manifest import load_manifest
from mlm_dist.masking import MaskingConfig
from mlm_dist.mlm import MLM
from mlm_dist.optim import OptimConfig
from mlm_dist.stream import Batch, DataConfig
from mlm_dist.world import World

SEED, STEPS, RATE = 7, 10, 0.3
# ragged on purpose: rows hold different numbers of targets, so that a mean of means would differ
BATCH = BatchConfig(seq_len=64, global_rows=16, micro_rows=4)
GROWING = BatchConfig(seq_len=64, global_rows=16, micro_rows=2, warmup_rows=2, warmup_tokens=40 * 64)  # 2, 4, 8, 16
MASKING = MaskingConfig(seed_by="sample")
OPTIM = OptimConfig(lr=1e-3)
CLIP = 0.5
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # small weights too


class Small(nn.Module):
    """Ids -> logits with one attention-free block: enough parameters of both kinds, and fast."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 32)
        self.mix = nn.Conv1d(32, 32, 5, padding=2)
        self.norm = nn.LayerNorm(32)
        self.out = nn.Linear(32, vocab_size)

    def forward(self, ids: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + torch.relu(self.mix(x.transpose(1, 2)).transpose(1, 2))
        return self.out(self.norm(x))


def build(tokenizer: vocab.Vocab, recompute: bool | None = None) -> MLM:
    """recompute: an encoder in place of `Small`, its layers computed again or not."""
    world.seed_everything(SEED)
    if recompute is None:
        model = Small(tokenizer.size)
    else:
        shape = EncoderConfig(layers=3, width=32, heads=2, mlp_width=48, global_every=2, window=16, recompute=recompute)
        model = Encoder(shape, tokenizer.size)
    return MLM(model, **masking.mlm_keywords(MASKING, tokenizer))


def windows(toy: Path, tokenizer: vocab.Vocab, batch: BatchConfig, rank: int, size: int) -> Iterator[list[Batch]]:
    """A rank's micro-batches of each step."""
    data = DataConfig(shards=str(toy), packing="pad", workers=0)
    batches = stream.train_batches(load_manifest(toy / "train"), tokenizer, data, batch, SEED, rank, size, None)
    for rows in map(partial(batch_size.rows_at, batch), range(STEPS)):
        micro_rows, count = batch_size.micro_rows(batch, size, rows), batch_size.accumulation(batch, size, rows)
        yield [batches.draw(micro_rows) for _ in range(count)]


def on_engine(toy: Path, batch: BatchConfig, *stages: int) -> dict[int, dict]:
    """Losses and weights after some steps in DeepSpeed, by stage, as this rank sees them."""
    with world.join(120) as here:
        return {stage: train(toy, batch, stage, here) for stage in stages}


def train(toy: Path, batch: BatchConfig, stage: int, here: World, recompute: bool | None = None) -> dict:
    tokenizer = vocab.load(toy / "tokenizer")
    config = EngineConfig(zero_stage=stage, clip=CLIP, precision="fp32")
    model, extra = build(tokenizer, recompute), SHARD_ALL if recompute is not None else {}
    engine = Engine(model, config, OPTIM, batch, MASKING, SEED, here, extra)
    losses, under_way = [], len(FWD_MODULE_STACK)
    for step, window in enumerate(windows(toy, tokenizer, batch, here.rank, here.size)):
        counted = sum(int(masking.targets_of(b.maskable, RATE).sum()) for b in window)
        targets = int(here.sum(torch.tensor(counted)))
        sums = engine.train_step(window, targets, step, lr=1e-3, rate=RATE)
        assert int(here.sum(sums.targets)) == targets
        losses.append(here.sum(sums.loss).item() / targets)
        assert len(FWD_MODULE_STACK) == under_way  # nothing piles up there, step by step
    return {"losses": losses, "weights": full_weights(engine, stage)}


def full_weights(engine: Engine, stage: int) -> dict[str, torch.Tensor]:
    named = dict(engine.deepspeed.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=stage == 3):
        return {name: weight.detach().clone() for name, weight in named.items()}


def in_plain_torch(toy: Path, batch: BatchConfig) -> dict:
    tokenizer = vocab.load(toy / "tokenizer")
    model = build(tokenizer)
    optimizer = optim.build(OPTIM, model)
    losses = []
    for window in windows(toy, tokenizer, batch, 0, 1):
        targets = sum(int(masking.targets_of(b.maskable, RATE).sum()) for b in window)
        total = 0.0
        for each in window:
            keys = masking.row_keys_by_sample(SEED, each.row_keys)
            sums = model(each.ids, row_keys=keys, rate=RATE, sums=True, segments=each.segments)
            (sums["loss"] / targets).backward()
            total += sums["loss"].item()
        losses.append(total / targets)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "weights": model.state_dict()}


@pytest.fixture(scope="module")
def expected(toy: Path) -> dict:
    return in_plain_torch(toy, BATCH)


@pytest.fixture(scope="module")
def on_two_ranks(toy: Path) -> list[dict[int, dict]]:
    return on_ranks(2, on_engine, toy, BATCH, 0, 1, 2, 3)


def check_equal(got: dict, expected: dict) -> None:
    assert got["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert got["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert (got["weights"][name] - weight).abs().max() < 1e-5, name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one_process_with_the_whole_batch(expected: dict, on_two_ranks: list, stage: int) -> None:
    for rank in on_two_ranks:
        check_equal(rank[stage], expected)


def test_two_ranks_equal_one_process_while_the_batch_grows(toy: Path) -> None:
    assert {batch_size.rows_at(GROWING, step) for step in range(STEPS)} == {2, 4, 8, 16}
    expected = in_plain_torch(toy, GROWING)
    for rank in on_ranks(2, on_engine, toy, GROWING, 0, 1, 2, 3):
        for stage in (0, 1, 2, 3):
            check_equal(rank[stage], expected)


def computed_again(toy: Path, by_hand: bool, *stages: int) -> dict[int, tuple[dict, dict]]:
    """By stage, training with layers that are computed once, and again."""
    if not by_hand:
        cpu_layer.usable = lambda x: False  # of this process
    with world.join(120) as here:
        return {stage: tuple(train(toy, BATCH, stage, here, again) for again in (False, True)) for stage in stages}


@pytest.mark.parametrize("by_hand", [True, False])
def test_layers_computed_again_change_no_bit_of_losses_and_weights(toy: Path, by_hand: bool) -> None:
    for rank in on_ranks(2, computed_again, toy, by_hand, 0, 1, 2, 3):
        for once, again in rank.values():
            assert again["losses"] == once["losses"] and once["losses"][-1] < once["losses"][0]
            assert again["weights"].keys() == once["weights"].keys()
            assert all(torch.equal(again["weights"][name], weight) for name, weight in once["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4])
def test_the_loss_curve_does_not_depend_on_the_number_of_ranks(toy: Path, expected: dict, size: int) -> None:
    for rank in on_ranks(size, on_engine, toy, BATCH, 1):
        assert rank[1]["losses"] == pytest.approx(expected["losses"], abs=1e-5)


def waits(toy: Path, stages: tuple[int, ...]) -> int:
    """How often DeepSpeed tells the device to finish before the host goes on, in STEPS steps of each stage."""
    told = []
    deepspeed.get_accelerator().synchronize = lambda *_: told.append(1)
    on_engine(toy, BATCH, *stages)
    return len(told)


def test_deepspeed_never_waits_for_the_device(toy: Path) -> None:
    assert on_ranks(1, waits, toy, (0, 1, 2)) == [0]


# ---- gradients that are not finite


def with_faults(toy: Path, precision: str, *stages: int) -> dict[int, dict]:
    """Four steps by stage; at steps 1 and 2 the loss of rank 1 is not a number."""
    with world.join(120) as here:
        return {stage: faulty(toy, stage, precision, here) for stage in stages}


def faulty(toy: Path, stage: int, precision: str, here: World) -> dict:
    tokenizer = vocab.load(toy / "tokenizer")
    config = EngineConfig(zero_stage=stage, clip=CLIP, precision=precision)
    engine = Engine(build(tokenizer), config, OPTIM, BATCH, MASKING, SEED, here, {})
    forward, seen, weights = engine._forward, [], []

    def fault(*args) -> dict[str, torch.Tensor]:
        sums = forward(*args)
        return sums | {"loss": sums["loss"] * math.nan} if here.rank == 1 and len(seen) in (1, 2) else sums

    engine._forward = fault
    for step, window in zip(range(4), windows(toy, tokenizer, BATCH, here.rank, here.size), strict=False):
        targets = int(here.sum(torch.tensor(sum(int(masking.targets_of(b.maskable, RATE).sum()) for b in window))))
        sums = engine.train_step(window, targets, step, lr=1e-3, rate=RATE)
        seen.append((float(sums.loss), int(sums.targets), int(engine.skips.total), int(engine.skips.in_a_row)))
        weights.append(full_weights(engine, stage))
    return {"seen": seen, "weights": weights}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_counted(toy: Path, precision: str) -> None:
    stages = (0, 1, 2, 3) if precision == "fp32" else (1, 2, 3)
    for rank in on_ranks(2, with_faults, toy, precision, *stages):
        for stage in stages:
            losses, targets, total, in_a_row = zip(*rank[stage]["seen"], strict=True)
            assert total == (0, 1, 2, 2) and in_a_row == (0, 1, 2, 0), stage
            assert all(map(math.isfinite, losses)) and targets[1] == targets[2] == 0 < targets[0], stage
            before, first, second, after = rank[stage]["weights"]
            for name in before:
                assert torch.equal(before[name], first[name]) and torch.equal(before[name], second[name]), (stage, name)
                assert after[name].isfinite().all(), (stage, name)
            assert any(not torch.equal(before[name], after[name]) for name in before), stage
