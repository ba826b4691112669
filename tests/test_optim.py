from itertools import pairwise

import pytest
import torch
from torch import nn

from mlm_dist import optim
from mlm_dist.optim import OPTIMIZERS, SCHEDULES, OptimConfig, ScheduleConfig
from mlm_dist.schema import ConfigError


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_starts_at_the_peak_and_ends_where_it_says(name: str) -> None:
    schedule = ScheduleConfig(name=name, warmup_steps=10, final=0.1)
    rates = [optim.lr_at(OptimConfig(lr=2.0), schedule, step, 110) for step in range(111)]
    assert rates[:10] == sorted(rates[:10]) and 0 < rates[0] < rates[9] < 2.0
    assert rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[110] == pytest.approx(2.0 if name == "constant" else 0.2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_never_jumps(name: str) -> None:
    schedule = ScheduleConfig(name=name, warmup_steps=100)
    rates = [optim.lr_at(OptimConfig(lr=1.0), schedule, step, 10_000) for step in range(10_001)]
    # 1 - sqrt falls fastest at its start: sqrt(1 / 1980) of the peak in one step
    assert max(abs(a - b) for a, b in pairwise(rates)) < 0.025


def test_wsd_is_flat_until_its_decay() -> None:
    schedule = ScheduleConfig(name="wsd", warmup_steps=0, decay_fraction=0.25)
    rates = [optim.lr_at(OptimConfig(lr=1.0), schedule, step, 100) for step in range(101)]
    assert rates[:76] == [1.0] * 76
    assert rates[76] < 1.0
    assert rates[100] == pytest.approx(0.0)


def test_a_run_of_unknown_length_keeps_its_peak() -> None:
    schedule = ScheduleConfig(name="cosine", warmup_steps=4)
    assert optim.lr_at(OptimConfig(lr=1.0), schedule, 1_000_000, None) == 1.0
    assert optim.lr_at(OptimConfig(lr=1.0), schedule, 0, None) == pytest.approx(0.2)


def test_warm_up_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"schedule.warmup_steps = 50 leaves nothing of a run of 50 steps"):
        optim.check(ScheduleConfig(warmup_steps=50), 50)


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    decayed, plain = optim.parameter_groups(model, 0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(7, 4), (3, 4)]
    assert all(p.ndim == 1 for p in plain["params"]) and len(plain["params"]) == 3
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_gradients_are_clipped_to_their_common_norm() -> None:
    torch.manual_seed(0)
    model, reference = nn.Linear(50, 40), nn.Linear(50, 40)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    assert optim.clip_gradients(model.parameters(), 0.0).item() == pytest.approx(expected.item(), rel=1e-6)
    optim.clip_gradients(model.parameters(), 0.5)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    before = [p.grad.clone() for p in model.parameters()]
    assert optim.clip_gradients(model.parameters(), 1.0).item() == pytest.approx(0.5, rel=1e-5)
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True)), "small ones stay"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_quadratic(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    goal = torch.randn(8, 8)
    optimizer = optim.build(OptimConfig(name=name, lr=0.05, weight_decay=0.0), model)

    def loss() -> torch.Tensor:
        return (model.weight - goal).square().sum() + model.bias.square().sum()

    before = loss().item()
    for _ in range(200):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.01 * before
