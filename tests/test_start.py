"""Runs that start from a checkpoint of another run: cooled down, or as phases; beside runs that never were cut."""

import shutil
from pathlib import Path

import pytest
import torch
from comparing import check_the_same, interrupted, train_here
from launching import metrics, pretrain
from ranks import on_ranks

from mlm_dist import checkpoint, world
from mlm_dist.checkpoint import State
from mlm_dist.manifest import sha256_of
from mlm_dist.world import StopFlag

pytestmark = pytest.mark.slow

BRANCH, STEPS = 5, 12
KEPT = ("checkpoint.every_steps=5", "checkpoint.keep_last=9")
COOLED = (*KEPT, f"run.steps={STEPS}", f"schedule.decay_steps={STEPS - BRANCH}")
# whose decay begins behind the branch point
STABLE = (*KEPT, "run.steps=8", "schedule.decay_steps=1")


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file with its hash and the time of its last change."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (sha256_of(path), path.stat().st_mtime_ns) for path in files}


def the_state(folder: Path) -> State:
    return checkpoint.load_state(checkpoint.find(folder))


# ---- a cooldown


def cool_down(toy: Path, folder: Path) -> list[bool]:
    """At each stage: one run, and one that is branched off another, in one go and in parts. Whether the other is as it
    was before, at each stage."""
    untouched = []
    with world.join(120) as here, StopFlag() as stop:
        for stage in (0, 1, 2, 3):
            zero, at = f"engine.zero_stage={stage}", folder / str(stage)
            train_here(here, stop, toy, at / "whole", *COOLED, zero)
            train_here(here, stop, toy, at / "stable", *STABLE, zero)
            before = contents(at / "stable")
            come_from = f"run.from={at / 'stable/checkpoints' / checkpoint.step_name(BRANCH)}"
            train_here(here, stop, toy, at / "cooled", *COOLED, zero, come_from)
            untouched.append(contents(at / "stable") == before)
            interrupted(here, at / "cooled", at / "early", BRANCH)
            train_here(here, stop, toy, at / "early", *COOLED, zero, come_from)
            interrupted(here, at / "cooled", at / "late", 2 * BRANCH)
            if here.is_main:
                (at / "stable").rename(at / "moved")
            here.barrier()
            train_here(here, stop, toy, at / "late", *COOLED, zero, come_from)
    return untouched


@pytest.fixture(scope="module")
def cooled(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cooled")
    assert on_ranks(2, cool_down, toy, folder) == [[True] * 4] * 2, "the run that was branched off was changed"
    return folder


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_a_cooldown_is_the_end_of_a_run_with_that_schedule(cooled: Path, stage: int) -> None:
    check_the_same(cooled / f"{stage}/whole", cooled / f"{stage}/cooled", BRANCH + 1, STEPS)
    assert list(metrics(cooled / f"{stage}/cooled", "loss")) == list(range(BRANCH + 1, STEPS + 1))
    rates = metrics(cooled / f"{stage}/cooled", "lr")
    assert rates[BRANCH + 1] == max(rates.values()) > rates[STEPS]


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
@pytest.mark.parametrize("name", ("early", "late"))
def test_a_cooldown_that_is_killed_goes_on(cooled: Path, stage: int, name: str) -> None:
    """Before its first checkpoint, at the branch point again; after it, without the run that it comes from."""
    check_the_same(cooled / f"{stage}/cooled", cooled / f"{stage}/{name}", BRANCH + 1, STEPS)
    lines = (cooled / f"{stage}/{name}/metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if '"loss"' in line]) == STEPS - BRANCH, "each step once"


def test_a_checkpoint_tells_where_its_run_came_from(cooled: Path) -> None:
    for name in ("cooled", "early", "late"):
        came = the_state(cooled / f"1/{name}").facts["from"]
        assert (came["run"], came["step"], came["is_phase"], came["from"]) == ("stable", BRANCH, False, None)


# ---- phases

FIRST = (*KEPT, "run.steps=8", "engine.zero_stage=0")
LONGER = ("batch.seq_len=64", "batch.global_rows=8", "model.encoder.rope_theta=1e6", "optim.weight_decay=0.5")


def in_phases(toy: Path, folder: Path) -> None:
    with world.join(120) as here, StopFlag() as stop:
        train_here(here, stop, toy, folder / "first", *FIRST)
        overrides = {
            "longer": LONGER,
            "larger": ("batch.global_rows=32",),
            "other order": ("run.seed=7", "run.steps=5"),
        }
        for name, more in overrides.items():
            phase = (*FIRST, f"run.from={folder / 'first'}", f"run.steps={STEPS}", *more)
            train_here(here, stop, toy, folder / name, *phase)
            interrupted(here, folder / name, folder / f"{name}, parts", BRANCH)
            train_here(here, stop, toy, folder / f"{name}, parts", *phase)
        third = (*FIRST, *LONGER, f"run.from={folder / 'longer'}", "run.steps=4", "batch.seq_len=32")
        train_here(here, stop, toy, folder / "third", *third)


@pytest.fixture(scope="module")
def phases(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phases")
    on_ranks(2, in_phases, toy, folder)
    return folder


@pytest.mark.parametrize("name", ("longer", "larger"))
def test_a_phase_that_is_killed_goes_on_exactly(phases: Path, name: str) -> None:
    check_the_same(phases / name, phases / f"{name}, parts", 1, STEPS)


def test_a_phase_takes_over_weights_and_optimizer(phases: Path) -> None:
    losses, first = metrics(phases / "longer", "loss"), metrics(phases / "first", "loss")
    assert abs(losses[1] - first[8]) < abs(losses[1] - first[1]) / 2
    saved = checkpoint.find(phases / "longer") / "deepspeed/mp_rank_00_model_states.pt"
    optimizer = torch.load(saved, weights_only=True)["optimizer"]
    assert {int(state["step"]) for state in optimizer["state"].values()} == {8 + STEPS}
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.5, 0.0], "as this run states it"


def test_a_phase_counts_from_0_and_reads_other_rows_from_their_beginning(phases: Path) -> None:
    end = metrics(phases / "first", "epoch")[8]
    assert metrics(phases / "longer", "epoch")[1] < end and metrics(phases / "other order", "epoch")[1] < end
    assert metrics(phases / "larger", "epoch")[1] > end, "the same rows in larger batches go on"
    assert the_state(phases / "larger").step == STEPS and the_state(phases / "other order").step == 5
    warm = metrics(phases / "longer", "lr")
    assert warm[1] < warm[2] < warm[3], "it has its own warm-up"


def test_a_third_phase_tells_of_both_before_it(phases: Path) -> None:
    came = the_state(phases / "third").facts["from"]
    assert (came["run"], came["step"], came["is_phase"]) == ("longer", STEPS, True)
    assert (came["from"]["run"], came["from"]["step"], came["from"]["from"]) == ("first", 8, None)


# ---- another number of ranks


def branch_off(toy: Path, folder: Path) -> bool:
    with world.join(120) as here, StopFlag() as stop:
        before = contents(folder / "moved")
        train_here(here, stop, toy, folder / "alone", *COOLED, f"run.from={folder / 'moved/checkpoints/step_00000005'}")
        return contents(folder / "moved") == before


def test_another_number_of_ranks_starts_from_it_and_leaves_it_as_it_is(cooled: Path, toy: Path) -> None:
    assert on_ranks(1, branch_off, toy, cooled / "1") == [True]
    assert metrics(cooled / "1/alone", "tokens")[STEPS] == metrics(cooled / "1/whole", "tokens")[STEPS]


# ---- what is refused


@pytest.mark.parametrize(
    ("source", "overrides", "said"),
    [
        ("nowhere", (), "nowhere is not there; give the folder of a run, or of one of its checkpoints"),
        ("1", (), "manifest.json can't be read"),
        ("1/moved/checkpoints/step_00000005", ("run.steps=5",), "stands at step 5, and this run would end at step 5"),
        ("1/moved", ("model.encoder.layers=3",), "model.encoder.layers was 2 and is 3 now"),
        (
            "1/moved",
            ("engine.zero_stage=2", "optim.lr=1"),
            "can't be gone on from: engine.zero_stage was 1 and is 2 now",
        ),
    ],
)
def test_what_cannot_be_started_from_is_refused(
    cooled: Path, toy: Path, tmp_path: Path, source: str, overrides: tuple[str, ...], said: str
) -> None:
    refused = pretrain(toy, tmp_path / "run", f"run.from={cooled / source}", *overrides)
    assert refused.returncode == 2 and said in refused.stdout and "Traceback" not in refused.stdout, refused.stdout
    assert refused.stdout.count(said) == 1, "said once for all ranks"
    assert not (tmp_path / "run/checkpoints").exists()


def test_an_altered_checkpoint_is_refused_by_name_and_stays_where_it_is(
    cooled: Path, toy: Path, tmp_path: Path
) -> None:
    run = tmp_path / "parent"
    (run / "checkpoints").mkdir(parents=True)
    said = pretrain(toy, tmp_path / "run", f"run.from={run}")
    assert said.returncode == 2 and f"run.from = {run} holds no complete checkpoint" in said.stdout, said.stdout
    for step in (5, 8):
        shutil.copytree(cooled / f"1/moved/checkpoints/step_0000000{step}", run / f"checkpoints/step_0000000{step}")
    state = run / "checkpoints/step_00000008/state.json"
    state.write_text(state.read_text().replace('"step": 8', '"step": 7'))
    before = contents(run)
    refused = pretrain(toy, tmp_path / "run", f"run.from={run / 'checkpoints/step_00000008'}", *COOLED)
    assert refused.returncode == 2 and "state.json was altered" in refused.stdout, refused.stdout
    done = pretrain(toy, tmp_path / "run", f"run.from={run}", *COOLED)
    assert done.returncode == 0 and "step_00000008 is refused: state.json was altered" in done.stdout, done.stdout
    assert f"goes on from step 5 of {run}" in done.stdout and contents(run) == before
