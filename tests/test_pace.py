import platform
import time
from pathlib import Path

import pytest
import torch
from launching import ROOT, metrics, overridden, pretrain
from ranks import on_ranks
from torch import nn

from mlm_dist import config, train, world
from mlm_dist.pace import SECONDS_TO_REPEAT, SlowRank, Stopwatch, slowest
from mlm_dist.world import StopFlag

# ---- the watch


def test_a_watch_adds_up_its_laps_alone() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.lap():
            time.sleep(0.03)
        time.sleep(0.1)
    assert 0.06 <= watch.read() < 0.2
    assert watch.read() == 0.0, "a reading starts again"
    watch.go_on()
    assert watch.read() == 0.0, "outside of a lap it doesn't run"


def test_a_lap_that_fails_ends() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with pytest.raises(ValueError), watch.lap():
        raise ValueError
    time.sleep(0.02)
    watch.go_on()
    assert watch.read() < 0.01


def test_hooks_that_wait_before_a_part_are_left_out() -> None:
    class Sleeper(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            return x

    model, watch = nn.Sequential(Sleeper(), nn.Sequential(Sleeper())), Stopwatch(torch.device("cpu"))
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    watch.leave_out_hooks_of(model)
    with watch.lap():
        model(torch.ones(1))
    assert 0.04 <= watch.read() < 0.3
    model(torch.ones(1))
    assert watch.read() == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_its_own_clock_counts_and_nothing_waits_for_it() -> None:
    watch, started = Stopwatch(torch.device("cuda", 0)), time.perf_counter()
    with watch.lap():
        torch.cuda._sleep(10**9)  # clock cycles: about half a second
    torch.cuda._sleep(10**9)
    assert time.perf_counter() - started < 0.1
    assert 0.2 < watch.read() < 2.0


# ---- the judge


def test_the_slowest_is_measured_against_the_median_rank() -> None:
    assert slowest([1.0, 5.0, 2.0]) == (1, 3.0)
    assert slowest([1.0, 5.0]) == (1, 4.0)
    assert slowest([1.0, 1.0, 3.0, 9.0]) == (3, 8.0)
    assert slowest([2.0]) == (0, 0.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


EVEN, SLOW = [3.0, 3.1, 3.0], [3.0, 3.1, 4.5]  # own seconds of ten steps that take 10 s


def test_a_rank_that_stays_slow_is_told_once_then_hourly_and_when_it_is_over() -> None:
    clock = Clock()
    judge = SlowRank(["a", "b", "c"], 0.1, clock)

    def told(own_seconds: list[float]) -> str | None:
        return judge.judge(10, 10.0, own_seconds)

    assert [told(EVEN), told(EVEN), told(SLOW)] == [None, None, None], "one stretch may be a hiccup"
    said = told(SLOW)
    assert said is not None and "rank 2 (host c) is slow" in said and "0.140 s a step" in said and "14 %" in said
    assert [told(SLOW), told(EVEN), told(SLOW), told(SLOW)] == [None] * 4
    clock.now = SECONDS_TO_REPEAT
    assert "rank 2 (host c) is slow" in (told(SLOW) or "")
    other = [4.5, 3.1, 3.0]
    assert told(other) is None and "rank 0 (host a) is slow" in (told(other) or "")
    assert [told(EVEN), told(EVEN), told(EVEN)] == [None, "rank 0 (host a) keeps up with the others again", None]


def test_hiccups_small_lags_and_short_stretches_are_not_told() -> None:
    judge = SlowRank(["a", "b"], 0.1)
    assert [judge.judge(10, 10.0, own) for own in ([9.0, 1.0], [1.0, 9.0], [1.0, 1.0]) * 5] == [None] * 15
    assert [judge.judge(10, 10.0, [1.9, 1.0]) for _ in range(5)] == [None] * 5, "9 % of a step"
    assert [judge.judge(2000, 10.0, [9.0, 1.0]) for _ in range(5)] == [None] * 5, "4 ms a step"
    assert [judge.judge(100, 1.0, [0.9, 0.1]) for _ in range(9)] == [None] * 9, "9 s"
    assert judge.judge(100, 1.0, [0.9, 0.1]) is not None
    judge = SlowRank(["a", "b"], 0.1)
    said = [judge.judge(1, 1.0, [0.5, 0.1]) for _ in range(20)]
    assert said[:19] == [None] * 19 and "rank 0 (host a) is slow" in (said[19] or ""), "two stretches of ten steps"


# ---- on ranks


def options(seconds: float) -> tuple[str, ...]:
    return (
        "model.kind=factory", "model.factory=tests.faulty:slow", f"model.options.seconds={seconds}",
        "model.options.ranks=[1]", "log.every_steps=10",
    )  # fmt: skip


@pytest.mark.slow
def test_a_slow_rank_is_named_with_its_host_and_even_ranks_are_not(toy: Path, tmp_path: Path) -> None:
    slow = pretrain(toy, tmp_path / "slow", *options(0.1), "run.steps=100")
    assert slow.returncode == 0, slow.stdout
    assert slow.stdout.count(f"warning: rank 1 (host {platform.node()}) is slow") == 1, slow.stdout
    assert set(metrics(tmp_path / "slow", "slowest_rank").values()) == {1}
    lags, seconds = (metrics(tmp_path / "slow", name) for name in ("slowest_rank_lag", "step_seconds"))
    for step, lag in lags.items():  # it slept twice a step
        assert lag * seconds[step] == pytest.approx(0.2, rel=0.5) and lag < 1
    even = pretrain(toy, tmp_path / "even", *options(0.0), "run.steps=1000")
    assert even.returncode == 0, even.stdout
    assert "is slow" not in even.stdout, even.stdout


def train_with_a_slow_rank(toy: Path, folder: Path) -> None:
    with world.join(120) as here, StopFlag() as stop:
        for stage in (0, 2, 3):
            overrides = overridden(
                toy, folder / str(stage), *options(0.1), "run.steps=20", f"engine.zero_stage={stage}"
            )
            assert train.train_on(config.load(ROOT / "configs/quickstart.yaml", overrides), here, stop) == 0


@pytest.mark.slow
def test_a_slow_rank_is_known_at_every_stage(toy: Path, tmp_path: Path) -> None:
    on_ranks(2, train_with_a_slow_rank, toy, tmp_path)
    for stage in (0, 2, 3):
        assert metrics(tmp_path / str(stage), "slowest_rank") == {10: 1, 20: 1}, stage
        lag, seconds = (metrics(tmp_path / str(stage), name)[20] for name in ("slowest_rank_lag", "step_seconds"))
        assert lag * seconds == pytest.approx(0.2, rel=0.5), stage
