"""The run in W&B: a mirror of metrics.jsonl, on a thread of its own. Nothing that W&B does, or doesn't, holds up a run.

One W&B run for one training run: its id stands in the run folder, and each launch goes on in it. What an earlier launch
logged is read back from W&B's own files there, so that rows that it lost are sent again, and a fall back to an earlier
checkpoint is marked.
"""

import json
import os
import queue
import secrets
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import wandb
from wandb.proto.wandb_internal_pb2 import Record

from mlm_dist.manifest import replace_file
from mlm_dist.redaction import redact, redact_text
from mlm_dist.run_folder import DIFF
from mlm_dist.schema import setting

MOST_WAITING = 10_000  # tasks for W&B; with one that never answers, what comes after them is dropped
INIT_SECONDS = 60

# W&B's files are logs of LevelDB's format (its log_format.md), behind a header of their own.
FILE_HEADER, BLOCK, CHUNK_HEADER = 7, 32768, struct.Struct("<IHB")
FULL, FIRST, LAST = 1, 2, 4


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = setting(10, low=1, help="steps between two lines of metrics")
    wandb: Literal["auto", "online", "offline", "off"] = setting(
        "auto", help="auto: online where there is a key, else offline"
    )
    project: str = setting("mlm_dist", help="W&B project")
    entity: str | None = setting(None, help="W&B entity (team); none: the key's default")
    name: str | None = setting(None, help="W&B run name; none: the run folder's name")
    slow_rank: float = setting(
        0.1, above=0, help="warn of a rank whose own work takes longer than the median rank's by this share of a step"
    )
    verbose: bool = setting(False, help="show on the console what the libraries say besides warnings (--verbose)")
    stall_minutes: float = setting(10.0, above=0, help="alert where no step was finished for so long")
    log_text: bool | None = setting(
        None, help="tell what the model fills in held-out texts; none: in the run folder, and in W&B if it isn't online"
    )
    log_diff: bool = setting(False, help="record the git diff of the working tree, in the run folder and in W&B")
    log_checkpoints: bool = setting(False, help="tell W&B of each checkpoint: where it stands, not its contents")


class Mirror:
    """A run's place in W&B. All methods return at once but `finish`, and none raises.

    log, folder: what the user wants, and the run folder
    say:         prints a line
    mode:        as `wandb_mode` gives it; nothing happens where it is "disabled"
    """

    def __init__(self, log: LogConfig, folder: Path, say: Callable[[str], None], mode: str) -> None:
        self.settings, self.folder, self.say, self.mode = log, folder, say, mode
        self.tasks: queue.Queue[Callable[[], object] | None] = queue.Queue(MOST_WAITING)
        self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self.is_on = mode != "disabled"
        self.run: Any = None
        self.row = self.launch = 0

    def start(self, config: Mapping[str, Any], step: int, lines: Sequence[str]) -> None:
        """Open the run.

        config: the run's configuration and other inputs
        lines:  what metrics.jsonl holds, of earlier launches, up to the step that this one begins at
        """
        if self.is_on:
            self.thread.start()
            self._do(lambda: self._open(redact(dict(config)), step, lines))

    def log(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self._do(lambda: self._log(record))

    def alert(self, title: str, text: str, level: str) -> None:
        """level: INFO, WARN or ERROR."""
        self._do(lambda: self.run.alert(title=title[:63], text=text, level=level))

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], record: Mapping[str, Any]
    ) -> None:
        """A table of a step; record: the step, the tokens, the time."""
        self._do(lambda: self._log({**record, name: wandb.Table(columns=list(columns), data=[list(r) for r in rows])}))

    def refer(self, name: str, kind: str, folder: Path, facts: Mapping[str, Any]) -> None:
        """A version of an artifact that says where a folder stands; its contents stay there."""
        address = folder.resolve().as_uri()
        self._do(lambda: self._log_artifact(name, kind, facts, lambda it: it.add_reference(address, checksum=False)))

    def upload(self, name: str, kind: str, folder: Path, facts: Mapping[str, Any]) -> None:
        """A version of an artifact with a folder's contents."""
        self._do(lambda: self._log_artifact(name, kind, facts, lambda it: it.add_dir(str(folder))))

    def finish(self, exit_code: int, seconds: float) -> None:
        """Send what waits, with the exit code, and wait for that, though not for ever."""
        if not (self.is_on and self.thread.is_alive()):
            return

        def end() -> None:
            self.run.finish(exit_code=exit_code)
            wandb.teardown()  # else W&B's own process may still be writing when a scheduler kills all of the job's

        self._do(end)
        try:
            self.tasks.put_nowait(None)
        except queue.Full:
            pass  # the thread stands still, and the wait for it is bounded
        self.thread.join(seconds)
        if self.thread.is_alive():
            self._off(f"it didn't answer within {seconds:g} s")

    def _do(self, task: Callable[[], object]) -> None:
        if not self.is_on:
            return
        try:
            self.tasks.put_nowait(task)
        except queue.Full:
            self._off(f"it doesn't answer, and {MOST_WAITING:,} lines wait for it")

    def _work(self) -> None:
        while (task := self.tasks.get()) is not None:
            if not self.is_on:
                continue
            try:
                task()
            except BaseException as error:  # W&B raises KeyboardInterrupt too
                self._off(str(error) or type(error).__name__)

    def _off(self, why: str) -> None:
        self.is_on = False
        self.say(
            f"warning: W&B is off for this launch: {why.rstrip('.')}; "
            "metrics.jsonl has it all, and the next launch sends the rest"
        )

    def _open(self, config: Mapping[str, Any], step: int, lines: Sequence[str]) -> None:
        """Begin or go on; send what is not in W&B's own files yet."""
        log, history = self.settings, History.read(self.folder)
        wandb.setup(wandb.Settings(silent=True))  # without a key, it would ask for one at the terminal otherwise
        self.run = wandb.init(
            project=log.project,
            entity=log.entity,
            name=redact_text(log.name or self.folder.name),
            id=run_id(self.folder),
            resume="allow",
            dir=str(self.folder),
            config=config,
            mode=self.mode,
            settings=settings_of(log),
        )
        self.row = max(history.next_row, self.run.step or 0)
        self.launch = history.launches + 1
        self.run.define_metric("*", step_metric="step")
        if log.log_diff:  # W&B's own would come with what it tells of the machine
            self.run.save(str(self.folder / DIFF), base_path=str(self.folder), policy="now")
        place = self.run.url if self.mode == "online" else self.folder / "wandb"
        self.say(f"W&B: {self.mode} run {self.run.id}, {place}")
        if history.last_step > step:
            self._log({"step": step, "rolled_back_from": history.last_step, "rolled_back_to": step})
        for line in lines:
            record = json.loads(line)
            if record["time"] not in history.times:
                self._log(record)

    def _log_artifact(
        self, name: str, kind: str, facts: Mapping[str, Any], fill: Callable[[wandb.Artifact], object]
    ) -> None:
        artifact = wandb.Artifact(f"{self.run.id}-{name}", type=kind, metadata=dict(facts))
        fill(artifact)
        self.run.log_artifact(artifact)

    def _log(self, record: Mapping[str, Any]) -> None:
        self.run.log({**record, "launch": self.launch}, step=self.row)
        self.row += 1


def settings_of(log: LogConfig) -> wandb.Settings:
    """W&B's own settings: quiet, quick to write, and nothing of the machine or the code that wasn't asked for."""
    wanted = {
        "console": "off",
        "silent": True,
        "init_timeout": INIT_SECONDS,
        "disable_git": not log.log_diff,
        "save_code": False,
        # internal names, which may go
        "x_transaction_log_flush_interval": 1.0,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
    }
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in wandb.Settings.model_fields})


def wandb_mode(log: LogConfig) -> Literal["online", "offline", "disabled"]:
    """What `auto` comes to: online where W&B finds a key, offline otherwise; WANDB_MODE is heeded."""
    if log.wandb == "off" or os.environ.get("WANDB_MODE") == "disabled":
        return "disabled"
    if log.wandb == "online" or log.wandb == "offline":
        return log.wandb
    if os.environ.get("WANDB_MODE") == "offline" or not has_key():
        return "offline"
    return "online"


def has_key() -> bool:
    """Whether this machine is logged in to W&B: by WANDB_API_KEY, or by what `wandb login` writes to the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        logins = netrc(os.environ.get("NETRC")).hosts
        return server.netloc in logins or server.hostname in logins  # with a port or without
    except (OSError, NetrcParseError):
        return False


def run_id(folder: Path) -> str:
    """The W&B id of a run folder, made on first use: all launches of the run share it."""
    path = folder / "wandb_id.txt"
    if not path.exists():
        replace_file(path, secrets.token_hex(4).encode())
    return path.read_text().strip()


# ---- what earlier launches logged


@dataclass
class History:
    """What W&B's files of a run folder hold of it. last_step: the last that was not rolled back."""

    next_row: int = 0
    launches: int = 0
    last_step: int = 0
    times: set[float] = field(default_factory=set)

    @staticmethod
    def read(folder: Path) -> "History":
        history = History()
        for path in sorted(folder.glob("wandb/*run-*/*.wandb"), key=launched_at):
            for row in rows_of(path):
                history.add(row)
        return history

    def add(self, row: Mapping[str, Any]) -> None:
        self.next_row = max(self.next_row, int(row.get("_step", -1)) + 1)
        self.launches = max(self.launches, int(row.get("launch", 0)))
        self.times.add(row.get("time"))
        step = int(row.get("step", 0))
        self.last_step = step if "rolled_back_to" in row else max(self.last_step, step)


def launched_at(path: Path) -> str:
    """When a launch began, by the name of its folder: run-20261125_001230-ID, or offline-run-... before the same."""
    return path.parent.name.partition("run-")[2]


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of the history in one of W&B's files, up to where it was cut short if it was."""
    for data in chunks(path.read_bytes()):
        record = Record()
        try:
            record.ParseFromString(data)
        except Exception:  # protobuf's own; the file's end may be torn
            return
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            yield {"_step": record.history.step.num} | row


def chunks(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, each put together from its chunks."""
    at, parts = FILE_HEADER, b""
    while at + CHUNK_HEADER.size <= len(data):
        room = BLOCK - at % BLOCK
        if room < CHUNK_HEADER.size:
            at += room
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(data, at)
        at += CHUNK_HEADER.size + length
        if kind == 0 or at > len(data):
            return
        parts = (b"" if kind in (FULL, FIRST) else parts) + data[at - length : at]
        if kind in (FULL, LAST):
            yield parts
