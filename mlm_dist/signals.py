"""What tells a run to stop, heard also while the process waits inside a library, where Python runs no handler."""

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
