"""AdamW and StableAdamW on whole parameters; on ZeRO's pieces they are tested in test_optimizers.py."""

import pytest
import torch
from torch import nn

from mlm_dist import optim
from mlm_dist.adam import adamw_step
from mlm_dist.optim import OptimConfig
from mlm_dist.pieces import Pieced

CONFIG = OptimConfig(name="stable_adamw", lr=0.01, weight_decay=0.1, beta2=0.9)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def give_gradients(to: nn.Module, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in to.parameters():
        p.grad = size * torch.randn(p.shape, generator=generator)


def test_adamw_equals_torchs_bit_for_bit() -> None:
    one, other = model(), model()
    groups = optim.parameter_groups(one.parameters(), 0.1)
    ours, torchs = Pieced(groups, optim.adam_options(CONFIG)), optim.build(OptimConfig(lr=0.01, beta2=0.9), other)
    torchs.param_groups[0]["weight_decay"] = 0.1
    for step in range(5):
        give_gradients(one, step)
        give_gradients(other, step)
        found = torch.tensor(float(step == 3))
        ours.found_inf = torchs.found_inf = found
        with torch.no_grad():
            for group in ours.param_groups:
                adamw_step(ours, group)
        torchs.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert {int(state["step"]) for state in ours.state.values()} == {4}


def test_a_gradient_that_surprises_moves_a_parameter_by_no_more_than_others() -> None:
    """After steps with small gradients a large one: AdamW's step is 1 / sqrt(1 - beta2) too long, this one's is not."""
    lengths = {}
    for name in ("adamw", "stable_adamw"):
        net = model()
        optimizer = optim.build(OptimConfig(name=name, lr=0.01, weight_decay=0.0, beta1=0.0, beta2=0.99), net)
        for step in range(50):
            give_gradients(net, step, 1e-3 if step < 49 else 10.0)
            before = net[2].weight.detach().clone()
            optimizer.step()
        lengths[name] = (net[2].weight - before).square().mean().sqrt().item() / 0.01
    assert lengths["adamw"] > 5 and lengths["stable_adamw"] == pytest.approx(1, rel=0.02)


def test_where_the_second_moment_keeps_up_it_is_adamw() -> None:
    one, other = model(), model()
    ours = optim.build(CONFIG, one)
    torchs = optim.build(OptimConfig(lr=0.01, weight_decay=0.1, beta2=0.9), other)
    for step in range(5):
        give_gradients(one, 0, 1.0 / (1 + step))  # falls: RMS stays below 1
        give_gradients(other, 0, 1.0 / (1 + step))
        ours.step()
        torchs.step()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-6)


def test_a_parameter_without_a_gradient_stays() -> None:
    net = model()
    optimizer = optim.build(CONFIG, net)
    give_gradients(net, 0)
    net[2].weight.grad = None
    before = net[2].weight.detach().clone()
    optimizer.step()
    assert torch.equal(net[2].weight, before) and net[2].weight not in optimizer.state
