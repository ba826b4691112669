import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel, CLIPConfig

from mlm_dist import huggingface, models, schema, vocab
from mlm_dist.encoder import Encoder, EncoderConfig, padded
from mlm_dist.mlm import has_split_head
from mlm_dist.models import ModelConfig
from mlm_dist.schema import ConfigError
from mlm_dist.vocab import Vocab

SEQ = 32
SHAPE = EncoderConfig(layers=3, width=32, heads=4, mlp_width=48, max_positions=SEQ, global_every=2, window=6)
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WINDOWED = TINY | {"num_hidden_layers": 4, "local_attention": 6}


@pytest.fixture(scope="module")
def tokenizer() -> Vocab:
    return vocab.train(["the quick brown fox jumps over the lazy dog"] * 3, 300)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def build(tokenizer: Vocab, packing: str = "best_fit", seq_len: int = SEQ, **keys) -> nn.Module:
    return models.build(ModelConfig(**keys), tokenizer.size, seq_len, tokenizer, packing).eval()


def packed_row(vocab_size: int) -> tuple[Tensor, Tensor]:
    """ids and segments (1, SEQ) of documents of 14, 3 and 10 tokens, and padding."""
    ids = torch.randint(5, vocab_size, (1, SEQ), dtype=torch.int32)
    segments = torch.tensor([[1] * 14 + [2] * 3 + [3] * 10 + [0] * (SEQ - 27)], dtype=torch.int16)
    return ids * (segments > 0), segments


def wide(model: nn.Module) -> nn.Module:
    """The model with large weights, so that what should not be seen would show."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


# ---- documents of a packed row


@pytest.mark.parametrize(
    "keys",
    [
        {"encoder": SHAPE},
        {"kind": "transformers", "architecture": "bert", "options": TINY},
        {"kind": "transformers", "architecture": "roberta", "options": TINY},
        {"kind": "transformers", "architecture": "modernbert", "options": WINDOWED},
        {"kind": "transformers", "architecture": "electra", "options": TINY},
        {"kind": "factory", "factory": "tests.test_models:attends_within_segments"},
    ],
    ids=lambda keys: keys.get("architecture") or keys.get("kind", "encoder"),
)
@torch.no_grad()
def test_each_document_gets_the_logits_that_it_gets_alone(tokenizer: Vocab, keys: dict) -> None:
    model = wide(build(tokenizer, **keys))
    ids, segments = packed_row(tokenizer.size)
    packed = model(ids, segments=segments)
    assert packed.shape[:2] == ids.shape and packed.shape[2] >= tokenizer.size
    plain = model.model if isinstance(model, huggingface.TransformersModel) else model
    for number in (1, 2, 3):
        alone = models.logits_of(plain(ids[segments == number][None]))[0]
        torch.testing.assert_close(packed[segments == number], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packing", ["best_fit", "pad"])
@pytest.mark.parametrize("architecture", huggingface.HEADS)
@torch.no_grad()
def test_the_head_is_split_off_where_it_is_known_how(tokenizer: Vocab, architecture: str, packing: str) -> None:
    model = wide(build(tokenizer, packing, kind="transformers", architecture=architecture, options=TINY))
    ids, segments = packed_row(tokenizer.size)
    if packing == "pad":
        segments = (segments == 1).to(torch.int16)
    hidden = model.hidden_states(ids, segments=segments).flatten(0, 1)
    torch.testing.assert_close(model.head(hidden), model(ids, segments=segments).flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_the_head_stays_where_it_is_not_known_how(tokenizer: Vocab) -> None:
    model = build(tokenizer, kind="transformers", architecture="electra", options=TINY)
    assert not isinstance(model, huggingface.SplitTransformersModel)


def test_every_parameter_of_bert_gets_a_gradient(tokenizer: Vocab) -> None:
    model = build(tokenizer, kind="transformers", architecture="bert", options=TINY)
    ids, segments = packed_row(tokenizer.size)
    model(ids, segments=segments).logsumexp(-1).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_model_that_mixes_documents_needs_padded_rows(tokenizer: Vocab) -> None:
    with pytest.raises(ConfigError, match=r"fnet can't keep.*data\.packing=pad"):
        build(tokenizer, kind="transformers", architecture="fnet", options={"num_hidden_layers": 2})


def test_a_window_of_a_models_own_shows_where_rows_are_longer(tokenizer: Vocab) -> None:
    """A mask that is given replaces the model's own: documents are apart, and each sees more than it does alone."""
    options = TINY | {"num_hidden_layers": 4, "max_position_embeddings": 512}
    with pytest.raises(ConfigError, match=r"ultrabert can't keep.*logits differ by.*data\.packing=pad"):
        build(tokenizer, seq_len=512, kind="transformers", architecture="ultrabert", options=options)
    build(tokenizer, "pad", seq_len=512, kind="transformers", architecture="ultrabert", options=options)


def test_trying_a_model_out_leaves_it_as_it_was(tokenizer: Vocab) -> None:
    options = TINY | {"max_position_embeddings": 64}
    made = [build(tokenizer, "pad", kind="transformers", architecture="big_bird", options=options)]
    torch.manual_seed(0)
    made.append(huggingface.adapt(huggingface.new_model("big_bird", options, tokenizer.size, tokenizer), False))
    assert made[0].model.bert.attention_type == "block_sparse"
    one, other = (model.state_dict() for model in made)
    assert all(torch.equal(one[name], other[name]) for name in other)


@torch.no_grad()
def test_padded_rows_see_no_padding(tokenizer: Vocab) -> None:
    model = wide(build(tokenizer, "pad", kind="transformers", architecture="roberta", options=TINY))
    ids, segments = packed_row(tokenizer.size)
    segments = (segments == 1).to(torch.int16)
    expected = model.model(ids[segments > 0][None].long()).logits[0]
    torch.testing.assert_close(model(ids * segments, segments=segments)[segments > 0], expected, atol=1e-4, rtol=1e-4)


# ---- factories


class SegmentAttention(nn.Module):
    def __init__(self, vocab_size: int, leaky: bool = False) -> None:
        super().__init__()
        self.embeddings, self.leaky = nn.Embedding(vocab_size, 8), leaky

    def forward(self, ids: Tensor, *, segments: Tensor | None = None) -> Tensor:
        x = self.embeddings(ids)
        scores = x @ x.mT
        if segments is not None and not self.leaky:
            scores = scores.masked_fill(segments[:, :, None] != segments[:, None, :], -math.inf)
        return (x + scores.softmax(-1) @ x) @ self.embeddings.weight.T


class Bag(nn.Module):
    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size))

    def forward(self, ids: Tensor, **kwargs) -> Tensor:
        assert not kwargs
        return self.layers(ids)


def attends_within_segments(vocab_size: int, leaky: bool = False) -> nn.Module:
    return SegmentAttention(vocab_size, leaky)


def ids_alone(vocab_size: int, width: int) -> nn.Module:
    return Bag(vocab_size, width)


def test_a_factory_is_called_with_the_vocabulary_and_its_options(tokenizer: Vocab) -> None:
    model = build(tokenizer, "pad", kind="factory", factory="tests.test_models:ids_alone", options={"width": 6})
    ids, segments = packed_row(tokenizer.size)
    assert model(ids, segments=segments).shape == (1, SEQ, tokenizer.size)
    assert models.count_parameters(model) == 6 * tokenizer.size * 2 + tokenizer.size


@pytest.mark.parametrize(
    ("factory", "options", "said"),
    [
        ("ids_alone", {"width": 6}, "takes ids alone.*data.packing=pad"),
        ("attends_within_segments", {"leaky": True}, "mixes the documents.*data.packing=pad"),
        ("attends_within_segments", {"leeky": True}, "leeky"),
        ("no_such_thing", {}, "no_such_thing.*package.module:function"),
        ("", {}, "package.module:function"),
    ],
)
def test_a_factory_that_will_not_do_is_refused(tokenizer: Vocab, factory: str, options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(tokenizer, kind="factory", factory=f"tests.test_models:{factory}", options=options)


class WrongHead(SegmentAttention):
    """Its forward is right, its split path sees other documents."""

    def hidden_states(self, ids: Tensor, *, segments: Tensor | None = None) -> Tensor:
        x = self.embeddings(ids)
        return x + (x @ x.mT).softmax(-1) @ x

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embeddings.weight.T


class SplitBag(Bag):
    def hidden_states(self, ids: Tensor) -> Tensor:
        return self.layers[0](ids)

    def head(self, hidden: Tensor) -> Tensor:
        return self.layers[1](hidden)


def wrong_head(vocab_size: int) -> nn.Module:
    return WrongHead(vocab_size)


def split_bag(vocab_size: int) -> nn.Module:
    return SplitBag(vocab_size, 8)


def test_a_split_path_that_mixes_documents_is_refused_though_forward_does_not(tokenizer: Vocab) -> None:
    with pytest.raises(ConfigError, match="mixes the documents"):
        build(tokenizer, kind="factory", factory="tests.test_models:wrong_head")


@torch.no_grad()
def test_a_factorys_split_head_stays_split_without_segments(tokenizer: Vocab) -> None:
    model = build(tokenizer, "pad", kind="factory", factory="tests.test_models:split_bag")
    ids, segments = packed_row(tokenizer.size)
    assert has_split_head(model)
    torch.testing.assert_close(
        model.head(model.hidden_states(ids, segments=segments)), model(ids, segments=segments), atol=0, rtol=0
    )


# ---- going on from a folder


@pytest.fixture
def modernbert_folder(tokenizer: Vocab, tmp_path: Path) -> Path:
    config = huggingface.modernbert_config(SHAPE, tokenizer)
    wide(AutoModelForMaskedLM.from_config(config)).save_pretrained(tmp_path / "hf")
    tokenizer.save(tmp_path / "hf")
    return tmp_path / "hf"


@torch.no_grad()
@pytest.mark.parametrize("keys", [{"encoder": SHAPE}, {"kind": "transformers"}], ids=["encoder", "transformers"])
def test_training_goes_on_from_the_weights_of_a_folder(tokenizer: Vocab, modernbert_folder: Path, keys: dict) -> None:
    model = build(tokenizer, from_=str(modernbert_folder), **keys)
    ids = packed_row(tokenizer.size)[0]
    expected = AutoModelForMaskedLM.from_pretrained(modernbert_folder).eval()(ids).logits
    got = model(ids)[..., : tokenizer.size]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_an_encoder_is_described_to_transformers_and_back(tokenizer: Vocab) -> None:
    assert huggingface.encoder_config(huggingface.modernbert_config(SHAPE, tokenizer), "x") == SHAPE


def test_a_folder_of_another_shape_is_refused_with_the_section_to_write(
    tokenizer: Vocab, modernbert_folder: Path
) -> None:
    other = EncoderConfig(**{**vars(SHAPE), "layers": 5, "rope_theta": 1e4})
    with pytest.raises(ConfigError, match=r"encoder: \{layers: 3, rope_theta: 160000.0\}"):
        build(tokenizer, encoder=other, from_=str(modernbert_folder))


def test_a_folder_with_another_vocabulary_is_refused(tokenizer: Vocab, modernbert_folder: Path) -> None:
    larger = vocab.train(["".join(chr(97 + i // 26) + chr(97 + i % 26) for i in range(676))] * 9, 600)
    with pytest.raises(ConfigError, match=f"vocabulary of {tokenizer.size}.*{larger.size}"):
        build(larger, encoder=SHAPE, from_=str(modernbert_folder))
    other = vocab.train(["sphinx of black quartz, judge my vow"] * 3, tokenizer.size)
    with pytest.raises(ConfigError, match="another tokenizer"):
        build(other, encoder=SHAPE, from_=str(modernbert_folder))


def test_a_tokenizer_with_the_same_ids_that_reads_otherwise_is_refused(
    tokenizer: Vocab, modernbert_folder: Path
) -> None:
    file = modernbert_folder / "tokenizer.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"post_processor": None, "truncation": None}))
    build(tokenizer, encoder=SHAPE, from_=str(modernbert_folder))  # these make no other ids
    file.write_text(json.dumps(said | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(ConfigError, match="another tokenizer"):
        build(tokenizer, encoder=SHAPE, from_=str(modernbert_folder))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_hidden_layers": 2}, r"more layers than the model, with model\.layers\.2.*: num_hidden_layers"),
        ({"num_hidden_layers": 4}, r"config\.json with model\.options num_hidden_layers makes no"),
        (
            {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4},
            r"lacks weights.*layers\.3.*: layer_types, num",
        ),
        ({"intermediate_size": 64}, r"of shape \[96, 32\], and the model \[128, 32\].*: intermediate_size"),
    ],
)
def test_options_that_change_a_folders_shape_are_refused(
    tokenizer: Vocab, modernbert_folder: Path, options: dict, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        build(tokenizer, kind="transformers", from_=str(modernbert_folder), options=options)


def test_options_that_change_no_weight_go_with_a_folder(tokenizer: Vocab, modernbert_folder: Path) -> None:
    build(tokenizer, kind="transformers", from_=str(modernbert_folder), options={"attention_dropout": 0.1})


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_cut_weights_are_refused(tokenizer: Vocab, modernbert_folder: Path, keep: float) -> None:
    file = modernbert_folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    with pytest.raises(ConfigError, match=r"weights in .*hf can't be read.*copy the folder again"):
        build(tokenizer, encoder=SHAPE, from_=str(modernbert_folder))


def resaved(folder: Path, tokenizer: Vocab | None, **changes) -> str:
    """A BERT with a vocabulary of the given size and so on, in a folder, with or without a tokenizer."""
    BertForMaskedLM(BertConfig(**(TINY | changes))).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save(folder)
    return str(folder)


def test_rows_that_pad_a_folders_vocabulary_are_no_matter_where_its_tokenizer_matches(
    tokenizer: Vocab, tmp_path: Path
) -> None:
    build(tokenizer, kind="transformers", from_=resaved(tmp_path, tokenizer, vocab_size=tokenizer.size + 1000))


def test_without_a_tokenizer_to_compare_the_sizes_must_agree(
    tokenizer: Vocab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(tokenizer, kind="transformers", from_=resaved(tmp_path / "same", None, vocab_size=tokenizer.size))
    assert "can't be checked" in caplog.text
    with pytest.raises(ConfigError, match="no tokenizer to compare"):
        build(tokenizer, kind="transformers", from_=resaved(tmp_path / "more", None, vocab_size=tokenizer.size + 1))


def test_a_tokenizer_that_can_not_be_read_is_not_passed_over(tokenizer: Vocab, tmp_path: Path) -> None:
    folder = resaved(tmp_path, None, vocab_size=tokenizer.size)
    (tmp_path / "spm.model").write_bytes(b"not one")
    with pytest.raises(ConfigError, match=r"finds no tokenizer|made with another tokenizer"):
        build(tokenizer, kind="transformers", from_=folder)


@pytest.mark.parametrize("keys", [{"encoder": SHAPE}, {"kind": "transformers"}], ids=["encoder", "transformers"])
def test_weights_that_are_not_finite_are_refused(tokenizer: Vocab, modernbert_folder: Path, keys: dict) -> None:
    model = AutoModelForMaskedLM.from_pretrained(modernbert_folder)
    model.model.layers[1].mlp.Wo.weight.data[0, 0] = math.nan
    model.save_pretrained(modernbert_folder)
    with pytest.raises(ConfigError, match=r"aren't finite, in model\.layers\.1\.mlp\.Wo"):
        build(tokenizer, from_=str(modernbert_folder), **keys)


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_an_encoder_goes_on_from_its_own_shape(tokenizer: Vocab, tmp_path: Path, layers: int, every: int) -> None:
    shape = EncoderConfig(**{**vars(SHAPE), "layers": layers, "global_every": every})
    AutoModelForMaskedLM.from_config(huggingface.modernbert_config(shape, tokenizer)).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    build(tokenizer, encoder=shape, from_=str(tmp_path))


def test_a_folder_of_another_kind_is_refused(tokenizer: Vocab, tmp_path: Path) -> None:
    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="holds a clip, which is no masked language model"):
        build(tokenizer, kind="transformers", from_=str(tmp_path))


def test_options_that_change_a_folders_function_are_told(
    tokenizer: Vocab, modernbert_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(tokenizer, kind="transformers", from_=str(modernbert_folder), options={"num_attention_heads": 2})
    assert "num_attention_heads of" in caplog.text and "changed to 2" in caplog.text


def test_weights_that_could_run_code_are_refused(tokenizer: Vocab, modernbert_folder: Path) -> None:
    (modernbert_folder / "model.safetensors").unlink()
    torch.save({}, modernbert_folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        build(tokenizer, encoder=SHAPE, from_=str(modernbert_folder))


def test_remote_code_never_runs(tokenizer: Vocab, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match=r"config\.json"):
        build(tokenizer, kind="transformers", from_=str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_the_masked_language_model_head_is_refused(tokenizer: Vocab, tmp_path: Path) -> None:
    BertModel(BertConfig(vocab_size=tokenizer.size, **TINY)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks weights.*cls\."):
        build(tokenizer, kind="transformers", from_=str(tmp_path))


def test_a_missing_folder_is_refused(tokenizer: Vocab, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        build(tokenizer, encoder=SHAPE, from_=str(tmp_path / "none"))


# ---- configuration


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"kind": "transformers"}, "needs architecture"),
        ({"kind": "factory"}, "needs factory"),
        ({"architecture": "bert"}, "architecture means nothing with kind encoder"),
        ({"kind": "factory", "factory": "a:b", "from_": "x"}, "from means nothing with kind factory"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ModelConfig(**keys)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"architecture": "bertt"}, "did you mean .*bert"),
        ({"architecture": "bert", "options": {"hiden_size": 32}}, "did you mean hidden_size"),
        ({"architecture": "bert", "options": {"vocab_size": 9}}, "tokenizer's"),
        ({"architecture": "bert", "options": {"return_dict": False}}, "needed as it is"),
        ({"architecture": "bert", "options": {"hidden_size": 30, "num_attention_heads": 4}}, "make no bert"),
        ({"architecture": "bert", "options": TINY | {"max_position_embeddings": 31}}, "max_position_embeddings=32"),
        ({"architecture": "roberta", "options": TINY | {"max_position_embeddings": 32}}, "max_position_embeddings=33"),
    ],
)
def test_what_transformers_can_not_make_is_refused(tokenizer: Vocab, keys: dict, said: str) -> None:
    for packing in ("best_fit", "pad"):
        with pytest.raises(ConfigError, match=said):
            build(tokenizer, packing, kind="transformers", **keys)


def test_rows_longer_than_the_encoder_is_meant_for_are_refused(tokenizer: Vocab) -> None:
    with pytest.raises(ConfigError, match="max_positions = 32"):
        build(tokenizer, encoder=SHAPE, seq_len=SEQ + 1)


def test_the_section_is_written_and_read_back() -> None:
    config = ModelConfig(kind="transformers", from_="some/folder", options={"hidden_dropout_prob": 0.0})
    mapping = schema.to_mapping(config)
    assert mapping["from"] == "some/folder"
    assert schema.from_mapping(ModelConfig, mapping) == config


# ---- counting


@pytest.mark.parametrize(
    "keys", [{"encoder": SHAPE}, {"kind": "transformers", "architecture": "roberta", "options": TINY}]
)
def test_a_model_can_be_counted_without_memory(tokenizer: Vocab, keys: dict) -> None:
    with torch.device("meta"):
        shape = models.build(ModelConfig(**keys), tokenizer.size, SEQ)
    assert next(shape.parameters()).is_meta
    assert models.count_parameters(shape) == models.count_parameters(build(tokenizer, **keys))


def test_a_folder_is_counted_without_memory(tokenizer: Vocab, modernbert_folder: Path) -> None:
    for keys in ({"encoder": SHAPE}, {"kind": "transformers"}):
        with torch.device("meta"):
            shape = models.build(ModelConfig(from_=str(modernbert_folder), **keys), tokenizer.size, SEQ)
        assert next(shape.parameters()).is_meta


def test_flops_of_the_encoder_follow_the_formula() -> None:
    """Against a count by matrix products: 2 operations a multiply-add, the backward pass twice the forward."""
    config = ModelConfig(encoder=SHAPE)
    model = Encoder(SHAPE, 1000)
    d, m, layers = SHAPE.width, SHAPE.mlp_width, SHAPE.layers
    matrices = layers * (4 * d * d + 3 * d * m)
    attended = 2 * 2 * d * (32 + 7 + 32)  # scores and weighted sum; layers 0 and 2 attend globally
    head = 0.25 * 2 * (padded(1000) * d + d * d)
    expected = 3 * (2 * matrices + attended + head)
    norms = (2 * layers - 1) * d
    assert models.flops_per_token(config, model, 1000, 32, 0.25) == expected + 6 * norms
    again = ModelConfig(encoder=replace(SHAPE, recompute=True))  # what is computed twice counts once
    assert models.flops_per_token(again, model, 1000, 32, 0.25) == expected + 6 * norms


def test_flops_of_any_other_model_are_six_times_its_parameters() -> None:
    config = ModelConfig(kind="transformers", architecture="bert")
    model = BertForMaskedLM(BertConfig(vocab_size=100, **TINY))
    assert models.flops_per_token(config, model, 100, 32, 0.3) == 6 * models.count_parameters(model)
