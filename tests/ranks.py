"""Run a function on several real ranks (gloo, CPU), each a process of its own."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from mlm_dist.world import free_port

TIMEOUT_SECONDS = 300


def on_ranks(size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """What `fn(*args)` returns on each rank, in rank order. `fn` is a module's function; it joins the world itself.

    Raises AssertionError with the rank's traceback when a rank fails or does not end in time.
    """
    port, deadline = free_port(), time.monotonic() + TIMEOUT_SECONDS
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(rank_main, (size, port, folder, fn, args), size, join=False, start_method="spawn")
        try:
            while not context.join(timeout=max(1.0, deadline - time.monotonic())):
                assert time.monotonic() < deadline, f"ranks {[p.is_alive() for p in context.processes]} did not end"
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(size)]


def rank_main(rank: int, size: int, port: int, folder: str, fn: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.save(fn(*args), Path(folder) / str(rank))
    os._exit(0)  # gloo's threads abort now and then where the interpreter ends by itself
