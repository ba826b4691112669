"""Our encoder and transformers' ModernBERT are one model: the same logits and gradients, by way of a folder."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, ModernBertConfig, ModernBertForMaskedLM

from mlm_dist import cpu_layer, export, huggingface, models, vocab
from mlm_dist.encoder import Encoder, EncoderConfig
from mlm_dist.models import ModelConfig
from mlm_dist.schema import ConfigError
from mlm_dist.vocab import Vocab

LENGTH = 48
SHAPE = {"layers": 4, "width": 32, "heads": 4, "mlp_width": 48, "max_positions": 64, "global_every": 3, "window": 8}
SHAPES = {
    "windows": {},
    "untied": {"tie": False},
    "global": {"global_every": 1},
    "wide windows": {"window": 128, "norm_eps": 1e-3},
    "other bases": {"rope_theta": 500.0, "rope_theta_local": 20.0, "global_every": 2},
    "linear scaling": {"rope_factor": 8.0, "rope_factor_local": 2.0},
    "one scaled": {"rope_theta": 1e4, "rope_factor": 4.0},
}
# lengths of the documents of each row, padding (None) among them
ROWS = {
    "alone": [[LENGTH], [LENGTH]],
    "padding to the right": [[LENGTH], [30, None]],
    "padding to the left": [[LENGTH], [None, 30]],
    "packed": [[20, 25, None], [3, 30, 11, 4]],
}


@pytest.fixture(scope="module")
def tokenizer() -> Vocab:
    return vocab.train(["the quick brown fox jumps over the lazy dog"] * 3, 300)


def segments_of(rows: list[list[int | None]]) -> Tensor:
    """(B, T): documents numbered from 1 in each row, 0 for padding."""
    found = []
    for lengths in rows:
        padding = LENGTH - sum(length for length in lengths if length)
        numbers = itertools.count(1)
        parts = [[0] * padding if length is None else [next(numbers)] * length for length in lengths]
        found.append([number for part in parts for number in part])
    return torch.tensor(found)


def batch_of(rows: list[list[int | None]], tokenizer: Vocab) -> tuple[Tensor, Tensor, Tensor]:
    """ids, segments and labels (B, T); a third of the real positions have a label, the others -100."""
    generator = torch.Generator().manual_seed(0)
    segments = segments_of(rows)
    ids = torch.randint(5, tokenizer.size, segments.shape, generator=generator) * (segments > 0)
    wanted = (torch.rand(segments.shape, generator=generator) < 0.3) & (segments > 0)
    return ids, segments, torch.where(wanted, ids, -100)


def as_transformers_has_it(segments: Tensor, window: int) -> dict[str, object]:
    """Plain rows by a mask (B, T) alone; packed ones by masks (B, 1, T, T) and position ids (B, T)."""
    if segments.max() == 1:
        return {"attention_mask": (segments > 0).long()}
    together = segments[:, :, None] == segments[:, None, :]
    index = torch.arange(LENGTH)
    near = (index[:, None] - index).abs() <= window // 2
    positions = [[int((row[:t] == row[t]).sum()) for t in range(LENGTH)] for row in segments]
    masks = {"full_attention": together[:, None], "sliding_attention": (together & near)[:, None]}
    return {"attention_mask": masks, "position_ids": torch.tensor(positions)}


def wide(model: torch.nn.Module) -> None:
    """Weights as wide as training might make them, so that differences show."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        weight.data += (0.1 if "norm" in name else 0.2) * torch.randn_like(weight)


def compare(ours: Encoder, theirs: ModernBertForMaskedLM, rows: str, tokenizer: Vocab) -> None:
    """Logits of real positions, the loss of some, and the gradients of all weights: within 1e-5 of the largest."""
    ids, segments, labels = batch_of(ROWS[rows], tokenizer)
    expected = theirs(ids, **as_transformers_has_it(segments, ours.config.window)).logits
    got = ours(ids, segments=None if rows == "alone" else segments)[..., : tokenizer.size]
    assert_near(got[segments > 0], expected[segments > 0])
    for model, logits in ((ours, got), (theirs, expected)):
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        assert all(weight.grad is not None for weight in model.parameters())
    wanted = {name: weight.grad for name, weight in theirs.named_parameters()}
    found = {name: weight.grad[: len(wanted[name])] for name, weight in ours.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert_near(gradient, wanted[name])


def assert_near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "by torch"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_our_folder_in_transformers(
    shape: str, rows: str, by_hand: bool, tokenizer: Vocab, tmp_path: Path, monkeypatch
) -> None:
    if not by_hand:
        monkeypatch.setattr(cpu_layer, "usable", lambda x: False)
    config = ModelConfig(encoder=EncoderConfig(**SHAPE | SHAPES[shape]))
    ours = models.build(config, tokenizer.size, LENGTH, tokenizer)
    wide(ours)
    export.write(tmp_path / "model", ours, config, tokenizer, {})
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    compare(ours, theirs, rows, tokenizer)


def modernbert(folder: Path, tokenizer: Vocab, **settings) -> ModernBertForMaskedLM:
    """A ModernBERT of transformers' own making, in a folder."""
    usual = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "max_position_embeddings": 64, "local_attention": 8, "pad_token_id": 0, "cls_token_id": 2, "bos_token_id": 2,
        "sep_token_id": 3, "eos_token_id": 3,
    }  # fmt: skip
    model = ModernBertForMaskedLM(ModernBertConfig(vocab_size=tokenizer.size, **usual | settings))
    wide(model)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return model


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
THEIRS = {  # of ModernBertConfig -> what our encoder is told beyond SHAPE
    "as it comes": ({}, {}),
    "old keys for the bases": (
        {"global_rope_theta": 5e3, "local_rope_theta": 50.0},
        {"rope_theta": 5e3, "rope_theta_local": 50.0},
    ),
    "one scaling for all": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_factor": 2.0, "rope_factor_local": 2.0},
    ),
    "a scaling of its own": ({"rope_parameters": {"full_attention": LINEAR}}, {"rope_theta": 1e4, "rope_factor": 4.0}),
    "untied, every other": (
        {"tie_word_embeddings": False, "global_attn_every_n_layers": 2},
        {"tie": False, "global_every": 2},
    ),
}


@pytest.mark.parametrize("rows", ["padding to the left", "packed"])
@pytest.mark.parametrize("given", THEIRS)
def test_a_folder_of_transformers_in_our_encoder(given: str, rows: str, tokenizer: Vocab, tmp_path: Path) -> None:
    settings, told = THEIRS[given]
    theirs = modernbert(tmp_path, tokenizer, **settings)
    shape = EncoderConfig(**SHAPE | told)
    assert huggingface.encoder_config(theirs.config, "x") == shape
    ours = models.build(ModelConfig(encoder=shape, from_=str(tmp_path)), tokenizer.size, LENGTH, tokenizer)
    compare(ours, theirs, rows, tokenizer)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"width": 64}, "encoder: {width: 32}"),
        ({"heads": 2, "mlp_width": 40}, "encoder: {heads: 4, mlp_width: 48}"),
        ({"rope_theta": 1e4}, "encoder: {rope_theta: 160000.0}"),
        ({"rope_factor": 2.0}, "encoder: {rope_factor: 1.0}"),
        ({"window": 16, "tie": False}, "encoder: {window: 8, tie: True}"),
    ],
)
def test_another_shape_is_refused_by_name(told: dict, said: str, tokenizer: Vocab, tmp_path: Path) -> None:
    modernbert(tmp_path, tokenizer)
    config = ModelConfig(encoder=EncoderConfig(**SHAPE | told), from_=str(tmp_path))
    with pytest.raises(ConfigError) as refused:
        models.build(config, tokenizer.size, LENGTH, tokenizer)
    assert str(refused.value) == f"{tmp_path} has another shape than model.encoder; write {said}"


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rope_parameters": {"full_attention": YARN}}, "rope_parameters.full_attention = {'factor': 4.0, "),
        ({"mlp_bias": True, "hidden_activation": "relu"}, "hidden_activation = relu, mlp_bias = True"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types = ['sliding_attention', "),
    ],
)
def test_what_our_encoder_is_not_is_refused_in_one_sentence(
    settings: dict, named: str, tokenizer: Vocab, tmp_path: Path
) -> None:
    modernbert(tmp_path, tokenizer, **settings)
    config = ModelConfig(encoder=EncoderConfig(**SHAPE), from_=str(tmp_path))
    with pytest.raises(ConfigError) as refused:
        models.build(config, tokenizer.size, LENGTH, tokenizer)
    said = str(refused.value)
    assert said.startswith(f"{tmp_path} holds a modernbert with {named}") and "\n" not in said
    assert said.endswith("which our encoder has not; set model.kind=transformers to train it")
    models.build(ModelConfig(kind="transformers", from_=str(tmp_path)), tokenizer.size, LENGTH, tokenizer)


# ---- an exported model in use


@pytest.fixture(scope="module")
def exported(tokenizer: Vocab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Encoder]:
    folder, config = tmp_path_factory.mktemp("exported") / "model", ModelConfig(encoder=EncoderConfig(**SHAPE))
    model = models.build(config, tokenizer.size, LENGTH, tokenizer)
    wide(model)
    export.write(folder, model, config, tokenizer, {})
    return folder, model.eval()


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_document_has_the_same_embeddings_alone_and_in_a_padded_batch(
    exported: tuple[Path, Encoder], side: str
) -> None:
    folder, ours = exported
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    theirs = AutoModel.from_pretrained(folder).eval()
    whole = AutoModelForMaskedLM.from_pretrained(folder).eval()
    texts = ["the fox", "the quick brown fox jumps over the lazy dog", "quick quick dog"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    padded = theirs(**batch).last_hidden_state  # (B, T, d)
    assert not batch["attention_mask"].all()
    for text, row, logits, mask in zip(texts, padded, whole(**batch).logits, batch["attention_mask"], strict=True):
        one = tokenizer(text, return_tensors="pt")
        alone = theirs(**one).last_hidden_state[0]
        assert_near(row[mask > 0], alone)
        assert_near(row[mask > 0].mean(0), alone.mean(0))
        assert_near(logits[mask > 0], whole(**one).logits[0])
        assert_near(ours.hidden_states(one["input_ids"])[0], alone)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_an_exported_model_compiled_gives_the_same_logits(exported: tuple[Path, Encoder], backend: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported[0])
    model = AutoModelForMaskedLM.from_pretrained(exported[0]).eval()
    batch = tokenizer(["the fox", "the quick brown fox jumps"], return_tensors="pt", padding=True)
    expected = model(**batch).logits
    torch._dynamo.reset()
    assert_near(torch.compile(model, backend=backend)(**batch).logits, expected)
