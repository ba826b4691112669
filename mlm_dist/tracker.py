"""Where numbers go: the console, RUN/metrics.jsonl (the truth), W&B (its mirror), and alerts to who isn't looking."""

import errno
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from mlm_dist.alerts import Alerts, Level, Slowdown
from mlm_dist.logs import said
from mlm_dist.metrics import Spikes
from mlm_dist.mirror import LogConfig, Mirror, wandb_mode
from mlm_dist.predictions import FILE as PREDICTIONS
from mlm_dist.predictions import GUESSES, Sentence
from mlm_dist.run_folder import cut_lines


class Tracker:
    """The run's log on rank 0; on the other ranks the same object does nothing.

    folder: the run folder
    total:  tells the length of the run in steps, or None while it is not known
    """

    def __init__(self, log: LogConfig, folder: Path, is_main: bool, total: Callable[[], int | None]) -> None:
        self.is_main, self.total, self.folder = is_main, total, folder
        self.metrics: TextIO | None = None
        self.problem: str | None = None  # why a file of the run can't be written to
        self.line_open = False
        self.spikes, self.slowdown = Spikes(), Slowdown()
        self.started, self.first_step, self.log_text = time.perf_counter(), 0, log.log_text
        self.mirror = Mirror(log, folder, self.say, wandb_mode(log) if is_main else "disabled")
        self.alerts = Alerts(folder, self.say, self.mirror.alert)

    def start(self, step: int, inputs: Mapping[str, Any], resumed: bool) -> None:
        """Open the log of a launch that begins at a step: what an earlier launch logged beyond it is dropped.

        inputs:  the configuration and what else the run comes from, for W&B
        resumed: from a checkpoint of the run; else nothing stays of what was logged before
        """
        kept = step if resumed else -1
        self.started, self.first_step = time.perf_counter(), step
        if self.is_main:
            lines = cut_lines(self.folder / "metrics.jsonl", kept)
            cut_lines(self.folder / PREDICTIONS, kept)
            self.metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)
            self.mirror.start(inputs, step, lines)

    def log(self, step: int, numbers: dict[str, float], tokens: int) -> None:
        """Write one line of numbers as of a step: training's or, with names under `valid/` or `checkpoint/`, others."""
        if not self.is_main:
            return
        assert self.metrics is not None
        record = {"step": step, "tokens": tokens, "time": round(time.time(), 6)}
        # JSON has no word for what isn't finite
        finite = {name: x if x is not None and math.isfinite(x) else None for name, x in numbers.items()}
        with self.noting():
            self.metrics.write(json.dumps(record | finite, allow_nan=False) + "\n")
        self.mirror.log(record | numbers)
        if "loss" in numbers:
            self._progress(progress_line(step, self.total(), numbers, self._seconds_left(step), self.alerts.newest))
            self._watch(step, numbers)
        elif "valid/loss" in numbers:
            self.say(
                f"step {step}  held-out loss {numbers['valid/loss']:.4f}, "
                f"accuracy {100 * numbers['valid/accuracy']:.1f} %"
            )

    def show(self, sentences: Sequence[Sentence], step: int, tokens: int) -> None:
        """Give W&B what the model put in the place of masks, a row for each mask, where the text may go there."""
        allowed = self.mirror.mode == "offline" if self.log_text is None else self.log_text
        if self.is_main and sentences and allowed:
            guessed = [name for number in range(1, GUESSES + 1) for name in (f"guess {number}", f"p {number}")]
            rows = [
                [sentence["text"], mask["truth"], *chain.from_iterable(mask["guesses"])]
                for sentence in sentences
                for mask in sentence["masks"]
            ]
            self.mirror.table("predictions", ["text", "truth", *guessed], rows, {"step": step, "tokens": tokens})

    def alert(self, kind: str, text: str, step: int, level: Level = "WARN", always: bool = False) -> None:
        """Tell who isn't looking, as Alerts does."""
        if self.is_main:
            with self.noting():
                self.alerts.tell(kind, text, step, level, always)

    def _watch(self, step: int, numbers: Mapping[str, float]) -> None:
        """Alert where the numbers of a report call for it."""
        loss, rate = numbers["loss"], numbers["tokens_per_second"]
        usual = self.spikes.usual(loss)
        if usual is not None:
            text = f"the loss of {loss:.4f} at step {step} stands out: it was about {usual:.4f}"
            self.alert("loss spike", text, step)
        usual = self.slowdown.usual(rate)
        if usual is not None:
            text = f"throughput has fallen to {rate:,.0f} tokens/s at step {step}: it was about {usual:,.0f}"
            self.alert("throughput down", text, step)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Keep what the disk says as `problem`: the other ranks know nothing of it, and have to agree to end."""
        try:
            yield
        except OSError as error:
            self.problem = (
                f"{error.filename or self.folder} can't be written to: {os.strerror(error.errno or 0).lower()}"
            )
            self.problem += "; make room and start again: the checkpoints stand" * (error.errno == errno.ENOSPC)

    def say(self, text: str) -> None:
        """Print one line on the main rank, below the progress line where one stands."""
        if self.is_main:
            put(("\n" if self.line_open else "") + text + "\n")
            self.line_open = False
            said.info(text)

    def finish(self, exit_code: int, seconds: float = 60.0) -> None:
        """Close the log; W&B records the exit code, and is waited for, so long at most."""
        if self.metrics is not None:
            with self.noting():
                self.metrics.close()
            self.mirror.finish(exit_code, seconds)

    def _progress(self, line: str) -> None:
        said.info(line)
        if sys.stdout.isatty():
            # cut: what goes on in a second row would stay there when the line is written anew
            put(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}")
            self.line_open = True
        else:
            put(f"{line}\n")

    def _seconds_left(self, step: int) -> float | None:
        total, done = self.total(), step - self.first_step
        if total is None or done <= 0:
            return None
        return (total - step) * (time.perf_counter() - self.started) / done


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


def progress_line(
    step: int, total: int | None, numbers: dict[str, float], seconds_left: float | None, alert: str | None = None
) -> str:
    """`step 120/600  loss 5.4321  lr 1.0e-03  12,345 tokens/s  mfu 51 %  left 3:20  [loss spike at step 90]`."""
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
    if alert:
        parts.append(f"[{alert}]")
    return "  ".join(parts)
