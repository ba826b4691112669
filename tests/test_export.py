import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedModel, pipeline

from mlm_dist import export, huggingface, models, vocab
from mlm_dist.encoder import EncoderConfig
from mlm_dist.models import ModelConfig
from mlm_dist.schema import ConfigError
from mlm_dist.vocab import Vocab
from tests.test_models import Bag

ROOT = Path(__file__).parent.parent
SHAPE = EncoderConfig(layers=3, width=32, heads=4, mlp_width=48, max_positions=64, global_every=2, window=6)
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FACTS = {"steps": 1200, "held-out loss": 3.25, "best": None, "license": "mit", "config": "run:\n  steps: 1200\n"}
CONFIGS = {
    "tied": ModelConfig(encoder=SHAPE),
    "untied": ModelConfig(encoder=EncoderConfig(**{**vars(SHAPE), "tie": False})),
    "bert": ModelConfig(kind="transformers", architecture="bert", options=TINY),
    "roberta": ModelConfig(kind="transformers", architecture="roberta", options=TINY),
}


@pytest.fixture(scope="module")
def tokenizer() -> Vocab:
    return vocab.train(["the quick brown fox jumps over the lazy dog"] * 3, 300)


def trained(config: ModelConfig, tokenizer: Vocab, packing: str = "best_fit") -> nn.Module:
    """A model with weights as wide as training might make them."""
    torch.manual_seed(0)
    model = models.build(config, tokenizer.size, 64, tokenizer, packing).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def exported(request, tokenizer: Vocab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    config = CONFIGS[request.param]
    model, folder = trained(config, tokenizer), tmp_path_factory.mktemp(request.param) / "model"
    export.write(folder, model, config, tokenizer, FACTS)
    return folder, model


@torch.no_grad()
def test_the_folder_loads_whole_with_the_logits_of_the_trained_model(exported, tokenizer: Vocab) -> None:
    folder, model = exported
    loaded, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert {name: keys for name, keys in info.items() if keys} == {}
    ids = torch.randint(5, tokenizer.size, (3, 50))
    segments = torch.ones_like(ids)
    segments[1, 30:] = 0
    ids *= segments
    got = loaded.eval()(ids, attention_mask=segments).logits
    expected = model(ids, segments=segments)[..., : tokenizer.size]
    assert got.shape == (3, 50, tokenizer.size)
    torch.testing.assert_close(got[segments > 0], expected[segments > 0], atol=1e-5, rtol=1e-5)


def test_rows_to_spare_that_a_folder_came_with_are_exported_too(tokenizer: Vocab, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertForMaskedLM(BertConfig(vocab_size=tokenizer.size + 12, **shape)).save_pretrained(tmp_path / "given")
    tokenizer.save(tmp_path / "given")
    config = ModelConfig(kind="transformers", from_=str(tmp_path / "given"))
    export.write(tmp_path / "made", trained(config, tokenizer), config, tokenizer, FACTS)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "made")
    assert loaded.config.vocab_size == tokenizer.size + 12
    again = models.build(ModelConfig(kind="transformers", from_=str(tmp_path / "made")), tokenizer.size, 64, tokenizer)
    assert again.model.config.vocab_size == tokenizer.size + 12


def test_the_configuration_says_what_the_model_is(exported, tokenizer: Vocab) -> None:
    folder, model = exported
    said = json.loads((folder / "config.json").read_text())
    assert said["dtype"] == "float32"
    assert said["vocab_size"] == tokenizer.size
    assert said["pad_token_id"] == tokenizer.pad_id
    assert str(folder.parent.parent) not in (folder / "config.json").read_text()
    if isinstance(model, models.Encoder):
        assert said["architectures"] == ["ModernBertForMaskedLM"]
        assert [said[f"{name}_token_id"] for name in ("cls", "bos", "sep", "eos")] == [2, 2, 3, 3]
        assert said["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
        assert said["local_attention"] == 6
        assert said["rope_parameters"]["full_attention"]["rope_theta"] == 160_000
        assert said["rope_parameters"]["sliding_attention"]["rope_theta"] == 10_000
        assert said["max_position_embeddings"] == 64
        assert said["tie_word_embeddings"] == model.config.tie


def test_a_tied_matrix_is_stored_once(tokenizer: Vocab, tmp_path: Path) -> None:
    sizes = []
    for name in ("tied", "untied"):
        export.write(tmp_path / name, trained(CONFIGS[name], tokenizer), CONFIGS[name], tokenizer, {})
        sizes.append((tmp_path / name / "model.safetensors").stat().st_size)
    matrix = tokenizer.size * SHAPE.width * 4
    assert matrix <= sizes[1] - sizes[0] < matrix + 1000


@torch.no_grad()
def test_the_pipeline_fills_a_mask_as_the_model_does(exported, tokenizer: Vocab) -> None:
    folder, model = exported
    guesses = pipeline("fill-mask", model=str(folder), top_k=3)("the quick[MASK] fox")
    ids = [tokenizer.cls_id, *tokenizer.encode_batch(["the quick"])[0], tokenizer.mask_id]
    ids += [*tokenizer.encode_batch([" fox"])[0], tokenizer.sep_id]
    expected = model(torch.tensor([ids]))[0, ids.index(tokenizer.mask_id), : tokenizer.size].softmax(-1).topk(3)
    assert [guess["token"] for guess in guesses] == expected.indices.tolist()
    assert [guess["score"] for guess in guesses] == pytest.approx(expected.values.tolist(), rel=1e-3)
    assert AutoTokenizer.from_pretrained(folder).model_max_length >= 64


def test_training_can_go_on_from_an_export(tokenizer: Vocab, tmp_path: Path) -> None:
    model = trained(CONFIGS["tied"], tokenizer)
    export.write(tmp_path / "model", model, CONFIGS["tied"], tokenizer, {})
    again = models.build(ModelConfig(encoder=SHAPE, from_=str(tmp_path / "model")), tokenizer.size, 64, tokenizer)
    for name, weight in huggingface.modernbert_weights(again).items():
        assert torch.equal(weight, huggingface.modernbert_weights(model)[name]), name


def test_the_card_tells_the_facts_and_nothing_else(exported) -> None:
    card = (exported[0] / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "transformers"\npipeline_tag: "fill-mask"\nlicense: "mit"\n---\n')
    assert "| steps | 1,200 |\n| held-out loss | 3.25 |\n" in card
    assert "<summary>config</summary>\n\n```\nrun:\n  steps: 1200\n```\n\n</details>" in card
    assert "[MASK]" in card and "best" not in card


# ---- what is refused


def test_a_folder_in_use_is_kept(tokenizer: Vocab, tmp_path: Path) -> None:
    config, target = CONFIGS["tied"], tmp_path / "model"
    model = trained(config, tokenizer)
    target.mkdir()
    export.write(target, model, config, tokenizer, {"round": 1})  # an empty folder is free
    with pytest.raises(ConfigError, match="--overwrite"):
        export.write(target, model, config, tokenizer, {"round": 2})
    assert "| round | 1 |" in (target / "README.md").read_text()
    export.write(target, model, config, tokenizer, {"round": 2}, overwrite=True)
    assert "| round | 2 |" in (target / "README.md").read_text()

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    with pytest.raises(ConfigError, match="no model"):
        export.write(tmp_path / "home", model, config, tokenizer, {}, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "home"}


def test_a_folder_can_be_checked_before_there_is_a_model(tmp_path: Path) -> None:
    for name in ("empty", "model", "home"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "home" / "letters.txt").touch()
    (tmp_path / "file").touch()
    for name in ("none", "empty"):
        export.refuse_used(str(tmp_path / name), overwrite=False)
    export.refuse_used(str(tmp_path / "model"), overwrite=True)
    with pytest.raises(ConfigError, match="model holds a model already; choose another folder or pass --overwrite"):
        export.refuse_used(str(tmp_path / "model"), overwrite=False)
    for name in ("home", "file"):
        with pytest.raises(ConfigError, match=f"{name} exists and holds no model; choose another folder"):
            export.refuse_used(str(tmp_path / name), overwrite=True)


def test_an_export_that_lacks_a_weight_does_not_appear(tokenizer: Vocab, tmp_path: Path, monkeypatch) -> None:
    config, save = CONFIGS["tied"], PreTrainedModel.save_pretrained

    def save_less(model: PreTrainedModel, folder: Path) -> None:
        save(model, folder, state_dict={k: v for k, v in model.state_dict().items() if k != "head.norm.weight"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_less)
    with pytest.raises(ConfigError, match=r"missing_keys: head\.norm\.weight\); export with"):
        export.write(tmp_path / "model", trained(config, tokenizer), config, tokenizer, {})
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_differs_from_the_model_does_not_appear(tokenizer: Vocab, tmp_path: Path, monkeypatch) -> None:
    config = CONFIGS["tied"]
    true_weights = huggingface.modernbert_weights

    def altered(model: models.Encoder) -> dict[str, torch.Tensor]:
        weights = {name: weight.clone() for name, weight in true_weights(model).items()}
        weights["model.layers.1.mlp.Wo.weight"][0, 0] += 0.1
        return weights

    monkeypatch.setattr(huggingface, "modernbert_weights", altered)
    with pytest.raises(ConfigError, match=r"^nothing was exported: .* \(logits differ by [^:]*\); export with"):
        export.write(tmp_path / "model", trained(config, tokenizer), config, tokenizer, {})
    assert list(tmp_path.iterdir()) == []


def test_what_a_factory_made_is_saved_without_a_configuration(tokenizer: Vocab, tmp_path: Path) -> None:
    from safetensors.torch import load_model

    config = ModelConfig(kind="factory", factory="tests.test_models:ids_alone", options={"width": 4})
    model = trained(config, tokenizer, "pad")
    said = export.write(tmp_path / "model", model, config, tokenizer, {})
    assert "can't be loaded by AutoModelForMaskedLM" in said
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert "tests.test_models:ids_alone" in (tmp_path / "model" / "README.md").read_text()
    again = Bag(tokenizer.size, 4)
    load_model(again, tmp_path / "model" / "model.safetensors")
    ids = torch.randint(tokenizer.size, (1, 5))
    assert torch.equal(again(ids), model(ids))


# ---- launch/fill_mask.py


def run_fill_mask(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.syspath_prepend(ROOT / "launch")
    monkeypatch.setattr(sys, "argv", ["fill_mask.py", *arguments])
    return importlib.import_module("fill_mask").main()


def test_fill_mask_shows_the_likeliest_tokens_of_every_mask(
    tokenizer: Vocab, tmp_path: Path, monkeypatch, capsys
) -> None:
    folder = str(tmp_path / "model")
    export.write(folder, trained(CONFIGS["tied"], tokenizer), CONFIGS["tied"], tokenizer, {})
    capsys.readouterr()
    assert run_fill_mask(monkeypatch, "--model", folder, "--top", "2", "the[MASK] brown[MASK]", "a lazy[MASK]") == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if "%" not in line]
    assert shown == ["the[MASK] brown[MASK]", "  [MASK] 1", "  [MASK] 2", "a lazy[MASK]", "  [MASK] 1"]
    guesses = pipeline("fill-mask", model=folder, top_k=2)("a lazy[MASK]")
    assert lines[-2:] == [f"    {guess['score']:7.2%}  {guess['token_str']!r}" for guess in guesses]
    with pytest.raises(ConfigError, match=r"no \[MASK\] in 'no mask here'"):
        run_fill_mask(monkeypatch, "--model", folder, "no mask here")
    with pytest.raises(ConfigError, match="the model takes 64"):
        run_fill_mask(monkeypatch, "--model", folder, "quartz " * 64 + "[MASK]")


def refusal_of_fill_mask(folder: str) -> str:
    """The one line that it says on a folder it can't use."""
    command = [sys.executable, str(ROOT / "launch" / "fill_mask.py"), "--model", folder, "a [MASK]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_fill_mask_says_in_one_line_that_a_folder_is_missing() -> None:
    assert "no/such/folder is no exported model" in refusal_of_fill_mask("no/such/folder")


def test_fill_mask_says_in_one_line_what_is_damaged(tokenizer: Vocab, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "model"
    export.write(folder, trained(CONFIGS["tied"], tokenizer), CONFIGS["tied"], tokenizer, {})
    weights = (folder / "model.safetensors").read_bytes()
    for length in (0, 100, len(weights) - 1):
        (folder / "model.safetensors").write_bytes(weights[:length])
        with pytest.raises(ConfigError, match=f"^the weights in {folder} are damaged .*; copy them again or export"):
            run_fill_mask(monkeypatch, "--model", str(folder), "a [MASK]")
    assert f"error: the weights in {folder} are damaged" in refusal_of_fill_mask(str(folder))
    (folder / "tokenizer.json").unlink()
    assert f"error: {folder} can't be loaded: " in refusal_of_fill_mask(str(folder))
