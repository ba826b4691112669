"""What is seen of a run that is killed and started again: one W&B run, every step once, and no secret anywhere."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, environment, metrics, overridden, pretrain, run, start_pretrain, wait_for
from ranks import on_ranks

from mlm_dist import checkpoint, config, mirror, train, world
from mlm_dist.mirror import run_id
from mlm_dist.world import EXIT_STOPPED, StopFlag

pytestmark = pytest.mark.slow

STEPS = 48
OVERRIDES = (
    f"run.steps={STEPS}", "log.wandb=offline", "checkpoint.every_steps=8", "checkpoint.keep_last=10",
    "schedule.name=constant", "evaluate.every_steps=16",
)  # fmt: skip


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def kill_at(shards: Path, folder: Path, step: int) -> None:
    """A launch that is killed without a word once it has logged a step."""
    process = start_pretrain(shards, folder, *OVERRIDES)
    try:
        wait_for(lambda: any(line["step"] >= step and "loss" in line for line in lines(folder)), process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def flip_a_bit(folder: Path) -> None:
    path = next((folder / "deepspeed").glob("*.pt"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_run_that_is_killed_three_times_is_one_run_with_every_step(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for step in (12, 22, 35):
        kill_at(toy, folder, step)
    newest, *_ = checkpoint.newest_first(folder / "checkpoints")
    flip_a_bit(folder / "checkpoints" / newest)  # so that the last launch falls back to the one before it
    done = pretrain(toy, folder, *OVERRIDES)
    assert done.returncode == 0, done.stdout
    assert "is refused" in done.stdout

    trained = [line for line in lines(folder) if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1)), "every step once, in order"
    assert sorted(metrics(folder, "valid/loss")) == [16, 32, 48]

    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert {path.name for path in files} == {f"run-{run_id(folder)}.wandb"} and len(files) == 4
    rows = [row for path in files for row in mirror.rows_of(path)]
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers)), "W&B drops a row whose number isn't higher than the last one's"
    back = [row for row in rows if "rolled_back_to" in row]
    assert back[-1]["rolled_back_to"] == checkpoint_step(newest) - 8
    standing: dict[float, dict] = {}
    for row in rows:
        if "rolled_back_to" in row:
            standing = {at: kept for at, kept in standing.items() if kept["step"] <= row["rolled_back_to"]}
        elif "time" in row:
            standing[row["time"]] = row
    assert standing.keys() == {line["time"] for line in lines(folder)}, "what W&B has is what metrics.jsonl has"
    for line in lines(folder):
        row = standing[line["time"]]
        assert all(row[name] == value for name, value in line.items() if value is not None)

    tables = [row["step"] for row in rows if "predictions.nrows" in row and row["predictions.nrows"] > 0]
    assert tables[-1] == STEPS, "offline, the table goes along"
    exported = run("launch/export.py", "--run", str(folder), "--out", str(tmp_path / "model"), "--wandb")
    assert exported.returncode == 0, exported.stdout
    newest_file = max(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    inspect = ["-m", "wandb", "leet", "inspect", "--json", str(newest_file)]
    assert f"{run_id(folder)}-model" in run(*inspect).stdout


def stop_at_five(toy: Path, folder: Path) -> None:
    """On this rank: a line each three steps; the other rank is told to stop before step 6, and the run goes on."""
    cfg = config.load(ROOT / "configs/quickstart.yaml", overridden(toy, folder, "run.steps=9", "log.every_steps=3"))
    take = train.take
    with world.join(60) as here, StopFlag() as stop:

        def told(run: train.Run) -> Any:
            if run.state.step == 5 and here.rank == 1:
                stop.signal_name = "SIGTERM"
            return take(run)

        train.take = told
        assert train.train_on(cfg, here, stop) == EXIT_STOPPED
        train.take, stop.signal_name = take, None
        assert train.train_on(cfg, here, stop) == 0


def test_the_steps_before_a_stop_are_told_too(toy: Path, tmp_path: Path) -> None:
    on_ranks(2, stop_at_five, toy, tmp_path)
    rate, seconds, tokens = (metrics(tmp_path, name) for name in ("tokens_per_second", "step_seconds", "tokens"))
    assert list(rate) == [3, 5, 6, 9]
    told = sum(rate[step] * seconds[step] * steps for step, steps in ((3, 3), (5, 2), (6, 1), (9, 3)))
    assert told == pytest.approx(tokens[9]), "every step is in one line"


def checkpoint_step(name: str) -> int:
    return int(name.removeprefix("step_"))


def test_no_secret_stands_in_a_run_folder(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {
        name: f"PLANTED{number}"
        for number, name in enumerate(("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MY_PASSWORD"))
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    assert planted.items() <= environment().items()
    secrets = ("deepspeed={comet: {api_key: PLANTED8}}", "log.name=https://me:PLANTED9@host/x")
    done = pretrain(toy, tmp_path / "run", "run.steps=4", "log.wandb=offline", "checkpoint.every_steps=2", *secrets)
    assert done.returncode == 0, done.stdout
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 15
    assert [path for path in files if b"PLANTED" in path.read_bytes()] == []
    assert "[redacted]" in (tmp_path / "run" / "config.yaml").read_text()
    again = pretrain(toy, tmp_path / "run", "run.steps=6", "log.wandb=offline", "checkpoint.every_steps=2", *secrets)
    assert again.returncode == 0 and "resumed from step 4" in again.stdout, again.stdout


def test_the_console_is_quiet_and_each_rank_has_a_log(toy: Path, tmp_path: Path) -> None:
    plain = pretrain(toy, tmp_path / "plain", "run.steps=3", "evaluate.every_steps=3")
    loud = pretrain(toy, tmp_path / "loud", "run.steps=3", "log.verbose=true")
    assert plain.returncode == loud.returncode == 0, plain.stdout + loud.stdout
    assert "[INFO]" in loud.stdout
    known = re.compile(r"step \d|W&B: |done: |model: |\[\d{4}-.*\[launch|$")  # ours, and the launcher's own
    assert [line for line in plain.stdout.splitlines() if not known.match(line)] == []
    for rank in range(2):
        log = (tmp_path / "plain" / "logs" / f"rank_{rank:05d}.log").read_text()
        assert "DeepSpeed" in log, "what isn't shown is kept"
        assert ("held-out loss" in log) == ("step 3/3  loss" in log) == (rank == 0)


def test_a_rank_s_log_has_the_traceback_that_ended_it(toy: Path, tmp_path: Path) -> None:
    (toy_copy := tmp_path / "toy").mkdir()
    shutil.copytree(toy, toy_copy, dirs_exist_ok=True)
    for shard in (toy_copy / "train").glob("*.tar"):
        shard.write_bytes(b"")
    done = pretrain(toy_copy, tmp_path / "run", "run.steps=3")
    assert done.returncode != 0
    for rank in range(2):
        assert "ShardError" in (tmp_path / "run" / "logs" / f"rank_{rank:05d}.log").read_text()
    [alert] = [json.loads(line) for line in (tmp_path / "run" / "alerts.jsonl").read_text().splitlines()]
    assert alert["level"] == "ERROR" and alert["title"] == "failed" and ".tar" in alert["text"]
