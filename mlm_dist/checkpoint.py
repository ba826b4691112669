"""Checkpoints: whole or not there at all. Verified before a load; which are kept. saver.py writes them.

RUN/checkpoints/latest                        name of the newest complete one
RUN/checkpoints/step_00001000/manifest.json   every file with its size and sha256; written last
RUN/checkpoints/step_00001000/state.json      step, tokens, data cursor, config: all that a resume needs
RUN/checkpoints/step_00001000/deepspeed/      weights and optimizer, one file or more a rank
"""

import argparse
import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from mlm_dist.engine import Engine
from mlm_dist.manifest import replace_file, sha256_of
from mlm_dist.schema import ConfigError, setting
from mlm_dist.world import World

TAG = "deepspeed"
NAME = re.compile(r"step_\d{8,}")

# All that DeepSpeed's own files hold besides tensors and plain values; anything else is refused, unread.
torch.serialization.add_safe_globals([ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler])


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = setting(500, low=1, help="steps between two checkpoints; one more is saved at the end")
    keep_last: int = setting(2, low=1, help="how many of the newest to keep")
    keep_every_steps: int | None = setting(
        None, low=1, help="keep each checkpoint whose step is a multiple of this, for ever"
    )
    keep_best: bool = setting(True, help="of those that were saved, keep the one with the lowest held-out loss")
    background: bool = setting(
        True,
        help="write while training goes on, from a copy in host memory (up to 16 bytes a parameter, over all ranks)",
    )


@dataclass
class State:
    """Where a run stands between two steps; the same on every rank."""

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    cursor: dict[str, Any] | None = None
    total_steps: int | None = None
    train_seconds: float = 0.0
    valid_loss: float | None = None
    best: dict[str, float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class CheckpointError(RuntimeError):
    """A checkpoint is missing, half-written or altered."""


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with the sha256 of everything else in it."""
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    return said | {"sha256": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}


def newest_whole(folder: Path, world: World, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that every rank finds whole; None where there is none at all. All ranks call it.

    One that is not whole is named and set aside, as `bad-...`, so that the run can save that step again. Raises
    CheckpointError where there are checkpoints and none of them is whole.
    """
    names = world.broadcast(newest_first(folder))
    for name in names:
        faults = faults_of(folder / name, world)
        if not faults:
            return folder / name
        say(f"checkpoint {folder / name} is refused: {faults[0]}; it is kept as {set_aside(folder, name, world)}")
    if names:
        raise CheckpointError(f"no checkpoint of {folder} is whole; restore one, or start again in another run.dir")
    return None


def faults_of(saved: Path, world: World) -> list[str]:
    """What is wrong with a checkpoint, in words. All ranks call it: each checks its share, and learns of all."""
    return [fault for part in world.gather(verify(saved, world.rank, world.size)) for fault in part]


def set_aside(folder: Path, name: str, world: World) -> str:
    """Give a checkpoint a name that is not a checkpoint's."""
    number = 1
    while (folder / f"bad-{number}-{name}").exists():
        number += 1
    world.barrier()
    if world.is_main:
        os.rename(folder / name, folder / f"bad-{number}-{name}")
    world.barrier()
    return f"bad-{number}-{name}"


def load(saved: Path, engine: Engine, world: World, scratch: Path) -> None:
    """Put a whole checkpoint's weights and optimizer state into the engine. All ranks call it.

    One that another number of ranks saved goes through DeepSpeed's universal checkpoint, for which the engine must have
    been made (`needs_resharding`).
    scratch: the folder of checkpoints of the run that loads it, where a conversion has room
    Raises CheckpointError where it can't be read, or is deleted meanwhile.
    """
    if not needs_resharding(saved, world):
        with while_it_stands(saved), refusing_foreign_objects(saved), engine.own_optimizer_options():
            path, _ = engine.deepspeed.load_checkpoint(str(saved), tag=TAG)
            assert path is not None, "DeepSpeed found no checkpoint where one was verified"
        return
    folder = scratch / f"tmp-universal-{saved.name}"
    problem = None
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with while_it_stands(saved), refusing_foreign_objects(saved):
                make_universal(saved / TAG, folder / TAG)
        except CheckpointError as error:
            problem = str(error)
        except (OSError, RuntimeError) as error:
            problem = f"{saved} can't be turned into a checkpoint for {world.size} ranks: {error}"
    problem = world.broadcast(problem)
    if problem:
        raise CheckpointError(problem)
    with engine.own_optimizer_options():
        path, _ = engine.deepspeed.load_checkpoint(str(folder), tag=TAG)
    assert path is not None, "DeepSpeed found no checkpoint where one was made"
    world.barrier()
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)


def needs_resharding(saved: Path, world: World) -> bool:
    """Whether a checkpoint has another number of shards than there are ranks. At stage 0 nothing is sharded."""
    with while_it_stands(saved):
        manifest = json.loads((saved / "manifest.json").read_text())
    return manifest["zero_stage"] > 0 and manifest["world_size"] != world.size


def make_universal(source: Path, target: Path) -> None:
    """Turn the shards of one stage into whole tensors, one folder a parameter, that any number of ranks can load."""
    target.mkdir(parents=True)
    source = with_both_moments(source, target.parent / "shards")
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    arguments = argparse.Namespace(
        input_folder=str(source), output_folder=str(target), inject_missing_state=True, **options
    )
    # it reports its progress to both
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)


def with_both_moments(source: Path, target: Path) -> Path:
    """The shards in a folder, or copies of them in another where the optimizer has no second moments for some weights.

    DeepSpeed's converter asks for Adam's two (0.19.8); the copies have zeros, which `own_optimizer_options` drops.
    """
    for path in source.glob("*_optim_states.pt"):
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        states = saved["optimizer_state_dict"]
        states = states.get("optimizer_state_dict") or states["base_optimizer_state"]  # of stage 3, of 1 and 2
        incomplete = [state for state in states["state"].values() if "exp_avg_sq" not in state]
        if not incomplete:
            return source
        for state in incomplete:
            state["exp_avg_sq"] = torch.zeros(1).expand(state["exp_avg"].shape)  # one number in the file
        target.mkdir(exist_ok=True)
        torch.save(saved, target / path.name)
    for path in source.iterdir():
        if not (target / path.name).exists():
            (target / path.name).symlink_to(path.resolve())
    return target


def load_state(checkpoint: Path) -> State:
    """The state that a checkpoint holds."""
    return State(**json.loads((checkpoint / "state.json").read_text()))


def newest_first(folder: Path) -> list[str]:
    """Names of the complete checkpoints of a run, the newest first; a folder of another name is a user's own."""
    named = (path for path in folder.glob("step_*") if NAME.fullmatch(path.name))
    return sorted((path.name for path in named if path.is_dir()), reverse=True)


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def verify(checkpoint: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files, in words; empty when nothing is."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"manifest.json can't be read ({type(error).__name__})"]
    if sealed(manifest) != manifest:
        return ["manifest.json was altered (its own sha256 differs)"]
    faults = []
    for name in sorted(files)[rank::world_size]:
        try:
            faults += faults_of_file(checkpoint / name, name, files[name])
        except OSError as error:  # deleted a moment ago, say
            faults.append(f"{name} can't be read ({type(error).__name__})")
    return faults


def faults_of_file(path: Path, name: str, entry: dict[str, Any]) -> list[str]:
    if not path.is_file():
        return [f"{name} is missing"]
    if path.stat().st_size != entry["bytes"]:
        return [f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"]
    return [f"{name} was altered (its sha256 differs)"] if sha256_of(path) != entry["sha256"] else []


def prune(folder: Path, config: CheckpointConfig, state: State) -> None:
    """Delete the checkpoints that no rule keeps."""
    names = newest_first(folder)
    kept = set(names[: config.keep_last])
    if config.keep_every_steps:
        kept |= {name for name in names if int(name.removeprefix("step_")) % config.keep_every_steps == 0}
    if config.keep_best and state.best:
        kept.add(step_name(int(state.best["step"])))
    for name in set(names) - kept:
        # renamed first: a checkpoint that is half deleted must not look whole
        doomed = folder / f"tmp-{name}"
        os.rename(folder / name, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def find(run: Path, step: int | None = None) -> Path:
    """A whole checkpoint of a run: of the given step, else the newest. Raises ConfigError where there is none."""
    folder = run / "checkpoints"
    names = [name for name in newest_first(folder) if step is None or name == step_name(step)]
    faults = []
    for name in names:
        found = verify(folder / name)
        if not found:
            return folder / name
        faults.append(f"{name}: {found[0]}")
    which = "" if step is None else f" of step {step}"
    detail = f" ({'; '.join(faults)})" if faults else ""
    there = ", ".join(str(int(name.removeprefix("step_"))) for name in newest_first(folder))
    advice = f"there are those of steps {there}" if there else "give the folder of a run that has saved one"
    raise ConfigError(f"{folder} holds no whole checkpoint{which}{detail}; {advice}")


def full_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All weights in fp32 on the host, whatever the stage and the number of ranks that saved them. Needs no GPU."""
    folder = checkpoint / TAG
    with refusing_foreign_objects(checkpoint):
        stage = json.loads((checkpoint / "manifest.json").read_text())["zero_stage"]
        if stage == 3:
            return masters(checkpoint)
        saved = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", mmap=True, weights_only=True)
        weights = {} if stage == 0 else masters(checkpoint, saved)
        # those that aren't trained, and all at stage 0, are nowhere else
        return weights | in_fp32({name: value for name, value in saved["module"].items() if name not in weights})


def masters(checkpoint: Path, saved: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """The weights in fp32 that the ranks' optimizers hold a share of each; saved: as `weights_in_slices` has it."""
    shards = sorted((checkpoint / TAG).glob("bf16_zero_pp_rank_*_optim_states.pt"), key=rank_of)
    if saved is not None and shards and not has_zero_stage(shards[0]):
        return weights_in_slices(saved, shards)
    # it reports its progress to both
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG))


def in_fp32(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def rank_of(shard: Path) -> int:
    """The rank whose optimizer state a file holds."""
    return int(shard.name.partition("_rank_")[2].partition("_")[0])


def has_zero_stage(shard: Path) -> bool:
    """Whether DeepSpeed's own reader knows what a file is.

    Of what bf16 saves at stage 1 it says "not a zero checkpoint", since BF16_Optimizer.state_dict() leaves `zero_stage`
    out (0.19.8).
    """
    return "zero_stage" in torch.load(shard, map_location="cpu", mmap=True, weights_only=True)["optimizer_state_dict"]


def weights_in_slices(saved: dict[str, Any], shards: list[Path]) -> dict[str, torch.Tensor]:
    """The trained weights in fp32, put together from the ranks' slices of the master weights, by the slices' names.

    saved: what DeepSpeed keeps of the model itself
    """
    slices: dict[str, list[torch.Tensor]] = {}
    for shard in shards:
        state = torch.load(shard, map_location="cpu", mmap=True, weights_only=True)["optimizer_state_dict"]
        groups = zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True)
        for flat, places in groups:
            for name, place in places.items():
                slices.setdefault(name, []).append(flat.narrow(0, place.start, place.numel))
    shapes = {name: shape for group in saved["param_shapes"] for name, shape in group.items()}
    weights = {name: torch.cat(slices[name]).view(shape) for name, shape in shapes.items()}
    return weights | {name: weights[other] for name, other in saved["shared_params"].items() if other in weights}


@contextmanager
def while_it_stands(checkpoint: Path) -> Iterator[None]:
    """Turn whatever comes of reading a checkpoint that is whole no more into one sentence.

    One of another run (`run.from`) may be pruned by that run, or deleted by hand, after it was verified.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        faults = verify(checkpoint)
        if not faults:
            raise
        raise CheckpointError(
            f"{checkpoint} was whole and is not any more, deleted perhaps while it was read ({faults[0]}); "
            "start again from one that stays: checkpoint.keep_every_steps of its run keeps some"
        ) from error


@contextmanager
def refusing_foreign_objects(checkpoint: Path) -> Iterator[None]:
    """Turn torch's refusal to unpickle what is not on its list, of a file whose hash is right, into one sentence."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{checkpoint} holds more than weights and plain values, and is not read: who has made it could run code"
        ) from error


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader sees the old text or the new."""
    replace_file(path, text.encode())
