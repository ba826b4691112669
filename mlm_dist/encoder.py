"""The fast encoder: ModernBERT's architecture (Warner et al., arXiv 2412.13663) on packed rows.

Pre-norm, no biases, rotary positions, GeGLU, layers that attend globally or in a sliding window. The names and shapes
of its parameters are those of transformers' ModernBertForMaskedLM.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlm_dist import cpu_layer, gpu_attention
from mlm_dist.linear_loss import linear_cross_entropy
from mlm_dist.schema import ConfigError, setting

VOCAB_MULTIPLE = 64  # matrix kernels are fastest on whole tiles
VOCABULARY_WEIGHTS = ("model.embeddings.tok_embeddings.weight", "decoder.weight", "decoder.bias")  # one row a token
PADDED_BIAS = -1e4  # softmax makes of it a probability, and a gradient, of exactly 0, in fp16 and bf16 too


@dataclass(frozen=True)
class EncoderConfig:
    layers: int = setting(22, low=1, help="number of layers")
    width: int = setting(768, low=1, help="of the hidden states")
    heads: int = setting(12, low=1, help="attention heads; width / heads must be even, and is best 64")
    mlp_width: int = setting(1152, low=1, help="of the gated MLP, after the gate")
    max_positions: int = setting(1024, low=1, help="longest row the model is meant for")
    global_every: int = setting(3, low=1, help="layers 0, n, 2n, ... attend globally, the others in a window")
    window: int = setting(128, low=2, help="width of the sliding window: half of it to either side")
    rope_theta: float = setting(160_000.0, above=0, help="base of the rotary angles in global layers")
    rope_theta_local: float = setting(10_000.0, above=0, help="base of the rotary angles in window layers")
    rope_factor: float = setting(1.0, above=0, help="what positions are divided by in global layers, before the angles")
    rope_factor_local: float = setting(1.0, above=0, help="the same in window layers")
    norm_eps: float = setting(1e-5, above=0, help="added to the variance in LayerNorm")
    tie: bool = setting(True, help="one matrix for the embeddings and the decoder")
    init_std: float = setting(0.02, above=0, help="standard deviation of the initial weights, cut at twice that")
    max_documents: int = setting(
        32, low=1, help="on a GPU: documents, and padding, that the rows of a micro-batch may hold on average"
    )
    recompute: bool = setting(
        False, help="keep each layer's input alone, and compute the rest again in the backward pass: less memory"
    )

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise ConfigError(f"width = {self.width} must be an even multiple of heads = {self.heads}")
        if self.window % 2:
            raise ConfigError(f"window = {self.window} must be even: half of it lies to either side of a position")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def is_global(self, layer: int) -> bool:
        return layer % self.global_every == 0

    def rope(self, is_global: bool) -> tuple[float, float]:
        """Base of the rotary angles, and what positions are divided by, in global or in window layers."""
        if is_global:
            return self.rope_theta, self.rope_factor
        return self.rope_theta_local, self.rope_factor_local


def padded(vocab_size: int) -> int:
    """Rows of the embeddings and the decoder: the vocabulary rounded up."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


# ---- what a row's documents mean for positions and attention


def document_starts(segments: Tensor) -> Tensor:
    """True (B, T) where a document, or padding, begins. segments: (B, T), the same number throughout a document."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return starts


def positions_in_document(starts: Tensor) -> Tensor:
    """Positions (B, T) that count from 0 in each document."""
    index = torch.arange(starts.shape[1], device=starts.device)
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def attention_mask(segments: Tensor | None, length: int, half_window: int, like: Tensor) -> Tensor | None:
    """What to add to the attention scores, (B or 1, 1, T, T): 0 within a document and the window, -inf elsewhere.

    Padding is a document of its own, so that every position attends to something. None where nothing is masked.
    """
    allowed = None
    if segments is not None:
        allowed = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
    if half_window < length - 1:
        index = torch.arange(length, device=like.device)
        near = ((index[:, None] - index[None, :]).abs() <= half_window)[None]  # (1, T, T)
        allowed = near if allowed is None else allowed & near
    if allowed is None:
        return None
    return torch.where(allowed, like.new_zeros(()), -math.inf)[:, None]


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention on any device. q, k, v: (B, T, H, D) -> (B, T, H * D)."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
    return out.transpose(1, 2).flatten(2)


class Context(NamedTuple):
    """What the layers of one kind, global or window, share in a forward pass."""

    cos: Tensor  # (B or 1, T, 1, D)
    sin: Tensor  # (B or 1, T, 1, D), the first half negated
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    place: cpu_layer.Place | None = None


def rotary_tables(positions: Tensor, width: int, theta: float, factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin (B, T, 1, D), fp32, of the angles position / theta^(2i/D) (Su et al., arXiv 2104.09864).

    factor: positions are divided by it, for rows longer than those of before (Chen et al., arXiv 2306.15595)
    Dimension i is paired with i + D/2; the sine's first half is negated for `rotate`.
    """
    exponent = torch.arange(0, width, 2, device=positions.device) / width
    # in the order of transformers' operations: far positions turn a last digit here into a fourth of the logits
    angles = positions[:, :, None, None] * (1.0 / theta**exponent / factor)  # (B, T, 1, D / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, D), each pair of dimensions turned by its angle."""
    return (x * cos).addcmul(x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


# ---- modules


class Attention(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.Wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.Wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, T, d) -> what `Wo` is for, (B, T, d)."""
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, T, H, D) each
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        return context.attend(q, k, v)


class MLP(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.Wi = nn.Linear(config.width, 2 * config.mlp_width, bias=False)
        self.Wo = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.Wi(x).chunk(2, dim=-1)
        return self.Wo(F.gelu(x) * gate)


class Layer(nn.Module):
    def __init__(self, config: EncoderConfig, first: bool) -> None:
        super().__init__()
        # the embeddings are normalised already
        self.attn_norm = nn.Identity() if first else norm(config)
        self.attn = Attention(config)
        self.mlp_norm = norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context, wanted: Tensor | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d); or (B, K, d), of the positions `wanted` (B, K) of each row alone."""
        if cpu_layer.usable(x):
            return self.by_hand(x, context, wanted)
        attended = self.attn(self.attn_norm(x), context)
        if wanted is not None:
            x, attended = positions_of(x, wanted), positions_of(attended, wanted)
        x = x + self.attn.Wo(attended)
        return x + self.mlp(self.mlp_norm(x))

    def by_hand(self, x: Tensor, context: Context, wanted: Tensor | None) -> Tensor:
        """The same from the parts' weights: the parts themselves aren't called, and hooks on them don't run."""
        gain = None if isinstance(self.attn_norm, nn.Identity) else self.attn_norm.weight
        eps, attn, mlp = self.mlp_norm.eps, self.attn, self.mlp
        attended = cpu_layer.Attend.apply(x, wanted, gain, attn.Wqkv.weight, context.place, attn.heads, eps)
        if wanted is not None:
            x = positions_of(x, wanted)
        return cpu_layer.Feed.apply(
            x, attended, attn.Wo.weight, self.mlp_norm.weight, mlp.Wi.weight, mlp.Wo.weight, eps
        )


def positions_of(x: Tensor, wanted: Tensor) -> Tensor:
    """Of x (B, T, d) the positions `wanted` (B, K) of each row: (B, K, d)."""
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (wanted + first).flatten()).view(*wanted.shape, x.shape[2])


class Embeddings(nn.Module):
    def __init__(self, config: EncoderConfig, rows: int) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(rows, config.width)
        self.norm = norm(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.tok_embeddings(ids))


class Trunk(nn.Module):
    """Token ids (B, T) -> hidden states (B, T, d)."""

    def __init__(self, config: EncoderConfig, rows: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config, rows)
        self.layers = nn.ModuleList(Layer(config, first=i == 0) for i in range(config.layers))
        self.final_norm = norm(config)

    def forward(self, ids: Tensor, segments: Tensor | None, wanted: Tensor | None = None) -> Tensor:
        """wanted: positions (B, K) of each row: the states of these alone, (B, K, d)."""
        x = self.embeddings(ids)  # (B, T, d)
        contexts = self.contexts(x, segments)
        *before, last = self.layers
        for i, layer in enumerate(before):
            x = self.through(layer, x, contexts[self.config.is_global(i)])
        x = self.through(last, x, contexts[self.config.is_global(len(before))], wanted)
        return self.final_norm(x)

    def through(self, layer: Layer, x: Tensor, context: Context, wanted: Tensor | None = None) -> Tensor:
        """What the layer makes of x; with `recompute` again in the backward pass (Chen et al., arXiv 1604.06174)."""
        if not (self.config.recompute and torch.is_grad_enabled()):
            return layer(x, context, wanted)
        # Nothing in a layer is random. Stopping early is what leaves ZeRO stage 3's weights there until they were used.
        options = {"use_reentrant": False, "preserve_rng_state": False, "early_stop": True}
        return checkpoint(layer, x, context, wanted, **options)

    def contexts(self, x: Tensor, segments: Tensor | None) -> dict[bool, Context]:
        """The contexts of global (True) and of window layers (False), where there are such, for x (B, T, d)."""
        config, (rows, length) = self.config, x.shape[:2]
        varlen = gpu_attention.usable(x, config.head_width)
        if segments is None:
            positions = torch.arange(length, device=x.device)[None]  # (1, T)
            bounds = torch.arange(0, (rows + 1) * length, length, device=x.device, dtype=torch.int32)
        else:
            starts = document_starts(segments)
            positions = positions_in_document(starts)  # (B, T)
            most = gpu_attention.most_documents(starts, config.max_documents)
            bounds = gpu_attention.sequence_bounds(starts, most) if varlen else None
        contexts = {}
        for is_global in {config.is_global(i) for i in range(config.layers)}:
            half_window = length if is_global else config.window // 2
            if varlen:
                attend = partial(gpu_attention.attend, bounds=bounds, half_window=half_window)
            else:
                mask = attention_mask(segments, length, half_window, like=x)
                attend = partial(attend_masked, mask=mask)
            cos, sin = rotary_tables(positions, config.head_width, *config.rope(is_global))
            place = None
            if cpu_layer.usable(x):
                half = config.head_width // 2
                turns = torch.complex(cos[..., 0, half:], sin[..., 0, half:])
                place = cpu_layer.Place(turns, cpu_layer.Sight(mask if mask is None else mask[:, 0], half_window))
            contexts[is_global] = Context(cos, sin, attend, place)
        return contexts


class Decoder(nn.Linear):
    """(..., d) -> logits (..., V); given labels (N,) and the one that is ignored, (N, d) -> `linear_cross_entropy`."""

    def forward(self, x: Tensor, labels: Tensor | None = None, ignored: int = 0) -> Any:
        if labels is None:
            return super().forward(x)
        return linear_cross_entropy(x, self.weight, self.bias, labels, ignored)


class Head(nn.Module):
    """Hidden states (..., d) -> what `Decoder` makes of them."""

    takes_labels = True

    def __init__(self, config: EncoderConfig, decoder: Decoder) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width, bias=False)
        self.norm = norm(config)
        # called here, but a child of the Encoder, so that it has the name that transformers gives it
        self.__dict__["decoder"] = decoder

    def forward(self, hidden: Tensor, labels: Tensor | None = None, ignored: int = 0) -> Any:
        return self.decoder(self.norm(F.gelu(self.dense(hidden))), labels, ignored)


class Encoder(nn.Module):
    """Masked language model: token ids (B, T) -> logits (B, T, V), V being `padded(vocab_size)`.

    The logits beyond the vocabulary stay far below all others: they are never predicted, get no gradient, and are left
    out by an export.

    ids:      (B, T), any integer type
    segments: (B, T), 0 for padding, and one number a document: documents neither see each other nor padding, and
              positions count from 0 in each; None: every row is one document
    """

    takes_positions = True

    def __init__(self, config: EncoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.model = Trunk(config, padded(vocab_size))
        self.decoder = Decoder(config.width, padded(vocab_size))
        self.head = Head(config, self.decoder)
        if config.tie:
            self.decoder.weight = self.model.embeddings.tok_embeddings.weight
        self.initialise()

    def forward(self, ids: Tensor, *, segments: Tensor | None = None) -> Tensor:
        return self.head(self.model(ids, segments))

    def hidden_states(self, ids: Tensor, *, segments: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        """What `head` makes logits of, (B, T, d); or, of the positions `wanted` (B, K) of each row alone, (B, K, d).

        The last layer then does only what these need.
        """
        return self.model(ids, segments, wanted)

    def problem_with(self, segments: Tensor) -> str | None:
        """Why a micro-batch with these segments (B, T), on the host, can't be run where the model is; None: it can."""
        if not gpu_attention.usable(self.decoder.weight, self.config.head_width):
            return None
        return gpu_attention.too_many(document_starts(segments), self.config.max_documents)

    def get_output_embeddings(self) -> Decoder:
        """What makes the logits, by the name that transformers' models have for it."""
        return self.decoder

    @torch.no_grad()
    def initialise(self) -> None:
        """Truncated normals; what writes to the residual stream starts smaller by sqrt(2 * layers).

        The scheme of Megatron-LM (Shoeybi et al., arXiv 1909.08053) as ModernBERT uses it. The loss starts near ln V.
        """
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                smaller = name.endswith((".Wo.weight", "head.dense.weight", "decoder.weight"))
                std = self.config.init_std / (math.sqrt(2 * self.config.layers) if smaller else 1)
                nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        self.decoder.bias.zero_()
        self.decoder.bias[self.vocab_size :] = PADDED_BIAS


def norm(config: EncoderConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.width, eps=config.norm_eps, bias=False)
