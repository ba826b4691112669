"""Models to train: our encoder, any masked language model of transformers, or what a Python factory returns.

Every model takes `(ids, segments=...)` as `encoder.Encoder` does, and gives logits (B, T, V), V >= the vocabulary.
"""

import copy
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mlm_dist import huggingface
from mlm_dist.encoder import Encoder, EncoderConfig, padded
from mlm_dist.mlm import has_split_head, logits_of
from mlm_dist.schema import ConfigError, setting
from mlm_dist.vocab import Vocab

Packing = Literal["best_fit", "pad"]

SHORTEST_TRIAL, LONGEST_TRIAL = 8, 2048  # positions


@dataclass(frozen=True)
class ModelConfig:
    kind: Literal["encoder", "transformers", "factory"] = setting("encoder", help="ours, transformers' or your own")
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    architecture: str | None = setting(None, help="kind transformers: a model type such as bert, roberta, modernbert")
    factory: str | None = setting(
        None, help="kind factory: package.module:function, called with vocab_size and options"
    )
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "kind transformers: of its configuration; kind factory: its arguments"}
    )
    from_: str | None = setting(None, help="local Hugging Face folder whose weights training goes on from")

    def __post_init__(self) -> None:
        if self.kind == "transformers" and self.architecture is None and self.from_ is None:
            raise ConfigError("kind transformers needs architecture (bert, say), or from: a local Hugging Face folder")
        if self.kind == "factory" and self.factory is None:
            raise ConfigError("kind factory needs factory: package.module:function")
        unused = {
            "encoder": {"architecture": self.architecture, "factory": self.factory, "options": self.options},
            "transformers": {"factory": self.factory},
            "factory": {"architecture": self.architecture, "from": self.from_},
        }
        for name, value in unused[self.kind].items():
            if value:
                raise ConfigError(f"{name} means nothing with kind {self.kind}; take it out, or set another kind")


def build(
    config: ModelConfig, vocab_size: int, seq_len: int, vocab: Vocab | None = None, packing: Packing = "best_fit"
) -> nn.Module:
    """The model, in fp32, with weights from torch's default generator or from `config.from_`.

    vocab:   the tokenizer, for its special ids; None gives a model to count, not to train
    packing: best_fit asks for a model that keeps the documents of a row apart, which is tried out
    On the meta device only shapes are read, and nothing is tried out. Raises ConfigError for what can't be built.
    """
    check(config, seq_len)
    return MODELS[config.kind](config, vocab_size, seq_len, vocab, packing)


def check(config: ModelConfig, seq_len: int) -> None:
    """Raise ConfigError where rows are longer than the encoder is meant for."""
    if config.kind == "encoder" and seq_len > config.encoder.max_positions:
        raise ConfigError(
            f"batch.seq_len = {seq_len} is more than model.encoder.max_positions = {config.encoder.max_positions}; "
            "raise max_positions"
        )


def count_parameters(model: nn.Module) -> int:
    """Numbers that training changes; a matrix that is used twice counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def flops_per_token(config: ModelConfig, model: nn.Module, vocab_size: int, seq_len: int, mask_rate: float) -> float:
    """Floating point operations a token costs, forward and backward, counted as Chowdhery et al. do (arXiv 2204.02311).

    Encoder: 6 N + 6 r (V d + d^2) + 12 d sum_l a_l, where N are the parameters of the layers, r is the share of
    positions that the head runs on, and a_l how many positions layer l attends to: the row, or the window if that is
    less, as if the row were one document. Any other model: 6 times all its parameters.
    """
    if not isinstance(model, Encoder):
        return 6.0 * count_parameters(model)
    shape = config.encoder
    nearby = min(seq_len, shape.window + 1)
    attended = sum(seq_len if shape.is_global(layer) else nearby for layer in range(shape.layers))
    head = (padded(vocab_size) + shape.width) * shape.width
    return 6.0 * count_parameters(model.model.layers) + 6 * mask_rate * head + 12 * shape.width * attended


# ---- the three kinds


def build_encoder(
    config: ModelConfig, vocab_size: int, seq_len: int, vocab: Vocab | None, packing: Packing
) -> nn.Module:
    model = Encoder(config.encoder, vocab_size)
    if config.from_ is not None:
        huggingface.copy_weights(model, huggingface.read_model(config.from_, {}, vocab_size, vocab), config.from_)
    return model


def build_transformers(
    config: ModelConfig, vocab_size: int, seq_len: int, vocab: Vocab | None, packing: Packing
) -> nn.Module:
    if config.from_ is not None:
        model = huggingface.read_model(config.from_, config.options, vocab_size, vocab)
    else:
        assert config.architecture is not None
        model = huggingface.new_model(config.architecture, config.options, vocab_size, vocab)
    hf = model.config
    if config.architecture not in (None, hf.model_type):
        raise ConfigError(f"{config.from_} holds a {hf.model_type}, and model.architecture is {config.architecture}")
    offset = 0
    if not huggingface.on_meta():
        # BERT counts positions from 0, RoBERTa from the padding's id + 1: the one that gives the right logits is right
        offsets = (0, (hf.pad_token_id or 0) + 1)
        right = [o for o in offsets if not what_mixes(huggingface.adapt(model, True, o), vocab_size, SHORTEST_TRIAL)]
        offset = right[0] if right else 0
    positions = hf.to_dict().get("max_position_embeddings")
    if positions is not None and positions < seq_len + offset:
        raise ConfigError(
            f"rows of {seq_len} need model.options.max_position_embeddings={seq_len + offset} at least, not {positions}"
        )
    adapted = huggingface.adapt(model, packing != "pad", offset)
    fault = None if huggingface.on_meta() or packing == "pad" else what_mixes(adapted, vocab_size, seq_len)
    if fault:
        raise ConfigError(
            f"{hf.model_type} can't keep the documents of a packed row apart ({fault}); set data.packing=pad"
        )
    return adapted


def build_factory(
    config: ModelConfig, vocab_size: int, seq_len: int, vocab: Vocab | None, packing: Packing
) -> nn.Module:
    assert config.factory is not None
    function = find_factory(config.factory)
    try:
        inspect.signature(function).bind(vocab_size=vocab_size, **config.options)
    except TypeError as error:
        raise ConfigError(f"{config.factory} can't be called with vocab_size and model.options: {error}") from error
    model = function(vocab_size=vocab_size, **config.options)
    if "segments" not in inspect.signature(model.forward).parameters:
        if packing != "pad":
            raise ConfigError(
                f"the model of {config.factory} takes ids alone, and would mix the documents of a packed row: "
                "set data.packing=pad, or give its forward a keyword `segments`"
            )
        return SplitIdsOnly(model) if has_split_head(model) else IdsOnly(model)
    fault = None if huggingface.on_meta() or packing == "pad" else what_mixes(model, vocab_size, seq_len)
    if fault:
        raise ConfigError(
            f"the model of {config.factory} mixes the documents of a packed row ({fault}): attention must stay within "
            "a segment and positions count from its start; mend that or set data.packing=pad"
        )
    return model


def find_factory(path: str) -> Callable[..., nn.Module]:
    """The function that "package.module:function" names. Raises ConfigError where there is none."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"model.factory = {path} is not there ({error}); write package.module:function") from error


class IdsOnly(nn.Module):
    """A model that takes ids alone, padding and all."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, *, segments: Tensor | None = None) -> Tensor:
        return logits_of(self.model(ids))


class SplitIdsOnly(IdsOnly):
    """One whose head can run on some of the positions."""

    def hidden_states(self, ids: Tensor, *, segments: Tensor | None = None) -> Tensor:
        return self.model.hidden_states(ids)

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden)


# ---- trying a model out


@torch.no_grad()
def what_mixes(model: nn.Module, vocab_size: int, seq_len: int) -> str | None:
    """Why a row of documents and padding gives a document other logits than it gets in a row of its own; None if not.

    The row is as long as those of training, up to LONGEST_TRIAL, so that a window of the model's own would show, and
    goes the way of training, through the split head where there is one; the documents go alone through forward. A copy
    is tried, with weights under which attention matters.
    """
    trial = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in trial.parameters():
        if weight.ndim >= 2:
            weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
    row_tokens = min(seq_len, LONGEST_TRIAL)
    lengths = (3 * row_tokens // 4, row_tokens - 3 * row_tokens // 4 - 1)
    documents = [torch.randint(vocab_size // 2, vocab_size, (1, n), generator=generator) for n in lengths]
    row = torch.cat([*documents, torch.zeros(1, 1, dtype=torch.int64)], dim=1)
    segments = torch.tensor([[number for number, n in enumerate(lengths, 1) for _ in range(n)] + [0]])
    try:
        packed = target_logits(trial, row, segments)[0, :-1]
        alone = torch.cat([logits_of(trial(ids, segments=None))[0] for ids in documents])
    except Exception as error:  # whatever a model makes of a mask that it was not written for
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    worst = ((packed - alone).abs().max() / alone.abs().max()).item()
    return None if worst < 1e-3 else f"logits differ by {100 * worst:.2g} %"


def target_logits(model: nn.Module, ids: Tensor, segments: Tensor) -> Tensor:
    """The logits (B, T, V) that training would see: by the split head where there is one."""
    if not has_split_head(model):
        return logits_of(model(ids, segments=segments))
    return model.head(model.hidden_states(ids, segments=segments).flatten(0, 1)).unflatten(0, ids.shape)


MODELS: dict[str, Callable[[ModelConfig, int, int, Vocab | None, Packing], nn.Module]] = {
    "encoder": build_encoder,
    "transformers": build_transformers,
    "factory": build_factory,
}
