"""The ranks of a run: who this process is, on which device, and what all ranks say together."""

import ctypes
import errno
import math
import os
import platform
import random
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from mlm_dist.cpu_products import use_faster_library
from mlm_dist.schema import ConfigError
from mlm_dist.signals import STOP_SIGNALS, hear

EXIT_CONFIG_ERROR = 2
EXIT_NON_FINITE = 17
EXIT_STOPPED = 85
EXIT_HANG = 124
EXIT_INTERRUPTED = 130

# of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

SECONDS_TO_INSIST = 5.0
SECONDS_TO_ANSWER = 2.0  # in which Python's own handler runs, where the process isn't inside a library


def exit_code_of(error: BaseException, refusals: tuple[type[Exception], ...]) -> int:
    """The exit code of a process that an exception ends; refusals, and a full disk, are said in one sentence."""
    if isinstance(error, refusals) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return EXIT_CONFIG_ERROR
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


@dataclass(frozen=True)
class World:
    """The ranks of one run, as this rank sees them.

    rank, size:  this process among all of them
    local_rank:  this process on its machine
    device:      where this rank's model lives
    control:     a gloo group for numbers that stay on the host, so that agreeing on them never waits for a GPU
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over ranks of a host tensor, as a new one."""
        total = numbers.clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.control)
        return total

    def max(self, numbers: torch.Tensor) -> torch.Tensor:
        """The elementwise maximum over ranks of a host tensor, as a new one."""
        largest = numbers.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return largest

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank: the same answer on all of them."""
        return bool(self.max(torch.tensor([int(flag)])).item())

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item (plain picklable data of our own), in rank order, on every rank."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.control)
        return items

    def gather_numbers(self, numbers: torch.Tensor) -> torch.Tensor:
        """Every rank's host tensor (n,), in rank order, on every rank: (ranks, n)."""
        parts = [torch.empty_like(numbers) for _ in range(self.size)]
        dist.all_gather(parts, numbers, group=self.control)
        return torch.stack(parts)

    def broadcast(self, item: Any) -> Any:
        """Rank 0's item, on every rank."""
        box = [item]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def group_of(self, tensor: torch.Tensor) -> dist.ProcessGroup:
        """The group whose collectives take the tensor where it lies."""
        group = self.control if tensor.device.type == "cpu" else dist.group.WORLD
        assert group is not None
        return group

    def barrier(self) -> None:
        dist.barrier(group=self.control)


@contextmanager
def join(timeout_seconds: float) -> Iterator[World]:
    """Join the ranks that the launcher started (deepspeed, torchrun), or be a world of one, for a `with` block.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without RANK this is the only rank.
    Raises ConfigError where the rendezvous port is taken or the device is missing.
    """
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    missing = [name for name in RENDEZVOUS if name not in os.environ]
    if missing:
        raise ConfigError(f"RANK is set and {', '.join(missing)} is not; start with deepspeed or torchrun, or set all")
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = pick_device(local_rank)
    timeout = timedelta(seconds=timeout_seconds)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"port {os.environ['MASTER_PORT']} is in use, by another run perhaps; "
                f"give this one a free port: deepspeed --master_port {free_port()} ..."
            ) from error
        raise
    control = dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else dist.group.WORLD
    try:
        yield World(rank, size, local_rank, device, control)
    finally:
        dist.destroy_process_group()


def pick_device(local_rank: int) -> torch.device:
    """This rank's GPU, or the CPU where there is none or DS_ACCELERATOR=cpu asks for it."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        keep_memory()
        use_faster_library()
        share_cores(int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1))
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            f"start at most that many ranks on it (deepspeed --num_gpus {torch.cuda.device_count()} ...)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def keep_memory() -> None:
    """Let glibc keep what a CPU rank frees: page faults for large tensors, anew at every step, cost some 5 %."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def share_cores(ranks_here: int) -> None:
    """Give each CPU rank of this machine its share of the cores, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators; the same on every rank, so that all build the same weights."""
    random.seed(seed)
    torch.manual_seed(seed)


class StopFlag:
    """Set by SIGTERM, SIGUSR1 or SIGINT while the `with` block runs; that is all the handlers do.

    The ranks agree on it at a step. A SIGINT that comes 5 s or more after the first signal ends the rank at once;
    before that it is the launcher, which passes Ctrl-C on to ranks that the terminal has told already. Python runs no
    handler while the process waits inside a library, for a rank that hangs perhaps: a thread sees to that.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.since = self.heard_first = math.inf

    def __enter__(self) -> "StopFlag":
        self.previous = {number: signal.signal(number, self._set) for number in STOP_SIGNALS}
        self.end_hearing = hear(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.end_hearing()

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now - self.heard_first >= SECONDS_TO_INSIST:
            time.sleep(SECONDS_TO_ANSWER)
            os._exit(EXIT_INTERRUPTED)
        if number in STOP_SIGNALS:
            self.heard_first = min(self.heard_first, now)

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def _set(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now - self.since >= SECONDS_TO_INSIST:
            raise KeyboardInterrupt
        self.since = min(self.since, now)
        self.signal_name = signal.Signals(number).name
