"""Every optimizer in the engine, at every ZeRO stage, against its formula in one process on the whole batch."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from ranks import on_ranks
from torch import nn

from mlm_dist import checkpoint, masking, muon, stream, vocab, world
from mlm_dist.batch_size import BatchConfig
from mlm_dist.encoder import Encoder, EncoderConfig
from mlm_dist.engine import Engine
from mlm_dist.engine_config import EngineConfig
from mlm_dist.manifest import load_manifest
from mlm_dist.masking import MaskingConfig
from mlm_dist.mlm import MLM
from mlm_dist.optim import OPTIMIZERS, OptimConfig
from mlm_dist.stream import Batch, DataConfig
from mlm_dist.world import World

SEED, STEPS, RATE, CLIP, LR = 7, 6, 0.3, 0.05, 1e-3  # every step is clipped
BATCH = BatchConfig(seq_len=64, global_rows=16, micro_rows=4)
MASKING = MaskingConfig(seed_by="sample")
SHAPE = EncoderConfig(layers=2, width=32, heads=2, mlp_width=48, global_every=2, window=16)
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # small weights too
CASES = {"0": (0, False, "fp32"), "1": (1, False, "fp32"), "1 offload": (1, True, "fp32")}
CASES |= {"2": (2, False, "fp32"), "3": (3, False, "fp32")}
OFFLOADED = {f"{stage} offload": (stage, True, "fp32") for stage in (2, 3)}  # in slow tests
IN_BF16 = {f"{stage} bf16": (stage, False, "bf16") for stage in (1, 2, 3)}
SAVED = {"stable_adamw": CASES, "muon": CASES | IN_BF16}  # plain AdamW's checkpoints: test_train.py, test_precision.py
PARTS = {"attn.Wqkv.weight": 3, "attn.Wo.weight": 1, "mlp.Wi.weight": 2, "mlp.Wo.weight": 1}
MATRICES = {f"transformer.model.layers.{layer}.{name}": n for layer in range(2) for name, n in PARTS.items()}
MATRICES["transformer.head.dense.weight"] = 1


def options(name: str) -> OptimConfig:
    return OptimConfig(name=name, lr=LR, weight_decay=0.1, beta2=0.95, eps=1e-6)


def build(tokenizer: vocab.Vocab) -> MLM:
    world.seed_everything(SEED)
    return MLM(Encoder(SHAPE, tokenizer.size), **masking.mlm_keywords(MASKING, tokenizer))


def windows(toy: Path, rank: int, size: int) -> Iterator[list[Batch]]:
    """A rank's micro-batches of each step."""
    tokenizer = vocab.load(toy / "tokenizer")
    data = DataConfig(shards=str(toy), packing="pad", workers=0)
    batches = stream.train_batches(load_manifest(toy / "train"), tokenizer, data, BATCH, SEED, rank, size, None)
    for _ in range(STEPS):
        yield [batches.draw(4) for _ in range(4 // size)]


def targets_of(window: list[Batch]) -> int:
    return sum(int(masking.targets_of(batch.maskable, RATE).sum()) for batch in window)


# ---- in the engine


def engine_of(toy: Path, name: str, case: str, here: World, universal: bool = False) -> Engine:
    stage, offload, precision = (CASES | OFFLOADED | IN_BF16)[case]
    config = EngineConfig(zero_stage=stage, offload_optimizer=offload, clip=CLIP, precision=precision)
    model = build(vocab.load(toy / "tokenizer"))
    batch = BATCH if BATCH.global_rows % here.size == 0 else BatchConfig(seq_len=64, global_rows=4 * here.size)
    return Engine(model, config, options(name), batch, MASKING, SEED, here, SHARD_ALL, universal)


def take_step(engine: Engine, window: list[Batch], step: int) -> None:
    engine.train_step(window, int(engine.world.sum(torch.tensor(targets_of(window)))), step, LR, RATE)


def weights_of(engine: Engine) -> dict[str, torch.Tensor]:
    named = dict(engine.deepspeed.module.named_parameters())
    gathered = engine.deepspeed.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=gathered):
        return {name: weight.detach().clone() for name, weight in named.items()}


def trained(toy: Path, name: str, cases: Iterable[str] = CASES) -> dict[str, dict[str, Any]]:
    """By case: the weights before, and after each step, the norms, and how many matrices were made orthogonal."""
    made, orthogonalise = [0], muon.newton_schulz

    def counted(matrices: torch.Tensor, *args: Any) -> torch.Tensor:
        made[0] += len(matrices)
        return orthogonalise(matrices, *args)

    muon.newton_schulz = counted
    with world.join(120) as here:
        return {case: train(toy, name, case, here, made) for case in cases}


def train(toy: Path, name: str, case: str, here: World, made: list[int]) -> dict[str, Any]:
    engine = engine_of(toy, name, case, here)
    weights, norms, counts = [weights_of(engine)], [], []
    for step, window in enumerate(windows(toy, here.rank, here.size)):
        made[0] = 0
        take_step(engine, window, step)
        weights.append(weights_of(engine))
        norms.append(engine.grad_norm())
        counts.append(int(here.sum(torch.tensor(made[0]))) // (here.size if case == "0" else 1))
    return {"weights": weights, "norms": norms, "counts": counts}


# ---- by the formulas


def adamw(p: nn.Parameter, state: dict, decay: float, stable: bool) -> None:
    beta1, beta2, eps, step = 0.9, 0.95, 1e-6, state["step"]
    state["m"] = beta1 * state["m"] + (1 - beta1) * p.grad
    state["v"] = beta2 * state["v"] + (1 - beta2) * p.grad**2
    m, v = state["m"] / (1 - beta1**step), state["v"] / (1 - beta2**step)
    rms = (p.grad**2 / v.clamp(min=eps**2)).mean().sqrt() if stable else torch.ones(())
    lr = LR / max(1.0, float(rms))
    p.data -= lr * decay * p.data + lr * m / (v.sqrt() + eps)


def muon_update(p: nn.Parameter, state: dict, decay: float, parts: int) -> None:
    state["m"] = 0.95 * state["m"] + p.grad
    updates, state["ranks"] = [], []
    for x in (p.grad + 0.95 * state["m"]).chunk(parts):
        x = x / x.norm()
        state["ranks"].append(int((torch.linalg.svdvals(x) > 0.002).sum()))
        for _ in range(5):
            squared = x @ x.T
            x = 3.4445 * x - 4.7750 * squared @ x + 2.0315 * squared @ squared @ x
        updates.append(0.2 * max(x.shape) ** 0.5 * x)
    p.data -= LR * decay * p.data + LR * torch.cat(updates)


def by_formula(toy: Path, name: str) -> dict[str, Any]:
    model = build(vocab.load(toy / "tokenizer"))
    named = dict(model.named_parameters())
    states = {key: {"m": torch.zeros_like(p), "v": torch.zeros_like(p)} for key, p in named.items()}
    norms, ranks = [], []
    for step, window in enumerate(windows(toy, 0, 1)):
        for each in window:
            keys = masking.row_keys_by_sample(SEED, each.row_keys)
            sums = model(each.ids, row_keys=keys, rate=RATE, sums=True, segments=each.segments)
            (sums["loss"] / targets_of(window)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for key, p in named.items():
            decay = 0.1 if p.ndim >= 2 else 0.0
            states[key]["step"] = step + 1
            if name == "muon" and key in MATRICES:
                muon_update(p, states[key], decay, MATRICES[key])
            else:
                adamw(p, states[key], decay, name == "stable_adamw")
        model.zero_grad()
        ranks.append({key: states[key].get("ranks") for key in MATRICES})
    return {"weights": {key: p.detach() for key, p in named.items()}, "norms": norms, "ranks": ranks}


@pytest.fixture(scope="module", params=OPTIMIZERS)
def both(request: pytest.FixtureRequest, toy: Path) -> tuple[str, dict[str, Any], list[dict[str, dict[str, Any]]]]:
    name = request.param
    return name, by_formula(toy, name), on_ranks(2, trained, toy, name)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_do_what_the_formula_says(both: tuple, case: str) -> None:
    _, expected, ranks = both
    for rank in ranks:
        check_weights(rank[case], expected)


def check_weights(found: dict[str, Any], expected: dict[str, Any]) -> None:
    after = found["weights"][-1]
    assert after.keys() == expected["weights"].keys()
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(after[key], weight, atol=1e-5, rtol=0, msg=key)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4), "of the raw gradient"
    assert min(expected["norms"]) > CLIP


def update_of(rank: dict[str, Any], step: int, key: str) -> torch.Tensor:
    """What a step made of a gradient, decay and learning rate taken out."""
    before, after = rank["weights"][step][key].double(), rank["weights"][step + 1][key].double()
    return (before * (1 - LR * 0.1) - after) / LR


@pytest.mark.parametrize("case", CASES)
def test_muon_makes_every_hidden_matrix_orthogonal_once_a_step(both: tuple, case: str) -> None:
    name, expected, ranks = both
    for rank in ranks:
        check_orthogonal(rank[case], expected, name)


def check_orthogonal(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    """But for directions in which there is hardly a gradient: LayerNorm lets through none along the mean."""
    assert found["counts"] == [sum(MATRICES.values()) if name == "muon" else 0] * STEPS
    for key, parts in MATRICES.items() if name == "muon" else ():
        for step in range(STEPS):
            for update, of_gradient in zip(
                update_of(found, step, key).chunk(parts), expected["ranks"][step][key], strict=True
            ):
                values = torch.linalg.svdvals(update) / (0.2 * max(update.shape) ** 0.5)
                assert values.max() < 1.3 and values[of_gradient - 1] > 0.6, (key, step, values)
                assert of_gradient >= min(update.shape) / 3, (key, step)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_its_state_in_host_memory_at_stages_2_and_3_too(toy: Path, name: str) -> None:
    expected = by_formula(toy, name)
    for rank in on_ranks(2, trained, toy, name, tuple(OFFLOADED)):
        for found in rank.values():
            check_weights(found, expected)
            check_orthogonal(found, expected, name)


# ---- the map of DeepSpeed's flat tensors


def map_is_right(toy: Path) -> bool:
    """Whether, at every stage and precision, all ranks' pieces together are the weights."""
    right = []
    with world.join(120) as here:
        for case in CASES | IN_BF16:
            engine = engine_of(toy, "muon", case, here)
            with deepspeed.zero.GatheredParameters(list(engine.deepspeed.module.parameters()), enabled=case[0] == "3"):
                whole = {id(p): p.detach().float().flatten().clone() for p in engine.deepspeed.module.parameters()}
            seen = 0
            for flat in engine.inner.flats.values():
                shapes = flat.shapes()
                for piece in flat.pieces[here.rank]:
                    weight = whole[id(flat.parameters[piece.number])]
                    right.append(len(weight) == shapes[piece.number].numel())
                    right.append(torch.equal(piece.of(flat.tensor), piece.of_whole(weight)))
                    seen += piece.count
            total = int(here.sum(torch.tensor(seen)))
            right.append(total == (0 if case == "0" else sum(map(len, whole.values()))))
    return all(right)


@pytest.mark.parametrize("size", [1, 3])
def test_the_map_of_flat_tensors_is_deepspeeds(toy: Path, size: int) -> None:
    assert all(on_ranks(size, map_is_right, toy))


# ---- steps that change nothing


def with_faults(toy: Path, name: str) -> dict[str, tuple]:
    """By case, weights and state after 2 steps; after a third, to whose loss rank 1 brings inf; and after a fourth."""
    with world.join(120) as here:
        return {case: faulty(toy, name, case, here) for case in CASES}


def faulty(toy: Path, name: str, case: str, here: World) -> tuple:
    engine = engine_of(toy, name, case, here)
    forward, seen = engine._forward, []

    def fault(*args: Any) -> dict[str, torch.Tensor]:
        sums = forward(*args)
        return sums | {"loss": sums["loss"] * math.inf} if here.rank == 1 and len(seen) == 2 else sums

    engine._forward = fault
    for step, window in zip(range(4), windows(toy, here.rank, here.size), strict=False):
        take_step(engine, window, step)
        seen.append({**weights_of(engine), **state_of(engine)})
    return tuple(seen[1:]), int(engine.skips.total)


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    states = engine.optimizer.state.values()
    return {f"{i} {key}": value.clone() for i, state in enumerate(states) for key, value in state.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_neither_weights_nor_state(toy: Path, name: str) -> None:
    for rank in on_ranks(2, with_faults, toy, name):
        for case, ((before, skipped, after), total) in rank.items():
            assert total == 1 and before.keys() == skipped.keys(), case
            assert any(key.endswith("exp_avg") for key in before)
            for key, value in before.items():
                assert torch.equal(skipped[key], value), (case, key)
                assert after[key].isfinite().all() and not torch.equal(after[key], value), (case, key)


# ---- checkpoints


def save(engine: Engine, folder: Path) -> None:
    if engine.world.is_main:
        folder.mkdir(parents=True)
    engine.world.barrier()
    engine.checkpoint_files(folder, checkpoint.TAG, later=False)
    if engine.world.is_main:
        told = {"zero_stage": engine.deepspeed.zero_optimization_stage(), "world_size": engine.world.size}
        (folder / "manifest.json").write_text(json.dumps(told))
    engine.world.barrier()


def whole_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Weights in fp32 and state of every parameter, put together from all ranks' pieces; nothing at stage 0."""
    optimizer, mine = engine.inner, []
    names = {parameter: name for name, parameter in engine.deepspeed.module.named_parameters()}
    for flat in optimizer.flats.values():
        tensors = {"fp32": flat.tensor.detach()} | optimizer.state[flat.tensor]
        for piece in flat.pieces[engine.world.rank]:
            name = names[flat.parameters[piece.number]]
            mine += [(f"{name} {key}", piece.first, piece.of(t).clone() if t.ndim else t) for key, t in tensors.items()]
    parts: dict[str, list[torch.Tensor]] = {}
    for key, _, part in sorted((p for rank in engine.world.gather(mine) for p in rank), key=lambda p: p[:2]):
        parts.setdefault(key, []).append(part)
    return {key: torch.cat(some) if some[0].ndim else some[0] for key, some in parts.items()}


Ends = dict[str, dict[str, torch.Tensor]]  # the whole state half way and after all steps; this rank's there


def go_through(toy: Path, folder: Path, name: str, cases: Iterable[str]) -> dict[str, tuple[Ends, Ends]]:
    """By case: in one go, saved half way; and taken up again there."""
    with world.join(120) as here:
        once = {case: through(toy, folder / case, name, case, here) for case in cases}
        return {case: (ends, taken_up(toy, folder / case, name, case, here)) for case, ends in once.items()}


def through(toy: Path, folder: Path, name: str, case: str, here: World) -> Ends:
    engine = engine_of(toy, name, case, here)
    for step, window in enumerate(windows(toy, here.rank, here.size)):
        if step == STEPS // 2:
            save(engine, folder)
            middle = whole_state(engine)
        take_step(engine, window, step)
    return {"middle": middle, "whole": whole_state(engine), "end": weights_of(engine) | state_of(engine)}


def taken_up(toy: Path, folder: Path, name: str, case: str, here: World) -> Ends:
    engine = engine_of(toy, name, case, here, checkpoint.needs_resharding(folder, here))
    checkpoint.load(folder, engine, here, folder.parent)
    middle = whole_state(engine)
    for step, window in enumerate(windows(toy, here.rank, here.size)):
        if step >= STEPS // 2:
            take_step(engine, window, step)
    return {"middle": middle, "whole": whole_state(engine), "end": weights_of(engine) | state_of(engine)}


def taken_up_by_others(toy: Path, folder: Path, name: str, cases: Iterable[str]) -> dict[str, Ends]:
    with world.join(120) as here:
        return {case: taken_up(toy, folder / case, name, case, here) for case in cases}


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], case: str) -> None:
    assert found.keys() == expected.keys(), case
    for key, value in expected.items():
        assert torch.equal(found[key], value), (case, key)


@pytest.mark.parametrize("name", SAVED)
def test_a_run_goes_on_bit_for_bit(toy: Path, tmp_path: Path, name: str) -> None:
    for rank in on_ranks(2, go_through, toy, tmp_path, name, tuple(SAVED[name])):
        for case, (once, again) in rank.items():
            check_same(again["middle"], once["middle"], case)
            check_same(again["end"], once["end"], case)
            assert bool(once["middle"]) == (case != "0")


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_a_run_goes_on_on_another_number_of_ranks(toy: Path, tmp_path: Path, name: str) -> None:
    """What is loaded is bit for bit what was saved; from there on sums over ranks differ, in bf16 by more than fp32."""
    cases = (*SAVED[name], *OFFLOADED)
    whole = on_ranks(2, go_through, toy, tmp_path, name, cases)[0]
    for size in (1, 4):
        for rank in on_ranks(size, taken_up_by_others, toy, tmp_path, name, cases):
            for case, found in rank.items():
                once, again = whole[case]
                check_same(again["end"], once["end"], case)
                check_same(found["middle"], once["middle"], case)
                for key, weight in once["end"].items() if case not in IN_BF16 else ():
                    if key.startswith("transformer."):
                        torch.testing.assert_close(found["end"][key], weight, atol=1e-5, rtol=0, msg=f"{case} {key}")
                for key, weight in once["whole"].items() if case in IN_BF16 else ():
                    if key.endswith(" fp32"):
                        moved = (weight - once["middle"][key]).norm()
                        assert (found["whole"][key] - weight).norm() < 0.2 * moved, (case, key)
