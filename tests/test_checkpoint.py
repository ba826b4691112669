"""What a checkpoint folder is worth, without training: verification, finding, keeping. Saving is in test_train.py."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from mlm_dist import checkpoint
from mlm_dist.checkpoint import CheckpointConfig, CheckpointError, State
from mlm_dist.manifest import sha256_of
from mlm_dist.schema import ConfigError


def make(folder: Path, step: int) -> Path:
    """A folder that looks like a checkpoint, with two files."""
    path = folder / checkpoint.step_name(step)
    (path / "deepspeed").mkdir(parents=True)
    files = {}
    for name in ("state.json", "deepspeed/weights.pt"):
        (path / name).write_text(f"{name} of step {step}")
        files[name] = {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
    (path / "manifest.json").write_text(json.dumps(checkpoint.sealed({"step": step, "files": files})))
    return path


def test_a_whole_checkpoint_has_no_faults(tmp_path: Path) -> None:
    assert checkpoint.verify(make(tmp_path, 5)) == []


def test_every_flipped_bit_is_named(tmp_path: Path) -> None:
    path = make(tmp_path, 5)
    for name in ("state.json", "deepspeed/weights.pt"):
        whole = (path / name).read_bytes()
        for bit in range(8 * len(whole)):
            altered = bytearray(whole)
            altered[bit // 8] ^= 1 << bit % 8
            (path / name).write_bytes(altered)
            assert checkpoint.verify(path) == [f"{name} was altered (its sha256 differs)"]
        (path / name).write_bytes(whole)


def test_every_flipped_bit_of_the_manifest_is_named(tmp_path: Path) -> None:
    file = make(tmp_path, 5) / "manifest.json"
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        altered = bytearray(whole)
        altered[bit // 8] ^= 1 << bit % 8
        file.write_bytes(altered)
        assert "manifest.json" in checkpoint.verify(file.parent)[0]


def test_missing_short_and_unlisted_files_are_named(tmp_path: Path) -> None:
    path = make(tmp_path, 5)
    (path / "state.json").write_text("short")
    (path / "deepspeed/weights.pt").unlink()
    assert checkpoint.verify(path) == ["deepspeed/weights.pt is missing", "state.json has 5 bytes, not 20"]
    (path / "manifest.json").unlink()
    assert checkpoint.verify(path) == ["manifest.json can't be read (FileNotFoundError)"]


def test_one_that_is_lost_while_it_is_read_is_told_in_one_sentence(tmp_path: Path) -> None:
    path = make(tmp_path, 5)
    with pytest.raises(ZeroDivisionError), checkpoint.while_it_stands(path):
        raise ZeroDivisionError  # no fault of the checkpoint's
    with pytest.raises(CheckpointError, match=r"step_00000005 was whole and is not any more.*weights.pt is missing"):
        with checkpoint.while_it_stands(path):
            (path / "deepspeed/weights.pt").unlink()
            (path / "deepspeed/weights.pt").read_text()


def test_ranks_share_the_verification(tmp_path: Path) -> None:
    path = make(tmp_path, 5)
    for name in ("state.json", "deepspeed/weights.pt"):
        (path / name).unlink()
    shares = [checkpoint.verify(path, rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [1, 1, 0]
    assert sorted(fault for share in shares for fault in share) == sorted(checkpoint.verify(path))


def test_find_takes_the_newest_whole_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (9, 10, 100):
        make(folder, step)
    (folder / "tmp-step_00000200").mkdir()
    assert checkpoint.find(tmp_path).name == "step_00000100"
    (folder / "step_00000100/state.json").unlink()
    assert checkpoint.find(tmp_path).name == "step_00000010"
    assert checkpoint.find(tmp_path, 9).name == "step_00000009"
    with pytest.raises(ConfigError, match=r"step_00000100: state.json is missing"):
        checkpoint.find(tmp_path, 100)
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        checkpoint.find(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (CheckpointConfig(keep_last=2, keep_best=False), [5, 6]),
        (CheckpointConfig(keep_last=1), [2, 6]),
        (CheckpointConfig(keep_last=1, keep_every_steps=3, keep_best=False), [3, 6]),
    ],
)
def test_what_no_rule_keeps_is_deleted(tmp_path: Path, config: CheckpointConfig, kept: list[int]) -> None:
    for step in range(1, 7):
        make(tmp_path, step)
    checkpoint.prune(tmp_path, config, State(step=6, best={"step": 2, "loss": 1.0}))
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.step_name(step) for step in kept]


def test_a_copy_that_a_user_keeps_beside_them_is_left_alone(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (tmp_path / checkpoint.step_name(1)).rename(tmp_path / "step_00000001_kept")
    for step in (2, 3):
        make(tmp_path, step)
    checkpoint.prune(tmp_path, CheckpointConfig(keep_last=1, keep_every_steps=3, keep_best=False), State(step=3))
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000001_kept", checkpoint.step_name(3)}
    assert checkpoint.newest_first(tmp_path) == [checkpoint.step_name(3)]


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_a_foreign_object_is_refused_and_not_run(tmp_path: Path) -> None:
    """As DeepSpeed loads: it asks torch.load for everything, and the environment of the engine overrules it."""
    torch.save({"module": Payload(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "weights.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    checkpoint.write_text(tmp_path / "latest", "step_1\n")
    checkpoint.write_text(tmp_path / "latest", "step_2\n")
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
    assert (tmp_path / "latest").read_text() == "step_2\n"
