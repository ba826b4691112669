import json
from pathlib import Path

import pytest

from mlm_dist import alerts
from mlm_dist.alerts import FALLEN_REPORTS, RATES_COMPARED, Alerts, Slowdown


def test_alerts_of_a_kind_are_sent_once_in_a_while_and_printed_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(alerts.time, "monotonic", lambda: now)
    said: list[str] = []
    sent: list[tuple[str, str, str]] = []
    one = Alerts(tmp_path, said.append, lambda *alert: sent.append(alert))
    for step in (1, 2, 3):
        one.tell("bad shard", f"shard {step}", step)
    one.tell("loss spike", "stands out", 3)
    one.tell("finished", "done", 4, "INFO", always=True)
    one.tell("finished", "done again", 5, "INFO", always=True)
    assert said == [
        "warning: shard 1",
        "warning: shard 2",
        "warning: shard 3",
        "warning: stands out",
        "done",
        "done again",
    ]
    assert [text for _, text, _ in sent] == ["shard 1", "stands out", "done", "done again"]
    now += alerts.QUIET_SECONDS + 1
    one.tell("bad shard", "shard 4", 6)
    assert sent[-1] == ("bad shard", "shard 4 (2 more since the last alert of this kind)", "WARN")
    kept = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert [(r["step"], r["level"], r["title"]) for r in kept] == [
        (1, "WARN", "bad shard"), (3, "WARN", "loss spike"), (4, "INFO", "finished"), (5, "INFO", "finished"),
        (6, "WARN", "bad shard"),
    ]  # fmt: skip


def test_failures_are_left_for_others_to_print(tmp_path: Path) -> None:
    said: list[str] = []
    Alerts(tmp_path, said.append, lambda *_: None).tell("failed", "it broke", 7, "ERROR")
    assert said == [] and "it broke" in (tmp_path / "alerts.jsonl").read_text()


def test_what_can_t_be_written_is_sent_all_the_same(tmp_path: Path) -> None:
    sent: list[str] = []
    one = Alerts(tmp_path / "absent", print, lambda title, text, level: sent.append(text))
    with pytest.raises(OSError):
        one.tell("failed", "no space left", 7, "ERROR", always=True)
    assert sent == ["no space left"]


def test_throughput_that_falls_by_a_third_and_stays_there_is_told_once() -> None:
    watch = Slowdown()
    assert all(watch.usual(100.0) is None for _ in range(RATES_COMPARED))
    assert watch.usual(50.0) is None and watch.usual(100.0) is None, "once is no trend"
    assert all(watch.usual(70.0) is None for _ in range(2 * FALLEN_REPORTS)), "less than a third"
    answers = [watch.usual(60.0) for _ in range(FALLEN_REPORTS + RATES_COMPARED)]
    assert answers[FALLEN_REPORTS - 1] == 100.0
    assert answers.count(None) == len(answers) - 1
