import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from launching import run
from torch import Tensor
from transformers import ModernBertConfig, ModernBertForMaskedLM

from mlm_dist import cpu_layer, encoder, gpu_attention
from mlm_dist.encoder import Encoder, EncoderConfig
from mlm_dist.schema import ConfigError

VOCAB, PAD = 128, 0
SMALL = EncoderConfig(layers=4, width=32, heads=4, mlp_width=48, max_positions=64, global_every=3, window=8)


def reference(config: EncoderConfig) -> ModernBertForMaskedLM:
    """transformers' own model of that shape, initialised wide, so that differences show."""
    torch.manual_seed(1)
    kinds = ["full_attention" if config.is_global(i) else "sliding_attention" for i in range(config.layers)]
    model = ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=VOCAB,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.max_positions,
            layer_types=kinds,
            local_attention=config.window,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": config.rope_theta},
                "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_theta_local},
            },
            norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie,
            initializer_range=0.3,
            pad_token_id=PAD,
            cls_token_id=1,
            bos_token_id=1,
            sep_token_id=2,
            eos_token_id=2,
            attn_implementation="sdpa",
        )
    )
    torch.nn.init.normal_(model.decoder.bias)
    return model


def pair(config: EncoderConfig) -> tuple[Encoder, ModernBertForMaskedLM]:
    """Our encoder and transformers' model with the same weights."""
    theirs = reference(config)
    ours = Encoder(config, VOCAB)
    ours.load_state_dict(theirs.state_dict())  # strict: the same names and shapes
    return ours, theirs


def example_ids(*shape: int) -> Tensor:
    return torch.randint(5, VOCAB, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten().long(), ignore_index=PAD)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("window", [8, 128])
@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_logits_and_gradients_equal_transformers(tie: bool, window: int, padding: str | None) -> None:
    config = EncoderConfig(**{**vars(SMALL), "tie": tie, "window": window})
    ours, theirs = pair(config)
    ids = example_ids(3, 40)
    segments = torch.ones_like(ids)
    if padding == "right":
        segments[1, 30:] = 0
    if padding == "left":
        segments[1, :10] = 0
    ids = ids * segments
    positions = (segments.cumsum(1) - 1).clamp(min=0)
    mask = None if padding is None else segments
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    got = ours(ids, segments=None if padding is None else segments)
    real = segments.bool()
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)

    loss_of(expected, ids).backward()
    loss_of(got, ids).backward()
    for (name, parameter), (their_name, their_parameter) in zip(
        ours.named_parameters(), sorted_like(ours, theirs), strict=True
    ):
        assert name == their_name
        torch.testing.assert_close(parameter.grad, their_parameter.grad, atol=1e-5, rtol=1e-4)


def sorted_like(ours: Encoder, theirs: ModernBertForMaskedLM) -> list[tuple[str, Tensor]]:
    named = dict(theirs.named_parameters())
    return [(name, named[name]) for name, _ in ours.named_parameters()]


@pytest.mark.parametrize("window", [8, 128])
def test_a_packed_row_equals_each_document_alone(window: int) -> None:
    ours, theirs = pair(EncoderConfig(**{**vars(SMALL), "window": window}))
    ids = example_ids(2, 48)
    lengths = ((20, 25), (3, 30, 11, 4))  # the first row ends in padding
    segments = torch.zeros_like(ids, dtype=torch.int16)
    for row, row_lengths in enumerate(lengths):
        numbers = torch.arange(1, len(row_lengths) + 1).repeat_interleave(torch.tensor(row_lengths))
        segments[row, : len(numbers)] = numbers
    packed = ours(ids, segments=segments)
    for row, row_lengths in enumerate(lengths):
        for number in range(1, len(row_lengths) + 1):
            inside = segments[row] == number
            alone = theirs(ids[row, inside][None]).logits[0]
            torch.testing.assert_close(packed[row, inside], alone, atol=1e-5, rtol=1e-5)


def test_a_row_of_padding_alone_is_finite_forward_and_backward() -> None:
    model = Encoder(SMALL, VOCAB)
    segments = torch.zeros(2, 300, dtype=torch.int16)
    segments[0, 100:290] = 1
    logits = model(example_ids(2, 300), segments=segments)
    logits.square().mean().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_hidden_states_and_head_are_the_two_halves_of_forward() -> None:
    model = Encoder(SMALL, VOCAB)
    ids, segments = example_ids(2, 16), torch.ones(2, 16, dtype=torch.int16)
    hidden = model.hidden_states(ids, segments=segments)
    assert hidden.shape == (2, 16, SMALL.width)
    torch.testing.assert_close(model.head(hidden.flatten(0, 1)), model(ids, segments=segments).flatten(0, 1))


def test_every_parameter_gets_a_gradient() -> None:
    model = Encoder(EncoderConfig(**{**vars(SMALL), "tie": False}), VOCAB)
    ids = example_ids(2, 32)
    loss_of(model(ids), ids).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("tie", [True, False])
def test_the_loss_starts_near_that_of_a_uniform_guess(tie: bool) -> None:
    torch.manual_seed(0)
    config = EncoderConfig(layers=6, width=256, heads=4, mlp_width=384, tie=tie)
    ids = torch.randint(8000, (4, 64))
    loss = F.cross_entropy(Encoder(config, 8000)(ids).flatten(0, 1), torch.randint(8000, (4 * 64,)))
    assert abs(loss.item() - math.log(8000)) < 0.1


def test_the_same_seed_gives_the_same_weights_and_the_same_loss() -> None:
    ids = example_ids(2, 32)
    logits = []
    for _ in range(2):
        torch.manual_seed(7)
        logits.append(Encoder(SMALL, VOCAB)(ids))
    assert torch.equal(*logits)


def test_a_copy_of_the_model_has_a_decoder_of_its_own() -> None:
    model = Encoder(SMALL, VOCAB)
    hidden = torch.randn(3, SMALL.width)
    before = model.head(hidden)
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.decoder.weight)
    assert torch.equal(model.head(hidden), before)
    assert torch.equal(other.head(hidden)[0], other.decoder.bias)


# ---- computing the layers again

PEAKS = """
import torch
from mlm_dist.encoder import Encoder, EncoderConfig

def peak() -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
shape = dict(layers=12, width=128, heads=2, mlp_width=512, max_positions=512)
for recompute in (True, False):
    model = Encoder(EncoderConfig(**shape, recompute=recompute), 128)
    before = peak()
    model(torch.ones(8, 512, dtype=torch.int64)).sum().backward()
    print(peak() - before)
"""


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("some", [True, False])
def test_layers_computed_again_change_no_bit_of_states_and_gradients(monkeypatch, by_hand: bool, some: bool) -> None:
    if not by_hand:
        monkeypatch.setattr(cpu_layer, "usable", lambda x: False)
    models = [Encoder(EncoderConfig(**{**vars(SMALL), "recompute": recompute}), VOCAB) for recompute in (False, True)]
    models[1].load_state_dict(models[0].state_dict())  # the same names
    ids, segments = example_ids(3, 48), torch.arange(48).div(20, rounding_mode="floor").expand(3, 48)
    wanted = torch.randint(48, (3, 10)) if some else None
    found = []
    for model in models:
        states = model.hidden_states(ids, segments=segments, wanted=wanted)
        model.head(states).square().sum().backward()
        found.append([states, *(weight.grad for weight in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_layers_computed_again_take_a_fraction_of_the_memory() -> None:
    again, on_top = map(int, run("-c", PEAKS).stdout.split())
    assert 2 * again < again + on_top


# ---- the padded vocabulary


def test_padded_ids_are_never_predicted_nor_trained_and_leave_the_loss_alone() -> None:
    torch.manual_seed(0)
    model = Encoder(EncoderConfig(**{**vars(SMALL), "init_std": 1.0, "tie": False}), 100)
    ids = torch.randint(100, (4, 32))
    logits = model(ids)
    assert logits.shape[-1] == 128
    assert logits.argmax(-1).max() < 100
    assert torch.equal(loss_of(logits, ids), loss_of(logits[..., :100], ids))
    loss_of(logits, ids).backward()
    assert model.decoder.weight.grad[100:].abs().sum() == 0
    assert model.decoder.bias.grad[100:].abs().sum() == 0


# ---- positions and documents


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=4))
def test_bounds_and_positions_name_every_document(rows: list[list[int]]) -> None:
    length = max(map(sum, rows))
    segments = torch.zeros(len(rows), length, dtype=torch.int16)
    positions = torch.zeros(len(rows), length, dtype=torch.int64)
    expected = [0]
    for row, lengths in enumerate(rows):
        lengths = [*lengths, length - sum(lengths)] if sum(lengths) < length else lengths
        for number, count in enumerate(lengths, start=1):
            begin = expected[-1] - row * length
            segments[row, begin : begin + count] = number % len(lengths) if len(lengths) > 1 else 1
            positions[row, begin : begin + count] = torch.arange(count)
            expected.append(expected[-1] + count)
    starts = encoder.document_starts(segments)
    assert torch.equal(encoder.positions_in_document(starts), positions)
    most = len(expected) + 2
    bounds = gpu_attention.sequence_bounds(starts, most)
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == expected + [segments.numel()] * (most + 1 - len(expected))
    assert gpu_attention.sequence_bounds(starts, len(expected) - 1).tolist() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [8, 128])
def test_variable_length_attention_on_the_gpu_equals_masked_attention(window: int) -> None:
    torch.manual_seed(0)
    model = Encoder(EncoderConfig(**{**vars(SMALL), "heads": 1, "window": window, "init_std": 0.1}), VOCAB).cuda()
    ids, segments = example_ids(2, 64).cuda(), torch.zeros(2, 64, dtype=torch.int16, device="cuda")
    segments[0, :20], segments[0, 20:50], segments[1] = 1, 2, 1
    expected = model(ids, segments=segments)
    got = model.bfloat16()(ids, segments=segments).float()
    real = segments.bool()
    torch.testing.assert_close(got[real], expected[real], atol=0.1, rtol=0.05)


# ---- compiling, and refusals


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("packed", [True, False])
def test_the_model_compiles_without_a_graph_break(packed: bool, recompute: bool) -> None:
    model = Encoder(EncoderConfig(**{**vars(SMALL), "recompute": recompute}), VOCAB)
    ids = example_ids(2, 32)
    segments = torch.arange(32).div(10, rounding_mode="floor").expand(2, 32) if packed else None
    expected = model(ids, segments=segments)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    got = compiled(ids, segments=segments)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    loss_of(got, ids).backward()


@pytest.mark.parametrize(
    ("changes", "named"), [({"heads": 5}, "heads"), ({"heads": 32}, "heads"), ({"window": 7}, "window")]
)
def test_shapes_that_cannot_be_are_refused(changes: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        EncoderConfig(**{**vars(SMALL), **changes})
