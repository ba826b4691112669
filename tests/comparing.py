"""Runs on ranks that are there already: trained, interrupted, and compared bit for bit."""

import shutil
from pathlib import Path

import torch
from launching import ROOT, metrics, overridden

from mlm_dist import checkpoint, config, train
from mlm_dist.world import StopFlag, World

# what of a run may not depend on an interruption
LOGGED = ("loss", "lr", "grad_norm", "global_rows", "mask_rate", "tokens", "epoch")


def train_here(here: World, stop: StopFlag, toy: Path, folder: Path, *overrides: str) -> None:
    """Train the tiny model in `folder`, or go on there, to the end. All ranks call it."""
    cfg = config.load(ROOT / "configs/quickstart.yaml", overridden(toy, folder, *overrides))
    assert train.train_on(cfg, here, stop) == 0


def interrupted(here: World, whole: Path, parts: Path, step: int) -> None:
    """Leave in `parts` what a run would that was killed after the checkpoint of a step, and had logged on."""
    if here.is_main:
        shutil.copytree(whole, parts, ignore=lambda _, names: [name for name in names if later(name, step)])
    here.barrier()


def later(name: str, step: int) -> bool:
    return name.startswith("step_") and int(name.removeprefix("step_")) > step


def check_the_same(one: Path, other: Path, first: int, last: int) -> None:
    """That in these steps both logged the same, the last of them being their end, with the same weights."""
    for name in LOGGED:
        expected = {step: value for step, value in metrics(one, name).items() if step >= first}
        assert {step: value for step, value in metrics(other, name).items() if step >= first} == expected, name
        assert list(expected) == list(range(first, last + 1))
    weights, others = (checkpoint.full_weights(checkpoint.find(folder)) for folder in (one, other))
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
