"""The MLM wrapper: around any transformer, the seed's loss where the seed is right, and right where it is not."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import x_transformers
from torch import nn

from mlm_dist import masking
from mlm_dist.encoder import Encoder, EncoderConfig
from mlm_dist.masking import POLICIES
from mlm_dist.mlm import MLM, has_split_head

SIZE, PAD, CLS, UNK, SEP, MASK = 64, 0, 1, 2, 3, 4
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def bert() -> nn.Module:
    config = transformers.BertConfig(vocab_size=SIZE, max_position_embeddings=64, **SHAPE)
    return transformers.BertForMaskedLM(config)


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(vocab_size=SIZE, max_position_embeddings=66, pad_token_id=PAD, **SHAPE)
    return transformers.RobertaForMaskedLM(config)


def modernbert() -> nn.Module:
    specials = {"pad_token_id": PAD, "cls_token_id": CLS, "bos_token_id": CLS, "sep_token_id": SEP, "eos_token_id": SEP}
    config = transformers.ModernBertConfig(vocab_size=SIZE, max_position_embeddings=64, **specials, **SHAPE)
    return transformers.ModernBertForMaskedLM(config)


def x_transformer() -> nn.Module:
    layers = x_transformers.Encoder(dim=32, depth=2, heads=2)
    return x_transformers.TransformerWrapper(num_tokens=SIZE, max_seq_len=64, attn_layers=layers)


def encoder() -> nn.Module:
    return Encoder(EncoderConfig(layers=2, width=32, heads=2, mlp_width=64, max_positions=64), SIZE)


class Bag(nn.Module):
    """A transformer of the least kind: ids -> logits, through the mean of a row and the token itself."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(SIZE, width), nn.Linear(width, SIZE)

    def forward(self, ids: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.out((x + x.mean(1, keepdim=True)).tanh())


class SplitBag(Bag):
    """The same with its head apart, which notes how many positions it was run on."""

    def hidden_states(self, ids: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return (x + x.mean(1, keepdim=True)).tanh()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        self.head_shape = hidden.shape
        return self.out(hidden)


class Oracle(nn.Module):
    """Sees through no mask: sure of the very ids that it is shown."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.one_hot(ids, SIZE) * 100.0


MODELS = {f.__name__: f for f in (encoder, bert, roberta, modernbert, x_transformer, Bag, SplitBag)}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


def wrap(build: Callable[[], nn.Module], **keywords: object) -> MLM:
    """An MLM around fresh weights, without dropout, at 80/10/10."""
    torch.manual_seed(0)
    shares = {"replace_prob": 8 / 9, "random_token_prob": 0.1, "num_tokens": SIZE}
    specials = {"mask_token_id": MASK, "pad_token_id": PAD, "mask_ignore_token_ids": [CLS, UNK, SEP]}
    return MLM(build(), **(shares | specials | keywords)).eval()


def token_ids(rows: int = 4, length: int = 32, padding: int = 5) -> torch.Tensor:
    """[CLS] tokens [SEP] padding."""
    ids = torch.randint(5, SIZE, (rows, length), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, length - padding - 1], ids[:, length - padding :] = CLS, SEP, PAD
    return ids


def keys(rows: int = 4) -> torch.Tensor:
    return masking.row_keys_by_rank(0, 0, 0, 0, rows, "cpu")


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


# ---- the seed's arithmetic, written out


def seed_loss(logits: torch.Tensor, seq: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The seed's loss: the labels are the original ids where masked and the padding id elsewhere, which is ignored."""
    labels = seq.masked_fill(~mask, PAD)
    return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=PAD)


def seed_count(seq: torch.Tensor, mask_prob: float) -> list[int]:
    """How many tokens the seed masks in rows that are padded to the right and have no other special ids."""
    maskable = seq != PAD
    wanted = (maskable.sum(dim=-1, keepdim=True) * mask_prob).ceil()
    slots = math.ceil(mask_prob * seq.shape[1])
    excess = (maskable.cumsum(dim=-1) > wanted)[:, :slots]
    noise = torch.rand(seq.shape).masked_fill(~maskable, -1e9)
    chosen = (noise.topk(slots, dim=-1).indices + 1).masked_fill(excess, 0)
    return torch.zeros(seq.shape[0], seq.shape[1] + 1).scatter(-1, chosen, 1.0)[:, 1:].sum(1).int().tolist()


@each_model
def test_the_loss_is_the_seeds_for_the_same_mask(build: Callable[[], nn.Module]) -> None:
    mlm, seq = wrap(build), token_ids()
    masked = mlm.masker(seq, keys(), 0.15)
    used = (masked.labels != masking.IGNORED_LABEL).long()
    mask = torch.zeros_like(seq).scatter_add(1, masked.positions, used).bool()
    expected = seed_loss(logits_of(mlm.transformer, masked.ids), seq, mask)
    torch.testing.assert_close(mlm(seq, row_keys=keys()), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mask_prob", [0.15, 0.25, 0.3, 0.5])
def test_the_count_is_the_seeds_where_the_seed_is_right(mask_prob: float) -> None:
    for length in (2, 7, 23, 47):
        seq = token_ids(3, 48, 0)
        seq[:, 0], seq[:, -1] = 5, 5
        seq[:, length:] = PAD
        used = wrap(Bag).masker(seq, keys(3), mask_prob).labels != masking.IGNORED_LABEL
        assert used.sum(1).tolist() == seed_count(seq, mask_prob)


def test_left_padding_gets_the_exact_count() -> None:
    seq = token_ids(8, 100, 0)
    seq[:, :90] = PAD
    seq[:, 99] = 7
    masked = wrap(Bag).masker(seq, keys(8), 0.15)
    used = masked.labels != masking.IGNORED_LABEL
    assert used.sum(1).tolist() == [2] * 8
    assert (masked.positions[used] >= 90).all() and torch.equal(masked.ids[:, :90], seq[:, :90])


def test_random_tokens_stay_among_the_targets() -> None:
    seq = token_ids(500, 40, 10)
    mlm = wrap(Bag, random_token_prob=1.0)
    masked = mlm.masker(seq, keys(500), 0.3)
    assert (masked.ids != seq).sum() <= masked.targets == masked.by_random == 500 * math.ceil(0.3 * 28)
    assert torch.equal(masked.ids[seq < 5], seq[seq < 5])
    assert not (masked.ids[seq >= 5] < 5).any()


# ---- nothing to mask


@each_model
@pytest.mark.parametrize("case", ["padding alone", "mask_prob 0", "length 0", "length 1, padding", "no rows"])
def test_nothing_to_mask_gives_zero_and_zero_gradients(build: Callable[[], nn.Module], case: str) -> None:
    seq, mask_prob = {
        "padding alone": (torch.full((3, 16), PAD), 0.15),
        "mask_prob 0": (token_ids(), 0.0),
        "length 0": (torch.zeros(3, 0, dtype=torch.int64), 0.15),
        "length 1, padding": (torch.full((3, 1), PAD), 1.0),
        "no rows": (torch.zeros(0, 8, dtype=torch.int64), 0.15),
    }[case]
    mlm = wrap(build, mask_prob=mask_prob)
    loss = mlm(seq)
    loss.backward()
    assert loss.item() == 0
    for name, parameter in mlm.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name  # NaN would be any
    sums = mlm(seq, sums=True)
    assert {name: value.item() for name, value in sums.items()} == dict.fromkeys(sums, 0)


@each_model
def test_a_row_of_one_token_and_masking_of_everything(build: Callable[[], nn.Module]) -> None:
    sums = wrap(build)(torch.tensor([[7], [9]]), sums=True)
    assert sums["targets"] == 2 and sums["loss"] > 0
    sums = wrap(build, mask_prob=1.0)(token_ids(), sums=True)
    assert sums["targets"] == 4 * 25 and sums["loss"].isfinite()


# ---- the interface


@each_model
def test_every_parameter_gets_a_gradient_and_masks_follow_manual_seed(build: Callable[[], nn.Module]) -> None:
    mlm, seq = wrap(build), token_ids().int()
    torch.manual_seed(5)
    first = mlm(seq)
    second = mlm(seq)
    torch.manual_seed(5)
    assert torch.equal(mlm(seq), first) and not torch.equal(second, first)
    first.backward()
    assert first.shape == () and first.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mlm.parameters())
    assert torch.equal(mlm(seq, row_keys=keys()), mlm(seq, row_keys=keys()))


@each_model
def test_autocast(build: Callable[[], nn.Module]) -> None:
    mlm, seq = wrap(build), token_ids()
    exact = mlm(seq, row_keys=keys())
    with torch.autocast("cpu", torch.bfloat16):
        loss = mlm(seq, row_keys=keys())
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, atol=0.05, rtol=0.02)


@pytest.mark.parametrize(
    ("build", "name"),
    [(bert, "attention_mask"), (roberta, "attention_mask"), (modernbert, "attention_mask"), (x_transformer, "mask")],
)
def test_keywords_reach_the_transformer(build: Callable[[], nn.Module], name: str) -> None:
    seq = token_ids(padding=12)
    mlm = wrap(build, random_token_prob=0.0, replace_prob=1.0)
    visible = {name: seq != PAD}
    longer = F.pad(seq, (0, 8), value=PAD)
    far = {name: longer != PAD}
    # what is masked off must not matter, so that the same tokens with more padding have the same loss
    torch.testing.assert_close(mlm(longer, row_keys=keys(), **far), mlm(seq, row_keys=keys(), **visible))
    assert not torch.allclose(mlm(longer, row_keys=keys()), mlm(seq, row_keys=keys()), atol=1e-7, rtol=0)


def test_our_encoder_takes_segments_and_never_masks_segment_0() -> None:
    seq = token_ids(padding=0)
    segments = torch.ones(seq.shape, dtype=torch.int16)
    segments[:, 20:] = 0
    sums = wrap(encoder, mask_prob=1.0)(seq, sums=True, segments=segments)
    assert sums["targets"] == 4 * 19


def test_the_seeds_arguments_in_the_seeds_order() -> None:
    mlm = MLM(Bag(), 0.5, 1.0, SIZE, 0.0, MASK, PAD, [CLS, SEP])
    sums = mlm(token_ids(), sums=True)
    assert sums["targets"] == sums["by_mask"] == 4 * math.ceil(0.5 * 25)
    plain = MLM(Bag())  # the seed's defaults: 15 %, of which 90 % the mask token 2, the rest kept; padding 0
    masked = plain.masker(torch.full((200, 100), 7), keys(200), plain.mask_prob)
    assert masked.targets == 200 * 15 and masked.by_random == 0
    assert set(masked.ids.unique().tolist()) == {2, 7}
    assert abs(masked.by_mask.item() / 3000 - 0.9) < 0.03


def test_a_state_dict_holds_the_transformer_and_nothing_else() -> None:
    mlm = wrap(Bag, policy="whole_word", word_starts=torch.ones(SIZE, dtype=torch.bool))
    assert list(mlm.state_dict()) == [f"transformer.{name}" for name in Bag().state_dict()]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mask_prob": 1.2}, "mask_prob must lie between 0 and 1"),
        ({"replace_prob": -1.0}, "replace_prob must lie between 0 and 1"),
        ({"random_token_prob": 0.1}, "needs num_tokens"),
        ({"policy": "sentence"}, "token, whole_word, span"),
        ({"pad_token_id": None}, "pad_token_id must be whole numbers"),
        ({"mask_token_id": 2.0}, "mask_token_id must be whole numbers"),
        ({"mask_ignore_token_ids": ["[CLS]"]}, "mask_ignore_token_ids must be whole numbers"),
        ({"policy": "whole_word", "word_starts": torch.ones(SIZE, dtype=torch.int64)}, "word_starts must be a bool"),
        ({"word_starts": torch.ones(9, dtype=torch.bool), "num_tokens": SIZE}, "for each of 64 ids, got 9"),
        ({"mask_prob": "0.15"}, "mask_prob must lie between 0 and 1"),
        ({"mask_prob": torch.tensor(0.15)}, "mask_prob must lie between 0 and 1"),
        ({"num_tokens": 64.0}, "num_tokens must be whole numbers"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MLM(Bag(), **arguments)


# ---- head on the targets alone, and sums


@pytest.mark.parametrize("rate", [0.15, 0.3, 1.0])
def test_the_head_runs_on_the_targets_alone_with_the_same_result(rate: float) -> None:
    split, whole, seq = wrap(SplitBag), wrap(Bag), token_ids()
    losses = [mlm(seq, row_keys=keys(), rate=rate) for mlm in (split, whole)]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=0)
    assert split.transformer.head_shape == (4 * masking.slots(32, rate), 16)
    for loss in losses:
        loss.backward()
    for one, other in zip(split.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=0)


def test_our_encoders_split_head_equals_its_full_logits() -> None:
    mlm, seq = wrap(encoder), token_ids()
    assert has_split_head(mlm.transformer)
    split = mlm(seq, row_keys=keys())
    mlm.transformer = nn.Sequential(mlm.transformer)
    torch.testing.assert_close(split, mlm(seq, row_keys=keys()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("policy", POLICIES)
def test_sums_add_up_to_the_mean_however_the_rows_are_split(policy: str) -> None:
    mlm = wrap(Bag, policy=policy, word_starts=torch.arange(SIZE) % 2 == 0)
    seq, row_keys = token_ids(8), keys(8)
    seq[3, 2:20] = PAD
    whole = mlm(seq, row_keys=row_keys, sums=True)
    parts = [mlm(seq[rows], row_keys=row_keys[rows], sums=True) for rows in (slice(0, 1), slice(1, 8))]
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value)
    assert whole["by_mask"] + whole["by_random"] + whole["kept"] == whole["targets"]
    torch.testing.assert_close(whole["loss"] / whole["targets"], mlm(seq, row_keys=row_keys))
    assert all(value.shape == () for value in whole.values()) and whole["loss"].requires_grad


def test_correct_counts_the_targets_with_the_largest_logit() -> None:
    mlm, seq = MLM(Oracle(), 0.5, 8 / 9, SIZE, 0.1, MASK, PAD, [CLS, SEP]), token_ids(200)
    sums = mlm(seq, row_keys=keys(200), sums=True)
    masked = mlm.masker(seq, keys(200), 0.5)
    used = masked.labels != masking.IGNORED_LABEL
    unchanged = (masked.ids == seq).gather(1, masked.positions)[used].sum()
    assert sums["correct"] == unchanged >= sums["kept"] > 0


def test_details_are_those_of_the_sums() -> None:
    mlm, seq = wrap(Bag), token_ids(4)
    seq[1, 2:] = PAD  # few targets: slots of the row are left over
    sums, seen = mlm(seq, row_keys=keys(4), sums=True), mlm(seq, row_keys=keys(4), sums=True, details=True)
    for name, value in sums.items():
        torch.testing.assert_close(seen[name], value)
    masked = mlm.masker(seq, keys(4), mlm.mask_prob)
    for name in ("positions", "labels"):
        assert torch.equal(seen[name], getattr(masked, name))
    assert torch.equal(seen["shown"], masked.ids)
    used = masked.labels != masking.IGNORED_LABEL
    assert 0 < used.sum() < used.numel() and (seen["losses"][~used] == 0).all()
    torch.testing.assert_close(seen["losses"].sum(), sums["loss"])
    guessed = seen["logits"].view(*used.shape, -1).argmax(-1)
    assert (guessed[used] == seq.gather(1, masked.positions)[used]).sum() == sums["correct"]


def test_the_rate_can_change_from_call_to_call() -> None:
    mlm, seq = wrap(Bag), token_ids()
    assert [mlm(seq, sums=True, rate=rate)["targets"].item() for rate in (0.3, 0.15, 0.0)] == [32, 16, 0]


@pytest.mark.parametrize("build", [SplitBag, pytest.param(encoder, marks=pytest.mark.slow)])
def test_one_graph_captures_it(build: Callable[[], nn.Module]) -> None:
    torch.compiler.reset()
    mlm, seq = wrap(build), token_ids()
    compiled = torch.compile(mlm, fullgraph=True, dynamic=False, backend="eager")
    for rate in (0.15, 0.3):
        expected = mlm(seq, row_keys=keys(), rate=rate, sums=True)
        torch.testing.assert_close(compiled(seq, row_keys=keys(), rate=rate, sums=True), expected)
    compiled(seq).backward()
    assert all(p.grad is not None for p in mlm.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_never_waited_for() -> None:
    mlm, seq, row_keys = wrap(encoder).cuda(), token_ids().cuda(), keys().cuda()
    mlm(seq, row_keys=row_keys).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mlm(seq, row_keys=row_keys, sums=True)["loss"].backward()
        mlm(seq)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", [list, tuple, set, torch.tensor])
def test_ignored_ids_may_come_in_any_form(kind: Callable) -> None:
    ids = torch.randint(5, 20, (64, 32))
    masker = MLM(nn.Embedding(20, 20), 0.5, num_tokens=20, random_token_prob=1.0, mask_token_id=4,
                 mask_ignore_token_ids=kind([1, 3, 7])).masker  # fmt: skip
    assert masker.ordinary.tolist() == [i for i in range(20) if i not in (0, 1, 3, 4, 7)]
    masked = masker(ids, torch.arange(64), 0.5)
    assert torch.equal(masked.ids == 7, ids == 7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_tables_are_where_the_wrapped_transformer_is() -> None:
    mlm = MLM(nn.Embedding(20, 20).cuda(), 0.5)
    assert mlm.masker.ignored.device.type == "cuda"


# ---- what is refused at a call, and wrappers around the transformer


class Returns(nn.Module):
    """Gives what it was told to, whatever the ids."""

    def __init__(self, out: object) -> None:
        super().__init__()
        self.out = out

    def forward(self, ids: torch.Tensor) -> object:
        return self.out


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ((torch.zeros(4, 32, SIZE),), "it returned a tuple"),
        (None, "it returned a NoneType"),
        (torch.zeros(4, SIZE), r"it gave \(4, 64\)"),
        (torch.zeros(4, 31, SIZE), r"it gave \(4, 31, 64\)"),
    ],
)
def test_what_is_no_logits_is_refused(out: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrap(lambda: Returns(out))(token_ids())


@pytest.mark.parametrize(
    ("row_keys", "words"),
    [
        (keys()[:3], r"shape \(4,\).*\(3,\)"),
        (keys()[:, None], r"\(4, 1\)"),
        (keys().int(), "got torch.int32"),
    ],
)
def test_keys_that_do_not_fit_the_rows_are_refused(row_keys: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrap(Bag)(token_ids(), row_keys=row_keys)


@pytest.mark.parametrize(
    "seq", [token_ids()[0], token_ids()[None], token_ids().float(), token_ids() > 3, token_ids().tolist()]
)
def test_what_is_no_batch_of_ids_is_refused(seq: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"token ids of shape \(B, T\)"):
        wrap(Bag)(seq)


def test_a_wrapper_around_a_split_transformer_is_run_itself() -> None:
    """torch.compile's wrapper passes attributes through: taking the split from it would run everything uncompiled."""
    mlm = wrap(SplitBag)
    expected = mlm(token_ids(), row_keys=keys())
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    mlm.transformer = torch.compile(mlm.transformer, backend=backend)
    torch.testing.assert_close(mlm(token_ids(), row_keys=keys()), expected, atol=1e-6, rtol=0)
    assert len(graphs) == 1


def test_a_replaced_transformer_is_the_one_that_runs() -> None:
    mlm = wrap(Bag)
    mlm.transformer = SplitBag()
    mlm(token_ids())
    assert mlm.transformer.head_shape[0] < token_ids().numel()
    mlm.transformer = Bag()
    mlm(token_ids()).backward()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_model_made_without_memory_masks_rightly_once_it_has_some(policy: str) -> None:
    """.to_empty() leaves every buffer to chance; here also under a default device of meta."""
    keywords = {"policy": policy, "word_starts": torch.arange(SIZE) % 3 == 0}
    expected = wrap(Bag, **keywords).masker(token_ids(), keys(), 0.3)
    with torch.device("meta"):
        mlm = wrap(Bag, **keywords)
    for table in mlm.to_empty(device="cpu").masker.buffers():
        assert table.device.type == "cpu"
    for got, want in zip(mlm.masker(token_ids(), keys(), 0.3), expected, strict=True):
        assert torch.equal(got, want)


def test_weights_may_be_assigned_to_a_model_made_without_memory() -> None:
    weights, expected = wrap(Bag).state_dict(), wrap(Bag)(token_ids(), row_keys=keys())
    with torch.device("meta"):
        mlm = wrap(Bag)
    mlm.load_state_dict(weights, assign=True)
    assert torch.equal(mlm(token_ids(), row_keys=keys()), expected)


def test_segments_that_do_not_fit_the_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"segments must have the shape of seq, \(4, 32\), got \(1, 32\)"):
        wrap(encoder)(token_ids(), segments=torch.ones(1, 32, dtype=torch.int64))


def test_a_transformer_that_knows_too_few_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="logits of 16 tokens, and num_tokens = 64"):
        wrap(lambda: nn.Embedding(SIZE, 16))(token_ids())


def test_a_rate_in_float32_is_the_decimal_that_it_prints_as() -> None:
    ids = torch.full((1, 100), 7)
    sums = wrap(Bag, mask_prob=np.float32(0.15))(ids, sums=True)
    assert sums["targets"] == 15


def test_casting_leaves_the_tables_of_ids_as_they_are() -> None:
    mlm = MLM(Bag(), mask_ignore_token_ids=[50281], num_tokens=SIZE).type(torch.bfloat16)
    assert mlm.masker.ignored.tolist() == [0, 2, 50281]


def test_a_double_model_has_a_double_loss() -> None:
    assert wrap(Bag).double()(token_ids()).dtype == torch.float64


def test_a_transformer_compiled_in_its_place_is_run_itself() -> None:
    mlm, graphs = wrap(SplitBag), []
    expected = mlm(token_ids(), row_keys=keys())

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    mlm.transformer.compile(backend=backend)
    torch.testing.assert_close(mlm(token_ids(), row_keys=keys()), expected, atol=1e-6, rtol=0)
    assert len(graphs) == 1
