"""Checkpoints that are written beside training: they hold the step of the save, and failures end all ranks."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from launching import ROOT, metrics, overridden, pretrain, start_pretrain, wait_for
from ranks import on_ranks

from mlm_dist import checkpoint, config, saver, train, world
from mlm_dist.world import StopFlag

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)


def beside_and_in_turn(toy: Path, folder: Path) -> list[int]:
    """On this rank, at each stage: the same run with saves that are written steps later, and with saves that aren't.

    Returns the step that training stood at whenever a file was begun in the background.
    """
    write, writing_at = saver.write_files, []
    with world.join(120) as here, StopFlag() as stop:
        for stage in STAGES:
            for background in ("true", "false"):
                path = folder / f"{background}{stage}"
                overrides = overridden(
                    toy, path, "run.steps=12", "checkpoint.every_steps=5", "checkpoint.keep_last=9",
                    f"engine.zero_stage={stage}", f"checkpoint.background={background}", "evaluate.max_rows=1",
                )  # fmt: skip

                def write_later(staging: Path, *args: object, log: Path = path / "metrics.jsonl") -> dict:
                    time.sleep(0.15)
                    writing_at.append(len(log.read_text().splitlines()))
                    return write(staging, *args)

                saver.write_files = write_later if background == "true" else write
                assert train.train_on(config.load(ROOT / "configs/quickstart.yaml", overrides), here, stop) == 0
    return writing_at


def contents(item: object, path: str = "") -> dict[str, object]:
    """Everything in a file of a checkpoint, by its place in it; objects as what they are made of."""
    if isinstance(item, dict):
        return {key: value for name in item for key, value in contents(item[name], f"{path}.{name}").items()}
    if isinstance(item, list | tuple):
        return {key: value for n, part in enumerate(item) for key, value in contents(part, f"{path}[{n}]").items()}
    if hasattr(item, "__dict__") and not isinstance(item, torch.Tensor):
        return contents(vars(item), f"{path}:{type(item).__name__}")
    return {path: item}


def test_weights_saved_beside_training_are_those_of_the_step_of_the_save(toy: Path, tmp_path: Path) -> None:
    writing_at, _ = on_ranks(2, beside_and_in_turn, toy, tmp_path)
    assert len(writing_at) == 3 * len(STAGES) and any(step >= 7 for step in writing_at[::3]), "training went on"
    for stage in STAGES:
        for step in (5, 10, 12):
            beside, in_turn = (
                checkpoint.find(tmp_path / f"{background}{stage}", step) for background in ("true", "false")
            )
            names = {path.relative_to(beside) for path in beside.rglob("*.pt")}
            assert names == {path.relative_to(in_turn) for path in in_turn.rglob("*.pt")} and names
            for name in names:
                one, other = (contents(torch.load(folder / name, weights_only=False)) for folder in (beside, in_turn))
                assert one.keys() == other.keys()
                assert all(
                    torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
                    for key, value in one.items()
                ), (stage, step, name)
                assert abs((beside / name).stat().st_size - (in_turn / name).stat().st_size) < 1000, name
            assert len(list(beside.rglob("*"))) == len(list(in_turn.rglob("*")))
        assert metrics(tmp_path / f"true{stage}", "loss") == metrics(tmp_path / f"false{stage}", "loss")
        assert not list((tmp_path / f"true{stage}/checkpoints").glob("tmp-*"))
        numbers = metrics(tmp_path / f"true{stage}", "checkpoint/stall_seconds")
        assert sorted(numbers) == [5, 10, 12] and all(0 < seconds for seconds in numbers.values())
        # the first save waits for none
        assert numbers[5] < 0.15 < metrics(tmp_path / f"true{stage}", "checkpoint/seconds")[5]


SLOW = ("model.kind=factory", "model.factory=tests.faulty:slow_disk")


def test_a_save_that_comes_due_too_early_waits_and_says_so_once(toy: Path, tmp_path: Path) -> None:
    done = pretrain(
        toy, tmp_path, *SLOW, "model.options.seconds=1.0", "run.steps=8", "checkpoint.every_steps=2",
        "checkpoint.keep_last=9",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("had to wait") == 1 and "the save of step 4 had to wait" in done.stdout
    folder = tmp_path / "checkpoints"
    assert [name for name in checkpoint.newest_first(folder) if not checkpoint.verify(folder / name)] == [
        checkpoint.step_name(step) for step in (8, 6, 4, 2)
    ]
    assert (folder / "latest").read_text() == "step_00000008\n"
    assert sum(metrics(tmp_path, "checkpoint/stall_seconds").values()) > 2, "the waiting is part of the stall"


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_write_that_fails_on_one_rank_ends_all_and_the_checkpoint_before_it_stands(
    toy: Path, tmp_path: Path, background: str
) -> None:
    ended = pretrain(
        toy, tmp_path, "model.kind=factory", "model.factory=tests.faulty:full_disk", "model.options.first=8",
        "run.steps=1000", "checkpoint.every_steps=3", f"checkpoint.background={background}",
    )  # fmt: skip
    assert ended.returncode == 2, ended.stdout
    assert "step_00000006 was not saved, those before it stand" in ended.stdout and "Traceback" not in ended.stdout
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("failed", 2)
    assert checkpoint.find(tmp_path).name == checkpoint.step_name(3)
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000003\n"


def test_a_signal_while_a_checkpoint_is_written_leaves_that_one_and_its_own(toy: Path, tmp_path: Path) -> None:
    options = (*SLOW, "model.options.seconds=1.5", "checkpoint.every_steps=5", "checkpoint.keep_last=9", "run.steps=40")
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    launcher = start_pretrain(toy, stopped, *options, "checkpoint.background=true")
    wait_for(lambda: any((stopped / "checkpoints").glob("tmp-*-step_00000005")), launcher)
    os.killpg(launcher.pid, signal.SIGTERM)
    said, _ = launcher.communicate(timeout=120)
    status = json.loads((stopped / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("stopped", 85), said
    names = checkpoint.newest_first(stopped / "checkpoints")
    assert names == [checkpoint.step_name(step) for step in sorted({status["step"], 5}, reverse=True)]
    assert not any(fault for name in names for fault in checkpoint.verify(stopped / "checkpoints" / name))
    for folder in (stopped, whole):
        assert pretrain(toy, folder, *options, "checkpoint.every_steps=1000").returncode == 0
    assert metrics(stopped, "loss") == metrics(whole, "loss")
    one, other = (checkpoint.full_weights(checkpoint.find(folder)) for folder in (stopped, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)
