import os
import signal
import socket

import pytest
import torch
from ranks import on_ranks

from mlm_dist import world
from mlm_dist.schema import ConfigError
from mlm_dist.world import StopFlag


def talk() -> dict:
    with world.join(60) as here:
        return {
            "sum": here.sum(torch.tensor([here.rank + 1, 10])).tolist(),
            "max": here.max(torch.tensor([here.rank, -here.rank])).tolist(),
            "any": [here.any(False), here.any(here.rank == 1), here.any(True)],
            "gather": here.gather({"rank": here.rank}),
            "broadcast": here.broadcast(f"from {here.rank}"),
            "is_main": here.is_main,
            "device": str(here.device),
        }


def test_two_ranks_say_the_same() -> None:
    first, second = on_ranks(2, talk)
    assert (first.pop("is_main"), second.pop("is_main")) == (True, False)
    assert first == second
    assert first["sum"] == [3, 20] and first["max"] == [1, 0] and first["any"] == [False, True, True]
    assert first["gather"] == [{"rank": 0}, {"rank": 1}] and first["broadcast"] == "from 0" and first["device"] == "cpu"


def join_on(port: int) -> str:
    os.environ["MASTER_PORT"] = str(port)
    try:
        with world.join(60):
            return "joined"
    except ConfigError as error:
        return str(error)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        [said] = on_ranks(1, join_on, port)
    assert f"port {port} is in use" in said and "--master_port" in said


@pytest.mark.parametrize("number", world.STOP_SIGNALS)
def test_a_signal_only_sets_the_flag(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.signal_name == number.name
    assert signal.getsignal(number) is before


def test_only_a_late_sigint_insists() -> None:
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # what the launcher passes on
        stop.since -= world.SECONDS_TO_INSIST
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def join_with_rank_alone() -> str:
    for name in ("LOCAL_RANK", "MASTER_PORT"):
        del os.environ[name]
    with pytest.raises(ConfigError) as refused, world.join(60):
        pass
    return str(refused.value)


def test_a_half_set_environment_is_named() -> None:
    [said] = on_ranks(1, join_with_rank_alone)
    assert said.startswith("RANK is set and LOCAL_RANK, MASTER_PORT is not")


def test_a_cpu_rank_takes_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    try:
        world.share_cores(len(os.sched_getaffinity(0)))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
