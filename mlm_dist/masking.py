"""Which tokens of a batch are to be predicted, and what stands in their place: a pure function of ids and row keys.

There is no generator and no state. Every choice is a hash of (row key, what it is for, position) in int64 tensor
operations, so a key gives the same mask on any device, in any order, eager or compiled, and nothing needs saving.
Every shape follows from (B, T) and the rate alone, and nothing waits for the device.
"""

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mlm_dist.schema import ConfigError, setting
from mlm_dist.vocab import Vocab

IGNORED_LABEL = -100
LONGEST_ROW = 1 << 20  # tokens: what a position may take of an int64 beside a 32-bit hash
LONGEST_SPAN = 10  # tokens, as in SpanBERT; longer words are cut too

# ---- hash

WORD = (1 << 32) - 1
GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: keeps an all-zero key from hashing to zero
BY_RANK, BY_SAMPLE, DROPOUT = 1, 2, 3  # what a key is for
UNIT, SPAN, FATE, TOKEN = 1, 2, 3, 4  # what a draw is for


def mix(x: Any) -> Any:
    """A bijection of 32-bit words in which every bit of `x` moves every bit of the result: lowbias32.

    Works alike on Python ints and int64 tensors that hold values in [0, 2^32).
    Constants: https://github.com/skeeto/hash-prospector (Wellons, 2018). The second one, 0x846ca68b, is written less
    2^32: the same modulo 2^32, and the product stays inside an int64.
    """
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & WORD
    x = x ^ (x >> 15)
    x = x * (0x846CA68B - (1 << 32)) & WORD
    return x ^ (x >> 16)


def fold(*words: Any) -> Any:
    """A 32-bit hash of 64-bit integers (Python ints or int64 tensors), in their order."""
    state = 0
    for word in words:
        state = mix(state + GOLDEN + (word & WORD) & WORD)
        state = mix(state + GOLDEN + (word >> 32 & WORD) & WORD)
    return state


def _key(*words: Any) -> Any:
    """A key of 63 bits: two hashes side by side."""
    return fold(1, *words) >> 1 << 32 | fold(2, *words)


def row_keys_by_rank(
    seed: int, rank: int | Tensor, step: int | Tensor, micro_step: int | Tensor, rows: int, device: torch.device | str
) -> Tensor:
    """Keys (rows,) int64 of a micro-batch, other ones for each rank, step and micro-step (ints or 0-d tensors)."""
    return _key(BY_RANK, seed, rank, step, micro_step, torch.arange(rows, device=device))


def row_keys_by_sample(seed: int, row_keys: Tensor) -> Tensor:
    """Keys (B,) int64 that follow the rows (`Batch.row_keys`, (B,) int64) whatever rank or step they fall to."""
    return _key(BY_SAMPLE, seed, row_keys)


def dropout_seed(seed: int, rank: int, step: int, micro_step: int) -> int:
    """What to hand to `torch.manual_seed` before a micro-batch, so that dropout is a function of the key too."""
    return _key(DROPOUT, seed, rank, step, micro_step)


# an operator of its own, because a compiler that inlines the hash, which uses every word twice, takes minutes over it
@torch.library.custom_op("mlm_dist::draw", mutates_args=())
def draw(keys: Tensor, purpose: int, positions: Tensor) -> Tensor:
    """Uniform integers (B, N) in [0, 2^32) for keys (B,) and positions (B, N) or (1, N) below 2^32.

    Two words of key go in, so that one row's draws are not another's shifted; distinct positions give distinct draws.
    """
    first, second = (fold(half, purpose, keys)[:, None] for half in (1, 2))  # (B, 1)
    return mix(mix(positions ^ first) ^ second)


@draw.register_fake
def _draw_shape(keys: Tensor, purpose: int, positions: Tensor) -> Tensor:
    return positions.new_empty(keys.shape[0], positions.shape[1])


def threshold(share: float) -> int:
    """The integer below which that share of all draws lies."""
    return round(share * (1 << 32))


# ---- count


def share(name: str, value: Any) -> float:
    """A number between 0 and 1 as the decimal that it prints as: a float32 of 0.15 is 15/100 too.

    Raises ValueError for anything else.
    """
    if isinstance(value, np.floating):
        value = float(str(value))
    if not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {value!r}")
    return float(value)


@torch.compiler.assume_constant_result
def _fraction(rate: float) -> tuple[int, int]:
    """The smallest numerator / denominator, of denominator at most LONGEST_ROW, that is not below `rate`.

    `rate` is read as the decimal that it prints as. No multiple k/m with m <= LONGEST_ROW lies between the two, hence
    ceil(m * fraction) = ceil(m * rate) exactly, in products that fit an int64.
    """
    exact = Fraction(repr(float(rate)))
    near = exact.limit_denominator(LONGEST_ROW)
    if near >= exact:
        return near.numerator, near.denominator
    p, q = near.numerator, near.denominator  # the next fraction up is c/d with cq - pd = 1 and the largest d (Farey)
    d = -pow(p, -1, q) % q
    d += q * ((LONGEST_ROW - d) // q)
    return (1 + p * d) // q, d


def targets_of(maskable: Any, rate: float) -> Any:
    """Exactly ceil(rate * maskable), 0.15 being 15/100: how many of a row's maskable tokens are targets.

    maskable: tokens that may be targets, at most 2^20: an int, an integer array or a tensor, from which an int or the
    same in int64 comes back. Raises ValueError for a rate outside [0, 1].
    """
    rate = share("the mask rate", rate)
    numerator, denominator = _fraction(rate)
    if isinstance(maskable, Tensor):
        maskable = maskable.long()
    elif isinstance(maskable, np.ndarray):
        maskable = maskable.astype(np.int64)
    return (maskable * numerator + (denominator - 1)) // denominator


def slots(row_tokens: int, rate: float) -> int:
    """The most targets that a row of so many tokens can have: the static K of `Masked`."""
    if row_tokens > LONGEST_ROW:
        raise ValueError(f"a row may have at most {LONGEST_ROW} tokens, got {row_tokens}")
    return targets_of(row_tokens, rate)


# ---- policies: a policy says where units begin; units are then taken whole, in hashed order, until the count is full


class Rows(NamedTuple):
    """What a policy may look at. All of it (B, T) unless stated."""

    ids: Tensor
    breaks: Tensor  # bool: a unit must begin here (start of the row, after an ignored token, change of segment)
    keys: Tensor  # (B,)
    word_starts: Tensor | None  # (V,) bool
    cut_below: int  # span: a cut falls where a draw is below it


def token(rows: Rows) -> Tensor:
    """Every token by itself."""
    return torch.ones_like(rows.breaks)


def whole_word(rows: Rows) -> Tensor:
    """A token that begins a word, with those that continue it: a stretch without spaces is cut each tenth token."""
    assert rows.word_starts is not None
    return cut_long(rows.breaks | rows.word_starts[rows.ids])


def span(rows: Rows) -> Tensor:
    """Runs of geometric length, at most LONGEST_SPAN tokens.

    After SpanBERT (Joshi et al. 2020, https://arxiv.org/abs/1907.10529, section 3.1), whose spans are drawn one after
    the other; here the row is cut into spans first. The geometric distribution has no memory, so that a cut before
    each token with one chance, and after each tenth token of an uncut run, gives min(geometric, 10) for every span.
    """
    position = torch.arange(rows.ids.shape[1], device=rows.ids.device)[None]
    return cut_long(rows.breaks | (draw(rows.keys, SPAN, position) < rows.cut_below))


POLICIES: dict[str, Callable[[Rows], Tensor]] = {"token": token, "whole_word": whole_word, "span": span}


def cut_long(begins: Tensor) -> Tensor:
    """Where units begin (B, T) bool -> the same, with a further one each LONGEST_SPAN tokens of a long unit."""
    position = torch.arange(begins.shape[1], device=begins.device)
    return begins | ((position - unit_starts(begins)) % LONGEST_SPAN == 0)


def unit_starts(begins: Tensor) -> Tensor:
    """Where units begin (B, T) bool -> the position (B, T) of the first token of each token's unit."""
    position = torch.arange(begins.shape[1], device=begins.device)
    return torch.where(begins, position, 0).cummax(dim=1).values


def span_stop(mean_length: float) -> float:
    """The p whose min(geometric(p), LONGEST_SPAN) has the mean (1 - (1-p)^L) / p = `mean_length`, by bisection."""
    if not 1 <= mean_length < LONGEST_SPAN:
        raise ValueError(f"the mean span length must be at least 1 and below {LONGEST_SPAN}, got {mean_length}")
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if sum((1 - p) ** i for i in range(LONGEST_SPAN)) > mean_length else (low, p)
    return high


# ---- mask


class Masked(NamedTuple):
    """A masked batch. K = slots(T, rate); a row's targets fill its first slots, in no order of position."""

    ids: Tensor  # (B, T) int64, as the model is to see them
    positions: Tensor  # (B, K) int64; 0 in an unused slot
    labels: Tensor  # (B, K) int64, the original ids; IGNORED_LABEL in an unused slot
    targets: Tensor  # () int64, and so the three below, which add up to it
    by_mask: Tensor
    by_random: Tensor
    kept: Tensor


class Masker(nn.Module):
    """Chooses targets and replaces them. Holds tables of ids, which move with the module and are in no state dict.

    ignored_ids:  never a target, never overwritten, never drawn; the mask token's id is always one of them
    random_share: of the targets become an ordinary token, each as likely; `mask_share` of the others the mask token
    num_tokens:   ordinary tokens are the ids below it that are not ignored; needed where random_share > 0
    word_starts:  (V,) bool, True for ids that begin a word; needed by the policy whole_word
    Raises ValueError for a share outside [0, 1], an unknown policy, and what is needed and missing.
    """

    def __init__(
        self,
        mask_id: int,
        ignored_ids: set[int],
        mask_share: float,
        random_share: float = 0.0,
        num_tokens: int | None = None,
        policy: str = "token",
        word_starts: Tensor | None = None,
        span_mean_length: float = 3.8,
    ) -> None:
        super().__init__()
        mask_share, random_share = share("replace_prob", mask_share), share("random_token_prob", random_share)
        if policy not in POLICIES:
            raise ValueError(f"there is no policy {policy!r}; it must be one of {', '.join(POLICIES)}")
        if policy == "whole_word" and word_starts is None:
            raise ValueError("the policy whole_word needs word_starts: a bool for each id, True where it begins a word")
        if word_starts is not None and word_starts.dtype != torch.bool:
            raise ValueError(f"word_starts must be a bool for each id, got {word_starts.dtype}")
        if word_starts is not None and len(word_starts) < (num_tokens or 0):
            raise ValueError(f"word_starts must be a bool for each of {num_tokens} ids, got {len(word_starts)}")
        ignored = {mask_id, *ignored_ids}
        ordinary = [i for i in range(num_tokens or 0) if i not in ignored]
        if random_share > 0 and not ordinary:
            raise ValueError("random_token_prob needs num_tokens, the vocabulary's size, with an id that isn't ignored")
        self.mask_id, self.policy = mask_id, POLICIES[policy]
        self.random_below = threshold(random_share)
        self.replaced_below = threshold(random_share + (1 - random_share) * mask_share)
        self.cut_below = threshold(span_stop(span_mean_length))
        self.tables = {
            "ignored": torch.tensor(sorted(ignored), device="cpu"),
            "ordinary": torch.tensor(ordinary, dtype=torch.int64, device="cpu"),
            "word_starts": word_starts,
        }
        for name, table in self.tables.items():
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Masker":
        """What .to() and .to_empty() come down to; the latter would leave the tables of a model from meta unfilled."""
        super()._apply(fn, recurse)
        for name, table in self.tables.items():
            if table is not None and not self.get_buffer(name).is_meta:
                # as a new one: .type() would have rounded the ids
                self.register_buffer(name, table.to(self.get_buffer(name).device), persistent=False)
        return self

    def forward(self, ids: Tensor, keys: Tensor, rate: float, segments: Tensor | None = None) -> Masked:
        """Mask ids (B, T), any integer type, by keys (B,) int64, `rate` of each row's maskable tokens.

        segments: (B, T), 0 for padding, otherwise the document of the row that a token belongs to; a unit never
        crosses from one into the next, nor an ignored id.
        """
        ids = ids.long()
        position = torch.arange(ids.shape[1], device=ids.device)[None]
        maskable = (ids[..., None] != self.ignored).all(dim=-1)  # (B, T)
        breaks = (position == 0) | ~maskable.roll(1, dims=1)
        if segments is not None:
            maskable = maskable & (segments > 0)
            breaks = breaks | (segments != segments.roll(1, dims=1))

        starts = unit_starts(self.policy(Rows(ids, breaks, keys, self.word_starts, self.cut_below)))
        order = torch.where(maskable, draw(keys, UNIT, starts), 1 << 32) * LONGEST_ROW + position
        first = order.topk(slots(ids.shape[1], rate), dim=1, largest=False).values
        chosen = first % LONGEST_ROW  # (B, K): all the units of lowest hash, each from its first token on
        count = targets_of(maskable.sum(dim=1, keepdim=True), rate)  # (B, 1)
        used = torch.arange(chosen.shape[1], device=ids.device) < count

        originals = ids.gather(1, chosen)
        ids, by_mask, by_random = self.replace(ids, keys, chosen, used)
        targets, masks, randoms = used.sum(), by_mask.sum(), by_random.sum()
        labels = originals.masked_fill(~used, IGNORED_LABEL)
        return Masked(ids, chosen * used, labels, targets, masks, randoms, targets - masks - randoms)

    def replace(self, ids: Tensor, keys: Tensor, chosen: Tensor, used: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (B, T) with the used ones of the chosen positions replaced; which got the mask, which a random id."""
        fate = draw(keys, FATE, chosen)  # (B, K)
        by_random = used & (fate < self.random_below)
        by_mask = used & ~by_random & (fate < self.replaced_below)
        new = ids.gather(1, chosen).masked_fill(by_mask, self.mask_id)
        if self.random_below > 0:
            index = draw(keys, TOKEN, chosen) * self.ordinary.shape[0] >> 32  # uniform on range(len(ordinary))
            new = torch.where(by_random, self.ordinary[index], new)
        return ids.scatter(1, chosen, new), by_mask, by_random


# ---- config


@dataclass(frozen=True)
class MaskingConfig:
    policy: Literal["token", "whole_word", "span"] = setting("token", help="what is masked as one")
    rate: float = setting(0.3, above=0, high=1, help="share of a row's tokens to predict")
    rate_end: float | None = setting(None, above=0, high=1, help="the share at the end of the run; none: it stays")
    rate_plateaus: int = setting(4, low=2, help="equal steps in which the share moves from rate to rate_end")
    mask: float = setting(0.8, low=0, high=1, help="share of the targets shown as the mask token")
    random: float = setting(0.1, low=0, high=1, help="share of the targets shown as a random token")
    keep: float = setting(0.1, low=0, high=1, help="share of the targets shown as they are")
    seed_by: Literal["rank", "sample"] = setting("rank", help="sample: masks don't depend on the number of ranks")
    span_mean_length: float = setting(3.8, low=1, below=LONGEST_SPAN, help="policy span: tokens, of at most 10 a span")

    def __post_init__(self) -> None:
        total = self.mask + self.random + self.keep
        if abs(total - 1) > 1e-9:
            shares = f"{self.mask} + {self.random} + {self.keep}"
            raise ConfigError(f"mask + random + keep must be 1, got {shares} = {total:.10g}")


def rate_at(config: MaskingConfig, step: int, total_steps: int | None) -> float:
    """The mask rate of the step that follows `step` finished ones.

    Linear, in `rate_plateaus` equal plateaus, of which the first is `rate` and the last `rate_end`: the shapes stay
    fixed inside each. After https://arxiv.org/abs/2305.15096, which moves at every step.
    total_steps: length of the run, None while a run measured in hours does not know it yet (the rate holds).
    """
    if config.rate_end is None or total_steps is None:
        return config.rate
    last = config.rate_plateaus - 1
    plateau = min(step * config.rate_plateaus // max(total_steps, 1), last)
    start, end = Fraction(repr(config.rate)), Fraction(repr(config.rate_end))
    return float(start + (end - start) * plateau / last)


def mlm_keywords(config: MaskingConfig, vocab: Vocab) -> dict[str, Any]:
    """The keyword arguments of `MLM`, for a configuration and the vocabulary that the model is trained on."""
    rest = config.mask + config.keep
    return {
        "mask_prob": config.rate,
        "replace_prob": config.mask / rest if rest else 0.0,
        "num_tokens": vocab.size,
        "random_token_prob": config.random,
        "mask_token_id": vocab.mask_id,
        "pad_token_id": vocab.pad_id,
        "mask_ignore_token_ids": list(vocab.special_ids),
        "policy": config.policy,
        "word_starts": word_starts_of(vocab) if config.policy == "whole_word" else None,
        "span_mean_length": config.span_mean_length,
    }


def word_starts_of(vocab: Vocab) -> Tensor:
    """The table (V,) bool for the policy whole_word. Raises ConfigError where the tokens don't show what continues."""
    starts = vocab.word_starts()
    ordinary = np.delete(starts, list(vocab.special_ids))
    if ordinary.all() or not ordinary.any():
        raise ConfigError(
            "masking.policy = whole_word needs a tokenizer whose tokens show where words begin (##, Ġ or ▁), and this "
            "one's don't; set masking.policy to token or span"
        )
    return torch.from_numpy(starts)
