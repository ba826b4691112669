"""What ends a run that hangs: the stacks of every rank that answers, the names of those that don't, an exit code.

Each rank's watchdog is a thread that writes a sign of life to RUN/alive/, so that a rank whose process is stopped, dead
or out of reach can be told from one that waits for it.
"""

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mlm_dist.world import EXIT_HANG

LONGEST_INTERVAL_SECONDS = 5.0
SIGNS_PER_TIMEOUT = 20
LISTENING = 4  # intervals in which a rank that lives is sure to give a sign
GONE = "gone"  # the last sign of a rank that ended like this one is about to
BACKSTOP_SECONDS = 60.0


class Watchdog:
    """Ends this process with EXIT_HANG where `beat` is not called for `timeout_seconds`, while the `with` block runs.

    folder:  the run folder, which all ranks see
    on_hang: called before the end, by the lowest rank that answers
    """

    def __init__(
        self, folder: Path, rank: int, size: int, timeout_seconds: float, on_hang: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.rank, self.size = folder / "alive", rank, size
        self.timeout_seconds, self.on_hang = timeout_seconds, on_hang
        self.interval = min(LONGEST_INTERVAL_SECONDS, timeout_seconds / SIGNS_PER_TIMEOUT)
        self.doing, self.since, self.signs = "starting", time.monotonic(), 0
        self.stall_seconds, self.on_stall, self.told = math.inf, lambda doing, seconds: None, 0.0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.folder.mkdir(exist_ok=True)
        self._give_sign()  # in place of what a launch before it left
        self.since = time.monotonic()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Watch no more: what follows can't hang for long."""
        self.ended.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            self._file(self.rank).unlink(missing_ok=True)

    def beat(self, doing: str) -> None:
        """Say that there is progress, and what comes next."""
        self.doing, self.since = doing, time.monotonic()

    def watch_stalls(self, seconds: float, on_stall: Callable[[str, float], None]) -> None:
        """Have `on_stall(doing, seconds)` called, once, each time that there is no beat for so long; from a thread."""
        self.stall_seconds, self.on_stall = seconds, on_stall

    def _watch(self) -> None:
        while not self.ended.wait(self.interval):
            # should a library never let go of Python's lock, this thread can't run, and faulthandler's own ends it all
            faulthandler.dump_traceback_later(self.timeout_seconds + BACKSTOP_SECONDS, exit=True)
            self._give_sign()
            since, idle = self.since, time.monotonic() - self.since
            if idle > self.stall_seconds and self.told != since:
                self.told = since
                with contextlib.suppress(Exception):  # the watch goes on
                    self.on_stall(self.doing, idle)
            if idle > self.timeout_seconds:
                self._end()

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}"

    def _give_sign(self) -> None:
        self.signs += 1
        self._write(str(self.signs))

    def _write(self, sign: str) -> None:
        with contextlib.suppress(OSError):  # a full disk is for others to report
            self._file(self.rank).write_text(f"{sign} {self.doing}")

    def _end(self) -> None:
        answers = self._listen()
        if self.rank == min(answers):
            say(describe(self.timeout_seconds, answers, self.size))
            with contextlib.suppress(Exception):  # nothing may keep the process from ending
                self.on_hang()
        say(f"rank {self.rank}, {self.doing}, the stack of each thread:")
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        self._write(GONE)
        os._exit(EXIT_HANG)

    def _listen(self) -> dict[int, str]:
        """What each rank that gives signs of life is doing, this one among them."""
        before = {rank: self._sign(rank) for rank in range(self.size)}
        answers = {self.rank: self.doing}
        for _ in range(LISTENING):
            time.sleep(self.interval)
            self._give_sign()
            for rank in range(self.size):
                sign = self._sign(rank)
                if sign and (sign != before[rank] or sign.startswith(GONE)):
                    answers[rank] = sign.partition(" ")[2]
        return answers

    def _sign(self, rank: int) -> str:
        try:
            return self._file(rank).read_text()
        except OSError:
            return ""


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody may listen any more
        print(text, file=sys.stderr, flush=True)


def describe(timeout_seconds: float, answers: dict[int, str], size: int) -> str:
    """The sentence that says who hangs."""
    silent = [rank for rank in range(size) if rank not in answers]
    if not silent:
        return f"error: no progress for {timeout_seconds:g} s, and every rank answers: the stacks tell where they wait"
    names = ", ".join(map(str, silent[:16])) + (f" and {len(silent) - 16} more" if len(silent) > 16 else "")
    many = len(silent) > 1
    return (
        f"error: no progress for {timeout_seconds:g} s: rank{'s' if many else ''} {names} "
        f"{'do' if many else 'does'}n't answer (stopped, dead, or on a machine that is)"
    )
