"""Checkpoints under fire: ranks killed in each phase of a save, every file altered, a file that is no weights."""

import contextlib
import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from launching import ROOT, metrics, overridden, run
from ranks import on_ranks

from mlm_dist import checkpoint, config, engine, saver, train, world
from mlm_dist.manifest import sha256_of
from mlm_dist.world import StopFlag

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)
STEPS, SAVED_EVERY, KILLED_AT = 8, 2, 6


def train_to_the_end(toy: Path, folders: dict[str, int]) -> None:
    """On this rank: a run in each folder, at its ZeRO stage, from where it stands."""
    with world.join(60) as here, StopFlag() as stop:
        for folder, stage in folders.items():
            overrides = overridden(
                toy, Path(folder), f"run.steps={STEPS}", f"checkpoint.every_steps={SAVED_EVERY}",
                f"engine.zero_stage={stage}", "checkpoint.keep_last=9", "evaluate.max_rows=1",
            )  # fmt: skip
            assert train.train_on(config.load(ROOT / "configs/quickstart.yaml", overrides), here, stop) == 0


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---- killed in each phase: where the save doesn't come to its end, and on which rank


def before_anything(rank: int) -> None:
    saver.check_space = die


def while_it_is_copied(rank: int) -> None:
    """Rank 1 has copied its weights, if it holds any, and not its optimizer."""
    if rank == 1:
        copy = engine.copy_to_host
        engine.copy_to_host = lambda item: die() if "optimizer_state_dict" in item else copy(item)
        engine.CheckpointFiles.write = die  # at stage 0 it holds nothing


def half_way_in_a_file(rank: int) -> None:
    """Rank 0 is, after a step more or two."""

    def write_half(path: Path, content: object) -> None:
        whole = io.BytesIO()
        torch.save(content, whole)
        path.write_bytes(whole.getvalue()[: whole.tell() // 2])
        time.sleep(0.1)
        die()

    if rank == 0:
        engine.CheckpointFiles.write = lambda files: write_half(files.paths[0], files.copies[0][0])


def between_the_ranks_files(rank: int) -> None:
    """Rank 0 has written its files, and rank 1 has not."""
    write = saver.write_files

    def wait_for_rank_0(staging: Path, *_: object) -> None:
        while not (staging / "state.json").exists():
            time.sleep(0.01)
        die()

    saver.write_files = wait_for_rank_0 if rank == 1 else write


def before_the_manifest(rank: int) -> None:
    if rank == 0:
        saver.commit = die


def before_it_has_its_name(rank: int) -> None:
    if rank == 0:
        saver.os.rename = die


def before_latest(rank: int) -> None:
    write = checkpoint.write_text
    checkpoint.write_text = lambda path, text: die() if path.name == "latest" else write(path, text)


PHASES = (
    before_anything, while_it_is_copied, half_way_in_a_file, between_the_ranks_files, before_the_manifest,
    before_it_has_its_name, before_latest,
)  # fmt: skip


def killed_in_a_save(toy: Path, folder: str, stage: int, phase: str) -> None:
    save = saver.Saver.save

    def watched(self: saver.Saver, state: checkpoint.State) -> None:
        if state.step == KILLED_AT:
            self.wait()  # the one before is not what is killed
            globals()[phase](int(os.environ["RANK"]))
        save(self, state)

    saver.Saver.save = watched
    train_to_the_end(toy, {folder: stage})


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_any_phase_of_a_save_a_run_ends_as_if_it_had_not_been(toy: Path, tmp_path: Path, stage: int) -> None:
    folders = {phase.__name__: tmp_path / phase.__name__ for phase in PHASES}
    for phase, folder in folders.items():
        with contextlib.suppress(Exception):  # however the ranks that were not killed end
            on_ranks(2, killed_in_a_save, toy, str(folder), stage, phase)
        found = checkpoint.find(folder)
        assert found.name == checkpoint.step_name(6 if phase == "before_latest" else 4), phase
    whole = tmp_path / "whole"
    on_ranks(2, train_to_the_end, toy, {str(folder): stage for folder in [whole, *folders.values()]})
    expected = checkpoint.full_weights(checkpoint.find(whole))
    for phase, folder in folders.items():
        got = checkpoint.full_weights(checkpoint.find(folder))
        assert all(torch.equal(got[name], expected[name]) for name in expected), phase
        assert metrics(folder, "loss") == metrics(whole, "loss"), phase
        assert (folder / "checkpoints/latest").read_text().strip() == checkpoint.step_name(STEPS)


# ---- altered


@pytest.fixture(scope="module")
def saved(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run of each stage, by two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    on_ranks(2, train_to_the_end, toy, {str(folder / str(stage)): stage for stage in STAGES})
    return {stage: folder / str(stage) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_a_bit_flipped_in_any_file_is_named_and_the_checkpoint_before_is_used(
    saved: dict[int, Path], stage: int
) -> None:
    newest = checkpoint.find(saved[stage])
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) >= (3 if stage == 0 else 5)
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
        faults = checkpoint.verify(newest)
        assert faults and file.name in " ".join(faults), file
        assert checkpoint.find(saved[stage]).name == checkpoint.step_name(STEPS - SAVED_EVERY)
        file.write_bytes(whole)
    assert checkpoint.verify(newest) == []


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_with_a_payload_is_refused_though_its_hash_is_right(
    toy: Path, saved: dict[int, Path], tmp_path: Path, stage: int
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved[stage], folder)
    for found in (folder / "checkpoints").glob("step_*"):
        for file in (found / "deepspeed").iterdir():
            torch.save(torch.load(file, weights_only=False) | {"more": Payload(tmp_path / "ran")}, file)
            manifest = json.loads((found / "manifest.json").read_text())
            entry = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
            manifest["files"][f"deepspeed/{file.name}"] = entry
            (found / "manifest.json").write_text(json.dumps(checkpoint.sealed(manifest)))
    exported = run("launch/export.py", "--run", str(folder), "--out", str(tmp_path / "out"))
    assert exported.returncode == 2 and "Traceback" not in exported.stdout, exported.stdout
    assert "holds more than weights and plain values" in exported.stdout
    with pytest.raises(Exception, match="holds more than weights and plain values"):
        on_ranks(2, train_to_the_end, toy, {str(folder): stage})
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
