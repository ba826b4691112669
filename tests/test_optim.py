import pytest
import torch
from torch import nn

from mlm_dist import optim
from mlm_dist.optim import OPTIMIZERS, OptimConfig
from mlm_dist.schema import ConfigError


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    decayed, plain = optim.parameter_groups(model.parameters(), 0.1)
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
def test_a_model_with_nothing_to_train_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no parameter of the model is trained"):
        optim.build(OptimConfig(name=name), nn.Linear(3, 3).requires_grad_(False))


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
