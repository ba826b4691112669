"""transformers: its masked language models behind our interface, and the encoder's weights from and to ModernBERT."""

import difflib
import logging
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlm_dist.encoder import (
    VOCABULARY_WEIGHTS,
    Encoder,
    EncoderConfig,
    attention_mask,
    document_starts,
    positions_in_document,
)
from mlm_dist.schema import ConfigError
from mlm_dist.vocab import Vocab, load

if TYPE_CHECKING:
    from transformers import ModernBertConfig, PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "*.model", "*bpe.codes", "merges.txt")
# what a ModernBERT must say for our encoder to be the same model
FIXED_IN_ENCODER = {
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
}
# options that are not the user's to set
DECIDED = {"vocab_size": "the tokenizer's to say", "return_dict": "needed as it is"}
OF_WINDOW_LAYERS = ("window", "rope_theta_local", "rope_factor_local")
NO_PART_OF_THE_SHAPE = ("init_std", "max_positions", "max_documents", "recompute")


# ---- the encoder from and to ModernBERT


def modernbert_config(shape: EncoderConfig, vocab: Vocab) -> "ModernBertConfig":
    """transformers' description of an encoder, without the rows that pad its vocabulary."""
    from transformers import ModernBertConfig

    ropes = {"full_attention": shape.rope(is_global=True), "sliding_attention": shape.rope(is_global=False)}
    return ModernBertConfig(
        vocab_size=vocab.size,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.max_positions,
        layer_types=["full_attention" if shape.is_global(i) else "sliding_attention" for i in range(shape.layers)],
        local_attention=shape.window,
        rope_parameters={kind: rope_parameters(*rope) for kind, rope in ropes.items()},
        norm_eps=shape.norm_eps,
        initializer_range=shape.init_std,
        tie_word_embeddings=shape.tie,
        **FIXED_IN_ENCODER,
        **special_ids(vocab),
    )


def rope_parameters(theta: float, factor: float) -> dict[str, Any]:
    """transformers' description of rotary angles."""
    if factor == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def rope_of(described: dict[str, Any]) -> tuple[float, float] | None:
    """The inverse of `rope_parameters`; None for angles that our encoder has not."""
    kind = described["rope_type"]
    if kind not in ("default", "linear") or described.get("partial_rotary_factor", 1.0) != 1.0:
        return None
    return described["rope_theta"], described["factor"] if kind == "linear" else 1.0


def encoder_config(hf: "PreTrainedConfig", folder: str) -> EncoderConfig:
    """The inverse of `modernbert_config`. Raises ConfigError for what our encoder is not."""
    if hf.model_type != "modernbert":
        raise ConfigError(f"{folder} holds a {hf.model_type}, and not a modernbert; set model.kind=transformers")
    described, kinds = hf.to_dict(), hf.layer_types
    every = kinds.index("full_attention", 1) if "full_attention" in kinds[1:] else len(kinds)
    ropes = {kind: rope_of(hf.rope_parameters[kind]) for kind in ("full_attention", "sliding_attention")}
    other = {key: described[key] for key, value in FIXED_IN_ENCODER.items() if described[key] != value}
    if any((kind == "full_attention") != (i % every == 0) for i, kind in enumerate(kinds)):
        other["layer_types"] = kinds
    other |= {f"rope_parameters.{kind}": hf.rope_parameters[kind] for kind, rope in ropes.items() if rope is None}
    if other:
        raise ConfigError(
            f"{folder} holds a modernbert with {', '.join(f'{key} = {value}' for key, value in other.items())}, which "
            "our encoder has not; set model.kind=transformers to train it"
        )
    (theta, factor), (theta_local, factor_local) = ropes.values()
    return EncoderConfig(
        layers=hf.num_hidden_layers,
        width=hf.hidden_size,
        heads=hf.num_attention_heads,
        mlp_width=hf.intermediate_size,
        max_positions=hf.max_position_embeddings,
        global_every=every,
        window=hf.local_attention,
        rope_theta=theta,
        rope_theta_local=theta_local,
        rope_factor=factor,
        rope_factor_local=factor_local,
        norm_eps=hf.norm_eps,
        tie=hf.tie_word_embeddings,
        init_std=hf.initializer_range,
    )


@torch.no_grad()
def copy_weights(model: Encoder, source: "PreTrainedModel", folder: str) -> None:
    """Give the encoder the weights of a ModernBERT; rows that pad the vocabulary stay as they are.

    Raises ConfigError where the shapes differ, with the section to write.
    """
    theirs, ours = encoder_config(source.config, folder), model.config
    names = [field.name for field in fields(EncoderConfig) if field.name not in NO_PART_OF_THE_SHAPE]
    if theirs.layers == ours.layers and all(theirs.is_global(i) == ours.is_global(i) for i in range(ours.layers)):
        names.remove("global_every")  # which few layers don't show
        if all(ours.is_global(i) for i in range(ours.layers)):
            names = [name for name in names if name not in OF_WINDOW_LAYERS]
    wrong = [name for name in names if vars(theirs)[name] != vars(ours)[name]]
    if wrong:
        values = ", ".join(f"{name}: {vars(theirs)[name]}" for name in wrong)
        raise ConfigError(f"{folder} has another shape than model.encoder; write encoder: {{{values}}}")
    weights = source.state_dict()
    for name, weight in model.state_dict().items():
        rows = model.vocab_size if name in VOCABULARY_WEIGHTS else len(weight)
        weight[:rows].copy_(weights[name][:rows])


def modernbert_weights(model: Encoder) -> dict[str, Tensor]:
    """The encoder's weights as a ModernBERT without vocabulary padding has them: views of the same memory."""
    return {
        name: weight[: model.vocab_size] if name in VOCABULARY_WEIGHTS else weight
        for name, weight in model.state_dict().items()
    }


# ---- any masked language model behind our interface


class TransformersModel(nn.Module):
    """A masked language model of transformers. Logits (B, T, V) for ids and segments (B, T).

    packed: tell it of the documents by a (B, 1, T, T) mask and position ids; else only where there is padding
    offset: the position id of a document's first token
    """

    def __init__(self, model: "PreTrainedModel", packed: bool, offset: int = 0) -> None:
        super().__init__()
        self.model = model
        self.packed = packed
        self.offset = offset

    def forward(self, ids: Tensor, *, segments: Tensor | None = None) -> Tensor:
        return self.model(input_ids=ids, **self.keywords(segments)).logits

    def keywords(self, segments: Tensor | None) -> dict[str, Any]:
        """What the segments are to transformers."""
        if segments is None:
            return {}
        if not self.packed:
            return {"attention_mask": (segments > 0).long()}
        length = segments.shape[1]
        like = torch.empty(0, dtype=self.model.dtype, device=segments.device)
        mask: Any = attention_mask(segments, length, length, like)  # (B, 1, T, T)
        if self.model.config.model_type == "modernbert":  # which adds no window to a mask that it is given
            near = attention_mask(segments, length, self.model.config.sliding_window, like)
            mask = {"full_attention": mask, "sliding_attention": near}
        return {"attention_mask": mask, "position_ids": positions_in_document(document_starts(segments)) + self.offset}


class SplitTransformersModel(TransformersModel):
    """One whose head can run on some of the positions."""

    def hidden_states(self, ids: Tensor, *, segments: Tensor | None = None) -> Tensor:
        """What `head` makes logits of, (B, T, d)."""
        return self.model.base_model(input_ids=ids, **self.keywords(segments)).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (N, d) -> logits (N, V)."""
        return HEADS[self.model.config.model_type](self.model, hidden)


def adapt(model: "PreTrainedModel", packed: bool, offset: int = 0) -> TransformersModel:
    """The model behind our interface, its head split off where it is known how."""
    adapter = SplitTransformersModel if model.config.model_type in HEADS else TransformersModel
    return adapter(model, packed, offset)


# ---- making and reading one


def on_meta() -> bool:
    return torch.get_default_device().type == "meta"


def new_model(architecture: str, options: dict[str, Any], vocab_size: int, vocab: Vocab | None) -> "PreTrainedModel":
    """A model with fresh weights. Raises ConfigError for an architecture or options that transformers has not."""
    from transformers import AutoConfig, AutoModelForMaskedLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as KNOWN

    if architecture not in KNOWN:
        close = difflib.get_close_matches(architecture, KNOWN, n=3) or ["bert", "roberta", "modernbert"]
        raise ConfigError(
            f"model.architecture = {architecture} is no masked language model of transformers; "
            f"did you mean {' or '.join(close)}?"
        )
    usual = AutoConfig.for_model(architecture)
    refuse_unknown(options, usual)
    ids = {name: number for name, number in special_ids(vocab).items() if hasattr(usual, name)}
    try:
        config = AutoConfig.for_model(architecture, **{"vocab_size": vocab_size} | ids | options)
        return AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever the architecture makes of its options
        raise ConfigError(f"model.options make no {architecture}: {error}") from error


def refuse_unknown(options: dict[str, Any], usual: "PreTrainedConfig") -> None:
    """Raise ConfigError for options that the architecture does not have, which transformers would pass over."""
    for name in options:
        if name in DECIDED:
            raise ConfigError(f"model.options.{name} is {DECIDED[name]}; take it out")
        if not hasattr(usual, name):
            close = difflib.get_close_matches(name, usual.to_dict(), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"model.options.{name} is no setting of {usual.model_type}{hint}")


def special_ids(vocab: Vocab | None) -> dict[str, int | None]:
    """The special ids under the names that they have in transformers' configurations."""
    pad, cls, sep = (vocab.pad_id, vocab.cls_id, vocab.sep_id) if vocab is not None else (0, None, None)
    return {
        "pad_token_id": pad,
        "cls_token_id": cls,
        "bos_token_id": cls,
        "sep_token_id": sep,
        "eos_token_id": sep,
    }


def read_config(folder: str, options: dict[str, Any]) -> "PreTrainedConfig":
    """A local folder's config.json, with `options` in place of what it says. Runs no code from the folder."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as KNOWN

    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"model.from = {folder} is no Hugging Face folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        changed = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # whatever transformers makes of a config.json
        raise ConfigError(f"{folder}/config.json can't be used: {error}") from error
    if config.model_type not in KNOWN:
        raise ConfigError(f"{folder} holds a {config.model_type}, which is no masked language model of transformers")
    refuse_unknown(options, config)
    for name, value in options.items():
        if vars(config).get(name) != value:
            logger.warning("model.options: %s of %s is changed to %r", name, folder, value)
    return changed


def read_model(folder: str, options: dict[str, Any], vocab_size: int, vocab: Vocab | None) -> "PreTrainedModel":
    """The model of a local folder, in fp32; on the meta device its shape alone.

    Raises ConfigError where its vocabulary or its weights don't fit.
    """
    from transformers import AutoModelForMaskedLM

    config = read_config(folder, options)
    check_vocabulary(folder, config, vocab_size, vocab)
    if not any(Path(folder).glob("*.safetensors")):
        raise ConfigError(f"{folder} has no *.safetensors file, and weights in formats that can run code are not read")
    try:
        with torch.device("meta"):
            shape = AutoModelForMaskedLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever the architecture makes of its settings
        by = f" with model.options {', '.join(sorted(options))}" if options else ""
        raise ConfigError(f"{folder}/config.json{by} makes no masked language model: {error}") from error
    if on_meta():
        return shape
    try:
        model, info = AutoModelForMaskedLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # whatever transformers makes of a damaged file
        raise ConfigError(f"the weights in {folder} can't be read ({error}); copy the folder again") from error
    refuse_misfits(folder, options, model, info)
    return model


def check_vocabulary(folder: str, config: "PreTrainedConfig", vocab_size: int, vocab: Vocab | None) -> None:
    """Raise ConfigError where the folder's model reads by another vocabulary than the shards were made with."""
    rebuild = f"build the shards with --tokenizer {folder}"
    has_tokenizer = any(next(Path(folder).glob(pattern), None) for pattern in TOKENIZER_FILES)
    sizes = f"{folder} has a vocabulary of {config.vocab_size}, and the shards one of {vocab_size}"
    if config.vocab_size < vocab_size:
        raise ConfigError(f"{sizes}; {rebuild}")
    if vocab is not None and has_tokenizer and not load(folder).reads_like(vocab):
        raise ConfigError(f"the shards were made with another tokenizer than that of {folder}; {rebuild}")
    if not has_tokenizer and config.vocab_size != vocab_size:
        raise ConfigError(
            f"{sizes}, and the folder no tokenizer to compare; put the model's own there and build the shards with it"
        )
    if not has_tokenizer:
        logger.warning("%s holds no tokenizer: that the shards were made with its own can't be checked", folder)


def refuse_misfits(folder: str, options: dict[str, Any], model: "PreTrainedModel", info: dict[str, Any]) -> None:
    """Raise ConfigError where the folder's weights are not the model's: some missing, of another shape, or left over.

    info: what from_pretrained says of the loading. Left-over weights are refused where they belong to further layers;
    those of another task's head or a pooler are no part of a masked language model.
    """
    changed = f"; take what changes its shape out of model.options: {', '.join(sorted(options))}" if options else ""
    if info["missing_keys"]:
        raise ConfigError(
            f"{folder} lacks weights of a masked language model, such as {min(info['missing_keys'])}{changed}"
        )
    if info["mismatched_keys"]:
        name, theirs, ours = min(info["mismatched_keys"])
        raise ConfigError(f"{folder} has {name} of shape {list(theirs)}, and the model {list(ours)}{changed}")
    kinds = {re.sub(r"\d+", "N", name) for name in model.state_dict()}
    further = [name for name in info["unexpected_keys"] if re.sub(r"\d+", "N", name) in kinds]
    if further:
        raise ConfigError(f"{folder} has more layers than the model, with {min(further)}{changed}")
    broken = [name for name, weight in model.state_dict().items() if not weight.isfinite().all()]
    if broken:
        raise ConfigError(f"{folder} has weights that aren't finite, in {broken[0]}; take another checkpoint of it")


# what makes logits of the last hidden states, by transformers' model type
HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "bert": lambda model, hidden: model.cls(hidden),
    "roberta": lambda model, hidden: model.lm_head(hidden),
    "xlm-roberta": lambda model, hidden: model.lm_head(hidden),
    "camembert": lambda model, hidden: model.lm_head(hidden),
    "modernbert": lambda model, hidden: model.decoder(model.head(hidden)),
}
