"""Worker processes for build.py: a pool that cleans up after itself, work handed out in order, and a progress line."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

from mlm_dist.signals import end_with_parent

LINE_EVERY_SECONDS = 5.0
STOPS = (signal.SIGINT, signal.SIGTERM)
UNDER_WAY = 4  # items a worker: enough that none waits, few enough for the memory
Item = TypeVar("Item")
Result = TypeVar("Result")


@contextlib.contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that leave Ctrl-C to their parent and never outlive it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=start_worker)
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # in the middle of a fork Python would lose one
        pool.submit(os.getpid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        yield pool
    except BaseException:
        for child in multiprocessing.active_children():  # what they are at is of no use any more
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def start_worker() -> None:
    """Runs first in a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    end_with_parent()


def in_order(
    pool: ProcessPoolExecutor, workers: int, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """(item, function(item)) for each item in turn, while a few items a worker are under way."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) >= UNDER_WAY * workers:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


class Progress:
    """One line that says how far a stage has come: rewritten on a terminal, else printed anew every few seconds."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total = stage, max(1, total)
        self.start = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def show(self, done: int, note: str) -> None:
        """done: of `total`; note: what else there is to say."""
        now = time.monotonic()
        if now - self.shown >= (0.2 if self.live else LINE_EVERY_SECONDS):
            self.shown = now
            share = min(1.0, done / self.total)
            left = (now - self.start) * (1 - share) / max(share, 1e-9)
            bar = f"[{'#' * int(share * 30):30}] " if self.live else ""
            line = f"{self.stage} {bar}{share:4.0%}, {note}, {clock(left)} left"
            print(f"\r{line}\x1b[K" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clear the line."""
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as 3:07 or 2:03:07."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
