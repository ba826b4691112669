"""What a run starts from. Cooled down or in phases, killed or not, it is as a run that was never cut: bit for bit."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import check_the_same, interrupted, train_here
from launching import ROOT, metrics, plain, pretrain
from ranks import on_ranks

from mlm_dist import assembly, checkpoint, config, schema, start, vocab, world
from mlm_dist.checkpoint import State
from mlm_dist.manifest import sha256_of
from mlm_dist.schema import ConfigError
from mlm_dist.world import StopFlag

slow = pytest.mark.slow

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


# ---- what a checkpoint of another run is to this one


def facts_of(*overrides: str, **more: Any) -> dict[str, Any]:
    cfg = config.load(ROOT / "configs/quickstart.yaml", plain(*overrides))
    return {
        "config": schema.to_mapping(cfg),
        "manifest": "m",
        "tokenizer": "t",
        "precision": "fp32",
        "zero_stage": 0,
        "from": None,
    } | more


def branch(folder: Path, *overrides: str, saved: dict[str, Any] | None = None, **more: Any) -> start.Start:
    """At step 400 of a run of 600 steps of the quickstart's configuration."""
    run = folder / "stable/checkpoints/step_00000400"
    run.mkdir(parents=True, exist_ok=True)
    cursor = {"rows": 6400, "lanes": [[1, 2, 3]], "bad_shards": {}}
    stood = State(400, 9000, 1, cursor, 600, 70.0, 2.5, {"step": 300, "loss": 2.4}, saved or facts_of("run.steps=600"))
    (run / "state.json").write_text(json.dumps(asdict(stood)))
    given = ("run.dir=cooled", f"run.from={folder / 'stable'}", *overrides)
    return start.branched(config.load(ROOT / "configs/quickstart.yaml", plain(*given)), run, facts_of(*given, **more))


def test_with_the_same_rows_and_batches_a_run_goes_on(tmp_path: Path) -> None:
    lengths = ("run.steps=500", "schedule.decay_steps=100", "masking.rate=0.15", "optim.lr=1e-3", "batch.micro_rows=4")
    begun = branch(tmp_path, *lengths)
    state = begun.state
    assert (state.step, state.tokens, state.skipped_steps, state.total_steps) == (400, 9000, 1, 500)
    assert state.cursor == {"rows": 6400, "lanes": [[1, 2, 3]], "bad_shards": {}} and state.train_seconds == 70.0
    assert state.best is None and state.valid_loss is None, "they are no checkpoints of this run"
    assert not begun.own and begun.told.startswith("goes on from step 400 of ")


@pytest.mark.parametrize(
    ("override", "rows_go_on"),
    [
        ("batch.global_rows=32", True),
        ("batch.seq_len=64", False),
        ("run.seed=3", False),
        ("data.lanes=2", False),
        ("data.packing=pad", False),
        ("data.window_records=8", False),
    ],
)
def test_with_others_it_is_a_phase(tmp_path: Path, override: str, rows_go_on: bool) -> None:
    begun = branch(tmp_path, override, "run.steps=300")
    assert (begun.state.step, begun.state.tokens, begun.state.total_steps) == (0, 0, 300)
    assert (begun.state.cursor is not None) == rows_go_on
    assert override.partition("=")[0] in begun.told and begun.told.startswith("a phase of its own, from step 0")


def test_other_shards_make_a_phase_and_another_tokenizer_is_refused(tmp_path: Path) -> None:
    begun = branch(tmp_path, manifest="another")
    assert begun.state.step == 0 and begun.state.cursor is None
    assert "the manifest of data.shards is another" in begun.told
    with pytest.raises(ConfigError, match="the tokenizer of the data is another"):
        branch(tmp_path, tokenizer="another")
    with pytest.raises(ConfigError, match=r"engine\.precision came to fp32 and comes to bf16 now"):
        branch(tmp_path, precision="bf16")
    with pytest.raises(ConfigError, match=r"engine\.zero_stage came to 0 and comes to 1 now"):
        branch(tmp_path, zero_stage=1)
    older = {name: fact for name, fact in facts_of("run.steps=600").items() if name != "zero_stage"}
    assert branch(tmp_path, saved=older).state.step == 400


def test_a_run_that_would_be_over_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stands at step 400, and this run would end at step 400"):
        branch(tmp_path, "run.steps=400")
    assert branch(tmp_path, "run.steps=400", "batch.seq_len=64").state.total_steps == 400, "a phase counts from 0"


def test_hours_that_stay_as_they_are_are_as_many_steps(tmp_path: Path) -> None:
    hours = ("run.steps=null", "run.hours=2")
    assert branch(tmp_path, *hours, saved=facts_of(*hours)).state.total_steps == 600
    assert branch(tmp_path, "run.steps=null", "run.hours=3", saved=facts_of(*hours)).state.total_steps is None


def test_an_encoder_s_weights_are_not_read_again_where_a_checkpoint_has_them() -> None:
    """Nor held against the folder that they once came from: the base of the positions may have been raised since."""
    cfg = config.load(ROOT / "configs/quickstart.yaml", ["model.from=nowhere"])
    tokenizer = vocab.train(["some words of text"] * 3, 270)
    assembly.build_model(cfg, tokenizer, is_trained=True)
    with pytest.raises(ConfigError, match="nowhere is no Hugging Face folder"):
        assembly.build_model(cfg, tokenizer, is_trained=False)


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
            train_here(here, stop, toy, at / "decayed", *COOLED, zero, come_from, "optim.weight_decay=0.5")
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


@slow
@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_a_cooldown_is_the_end_of_a_run_with_that_schedule(cooled: Path, stage: int) -> None:
    check_the_same(cooled / f"{stage}/whole", cooled / f"{stage}/cooled", BRANCH + 1, STEPS)
    assert list(metrics(cooled / f"{stage}/cooled", "loss")) == list(range(BRANCH + 1, STEPS + 1))
    rates = metrics(cooled / f"{stage}/cooled", "lr")
    assert rates[BRANCH + 1] == max(rates.values()) > rates[STEPS]


@slow
@pytest.mark.parametrize("stage", (0, 1, 2, 3))
@pytest.mark.parametrize("name", ("early", "late"))
def test_a_cooldown_that_is_killed_goes_on(cooled: Path, stage: int, name: str) -> None:
    """Before its first checkpoint, at the branch point again; after it, without the run that it comes from."""
    check_the_same(cooled / f"{stage}/cooled", cooled / f"{stage}/{name}", BRANCH + 1, STEPS)
    lines = (cooled / f"{stage}/{name}/metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if '"loss"' in line]) == STEPS - BRANCH, "each step once"


@slow
@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_the_optimizer_s_options_are_those_of_the_new_run(cooled: Path, stage: int) -> None:
    as_before, decayed = (metrics(cooled / f"{stage}/{name}", "loss") for name in ("cooled", "decayed"))
    assert as_before[BRANCH + 1] == decayed[BRANCH + 1] and as_before[BRANCH + 2] != decayed[BRANCH + 2]


@slow
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


@slow
@pytest.mark.parametrize("name", ("longer", "larger"))
def test_a_phase_that_is_killed_goes_on_exactly(phases: Path, name: str) -> None:
    check_the_same(phases / name, phases / f"{name}, parts", 1, STEPS)


@slow
def test_a_phase_takes_over_weights_and_optimizer(phases: Path) -> None:
    losses, first = metrics(phases / "longer", "loss"), metrics(phases / "first", "loss")
    assert abs(losses[1] - first[8]) < abs(losses[1] - first[1]) / 2
    saved = checkpoint.find(phases / "longer") / "deepspeed/mp_rank_00_model_states.pt"
    optimizer = torch.load(saved, weights_only=True)["optimizer"]
    assert {int(state["step"]) for state in optimizer["state"].values()} == {8 + STEPS}
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.5, 0.0], "as this run states it"


@slow
def test_a_phase_counts_from_0_and_reads_other_rows_from_their_beginning(phases: Path) -> None:
    end = metrics(phases / "first", "epoch")[8]
    assert metrics(phases / "longer", "epoch")[1] < end and metrics(phases / "other order", "epoch")[1] < end
    assert metrics(phases / "larger", "epoch")[1] > end, "the same rows in larger batches go on"
    assert the_state(phases / "larger").step == STEPS and the_state(phases / "other order").step == 5
    warm = metrics(phases / "longer", "lr")
    assert warm[1] < warm[2] < warm[3], "it has its own warm-up"


@slow
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


@slow
def test_another_number_of_ranks_starts_from_it_and_leaves_it_as_it_is(cooled: Path, toy: Path) -> None:
    assert on_ranks(1, branch_off, toy, cooled / "1") == [True]
    assert metrics(cooled / "1/alone", "tokens")[STEPS] == metrics(cooled / "1/whole", "tokens")[STEPS]


# ---- what is refused


@slow
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


@slow
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


@slow
@pytest.mark.parametrize(("stage", "ranks"), [(0, 2), (1, 2), (3, 2), (1, 1)])
def test_one_that_is_deleted_while_it_is_read_is_told_in_one_sentence(
    toy: Path, tmp_path: Path, stage: int, ranks: int
) -> None:
    """After it was verified, before its weights are loaded: its run keeps the newest few, and has gone on."""
    folder = tmp_path / "parent/checkpoints"
    options = (f"engine.zero_stage={stage}", "model.kind=factory", "model.factory=tests.factories:that_deletes")
    options = (*options, f"model.options.folder={folder}")
    done = pretrain(toy, folder.parent, "run.steps=3", *options)
    assert done.returncode == 0, done.stdout
    refused = pretrain(toy, tmp_path / "run", f"run.from={folder.parent}", "run.steps=5", *options, ranks=ranks)
    assert refused.returncode == 2 and "Traceback" not in refused.stdout, refused.stdout
    assert "step_00000003 was whole and is not any more" in refused.stdout
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))
