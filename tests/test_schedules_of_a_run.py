"""Runs that are interrupted in the middle of a schedule, beside the same runs that never were: bit for bit."""

from pathlib import Path

import pytest
from comparing import check_the_same, interrupted, train_here
from launching import metrics
from ranks import on_ranks

from mlm_dist import world
from mlm_dist.world import StopFlag

pytestmark = pytest.mark.slow

STEPS, STOP = 12, 5
KEPT = (f"run.steps={STEPS}", f"checkpoint.every_steps={STOP}", "checkpoint.keep_last=9")
GROWING = ("batch.warmup_rows=4", f"batch.warmup_tokens={40 * 32}", "batch.micro_rows=2")
SCHEDULES = {
    "sqrt": ("schedule.name=wsd", "schedule.decay_steps=9"),
    "linear decay": ("schedule.name=wsd", "schedule.decay_steps=9", "schedule.decay_shape=linear"),
    "fraction": ("schedule.name=wsd", "schedule.decay_fraction=0.8"),
    "cosine": ("schedule.name=cosine",),
    "linear": ("schedule.name=linear", "schedule.final=0.1"),
    "constant": ("schedule.name=constant",),
    "warm-up": ("schedule.warmup_steps=9",),
    "batch": GROWING,
    "mask rate": ("masking.rate=0.4", "masking.rate_end=0.1", "masking.rate_plateaus=5"),
}


# ---- each schedule


def go_on_in_each(toy: Path, folder: Path) -> None:
    with world.join(120) as here, StopFlag() as stop:
        for name, overrides in SCHEDULES.items():
            train_here(here, stop, toy, folder / name, *KEPT, *overrides)
            interrupted(here, folder / name, folder / f"{name}, parts", STOP)
            train_here(here, stop, toy, folder / f"{name}, parts", *KEPT, *overrides)


@pytest.fixture(scope="module")
def runs(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    on_ranks(2, go_on_in_each, toy, folder)
    return folder


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_goes_on_in_the_middle_of_its_schedule(runs: Path, name: str) -> None:
    check_the_same(runs / name, runs / f"{name}, parts", 1, STEPS)


def test_the_schedules_are_not_the_same(runs: Path) -> None:
    """What the comparison above rests on: each has changed something by the step at which it is interrupted."""
    logged = dict.fromkeys(SCHEDULES, "lr") | {"batch": "global_rows", "mask rate": "mask_rate"}
    for name, metric in logged.items():
        values = metrics(runs / name, metric)
        around = [values[step] for step in (STOP - 1, STOP, STOP + 1)]
        moves = max(around) > 1.02 * min(around)
        assert moves == (name != "constant"), (name, around)


# ---- a batch that grows


def on_one_rank(toy: Path, folder: Path) -> None:
    with world.join(120) as here, StopFlag() as stop:
        train_here(here, stop, toy, folder, *KEPT, *GROWING, "masking.seed_by=sample")


def test_a_batch_grows_in_the_same_way_on_any_number_of_ranks(runs: Path, toy: Path, tmp_path: Path) -> None:
    on_ranks(1, on_one_rank, toy, tmp_path)
    rows = metrics(tmp_path, "global_rows")
    assert sorted(set(rows.values())) == [4, 8, 16] and rows == metrics(runs / "batch", "global_rows")
    assert metrics(tmp_path, "tokens") == metrics(runs / "batch", "tokens"), "the same rows at every step"
