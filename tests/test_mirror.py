"""The mirror in W&B: real offline runs, read back from W&B's own files by W&B's own reader."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT

from mlm_dist import mirror
from mlm_dist.mirror import History, LogConfig, Mirror, run_id, wandb_mode

OFFLINE = LogConfig(wandb="offline")


def launch(folder: Path, first: int, last: int, *, kept: int | None = None, config: Any = None) -> list[str]:
    """One launch that logs the steps first + 1 ... last, W&B being told of those up to `kept`; its lines."""
    path, said = folder / "metrics.jsonl", []
    before = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= first] if first else []
    one = Mirror(OFFLINE, folder, said.append, "offline")
    one.start(config or {}, first, before)
    lines = []
    for step in range(first + 1, last + 1):
        record = {"step": step, "tokens": 10 * step, "time": round(time.time(), 6), "loss": 1 / step}
        lines.append(json.dumps(record))
        if kept is None or step <= kept:
            one.log(record)
    path.write_text("".join(f"{line}\n" for line in before + lines))
    one.finish(0, 60)
    assert len(said) == 1 and said[0].startswith("W&B: offline run"), said
    return lines


def inspected(folder: Path) -> list[dict[str, Any]]:
    """Every record of every launch, as `wandb leet` reads them."""
    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows += [json.loads(line) for line in said.splitlines()]
    return rows


def history(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")) for row in mirror.rows_of(path)]


def test_an_offline_run_can_be_read_back(tmp_path: Path) -> None:
    launch(tmp_path, 0, 300, config={"optim.lr": 0.5, "deepspeed.api_key": "PLANTED", "url": "s3://me:PLANTED@x/y"})
    ours, theirs = history(tmp_path), [row for row in inspected(tmp_path) if row["type"] == "history"]
    assert len(ours) == len(theirs) == 300
    assert [row["step"] for row in ours] == list(range(1, 301)) and ours[2]["loss"] == 1 / 3
    assert "0.3333333333333333" in json.dumps(theirs[2])
    text = json.dumps(inspected(tmp_path)) + "".join(
        path.read_bytes().decode("latin1") for path in tmp_path.glob("wandb/*/*.wandb")
    )
    assert run_id(tmp_path) in text and "optim.lr" in text and "PLANTED" not in text


def test_launches_go_on_in_one_run_and_fill_what_was_lost(tmp_path: Path) -> None:
    launch(tmp_path, 0, 5, kept=3)  # killed before W&B had the last two
    launch(tmp_path, 5, 8)
    launch(tmp_path, 6, 9)  # from an earlier checkpoint
    rows = history(tmp_path)
    assert [row["_step"] for row in rows] == list(range(len(rows))), "W&B drops a row whose number isn't higher"
    assert [(row["launch"], row["step"]) for row in rows] == [
        *[(1, 1), (1, 2), (1, 3)], *[(2, 4), (2, 5), (2, 6), (2, 7), (2, 8)], *[(3, 6), (3, 7), (3, 8), (3, 9)]
    ]  # fmt: skip
    assert [(row["rolled_back_from"], row["rolled_back_to"]) for row in rows if "rolled_back_to" in row] == [(8, 6)]
    ids = {row["id"] for row in inspected(tmp_path) if row["type"] == "run" and "id" in row}
    assert len({path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}) == 1 and ids <= {run_id(tmp_path)}


def test_launches_are_read_in_order_whether_online_or_not(tmp_path: Path) -> None:
    """The second of three was online: its folder has another name, and was rolled back by the third."""
    for first, last in ((0, 3), (3, 8), (5, 6)):
        launch(tmp_path, first, last)
        [newest] = tmp_path.glob("wandb/offline-run-2*")
        where = "run" if first == 3 else "offline-run"
        newest.rename(tmp_path / "wandb" / f"{where}-1999010{first}_000000-{run_id(tmp_path)}")
    assert (History.read(tmp_path).last_step, History.read(tmp_path).launches) == (6, 3)


def test_a_torn_file_is_read_up_to_the_tear(tmp_path: Path) -> None:
    launch(tmp_path, 0, 2000)
    [path] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    whole = path.read_bytes()
    assert len(whole) > 3 * mirror.BLOCK, "records lie across blocks"
    assert History.read(tmp_path).last_step == 2000
    for cut in (0, 6, 100, mirror.BLOCK + 3, len(whole) // 2):
        path.write_bytes(whole[:cut])
        history = History.read(tmp_path)
        assert history.next_row == history.last_step == len(history.times) < 2000


def test_tables_alerts_and_artifacts_are_recorded(tmp_path: Path) -> None:
    one = Mirror(OFFLINE, tmp_path, print, "offline")
    one.start({}, 0, [])
    one.alert("bad shard", "a shard is skipped", "WARN")
    one.table("predictions", ["text", "guess"], [["a [MASK]", "b"]], {"step": 3, "tokens": 9, "time": 1.0})
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "weights").write_text("PRIVATE")
    one.refer("checkpoint", "checkpoint", tmp_path / "saved", {"step": 3})
    one.finish(85, 60)
    rows = inspected(tmp_path)
    kinds = {row["type"] for row in rows}
    assert {"alert", "artifact", "exit"} <= kinds
    assert "a shard is skipped" in json.dumps([row for row in rows if row["type"] == "alert"])
    assert '"exit_code": 85' in json.dumps(rows) or "85" in json.dumps([r for r in rows if r["type"] == "exit"])
    [row] = [row for row in history(tmp_path) if row["step"] == 3]
    assert row["predictions.nrows"] == 1
    held = b"".join(path.read_bytes() for path in tmp_path.glob("wandb/**/*") if path.is_file())
    assert b"PRIVATE" not in held, "a reference, not the contents"


@pytest.mark.parametrize("asked", [True, False])
def test_the_diff_goes_along_where_it_was_asked_for(tmp_path: Path, asked: bool) -> None:
    (tmp_path / "diff.patch").write_text("+ a line")
    one = Mirror(LogConfig(wandb="offline", log_diff=asked), tmp_path, print, "offline")
    one.start({}, 0, [])
    one.finish(0, 60)
    sent = [path.read_text() for path in tmp_path.glob("wandb/offline-run-*/files/diff.patch")]
    assert sent == ["+ a line"] * asked
    assert ("diff.patch" in json.dumps([row for row in inspected(tmp_path) if row["type"] == "files"])) == asked


class Stub:
    """In place of wandb's run."""

    url, id, step = "there", "x", 0

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, *_: object, **__: object) -> None:
        self.act()

    def finish(self, **_: object) -> None:
        self.act()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("raising", ["init", "log"])
def test_wandb_raising_is_said_once_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raising: str, error: type[BaseException]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error("no network")

    monkeypatch.setattr(mirror.wandb, "init", refuse if raising == "init" else lambda **_: Stub(refuse))
    said: list[str] = []
    one = Mirror(OFFLINE, tmp_path, said.append, "online")
    one.start({}, 0, [])
    for step in range(5):
        one.log({"step": step, "time": float(step)})
    one.finish(0, 10)
    assert [line for line in said if "W&B is off" in line] == [said[-1]] and "no network" in said[-1]


@pytest.mark.parametrize("hanging", ["init", "log"])
def test_wandb_hanging_holds_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hanging: str) -> None:
    released = threading.Event()

    def hang(*_: object, **__: object) -> Stub:
        released.wait()
        return Stub(lambda: None)

    monkeypatch.setattr(mirror.wandb, "init", hang if hanging == "init" else lambda **_: Stub(hang))
    monkeypatch.setattr(mirror, "MOST_WAITING", 50)
    said: list[str] = []
    one = Mirror(OFFLINE, tmp_path, said.append, "online")
    began = time.perf_counter()
    one.start({}, 0, [])
    for step in range(200):
        one.log({"step": step, "time": float(step)})
    assert time.perf_counter() - began < 1, "a step never waits"
    one.finish(0, 0.5)
    assert time.perf_counter() - began < 2, "nor does the end, for long"
    assert sum("W&B is off" in line for line in said) == 1
    released.set()


def test_nobody_is_asked_for_a_key_at_a_terminal(tmp_path: Path) -> None:
    """A launch that wants to be online, without a key, where a terminal is: its one line says what is missing."""
    launch = "from mlm_dist.mirror import *; from pathlib import Path; import sys; one = Mirror(LogConfig(), "
    launch += f"Path({str(tmp_path)!r}), print, 'online'); one.start({{}}, 0, []); one.finish(0, 30); print('over')"
    here, terminal = os.openpty()
    hidden = {name: os.environ[name] for name in os.environ if not name.startswith("WANDB")} | {"TERM": "xterm"}
    command = [sys.executable, "-c", launch]
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, cwd=ROOT, env=hidden | {"NETRC": "/dev/null"}
    )
    os.close(terminal)
    said = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while more := os.read(here, 1000):
            said += more
            if b"Enter your choice" in said:
                process.kill()
    os.close(here)
    process.wait()
    assert (
        b"W&B is off for this launch: No API key configured. Use `wandb login` to log in;" in said and b"over" in said
    ), said.decode()


def test_auto_is_online_only_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(LogConfig()) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    (tmp_path / "netrc").chmod(0o600)
    assert wandb_mode(LogConfig()) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example:8080")
    assert wandb_mode(LogConfig()) == "offline"
    for host in ("wandb.example", "wandb.example:8080"):
        (tmp_path / "netrc").write_text(f"machine {host} login user password 0123\n")
        assert wandb_mode(LogConfig()) == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode(LogConfig()) == "offline"
    assert wandb_mode(LogConfig(wandb="off")) == "disabled"


def test_a_run_folder_keeps_its_id(tmp_path: Path) -> None:
    assert run_id(tmp_path) == run_id(tmp_path) != ""
