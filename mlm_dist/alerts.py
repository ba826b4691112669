"""Alerts: what someone should hear of who isn't looking. In the log, in RUN/alerts.jsonl and through W&B."""

import json
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

Level = Literal["INFO", "WARN", "ERROR"]

QUIET_SECONDS = 900.0  # between two alerts of a kind; a run that ends is always told of

RATES_COMPARED = 32
FALLEN = 2 / 3
FALLEN_REPORTS = 3  # in a row: a slow one by itself may be an evaluation or a neighbour's


class Alerts:
    """The alerts of one launch, on the main rank; callable from any thread.

    folder: the run folder
    say:    prints a line
    send:   W&B's, (title, text, level)
    """

    def __init__(self, folder: Path, say: Callable[[str], None], send: Callable[[str, str, str], None]) -> None:
        self.path, self.say, self.send = folder / "alerts.jsonl", say, send
        self.last: dict[str, float] = {}
        self.kept_back: dict[str, int] = {}
        self.newest: str | None = None  # what and when, in a few words
        self.lock = threading.Lock()

    def tell(self, kind: str, text: str, step: int, level: Level = "WARN", always: bool = False) -> None:
        """Alert, or only print, where one of the kind was sent less than QUIET_SECONDS ago.

        kind: a few words, the alert's title; text: a sentence. A failure is not printed: whoever meets it does that.
        """
        with self.lock:
            now = time.monotonic()
            self.newest = f"{kind} at step {step}"
            if level != "ERROR":
                self.say(f"warning: {text}" if level == "WARN" else text)
            if not always and now - self.last.get(kind, -QUIET_SECONDS) < QUIET_SECONDS:
                self.kept_back[kind] = self.kept_back.get(kind, 0) + 1
                return
            self.last[kind] = now
            if more := self.kept_back.pop(kind, 0):
                text += f" ({more} more since the last alert of this kind)"
            self.send(kind, text, level)  # first: that the disk is full is what it may tell
            record = {"step": step, "time": round(time.time(), 3), "level": level, "title": kind, "text": text}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


class Slowdown:
    """Tells throughput that has fallen by a third."""

    def __init__(self) -> None:
        self.rates: deque[float] = deque(maxlen=RATES_COMPARED)
        self.low: list[float] = []

    def usual(self, rate: float) -> float | None:
        """The median of the last rates where the last FALLEN_REPORTS all lie a third below it; None otherwise."""
        if len(self.rates) < RATES_COMPARED // 2:
            self.rates.append(rate)
            return None
        usual = statistics.median(self.rates)
        if rate >= FALLEN * usual:
            self.rates.append(rate)
            self.low.clear()
            return None
        self.low.append(rate)
        if len(self.low) < FALLEN_REPORTS:
            return None
        # told once: from here on the low rate is what is usual
        self.rates.clear()
        self.low.clear()
        return usual
