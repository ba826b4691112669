from itertools import pairwise

import pytest

from mlm_dist import schedule
from mlm_dist.optim import OptimConfig
from mlm_dist.schedule import DECAYS, SCHEDULES, ScheduleConfig
from mlm_dist.schema import ConfigError


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_starts_at_the_peak_and_ends_where_it_says(name: str) -> None:
    config = ScheduleConfig(name=name, warmup_steps=10, final=0.1)
    rates = [schedule.lr_at(OptimConfig(lr=2.0), config, step, 110) for step in range(111)]
    assert rates[:10] == sorted(rates[:10]) and 0 < rates[0] < rates[9] < 2.0
    assert rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[110] == pytest.approx(2.0 if name == "constant" else 0.2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_never_jumps(name: str) -> None:
    config = ScheduleConfig(name=name, warmup_steps=100)
    rates = [schedule.lr_at(OptimConfig(lr=1.0), config, step, 10_000) for step in range(10_001)]
    # 1 - sqrt falls fastest at its start: sqrt(1 / 1980) of the peak in one step
    assert max(abs(a - b) for a, b in pairwise(rates)) < 0.025


def test_wsd_is_flat_until_its_decay() -> None:
    config = ScheduleConfig(name="wsd", warmup_steps=0, decay_fraction=0.25)
    rates = [schedule.lr_at(OptimConfig(lr=1.0), config, step, 100) for step in range(101)]
    assert rates[:76] == [1.0] * 76
    assert rates[76] < 1.0
    assert rates[100] == pytest.approx(0.0)


@pytest.mark.parametrize("shape", DECAYS)
def test_wsd_decays_over_the_last_steps_where_they_are_stated(shape: str) -> None:
    config = ScheduleConfig(warmup_steps=10, decay_fraction=0.9, decay_steps=20, decay_shape=shape)
    rates = [schedule.lr_at(OptimConfig(lr=1.0), config, step, 100) for step in range(101)]
    assert rates[10:81] == [1.0] * 71 and rates[81] < 1.0
    assert rates[80:] == sorted(rates[80:], reverse=True) and rates[100] == 0.0
    longer = [schedule.lr_at(OptimConfig(lr=1.0), config, step, 250) for step in range(251)]
    assert longer[-21:] == rates[-21:], "the decay is the same, wherever it begins"


def test_the_shapes_of_the_decay() -> None:
    rates = {
        shape: schedule.lr_at(OptimConfig(lr=1.0), ScheduleConfig(decay_steps=100, decay_shape=shape), 925, 1000)
        for shape in DECAYS
    }
    assert rates == {"sqrt": 0.5, "linear": 0.75}, "after a quarter of it"


def test_a_run_of_unknown_length_keeps_its_peak() -> None:
    config = ScheduleConfig(name="cosine", warmup_steps=4)
    assert schedule.lr_at(OptimConfig(lr=1.0), config, 1_000_000, None) == 1.0
    assert schedule.lr_at(OptimConfig(lr=1.0), config, 0, None) == pytest.approx(0.2)


def test_warm_up_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"schedule.warmup_steps = 50 leaves nothing of a run of 50 steps"):
        schedule.check(ScheduleConfig(warmup_steps=50), 50)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ScheduleConfig(decay_steps=60), r"decay_steps = 60 and warmup_steps = 0 are more than the run of 50 steps"),
        (ScheduleConfig(warmup_steps=20, decay_steps=31), r"set decay_steps to 30 or less"),
        (ScheduleConfig(name="cosine", decay_steps=9), r"means nothing with schedule.name = cosine"),
    ],
)
def test_a_decay_that_does_not_fit_is_refused(config: ScheduleConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        schedule.check(config, 50)
    schedule.check(ScheduleConfig(warmup_steps=20, decay_steps=30), 50)
