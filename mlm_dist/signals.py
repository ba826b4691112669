"""What tells a process to end: signals, heard also while it waits inside a library, where Python runs no handler; and
the end of the process that started it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def hear(act: Callable[[int], object]) -> Callable[[], None]:
    """Have `act` called on a thread with the number of each signal that has a handler. Returns what ends that."""
    heard, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    before = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def listen() -> None:
        while number := os.read(heard, 1):
            act(number[0])
        os.close(heard)

    def end() -> None:
        signal.set_wakeup_fd(before)
        os.close(wakeup)  # which ends the thread

    threading.Thread(target=listen, name="signals", daemon=True).start()
    return end


def end_with_parent() -> None:
    """Have this process, started by multiprocessing, end when its parent does, however that came about."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
