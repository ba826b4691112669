"""MLM: the masked language model objective around any transformer."""

import operator
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_dist.masking import IGNORED_LABEL, Masked, Masker, share

ID_TYPES = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.int64)


class SplitHead(Protocol):
    """A transformer whose head can run on some of the positions: head(hidden_states(ids)) equals its forward(ids)."""

    def hidden_states(self, ids: Tensor, **kwargs: Any) -> Tensor:
        """ids (B, T) -> hidden states (B, T, d).

        With an attribute `takes_positions` it is called with positions (B, K) of each row as the keyword `wanted`, and
        returns the states of these, (B, K, d).
        """

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (N, d) -> logits (N, V).

        With an attribute `takes_labels` it is also called as head(hidden, labels, ignored), fp32 on a CPU, and returns
        what `linear_loss.linear_cross_entropy` does.
        """


def has_split_head(transformer: nn.Module) -> bool:
    """Whether it offers `SplitHead`. A wrapper that passes attributes through, as torch.compile's does, doesn't itself.

    `head` may be a submodule, which isinstance with a protocol does not see from Python 3.12 on.
    """
    compiled = transformer._compiled_call_impl is not None  # by nn.Module.compile, in its place
    split = hasattr(type(transformer), "hidden_states") and callable(getattr(transformer, "head", None))
    return split and not compiled


def logits_of(out: Any) -> Tensor:
    """The logits that a model returned, bare or as `.logits`. Raises ValueError for anything else."""
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the transformer must return logits, or an object with .logits; it returned a {type(out).__name__}"
        )
    return logits


def check_ids(seq: Any, segments: Any) -> None:
    """Raise ValueError for a batch that isn't token ids (B, T), or segments of another shape."""
    if not isinstance(seq, Tensor) or seq.ndim != 2 or seq.dtype not in ID_TYPES:
        got = f"{seq.dtype} of shape {tuple(seq.shape)}" if isinstance(seq, Tensor) else f"a {type(seq).__name__}"
        raise ValueError(f"seq must be a tensor of token ids of shape (B, T), got {got}")
    if isinstance(segments, Tensor) and segments.shape != seq.shape:
        raise ValueError(f"segments must have the shape of seq, {tuple(seq.shape)}, got {tuple(segments.shape)}")


def whole_numbers(name: str, ids: Iterable[Any]) -> set[int]:
    """Token ids as ints, from ints or tensors. Raises ValueError for anything else, such as None."""
    try:
        return {operator.index(i) for i in ids}
    except TypeError as error:
        raise ValueError(f"{name} must be whole numbers, got {ids!r}") from error


class MLM(nn.Module):
    """Masks a batch of token ids, runs the transformer on it, and returns the loss on the masked tokens.

    Keywords, defaults and meaning are those of lucidrains' mlm-pytorch (https://github.com/lucidrains/mlm-pytorch);
    docs/differences-from-mlm-pytorch.md lists where its results are put right.

    transformer:           ids (B, T) -> logits (B, T, V), or an object with `.logits`; with `SplitHead`'s two methods
                           the head runs on the targets alone
    mask_prob:             share of each row's maskable tokens that are targets, rounded up
    random_token_prob:     share of the targets that become a random token
    replace_prob:          share of the other targets that become the mask token; the rest stays as it is
    num_tokens:            size of the vocabulary, needed where random_token_prob > 0
    pad_token_id, mask_token_id, mask_ignore_token_ids: never a target, never overwritten, never drawn
    policy:                token, whole_word or span
    word_starts:           (V,) bool, True for ids that begin a word, needed by whole_word
    span_mean_length:      of policy span, in tokens, at least 1 and below 10
    A transformer that can't be split, one under torch.compile among them, runs as it is and gives all logits: to have
    both, compile the MLM. Of one that is split the two methods are called, and hooks of its own don't run: hook its
    parts, or the MLM. Raises ValueError for a probability outside [0, 1], an id that is no whole number, an unknown
    policy, and what is needed and missing.
    """

    def __init__(
        self,
        transformer: nn.Module,
        mask_prob: float = 0.15,
        replace_prob: float = 0.9,
        num_tokens: int | None = None,
        random_token_prob: float = 0.0,
        mask_token_id: int = 2,
        pad_token_id: int = 0,
        mask_ignore_token_ids: Iterable[int] = (),
        *,
        policy: str = "token",
        word_starts: Tensor | None = None,
        span_mean_length: float = 3.8,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.mask_prob = share("mask_prob", mask_prob)
        self.num_tokens = None if num_tokens is None else max(whole_numbers("num_tokens", [num_tokens]))
        self.masker = Masker(
            *whole_numbers("mask_token_id", [mask_token_id]),
            whole_numbers("mask_ignore_token_ids", mask_ignore_token_ids)
            | whole_numbers("pad_token_id", [pad_token_id]),
            replace_prob,
            random_token_prob,
            self.num_tokens,
            policy,
            word_starts,
            span_mean_length,
        )
        # a transformer that is on its device already keeps working when it is wrapped
        placed = next(transformer.parameters(), None)
        if placed is not None and not placed.is_meta:
            self.masker.to(placed.device)

    def forward(
        self,
        seq: Tensor,
        *,
        row_keys: Tensor | None = None,
        rate: float | None = None,
        sums: bool = False,
        details: bool = False,
        **kwargs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The mean loss over the targets of seq (B, T), any integer type; 0 where there are none.

        row_keys: (B,) int64, one key a row, from which its mask follows; drawn from torch's default generator if None
        rate:     instead of mask_prob, for this call
        sums:     return, as 0-d device tensors, the sum of the loss (which has the gradient) and, in int64, `targets`,
                  how many of them the model got right (`correct`), and what they were shown as (`by_mask`,
                  `by_random`, `kept`)
        details:  with the sums, for each of a row's K slots for targets: `positions`, `labels` (IGNORED_LABEL in an
                  unused one) and `losses`, all (B, K), and `logits` (B * K, V); and `shown` (B, T), the ids as the
                  transformer sees them
        kwargs:   handed to the transformer. `segments` (B, T), where it takes them, is looked at too: 0 is padding,
                  and words and spans don't cross from one segment into the next.
        """
        check_ids(seq, kwargs.get("segments"))
        if self.masker.ignored.device != seq.device:
            self.masker.to(seq.device)  # a transformer that was moved after it was wrapped
        if row_keys is None:
            row_keys = torch.randint(2**63 - 1, (seq.shape[0],), device=seq.device)
        elif row_keys.shape != seq.shape[:1] or row_keys.dtype != torch.int64:
            raise ValueError(
                f"row_keys must be int64 of shape ({seq.shape[0]},), a key for each row; got {row_keys.dtype} of shape "
                f"{tuple(row_keys.shape)}"
            )
        masked = self.masker(seq, row_keys, self.mask_prob if rate is None else rate, kwargs.get("segments"))
        labels, more = masked.labels.flatten(), {}
        if not details and self.head_takes_labels(seq):
            loss, correct = self.of_targets(masked, labels, IGNORED_LABEL, **kwargs)
        else:
            logits, losses = self.losses(masked, labels, "none" if details else "sum", **kwargs)
            loss, correct = losses.sum(), (logits.argmax(dim=-1) == labels).sum() if sums else None
            if details:
                more = {"shown": masked.ids, "positions": masked.positions, "labels": masked.labels}
                more |= {"losses": losses.view_as(masked.labels), "logits": logits}
        if not sums:
            return loss / masked.targets.clamp(min=1)
        return more | {
            "loss": loss,
            "targets": masked.targets,
            "correct": correct,
            "by_mask": masked.by_mask,
            "by_random": masked.by_random,
            "kept": masked.kept,
        }

    def head_takes_labels(self, seq: Tensor) -> bool:
        """Whether the head makes the loss itself: in training, in fp32 on a CPU, and nobody traces it."""
        if not (has_split_head(self.transformer) and getattr(self.transformer.head, "takes_labels", False)):
            return False
        weight = next(self.transformer.parameters())
        in_fp32 = weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        in_training = torch.is_grad_enabled() and seq.numel() > 0 and not torch.compiler.is_compiling()
        return weight.device.type == "cpu" and in_fp32 and in_training

    def losses(self, masked: Masked, labels: Tensor, reduction: str, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The transformer's logits (B * K, V) in the slots for targets, in fp32 at least, and their cross entropy."""
        logits = self.of_targets(masked, **kwargs)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return logits, F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction=reduction)

    def of_targets(self, masked: Masked, *labels: Any, **kwargs: Any) -> Any:
        """The transformer's logits (B * K, V) in the slots for targets, or what its head makes of `labels` there."""
        rows, row_tokens = masked.ids.shape
        if rows * row_tokens == 0:
            return self.no_logits()
        if has_split_head(self.transformer) and getattr(self.transformer, "takes_positions", False):
            hidden = self.transformer.hidden_states(masked.ids, wanted=masked.positions, **kwargs)  # (B, K, d)
            return self.transformer.head(hidden.flatten(0, 1), *labels)
        first = torch.arange(rows, device=masked.ids.device)[:, None] * row_tokens
        index = (masked.positions + first).flatten()  # (B * K,) into (B * T,)
        if has_split_head(self.transformer):
            hidden = self.transformer.hidden_states(masked.ids, **kwargs)  # (B, T, d)
            return self.transformer.head(hidden.flatten(0, 1)[index], *labels)
        logits = logits_of(self.transformer(masked.ids, **kwargs))  # (B, T, V)
        if logits.shape[:-1] != masked.ids.shape:
            raise ValueError(
                f"the transformer must give logits (B, T, V), {tuple(masked.ids.shape)} and the vocabulary here; "
                f"it gave {tuple(logits.shape)}"
            )
        if self.num_tokens is not None and logits.shape[-1] < self.num_tokens:
            raise ValueError(
                f"the transformer gave logits of {logits.shape[-1]} tokens, and num_tokens = {self.num_tokens}"
            )
        return logits.flatten(0, 1)[index]

    def no_logits(self) -> Tensor:
        """Logits (0, 1) that give every parameter a gradient of 0: few transformers run on a batch without tokens."""
        nothing = [p.flatten()[:0] for p in self.parameters() if p.requires_grad]
        return torch.cat([torch.zeros(0, device=self.masker.ignored.device), *nothing])[:, None]
