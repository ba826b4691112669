"""Real launches: `deepspeed` with two ranks, from shards to checkpoints and back."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from launching import ROOT, metrics, pretrain, run

from mlm_dist import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps on two ranks, never stopped."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = pretrain(toy, folder, "run.steps=12", "evaluate.every_steps=6")
    assert done.returncode == 0, done.stdout
    assert "done: 12 steps" in done.stdout
    return folder


def test_a_run_leaves_what_explains_it(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "status.json", "checkpoints", "tokenizer"} <= names
    status = json.loads((finished / "status.json").read_text())
    assert status == {"status": "done", "exit_code": 0, "step": 12, "total_steps": 12}
    losses = metrics(finished, "loss")
    assert sorted(losses) == list(range(1, 13)), "every step is logged once"
    assert sorted(metrics(finished, "valid/loss")) == [6, 12]
    assert losses[12] < losses[1]


def test_the_same_command_again_says_that_the_run_is_complete(finished: Path, toy: Path) -> None:
    again = pretrain(toy, finished, "run.steps=12", "evaluate.every_steps=6")
    assert again.returncode == 0
    assert "is complete: 12 steps" in again.stdout


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_equals_never_having_stopped(toy: Path, tmp_path: Path, stage: int) -> None:
    """Stopped after 7 of 12 steps; the schedule is constant, so that the length of the run changes nothing else."""
    options = ("schedule.name=constant", f"engine.zero_stage={stage}", "data.workers=1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, steps in ((whole, 12), (parts, 7), (parts, 12)):
        done = pretrain(toy, folder, f"run.steps={steps}", *options)
        assert done.returncode == 0, done.stdout
    assert "resumed from step 7" in done.stdout
    assert metrics(whole, "loss") == metrics(parts, "loss")
    one, other = (checkpoint.full_weights(checkpoint.find(folder)) for folder in (whole, parts))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_an_altered_checkpoint_is_named_and_the_one_before_it_used(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert pretrain(toy, folder, "run.steps=6", "checkpoint.every_steps=3").returncode == 0
    newest = folder / "checkpoints/step_00000006/deepspeed/mp_rank_00_model_states.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    again = pretrain(toy, folder, "run.steps=8", "checkpoint.every_steps=3")
    assert again.returncode == 0, again.stdout
    assert "mp_rank_00_model_states.pt was altered" in again.stdout and "resumed from step 3" in again.stdout
    assert sorted(metrics(folder, "loss")) == list(range(1, 9)), "every step is logged once, the repeated ones too"


def test_a_changed_configuration_is_refused_by_name(finished: Path, toy: Path) -> None:
    refused = pretrain(toy, finished, "run.steps=20", "optim.lr=0.5")
    assert refused.returncode == 2
    assert "optim.lr was 0.003 and is 0.5 now" in refused.stdout
    assert refused.stdout.count("error") == 1, "said once for all ranks"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "did you mean 'lr'?"),
        ("batch.global_rows=18", "batch.global_rows to 16 or 24"),
        ("data.lanes=3", "lanes that work here"),
        ("engine.zero_stage=7", "zero_stage"),
        ("data.shards=no/such/folder", "no/such/folder"),
    ],
)
def test_bad_input_ends_with_one_sentence(toy: Path, tmp_path: Path, override: str, said: str) -> None:
    refused = pretrain(toy, tmp_path / "run", override)
    assert refused.returncode == 2, refused.stdout
    assert said in refused.stdout and "Traceback" not in refused.stdout
    assert not (tmp_path / "run/checkpoints").exists()


def test_other_shards_are_refused(finished: Path, toy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(toy, other)
    shutil.rmtree(other / "train")
    shutil.copytree(other / "valid", other / "train")
    refused = pretrain(other, finished, "run.steps=20")
    assert refused.returncode == 2 and "the manifest of data.shards is another" in refused.stdout


def test_a_run_folder_in_use_is_refused(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    holder = subprocess.Popen(["flock", str(folder / "lock"), "sleep", "120"])
    try:
        refused = pretrain(toy, folder, "run.steps=2")
    finally:
        holder.kill()
    assert refused.returncode == 2 and "is in use by another launch" in refused.stdout


def test_evaluate_agrees_with_training_and_export_loads(finished: Path, tmp_path: Path) -> None:
    evaluated = run("launch/evaluate.py", "--run", str(finished), "--json")
    assert evaluated.returncode == 0, evaluated.stdout
    numbers = json.loads(evaluated.stdout.splitlines()[-1])
    assert numbers["loss"] == pytest.approx(metrics(finished, "valid/loss")[12], abs=1e-5)

    exported = run("launch/export.py", "--run", str(finished), "--out", str(tmp_path / "hf"))
    assert exported.returncode == 0, exported.stdout
    filled = run("launch/fill_mask.py", "--model", str(tmp_path / "hf"), "the heart [MASK]", "--top", "3")
    assert filled.returncode == 0, filled.stdout
    assert len([line for line in filled.stdout.splitlines() if "%" in line or "0." in line]) >= 3


def test_dry_run_trains_nothing(toy: Path, tmp_path: Path) -> None:
    shown = run(
        "launch/pretrain.py", "--config", "configs/quickstart.yaml", "--dry-run", "--world-size", "2",
        f"data.shards={toy}", f"run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stdout
    for part in ("parameters", "FLOPs per token", "tokens per step", "stage 3:", '"train_micro_batch_size_per_gpu"'):
        assert part in shown.stdout
    assert not (tmp_path / "run").exists()


def test_help_names_the_keys() -> None:
    shown = run("launch/pretrain.py", "--help")
    assert shown.returncode == 0 and "optim.lr" in shown.stdout and "engine.zero_stage" in shown.stdout
    assert (ROOT / "launch/local.sh").exists()
