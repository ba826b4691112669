"""Work beside training: what is to be written is copied to the host, and a thread writes it while the steps go on."""

import io
import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from mlm_dist.world import World


def copy_to_host(item: Any) -> Any:
    """A copy of plain values, objects and tensors, all of it on the host, that shares no memory with what was copied.

    Tensors that share memory with each other still do so in the copy: torch.save makes the same file of both.
    """
    pickled = io.BytesIO()
    copier = Copier(pickled)
    copier.dump(item)
    if any(source.is_cuda for source in copier.sources):
        torch.cuda.current_stream().synchronize()
    pickled.seek(0)
    return Restorer(pickled, copier.copies).load()


class Copier(pickle.Pickler):
    """Pickles all but the tensors: a number stands for each, and its copy is in `copies`."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.sources: list[torch.Tensor] = []  # held, so that no other object gets the id of one
        self.copies: list[torch.Tensor] = []
        self.numbers: dict[int, int] = {}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def persistent_id(self, item: Any) -> int | None:
        if not isinstance(item, torch.Tensor):
            return None
        if id(item) not in self.numbers:
            self.numbers[id(item)] = len(self.copies)
            self.sources.append(item)
            self.copies.append(self._copy(item.detach()))
        return self.numbers[id(item)]

    def _copy(self, source: torch.Tensor) -> torch.Tensor:
        storage = source.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = on_host(storage)
        host = torch.empty(0, dtype=source.dtype)
        return host.set_(self.storages[storage._cdata], source.storage_offset(), source.size(), source.stride())


class Restorer(pickle.Unpickler):
    """Reads back what Copier has just written."""

    def __init__(self, file: io.BytesIO, copies: list[torch.Tensor]) -> None:
        super().__init__(file)
        self.copies = copies

    def persistent_load(self, number: int) -> torch.Tensor:
        return self.copies[number]


def on_host(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A copy of all its bytes. One of a GPU's is under way when this returns, into page-locked memory: several times as
    fast as into other memory, and torch keeps it for the next save, since locking it takes longer than the copy."""
    source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    copy = torch.empty(source.numel(), dtype=torch.uint8, pin_memory=source.is_cuda)
    return copy.copy_(source, non_blocking=True).untyped_storage()


class TaskError(RuntimeError):
    """A rank's part of a task failed; raised on every rank."""


class Background:
    """One task at a time that every rank has: on a thread, or, where `beside` is False, at once on the caller's.

    The thread takes no part in any collective: what the ranks come to, they tell each other on their main threads.
    """

    def __init__(self, world: World, beside: bool) -> None:
        self.world = world
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if beside else None
        self.task: Future = Future()

    def start(self, work: Callable[[], Any]) -> None:
        """Begin with this rank's part of the next task. Its last one has been collected."""
        if self.thread:
            self.task = self.thread.submit(work)
            return
        self.task = Future()
        try:
            self.task.set_result(work())
        except Exception as error:
            self.task.set_exception(error)

    def finished(self) -> bool:
        return self.task.done()

    def failed(self) -> bool:
        return self.task.done() and self.task.exception() is not None

    def collect(self) -> list[Any]:
        """What each rank's part returned, by rank. Waits for this rank's. All ranks call it.

        Raises TaskError on every rank where it failed on some, with the words of the first of them.
        """
        error = self.task.exception()
        said = None
        if error is not None:
            known = isinstance(error, OSError | RuntimeError)
            said = f"{'' if known else type(error).__name__ + ': '}{error} (rank {self.world.rank})"
        results = self.world.gather((said, None if error else self.task.result()))
        for said, _ in results:
            if said is not None:
                raise TaskError(said) from error
        return [result for _, result in results]

    def close(self) -> None:
        """Take no more tasks. What still runs is left alone: it ends with the process."""
        if self.thread:
            self.thread.shutdown(wait=False)
