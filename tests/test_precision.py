"""Checkpoints of what isn't plain fp32: bf16, the optimizer in host memory, and fp16 at the end of its loss scale."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from launching import ROOT, metrics, overridden, run
from ranks import on_ranks

from mlm_dist import assembly, checkpoint, config, engine, prepare, train, vocab, world
from mlm_dist.world import EXIT_NON_FINITE, StopFlag

pytestmark = pytest.mark.slow

STAGES = (1, 2, 3)
KINDS = {
    "offload": ("engine.offload_optimizer=true",),
    "bf16": ("engine.precision=bf16",),
    "bf16-offload": ("engine.precision=bf16", "engine.offload_optimizer=true"),
}


def go_on(toy: Path, folder: Path, kind: str, steps: int, *more: str) -> list[int]:
    """On this rank, at each stage: train, or go on, up to a step, with masks and a schedule that depend on neither."""
    codes = []
    with world.join(120) as here, StopFlag() as stop:
        for stage in STAGES:
            overrides = overridden(
                toy, folder / str(stage), f"run.steps={steps}", "schedule.name=constant", "masking.seed_by=sample",
                f"engine.zero_stage={stage}", "evaluate.max_rows=1", *KINDS.get(kind, ()), *more,
            )  # fmt: skip
            codes.append(train.train_on(config.load(ROOT / "configs/quickstart.yaml", overrides), here, stop))
    return codes


@pytest.mark.parametrize("kind", KINDS)
def test_runs_go_on_exactly_and_with_another_number_of_ranks(toy: Path, tmp_path: Path, kind: str) -> None:
    """8 steps in one go; 4 and then the rest: on as many ranks bit for bit, on 1 or 4 up to the order of the sums."""
    on_ranks(2, go_on, toy, tmp_path / "whole", kind, 8)
    on_ranks(2, go_on, toy, tmp_path / "same", kind, 4)
    for name in ("on1", "on4"):
        shutil.copytree(tmp_path / "same", tmp_path / name)
    for name, ranks in (("same", 2), ("on1", 1), ("on4", 4)):
        on_ranks(ranks, go_on, toy, tmp_path / name, kind, 8)
    close = 5e-6 if kind == "offload" else 5e-4  # bf16 rounds each rank's sums; a step moves a weight by up to 3e-3
    for stage in STAGES:
        found = {
            name: checkpoint.find(tmp_path / name / str(stage), 8) for name in ("whole", "same", "on1", "on4")
        }  # whole ones, by their hashes
        losses = {name: list(metrics(tmp_path / name / str(stage), "loss").values()) for name in found}
        weights = {name: checkpoint.full_weights(path) for name, path in found.items()}
        assert losses["same"] == losses["whole"] and len(losses["whole"]) == 8
        for key, weight in weights["whole"].items():
            assert weight.dtype == torch.float32
            assert torch.equal(weights["same"][key], weight), (stage, key)
            for name in ("on1", "on4"):
                torch.testing.assert_close(
                    weights[name][key], weight, atol=close, rtol=0, msg=f"{name}, stage {stage}, {key}"
                )
        for name in ("on1", "on4"):
            assert losses[name][4] == pytest.approx(losses["whole"][4], abs=5e-6), "the step after the resumption"
            assert losses[name] == pytest.approx(losses["whole"], abs=close)
        # DeepSpeed keeps the weights it computes with beside: at stage 3 among the optimizer's alone
        if stage < 3:
            kept = torch.load(found["whole"] / "deepspeed/mp_rank_00_model_states.pt", weights_only=True)["module"]
            assert kept.keys() == weights["whole"].keys()
            for key, value in kept.items():
                assert torch.equal(value, weights["whole"][key].to(value.dtype)), (stage, key)


def test_bf16_at_stage_1_is_exported_and_evaluated(toy: Path, tmp_path: Path) -> None:
    """What a GPU does by default; DeepSpeed's own reader refuses what it saves."""
    on_ranks(2, go_on, toy, tmp_path, "bf16", 4)
    exported = run("launch/export.py", "--run", str(tmp_path / "1"), "--out", str(tmp_path / "hf"))
    assert exported.returncode == 0 and (tmp_path / "hf/model.safetensors").exists(), exported.stdout
    evaluated = run("launch/evaluate.py", "--run", str(tmp_path / "1"))
    assert evaluated.returncode == 0 and "Traceback" not in evaluated.stdout, evaluated.stdout


# ---- parameters that are not trained

FROZEN = ("model.kind=factory", "model.factory=tests.factories:half_frozen", "optim.name=muon")


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_weights_that_are_not_trained_are_in_every_checkpoint(toy: Path, tmp_path: Path, kind: str) -> None:
    """As they were made, at each stage, and where another number of ranks goes on."""
    for ranks, steps in ((2, 3), (1, 5)):
        assert on_ranks(ranks, go_on, toy, tmp_path, kind, steps, *FROZEN) == [[0] * len(STAGES)] * ranks
    tokenizer = vocab.load(toy / "tokenizer")
    for stage in STAGES:
        cfg = config.load(ROOT / "configs/quickstart.yaml", overridden(toy, tmp_path, *FROZEN))
        world.seed_everything(cfg.run.seed)
        made = assembly.objective(cfg, assembly.build_model(cfg, tokenizer, is_trained=False), tokenizer)
        frozen = {name for name, weight in made.named_parameters() if not weight.requires_grad}
        assert frozen
        for step in (3, 5):
            model = assembly.load_model(cfg, tokenizer, checkpoint.find(tmp_path / str(stage), step))
            weights = dict(model.named_parameters())
            for name, weight in made.named_parameters():
                as_it_was = weight.bfloat16().float() if kind == "bf16" else weight
                assert torch.equal(weights[name], as_it_was) == (name in frozen), (stage, step, name)


# ---- fp16


def fp16_on_the_cpu(toy: Path, folder: Path, steps: int, *more: str) -> list[int]:
    """`go_on` in fp16, with DeepSpeed's own loss scaler and ZeRO; that a CPU is slow at it is no matter here."""
    get_accelerator().is_fp16_supported = lambda: True
    engine.resolve_precision = prepare.resolve_precision = lambda *_: "fp16"
    return go_on(toy, folder, "fp16", steps, *more)


def test_fp16_resumes_exactly_with_its_loss_scale(toy: Path, tmp_path: Path) -> None:
    scale = ("deepspeed.fp16.initial_scale_power=4", "deepspeed.fp16.loss_scale_window=3")
    for name, steps in (("whole", 8), ("parts", 5), ("parts", 8)):
        assert on_ranks(2, fp16_on_the_cpu, toy, tmp_path / name, steps, *scale) == [[0, 0, 0]] * 2
    for stage in STAGES:
        one, other = (checkpoint.find(tmp_path / name / str(stage)) for name in ("whole", "parts"))
        weights, others = checkpoint.full_weights(one), checkpoint.full_weights(other)
        assert all(torch.equal(weights[key], others[key]) for key in weights)
        assert metrics(tmp_path / f"whole/{stage}", "loss") == metrics(tmp_path / f"parts/{stage}", "loss")
        scaler, same = (
            torch.load(next(path.rglob("*rank_0*optim_states.pt")), weights_only=False)["optimizer_state_dict"][
                "loss_scaler"
            ]
            for path in (one, other)
        )
        assert scaler.cur_scale == same.cur_scale > 16, "it has grown"


def test_fp16_at_its_lowest_scale_ends_a_run_that_only_overflows(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From step 5 on rank 1 overflows: 2 steps lower the scale from 4 to 1 and don't count, the next 4 do."""
    options = (
        "model.kind=factory", "model.factory=tests.faulty:faulty", "model.options.first=9", "model.options.last=999",
        "checkpoint.every_steps=2", "engine.max_non_finite_steps=4", "deepspeed.fp16.initial_scale_power=2",
        "deepspeed.fp16.hysteresis=1",
    )  # fmt: skip
    assert on_ranks(2, fp16_on_the_cpu, toy, tmp_path, 50, *options) == [[EXIT_NON_FINITE] * 3] * 2
    assert capfd.readouterr().out.count("the last 4 steps were skipped: the run ends") == len(STAGES)
    for stage in STAGES:
        skipped = metrics(tmp_path / str(stage), "skipped_steps")
        assert max(skipped) == 10 and skipped[10] == 6 and skipped[4] == 0
        alerts = (tmp_path / str(stage) / "alerts.jsonl").read_text().splitlines()
        assert json.loads(alerts[0])["step"] == 7, "what lowers the scale is counted, and no alert"
        weights = checkpoint.full_weights(checkpoint.find(tmp_path / str(stage)))
        assert all(weight.isfinite().all() for weight in weights.values())
