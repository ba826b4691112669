import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_dist import cpu_attention
from mlm_dist.cpu_attention import Sight
from mlm_dist.encoder import attention_mask

ROWS, HEADS, LENGTH, WIDTH = 3, 3, 50, 8


def segments() -> Tensor:
    return (torch.rand(ROWS, LENGTH) < 0.1).cumsum(dim=1)


@pytest.mark.parametrize("half_window", [LENGTH, 7])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("together", [(16, 16), (1, LENGTH)])
@pytest.mark.parametrize("scores", [1, 5000, 2**19])  # a row of a head, several rows, several heads at a time
@pytest.mark.parametrize("longest_kept", [LENGTH - 1, LENGTH])
@pytest.mark.parametrize("some", [False, True])
def test_outputs_and_gradients_are_those_of_torch(
    monkeypatch,
    library: None,
    half_window: int,
    packed: bool,
    together: tuple[int, int],
    scores: int,
    longest_kept: int,
    some: bool,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(cpu_attention, "SCORES_TOGETHER", scores)
    monkeypatch.setattr(cpu_attention, "QUERIES_TOGETHER", together)
    monkeypatch.setattr(cpu_attention, "LONGEST_KEPT", longest_kept)
    wanted = torch.randint(LENGTH, (ROWS, 20)) if some else torch.arange(LENGTH).expand(ROWS, -1)  # some of them twice
    q, gradient = (torch.randn(HEADS, ROWS, wanted.shape[1], WIDTH) for _ in range(2))
    k, v = (torch.randn(HEADS, ROWS, LENGTH, WIDTH) for _ in range(2))
    mask = attention_mask(segments() if packed else None, LENGTH, half_window, like=q)
    sight = Sight(mask if mask is None else mask[:, 0], half_window)
    if some:
        sight = sight.of(wanted)
        mask = sight.mask if mask is None else sight.mask[:, None]

    out, kept = cpu_attention.forward(q, k, v, sight)
    assert bool(kept) == (longest_kept >= LENGTH)
    into = torch.full_like(q, torch.nan), torch.zeros_like(k), torch.zeros_like(v)
    cpu_attention.backward(gradient, q, k, v, sight, kept, into)
    found = [out.permute(2, 0, 1, 3), *into]

    exact = [each.double().requires_grad_() for each in (q, k, v)]
    by_row = [each.transpose(0, 1) for each in exact]
    expected = F.scaled_dot_product_attention(*by_row, None if mask is None else mask.double(), scale=1.0)
    expected = expected.transpose(0, 1)
    expected.backward(gradient.double())
    for one, other in zip(found, [expected, *(each.grad for each in exact)], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5)
