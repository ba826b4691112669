"""Where numbers go: the console, RUN/metrics.jsonl (the truth) and W&B (its mirror)."""

import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal, TextIO
from urllib.parse import urlsplit

import wandb

from mlm_dist.metrics import Spikes
from mlm_dist.schema import redact, setting


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
    log_diff: bool = setting(False, help="let W&B record the git diff of the working tree")


class Tracker:
    """The run's log on rank 0; on the other ranks the same object does nothing.

    folder:  the run folder
    config:  the resolved run configuration, flat, for W&B
    total:   tells the length of the run in steps, or None while it is not known
    """

    def __init__(
        self, log: LogConfig, folder: Path, config: dict[str, Any], is_main: bool, total: Callable[[], int | None]
    ) -> None:
        self.is_main, self.total = is_main, total
        self.run: wandb.Run | None = None
        self.metrics: TextIO | None = None
        self.line_open = False
        self.spikes = Spikes()
        self.started, self.first_step = time.perf_counter(), 0
        self.folder, self.log_config, self.config = folder, log, config

    def start(self, step: int) -> None:
        """Open the log of a launch that goes on from a step: what an earlier launch logged beyond it is dropped."""
        self.started, self.first_step = time.perf_counter(), step
        if self.is_main:
            cut_metrics(self.folder, step)
            self.metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)
            self._guard(self._start_wandb)

    def log(self, step: int, numbers: dict[str, float], tokens: int) -> None:
        """Write one line of numbers (training or, with names under `valid/`, held-out) as of a step."""
        if not self.is_main:
            return
        assert self.metrics is not None
        record = {"step": step, "tokens": tokens, "time": round(time.time(), 3)}
        # JSON has no word for what isn't finite
        record |= {name: x if x is not None and math.isfinite(x) else None for name, x in numbers.items()}
        self.metrics.write(json.dumps(record, allow_nan=False) + "\n")
        self._guard(lambda: self.run and self.run.log({"step": step, "tokens": tokens, **numbers}))
        if "loss" in numbers:
            self._progress(progress_line(step, self.total(), numbers, self._seconds_left(step)))
            usual = self.spikes.usual(numbers["loss"])
            if usual is not None:
                self.say(
                    f"warning: the loss of {numbers['loss']:.4f} at step {step} stands out: it was about {usual:.4f}"
                )
        else:
            self.say(
                f"step {step}  held-out loss {numbers['valid/loss']:.4f}, "
                f"accuracy {100 * numbers['valid/accuracy']:.1f} %"
            )

    def say(self, text: str) -> None:
        """Print one line on the main rank, below the progress line where one stands."""
        if self.is_main:
            put(("\n" if self.line_open else "") + text + "\n")
            self.line_open = False

    def finish(self, exit_code: int) -> None:
        """Close the log; W&B records the exit code."""
        if self.metrics is not None:
            self.metrics.close()
            self._guard(lambda: self.run and self.run.finish(exit_code=exit_code))

    def _progress(self, line: str) -> None:
        if sys.stdout.isatty():
            put(f"\r\x1b[K{line}")
            self.line_open = True
        else:
            put(f"{line}\n")

    def _seconds_left(self, step: int) -> float | None:
        total, done = self.total(), step - self.first_step
        if total is None or done <= 0:
            return None
        return (total - step) * (time.perf_counter() - self.started) / done

    def _start_wandb(self) -> None:
        log, folder = self.log_config, self.folder
        mode = wandb_mode(log)
        if mode == "disabled":
            return
        self.run = wandb.init(
            project=log.project,
            entity=log.entity,
            name=log.name or folder.name,
            id=run_id(folder),
            resume="allow",
            dir=str(folder),
            config=redact(self.config),
            mode=mode,
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=60,
                disable_git=not log.log_diff,
                save_code=False,
                x_transaction_log_flush_interval=1.0,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        self.run.define_metric("*", step_metric="step")
        put(f"W&B: {mode} run {self.run.id}, {self.run.url if mode == 'online' else folder / 'wandb'}\n")

    def _guard(self, call: Callable[[], object]) -> None:
        # W&B is a mirror: whatever it raises, training goes on and metrics.jsonl stays whole
        try:
            call()
        except Exception as error:
            self.run = None
            print(f"warning: W&B is off for this launch: {error}", file=sys.stderr)


def put(text: str) -> None:
    """Print. Where nobody listens any more, since the connection to the launcher was cut, what follows is dropped.

    The run goes on, to its end or to the checkpoint that it was told to save: metrics.jsonl has it all.
    """
    try:
        print(text, end="", flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


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
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def run_id(folder: Path) -> str:
    """The W&B id of a run folder, made on first use: all launches of the run share it."""
    path = folder / "wandb_id.txt"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def cut_metrics(folder: Path, step: int) -> None:
    """Drop what metrics.jsonl holds beyond a step, before the run goes on from there: each step is logged once."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if is_within(line, step)]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def is_within(line: str, step: int) -> bool:
    # a killed run may leave half a line
    try:
        return json.loads(line)["step"] <= step
    except json.JSONDecodeError:
        return False


def progress_line(step: int, total: int | None, numbers: dict[str, float], seconds_left: float | None) -> str:
    """`step 120/600  loss 5.4321  lr 1.0e-03  12,345 tokens/s  mfu 51 %  left 3:20`."""
    parts = [
        f"step {step}/{total}" if total else f"step {step}",
        f"loss {numbers['loss']:.4f}",
        f"lr {numbers['lr']:.2e}",
        f"{numbers['tokens_per_second']:,.0f} tokens/s",
        f"mfu {100 * numbers['mfu']:.0f} %",
    ]
    if seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append(f"left {hours}:{minutes:02d}:{seconds:02d}" if hours else f"left {minutes}:{seconds:02d}")
    return "  ".join(parts)
