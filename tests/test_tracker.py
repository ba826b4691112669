import io
import json
import sys
from pathlib import Path

import pytest

from mlm_dist.mirror import LogConfig
from mlm_dist.run_folder import cut_lines
from mlm_dist.tracker import Tracker, progress_line

NUMBERS = {"loss": 4.5, "lr": 1e-3, "tokens_per_second": 12_345.6, "mfu": 0.5}


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    other = Tracker(LogConfig(wandb="off"), tmp_path, is_main=False, total=lambda: 10)
    other.start(0, {}, resumed=False)
    other.log(1, NUMBERS, tokens=5)
    other.finish(0)
    assert list(tmp_path.iterdir()) == []


def test_numbers_go_to_metrics_jsonl_and_the_console(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main = Tracker(LogConfig(wandb="off"), tmp_path, is_main=True, total=lambda: 10)
    main.start(0, {}, resumed=False)
    main.log(3, NUMBERS, tokens=500)
    main.log(3, {"valid/loss": 5.0, "valid/accuracy": 0.25}, tokens=500)
    main.finish(0)
    first, second = records(tmp_path)
    assert (first["step"], first["tokens"], first["loss"], second["valid/loss"]) == (3, 500, 4.5, 5.0)
    printed = capsys.readouterr().out
    assert "step 3/10  loss 4.5000" in printed and "held-out loss 5.0000, accuracy 25.0 %" in printed


def test_metrics_beyond_a_step_and_half_lines_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (10, 20, 30)) + '{"step": 4')
    assert cut_lines(path, 20) == ['{"step": 10}', '{"step": 20}']
    assert [r["step"] for r in records(tmp_path)] == [10, 20]
    assert cut_lines(tmp_path / "absent", 20) == []


def test_texts_with_signs_of_their_own_for_a_line_s_end_stay_and_half_a_character_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    whole = json.dumps({"step": 10, "text": "one\u2028line\x85é"}, ensure_ascii=False)
    path.write_bytes(f'{whole}\n{{"step": 11, "text": "é'.encode()[:-1])
    assert cut_lines(path, 20) == [whole]
    assert path.read_text(encoding="utf-8") == f"{whole}\n"


def test_what_an_earlier_launch_logged_beyond_the_step_is_written_anew(tmp_path: Path) -> None:
    for first, last in ((0, 3), (2, 4)):
        main = Tracker(LogConfig(wandb="off"), tmp_path, is_main=True, total=lambda: 4)
        main.start(first, {}, resumed=True)
        for step in range(first + 1, last + 1):
            main.log(step, NUMBERS | {"launch": first}, tokens=step)
        main.finish(0)
    assert [(r["step"], r["launch"]) for r in records(tmp_path)] == [(1, 0), (2, 0), (3, 2), (4, 2)]


def test_nothing_stays_of_what_was_logged_before_the_first_checkpoint(tmp_path: Path) -> None:
    """The branch point may be a later one now, beyond steps that were logged on the way from an earlier one."""
    for first, last in ((400, 403), (402, 404)):
        main = Tracker(LogConfig(wandb="off"), tmp_path, is_main=True, total=lambda: 404)
        main.start(first, {}, resumed=False)
        for step in range(first + 1, last + 1):
            main.log(step, NUMBERS, tokens=step)
        main.finish(0)
    assert [record["step"] for record in records(tmp_path)] == [403, 404]


def test_the_progress_line_fits_in_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = Tracker(LogConfig(wandb="off"), tmp_path, is_main=True, total=lambda: 10_000)
    main.start(0, {}, resumed=False)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "50")
    main.log(3, NUMBERS, tokens=500)
    main.finish(0)
    [line] = terminal.getvalue().split("\r\x1b[K")[1:]
    assert line.startswith("step 3/10000  loss 4.5000  lr 1.00e-03") and len(line) == 49


@pytest.mark.parametrize(
    ("seconds", "shown"), [(59, "left 0:59"), (3600 * 30 + 61, "left 30:01:01"), (None, "mfu 50 %")]
)
def test_progress_line_tells_the_time_left(seconds: float | None, shown: str) -> None:
    line = progress_line(120, 600, NUMBERS, seconds)
    assert line.startswith("step 120/600  loss 4.5000  lr 1.00e-03  12,346 tokens/s") and line.endswith(shown)


@pytest.mark.parametrize(
    ("mode", "log_text", "sent"),
    [("offline", None, True), ("online", None, False), ("online", True, True), ("offline", False, False)],
)
def test_text_leaves_the_machine_on_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, log_text: bool | None, sent: bool
) -> None:
    main = Tracker(LogConfig(wandb=mode, log_text=log_text), tmp_path, is_main=True, total=lambda: 4)
    tables = []
    monkeypatch.setattr(main.mirror, "table", lambda *table: tables.append(table))
    masks = [{"truth": "b", "guesses": [["b", 0.5], ["c", 0.25], ["d", 0.125]]}]
    main.show([{"text": "a [MASK]", "masks": masks}], 3, 30)
    assert bool(tables) == sent
    if sent:
        [(_, columns, rows, at)] = tables
        assert columns == ["text", "truth", "guess 1", "p 1", "guess 2", "p 2", "guess 3", "p 3"]
        assert rows == [["a [MASK]", "b", "b", 0.5, "c", 0.25, "d", 0.125]] and at == {"step": 3, "tokens": 30}


def test_a_disk_that_takes_no_more_is_noted_for_the_ranks_to_agree_on(tmp_path: Path) -> None:
    main = Tracker(LogConfig(wandb="off"), tmp_path, is_main=True, total=lambda: 4)
    main.start(0, {}, resumed=False)
    main.metrics.close()
    main.metrics = open("/dev/full", "w", buffering=1)
    main.log(1, NUMBERS, tokens=5)
    assert "no space left" in main.problem and "make room" in main.problem
    main.finish(0)
