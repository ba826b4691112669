"""Real launches: `deepspeed` with two ranks, from shards to checkpoints and back."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparing import train_here
from conftest import toy_documents, write_toy_split
from launching import ROOT, TINY, environment, metrics, overridden, pretrain, run, start_pretrain, wait_for
from ranks import on_ranks

from mlm_dist import checkpoint, config, lanes, train, vocab, world
from mlm_dist.encoder import Encoder
from mlm_dist.manifest import ShardError, load_manifest
from mlm_dist.world import StopFlag

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


def stop_and_resume(toy: Path, folder: Path) -> None:
    """On this rank, at each stage: 12 steps in one go, and 7 steps followed by the rest. The schedule is constant, so
    that the length of the run changes nothing else."""
    with world.join(120) as here, StopFlag() as stop:
        for stage in (0, 1, 2, 3):
            for name, steps in (("whole", 12), ("parts", 7), ("parts", 12)):
                overrides = overridden(
                    toy, folder / f"{name}{stage}", f"run.steps={steps}", "schedule.name=constant",
                    f"engine.zero_stage={stage}", "data.workers=1",
                )  # fmt: skip
                assert train.train_on(config.load(ROOT / "configs/quickstart.yaml", overrides), here, stop) == 0


def test_resume_equals_never_having_stopped(toy: Path, tmp_path: Path) -> None:
    on_ranks(2, stop_and_resume, toy, tmp_path)
    for stage in (0, 1, 2, 3):
        whole, parts = tmp_path / f"whole{stage}", tmp_path / f"parts{stage}"
        assert len(metrics(whole, "loss")) == 12
        assert metrics(whole, "loss") == metrics(parts, "loss")
        one, other = (checkpoint.full_weights(checkpoint.find(folder)) for folder in (whole, parts))
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), (stage, name)


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
    whole = [path.name for path in (folder / "checkpoints").glob("step_*") if not checkpoint.verify(path)]
    assert sorted(whole) == ["step_00000006", "step_00000008"], "the step of the altered one is saved again"
    assert (folder / "checkpoints/bad-1-step_00000006").is_dir(), "what was altered is kept for a look"


def test_a_changed_configuration_is_refused_by_name(finished: Path, toy: Path) -> None:
    refused = pretrain(toy, finished, "run.steps=20", "optim.lr=0.5", "model.encoder.mlp_width=64")
    assert refused.returncode == 2
    assert "optim.lr was 0.003 and is 0.5 now" in refused.stdout
    assert "model.encoder.mlp_width was 48 and is 64 now" in refused.stdout
    assert refused.stdout.count("can't be resumed") == 1, "said once for all ranks"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("batch.global_rows=18", "batch.global_rows to 16 or 24"),
        ("data.lanes=3", "lanes that work here"),
        ("engine.zero_stage=7", "zero_stage"),
        ("data.shards=no/such/folder", "no/such/folder"),
        ("run.dir=/proc/x", "run.dir = /proc/x can't be written to"),
        ("engine.precision=fp16", "needs a GPU"),
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
        refused = pretrain(toy, folder)
    finally:
        holder.kill()
    assert refused.returncode == 2 and "is in use by another launch" in refused.stdout


def test_a_port_in_use_is_named_and_both_ranks_end(toy: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = run(
            "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port,
            "launch/pretrain.py", f"data.shards={toy}", f"run.dir={tmp_path / 'run'}", *TINY,
        )  # fmt: skip
    assert refused.returncode == 2, refused.stdout
    assert f"port {port} is in use" in refused.stdout


SIXTY = ("run.steps=60", "data.workers=2")


@pytest.fixture(scope="module")
def sixty(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of 60 steps that nothing stopped."""
    folder = tmp_path_factory.mktemp("sixty") / "run"
    assert pretrain(toy, folder, *SIXTY).returncode == 0
    return metrics(folder, "loss")


def to_the_group(launcher: int, number: int) -> None:
    """As a scheduler does, or a terminal at Ctrl-C."""
    os.killpg(launcher, number)


def to_the_launcher(launcher: int, number: int) -> None:
    """To the process that hands it on to one rank after another, and ends those that don't go."""
    for process in (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            if os.getpgid(process) == launcher and b"deepspeed.launcher.launch" in command:
                os.kill(process, number)


@pytest.mark.parametrize(
    ("send", "number"),
    [(to_the_group, signal.SIGTERM), (to_the_group, signal.SIGINT), (to_the_launcher, signal.SIGTERM)],
)
def test_a_signal_saves_the_same_step_on_all_ranks_and_the_run_goes_on(
    toy: Path, tmp_path: Path, sixty: dict[int, float], send: Callable[[int, int], None], number: int
) -> None:
    stopped = tmp_path / "stopped"
    launcher = start_pretrain(toy, stopped, *SIXTY)
    wait_for(lambda: (stopped / "metrics.jsonl").exists() and len(metrics(stopped, "loss")) >= 3, launcher)
    send(launcher.pid, number)
    said, _ = launcher.communicate(timeout=120)
    status = json.loads((stopped / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("stopped", 85), said
    assert 3 <= status["step"] < 60
    again = pretrain(toy, stopped, *SIXTY)
    assert again.returncode == 0 and f"resumed from step {status['step']}" in again.stdout
    assert metrics(stopped, "loss") == sixty


def test_two_machines_by_torchrun(toy: Path, tmp_path: Path, finished: Path) -> None:
    """Two nodes on this host, each started by a torchrun of its own."""
    port, folder = world.free_port(), tmp_path / "run"
    options = overridden(toy, folder, "run.steps=12", "evaluate.every_steps=6")
    nodes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
                "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port),
                "launch/pretrain.py", "--config", "configs/quickstart.yaml", *options,
            ],
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert metrics(folder, "loss") == metrics(finished, "loss")


def test_a_full_disk_leaves_the_checkpoints_before_it(toy: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs takes root")
    try:
        full = pretrain(toy, small / "run", "run.steps=9", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
        assert full.returncode == 2, full.stdout
        assert "no space left" in full.stdout and "Traceback" not in full.stdout
        assert checkpoint.find(small / "run").name.startswith("step_")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_damaged_shard_ends_both_ranks_and_loses_no_step(toy: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(toy, shards)
    for tar in sorted((shards / "train").glob("*.tar"))[:4]:  # those of some lanes: one rank or the other meets it
        data = bytearray(tar.read_bytes())
        data[len(data) // 2] ^= 1
        tar.write_bytes(data)
    ended = pretrain(shards, tmp_path / "run", "run.steps=500")
    assert ended.returncode == 2, ended.stdout
    assert re.search(r"train/00000\d\.tar: record \d+ ", ended.stdout) and "Traceback" not in ended.stdout
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("failed", 2)
    if status["step"]:
        assert checkpoint.find(tmp_path / "run").name == checkpoint.step_name(status["step"])


def train_until_refused(toy: Path, folder: Path) -> str:
    """What a run says that meets, on rank 1 at its fourth step, a micro-batch that its model can't take."""
    asked = []

    def problem_with(self: Encoder, segments: torch.Tensor) -> str | None:
        asked.append(segments)
        return "too many documents" if os.environ["RANK"] == "1" and len(asked) > 6 else None

    Encoder.problem_with = problem_with  # of this process
    with world.join(120) as here, StopFlag() as stop:
        with pytest.raises(ShardError) as refused:
            train_here(here, stop, toy, folder, "run.steps=10")
        return str(refused.value)


def test_a_micro_batch_that_the_model_cannot_take_ends_both_ranks_and_loses_no_step(toy: Path, tmp_path: Path) -> None:
    assert on_ranks(2, train_until_refused, toy, tmp_path) == ["too many documents"] * 2
    assert checkpoint.find(tmp_path).name == "step_00000003"


def damage(split: Path, *numbers: int) -> None:
    for number in numbers:
        tar = split / f"{number:06d}.tar"
        data = bytearray(tar.read_bytes())
        data[512 + 3] ^= 1
        tar.write_bytes(data)


def test_skipped_shards_are_said_once_and_logged_over_both_ranks(toy: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(toy, shards)
    manifest = load_manifest(toy / "train")
    # those that lanes 0 and 1, of ranks 0 and 1, begin with
    bad = [lanes.LaneEpoch(manifest, 64, 1337, 0, lane, 4).shards[0] for lane in (0, 1)]
    damage(shards / "train", *bad)
    done = pretrain(shards, tmp_path / "run", "run.steps=4", "data.lanes=4", "data.max_bad_shards=2")
    assert done.returncode == 0, done.stdout
    for shard in bad:
        assert done.stdout.count(f"shard {shard:06d}.tar is skipped from here on: altered") == 1
    assert list(metrics(tmp_path / "run", "bad_shards").items()) == [(step, 2) for step in (1, 2, 3, 4)]
    assert metrics(tmp_path / "run", "bad_shards/altered")[4] == 2
    again = pretrain(shards, tmp_path / "run", "run.steps=6", "data.lanes=4", "data.max_bad_shards=2")
    assert again.returncode == 0 and "is skipped" not in again.stdout, again.stdout
    assert metrics(tmp_path / "run", "bad_shards")[6] == 2
    # one on each rank is two in all
    ended = pretrain(shards, tmp_path / "other", "run.steps=4", "data.lanes=4", "data.max_bad_shards=1")
    assert ended.returncode == 2 and "Traceback" not in ended.stdout
    assert "2 shards are damaged or missing, more than data.max_bad_shards = 1: " in ended.stdout


@pytest.fixture(scope="module")
def mixed(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides for two sources of the same tokenizer, of 8 and 4 shards."""
    folder = tmp_path_factory.mktemp("web")
    shutil.copytree(toy / "tokenizer", folder / "tokenizer")
    tokenizer = vocab.load(folder / "tokenizer")
    write_toy_split(folder / "train", tokenizer, toy_documents(120, seed=3), 4)
    write_toy_split(folder / "valid", tokenizer, toy_documents(20, seed=4), 1)
    return (
        "data.shards=null", f"data.sources.law.shards={toy}", "data.sources.law.weight=0.7",
        f"data.sources.web.shards={folder}", "data.sources.web.weight=0.3",
    )  # fmt: skip


def test_a_mixture_that_is_killed_goes_on_exactly(mixed: tuple[str, ...], toy: Path, tmp_path: Path) -> None:
    options = (*mixed, "run.steps=40", "checkpoint.every_steps=5", "evaluate.every_steps=20")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = pretrain(toy, whole, *options)
    assert done.returncode == 0, done.stdout
    launcher = start_pretrain(toy, killed, *options)
    wait_for(lambda: (killed / "checkpoints/latest").exists() and len(metrics(killed, "loss")) >= 8, launcher)
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.communicate(timeout=60)
    again = pretrain(toy, killed, *options, "data.workers=2")
    assert again.returncode == 0 and re.search(r"resumed from step \d+", again.stdout), again.stdout
    for name in ("loss", "valid/loss", "source/law", "source/web"):
        assert metrics(killed, name) == metrics(whole, name) != {}
    shares = metrics(whole, "source/law")
    # 4 lanes, 16 rows a step: each lane is within a row of its share over any stretch
    assert abs(sum(shares.values()) / 40 - 0.7) < 4 / (40 * 16) and 0.4 < min(shares.values())
    refused = pretrain(toy, killed, *options[:4], "data.sources.web.weight=0.5", *options[5:])
    assert refused.returncode == 2 and "data.sources.web.weight was 0.3 and is 0.5 now" in refused.stdout
    evaluated = run("launch/evaluate.py", "--run", str(whole), "--json")
    assert evaluated.returncode == 0, evaluated.stdout
    numbers = json.loads(evaluated.stdout.splitlines()[-1])
    assert numbers["loss"] == pytest.approx(metrics(whole, "valid/loss")[40], abs=1e-5)


def test_weights_that_are_no_longer_finite_are_not_saved(toy: Path, tmp_path: Path) -> None:
    ended = pretrain(
        toy, tmp_path / "run", "run.steps=40", "log.every_steps=10", "checkpoint.every_steps=4", "optim.lr=1e30",
        "engine.clip=0", "schedule.warmup_steps=0",
    )  # fmt: skip
    assert ended.returncode == 17, ended.stdout
    assert json.loads((tmp_path / "run/status.json").read_text())["exit_code"] == 17
    for saved in (tmp_path / "run/checkpoints").glob("step_*"):
        assert all(weight.isfinite().all() for weight in checkpoint.full_weights(saved).values())


def test_training_goes_on_from_an_export_on_other_text(finished: Path, toy: Path, tmp_path: Path) -> None:
    assert run("launch/export.py", "--run", str(finished), "--out", str(tmp_path / "hf")).returncode == 0
    options = ("run.steps=4", "optim.lr=1e-5")
    for name, more in (("new", ()), ("on", (f"model.from={tmp_path / 'hf'}",))):
        done = pretrain(toy, tmp_path / name, *options, *more)
        assert done.returncode == 0, done.stdout
    assert metrics(tmp_path / "on", "loss")[1] < metrics(tmp_path / "new", "loss")[1] - 0.1


def test_a_length_in_hours_becomes_steps_once_a_step_is_timed(toy: Path, tmp_path: Path) -> None:
    done = pretrain(toy, tmp_path / "run", "run.steps=null", "run.hours=0.001", "schedule.warmup_steps=99999")
    assert done.returncode == 0, done.stdout
    assert "0.001 hours are" in done.stdout
    assert "warning: schedule.warmup_steps = 99999 leaves nothing of a run of" in done.stdout
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["step"] == status["total_steps"] >= 20
    seconds = checkpoint.load_state(checkpoint.find(tmp_path / "run")).train_seconds
    assert status["step"] == 20 or 1 < seconds < 15, "3.6 s were asked for"


def test_evaluate_agrees_with_training_and_export_loads(finished: Path, tmp_path: Path) -> None:
    evaluated = run("launch/evaluate.py", "--run", str(finished), "--json")
    assert evaluated.returncode == 0, evaluated.stdout
    numbers = json.loads(evaluated.stdout.splitlines()[-1])
    assert numbers["loss"] == pytest.approx(metrics(finished, "valid/loss")[12], abs=1e-5)

    exported = run("launch/export.py", "--run", str(finished), "--out", str(tmp_path / "hf"))
    assert exported.returncode == 0, exported.stdout
    card, held_out = (tmp_path / "hf/README.md").read_text(), metrics(finished, "valid/loss")[12]
    tokens = checkpoint.load_state(checkpoint.find(finished)).tokens
    assert f"\n| steps | 12 |\n| tokens | {tokens:,}, padding not counted" in card
    perplexity = metrics(finished, "valid/perplexity")[12]
    assert f"| held-out loss | {held_out:.4f} at step 12 (perplexity {perplexity:,.2f}) |" in card
    assert f"| held-out text | {numbers['targets']:,.0f} tokens predicted, of " in card
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
