"""A trained model -> a Hugging Face folder that `transformers` loads offline."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_model
from torch import nn

from mlm_dist import card, huggingface
from mlm_dist.encoder import Encoder
from mlm_dist.models import IdsOnly, ModelConfig
from mlm_dist.schema import ConfigError
from mlm_dist.vocab import Vocab

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# by these a folder is known to be a model, which `overwrite` may remove
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")
ROUNDING = 1e-4  # of the largest logit: a model trained at a high learning rate makes 2e-5 of fp32's last digits


def write(
    folder: str | Path,
    model: nn.Module,
    config: ModelConfig,
    vocab: Vocab,
    facts: Mapping[str, Any],
    overwrite: bool = False,
) -> str:
    """Write config.json, model.safetensors, the tokenizer and a model card; returns a sentence that says what there is.

    model:     as `models.build` makes it, trained, in fp32 on the host
    facts:     what the card says of the training: {"tokens": 10_000_000, ...}; text of several lines gets a block to
               unfold; a `license`, `language` or `datasets` goes to the card's metadata
    overwrite: replace the model that stands in `folder`
    The folder appears whole or not at all, and only once it was loaded and gave the model's logits. What a factory made
    gets no config.json. Raises ConfigError for a folder that is in use, and where the logits differ.
    """
    folder = Path(folder)
    refuse_used(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    staging.mkdir()
    try:
        save = save_of_factory if config.kind == "factory" else save_for_transformers
        saved = save(staging, model, config, vocab)
        (staging / "README.md").write_text(card.write(folder.name, saved, config, vocab, facts), encoding="utf-8")
        replace(folder, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if config.kind == "factory":
        return f"{folder}: weights and tokenizer; what a factory made can't be loaded by AutoModelForMaskedLM"
    return f"{folder}: ready for AutoModelForMaskedLM.from_pretrained and pipeline('fill-mask')"


def refuse_used(folder: str | Path, overwrite: bool) -> None:
    """Raise ConfigError where `folder` holds something, unless it is a model and `overwrite` is set.

    `write` does this itself; call it first where getting the model takes long.
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not any((folder / name).exists() for name in MODEL_FILES):
        raise ConfigError(f"{folder} exists and holds no model; choose another folder")
    if not overwrite:
        raise ConfigError(f"{folder} holds a model already; choose another folder or pass --overwrite")


def replace(folder: Path, staging: Path) -> None:
    """Put `staging` in the place of `folder`."""
    old = staging.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    staging.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_of_factory(folder: Path, model: nn.Module, config: ModelConfig, vocab: Vocab) -> nn.Module:
    """Weights and tokenizer. Returns the model that was saved."""
    model = model.model if isinstance(model, IdsOnly) else model
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    vocab.save(folder)
    return model


def save_for_transformers(folder: Path, model: nn.Module, config: ModelConfig, vocab: Vocab) -> nn.Module:
    """config.json, weights and tokenizer, tried out. Returns transformers' model that was saved."""
    if isinstance(model, Encoder):
        hf, longest = as_modernbert(model, vocab), config.encoder.max_positions
    else:
        assert isinstance(model, huggingface.TransformersModel)
        hf = model.model
        positions = hf.config.to_dict().get("max_position_embeddings")
        longest = None if positions is None else positions - model.offset
    hf.config.name_or_path = ""  # it names a folder of the machine that trained the model
    hf.save_pretrained(folder)
    vocab.save(folder)
    if longest is not None:
        path = folder / "tokenizer_config.json"
        described = json.loads(path.read_text(encoding="utf-8")) | {"model_max_length": longest}
        path.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    verify(folder, model, vocab, length=min(longest or 128, 128))
    return hf


def as_modernbert(model: Encoder, vocab: Vocab) -> "PreTrainedModel":
    """transformers' model with the encoder's weights, less the rows that pad its vocabulary."""
    from transformers import ModernBertForMaskedLM

    with torch.device("meta"):
        hf = ModernBertForMaskedLM(huggingface.modernbert_config(model.config, vocab))
    # copies, since a view would be saved with all that it is a view of
    weights = {name: weight.clone() for name, weight in huggingface.modernbert_weights(model).items()}
    hf.load_state_dict(weights, assign=True)
    hf.tie_weights()
    return hf


@torch.no_grad()
def verify(folder: Path, model: nn.Module, vocab: Vocab, length: int) -> None:
    """Load the folder as its users will, and compare its logits on `length` tokens with the model's.

    Raises ConfigError where weights are missing or left over, or logits differ by more than `ROUNDING` of the largest.
    """
    from transformers import AutoModelForMaskedLM, __version__

    loaded, info = AutoModelForMaskedLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    ids = (torch.arange(length) * 7919 % vocab.size)[None]  # (1, T)
    ids[ids == vocab.pad_id] = vocab.mask_id
    training = model.training
    expected = model.eval()(ids)[..., : vocab.size]  # (1, T, V)
    model.train(training)
    got = loaded.eval()(ids).logits[..., : vocab.size]  # a folder that training went on from may have rows to spare
    difference = (got - expected).abs().max().item()
    faults = {name: keys for name, keys in info.items() if keys}
    if faults or not difference <= ROUNDING * max(1.0, expected.abs().max().item()):
        wrong = "".join(f", {name}: {', '.join(map(str, keys))}" for name, keys in faults.items())
        raise ConfigError(
            f"nothing was exported: what transformers {__version__} makes of the model is not what was trained (logits "
            f"differ by {difference:.2g}{wrong}); export with the version of transformers that requirements.txt names"
        )
