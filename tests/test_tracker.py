import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlm_dist import tracker
from mlm_dist.tracker import LogConfig, Tracker, cut_metrics, progress_line, run_id

NUMBERS = {"loss": 4.5, "lr": 1e-3, "tokens_per_second": 12_345.6, "mfu": 0.5}


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    other = Tracker(LogConfig(wandb="off"), tmp_path, {}, is_main=False, total=lambda: 10)
    other.start(0)
    other.log(1, NUMBERS, tokens=5)
    other.finish(0)
    assert list(tmp_path.iterdir()) == []


def test_numbers_go_to_metrics_jsonl_and_the_console(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main = Tracker(LogConfig(wandb="off"), tmp_path, {}, is_main=True, total=lambda: 10)
    main.start(0)
    main.log(3, NUMBERS, tokens=500)
    main.log(3, {"valid/loss": 5.0, "valid/accuracy": 0.25}, tokens=500)
    main.finish(0)
    first, second = records(tmp_path)
    assert (first["step"], first["tokens"], first["loss"], second["valid/loss"]) == (3, 500, 4.5, 5.0)
    printed = capsys.readouterr().out
    assert "step 3/10  loss 4.5000" in printed and "held-out loss 5.0000, accuracy 25.0 %" in printed


def test_an_offline_run_can_be_read_back(tmp_path: Path) -> None:
    main = Tracker(
        LogConfig(wandb="offline"), tmp_path, {"optim.lr": 0.5, "deepspeed.api_key": "PLANTED"}, True, lambda: 9
    )
    main.start(0)
    for step in (1, 2, 3):
        main.log(step, NUMBERS | {"loss": 4.0 / step}, tokens=100 * step)
    main.finish(0)
    [log] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    inspected = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rows = [json.loads(line) for line in inspected.splitlines()]
    text = inspected + log.read_bytes().decode("latin1")
    assert run_id(tmp_path) in text and "PLANTED" not in text
    history = [row for row in rows if row["type"] == "history"]
    assert len(history) == 3
    assert "1.3333333333333333" in json.dumps(history[-1])


def test_wandb_failing_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(**_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(tracker.wandb, "init", refuse)
    main = Tracker(LogConfig(wandb="online"), tmp_path, {}, is_main=True, total=lambda: 10)
    main.start(0)
    main.log(1, NUMBERS, tokens=1)
    main.finish(0)
    assert len(records(tmp_path)) == 1
    assert "W&B is off for this launch: no network" in capsys.readouterr().err


def test_auto_is_online_only_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert tracker.wandb_mode(LogConfig()) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    (tmp_path / "netrc").chmod(0o600)
    assert tracker.wandb_mode(LogConfig()) == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracker.wandb_mode(LogConfig()) == "offline"
    assert tracker.wandb_mode(LogConfig(wandb="off")) == "disabled"


def test_a_run_folder_keeps_its_id(tmp_path: Path) -> None:
    assert run_id(tmp_path) == run_id(tmp_path) != ""


def test_metrics_beyond_a_step_and_half_lines_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (10, 20, 30)) + '{"step": 4')
    cut_metrics(tmp_path, 20)
    assert [r["step"] for r in records(tmp_path)] == [10, 20]
    cut_metrics(tmp_path / "absent", 20)


def test_what_an_earlier_launch_logged_beyond_the_step_is_written_anew(tmp_path: Path) -> None:
    for first, last in ((0, 3), (2, 4)):
        main = Tracker(LogConfig(wandb="off"), tmp_path, {}, is_main=True, total=lambda: 4)
        main.start(first)
        for step in range(first + 1, last + 1):
            main.log(step, NUMBERS | {"launch": first}, tokens=step)
        main.finish(0)
    assert [(r["step"], r["launch"]) for r in records(tmp_path)] == [(1, 0), (2, 0), (3, 2), (4, 2)]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(59, "left 0:59"), (3600 * 30 + 61, "left 30:01:01"), (None, "mfu 50 %")]
)
def test_progress_line_tells_the_time_left(seconds: float | None, shown: str) -> None:
    line = progress_line(120, 600, NUMBERS, seconds)
    assert line.startswith("step 120/600  loss 4.5000  lr 1.00e-03  12,346 tokens/s") and line.endswith(shown)
