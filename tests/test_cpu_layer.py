from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mlm_dist import cpu_attention, cpu_layer
from mlm_dist.encoder import Encoder, EncoderConfig

VOCAB, ROWS, LENGTH = 64, 5, 200
SHAPE = EncoderConfig(layers=3, width=32, heads=4, mlp_width=48, max_positions=LENGTH, global_every=2, window=16)


def model() -> Encoder:
    torch.manual_seed(0)
    made = Encoder(SHAPE, VOCAB)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.2)  # so that attention, and each gain, matters
    return made


def rows(packed: bool) -> tuple[Tensor, Tensor | None]:
    ids = torch.randint(VOCAB, (ROWS, LENGTH))
    if not packed:
        return ids, None
    segments = torch.randint(2, (ROWS, LENGTH)).mul(torch.rand(ROWS, LENGTH) < 0.05).cumsum(dim=1) + 1
    segments[:, -7:] = 0
    return ids, segments


def outputs(encoder: Encoder, ids: Tensor, segments: Tensor | None, wanted: Tensor | None) -> list[Tensor]:
    """The hidden states, and the gradient of each parameter from random gradients of theirs."""
    encoder.zero_grad()
    states = encoder.hidden_states(ids, segments=segments, wanted=wanted)
    states.backward(torch.randn(states.shape, generator=torch.Generator().manual_seed(1)))
    return [states, *(weight.grad for weight in encoder.model.parameters())]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("head_by_head", [False, True])  # whichever library multiplies
def test_states_and_gradients_are_those_of_autograd(
    monkeypatch, library: None, packed: bool, some: bool, head_by_head: bool
) -> None:
    monkeypatch.setattr(cpu_layer, "onednn_multiplies", lambda: head_by_head)
    encoder, (ids, segments) = model(), rows(packed)
    wanted = torch.randint(LENGTH, (ROWS, 30)) if some else None  # some of them twice
    by_hand = [each.clone() for each in outputs(encoder, ids, segments, wanted)]
    monkeypatch.setattr(cpu_layer, "usable", lambda x: False)
    for one, other in zip(by_hand, outputs(encoder, ids, segments, wanted), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize(("rows_", "length", "heads", "some"), [(1, 9, 1, 4), (2, 1, 4, 1), (3, 9, 2, 0), (0, 9, 2, 3)])
def test_the_smallest_of_everything(monkeypatch, rows_: int, length: int, heads: int, some: int) -> None:
    torch.manual_seed(0)
    encoder = Encoder(replace(SHAPE, heads=heads), VOCAB)
    ids, wanted = torch.randint(VOCAB, (rows_, length)), torch.randint(length, (rows_, some))
    for asked in (wanted, None):
        by_hand = [each.clone() for each in outputs(encoder, ids, None, asked)]
        with monkeypatch.context() as plain:
            plain.setattr(cpu_layer, "usable", lambda x: False)
            expected = outputs(encoder, ids, None, asked)
        for one, other in zip(by_hand, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max([1.0, *other.flatten().abs().tolist()]))


def test_it_is_what_trains_on_a_cpu_and_nothing_else(monkeypatch) -> None:
    calls = []
    attend = cpu_attention.forward
    monkeypatch.setattr(cpu_attention, "forward", lambda *parts: calls.append(1) or attend(*parts))
    encoder, (ids, _) = model(), rows(False)
    with torch.no_grad():
        encoder(ids)
    with torch.autocast("cpu", torch.bfloat16):
        encoder(ids)
    encoder.double()(ids)
    assert not calls
    model()(ids)
    assert calls


def test_states_of_some_positions_are_those_of_all() -> None:
    encoder, (ids, segments) = model(), rows(True)
    wanted = torch.randint(LENGTH, (ROWS, 30))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = encoder.hidden_states(ids, segments=segments, wanted=wanted)
            states = encoder.hidden_states(ids, segments=segments)
        expected = states.gather(1, wanted[:, :, None].expand(-1, -1, states.shape[2]))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
