"""Held-out numbers: the same for any number of ranks, and those that a plain loop over the targets gives."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import toy_documents, write_toy_split
from ranks import on_ranks

from mlm_dist import masking, mixture, stream, vocab, world
from mlm_dist.batch_size import BatchConfig
from mlm_dist.cache import make_cache
from mlm_dist.encoder import Encoder, EncoderConfig
from mlm_dist.engine import held_out_pass
from mlm_dist.evaluate import evaluate
from mlm_dist.masking import MaskingConfig
from mlm_dist.mixture import SourceConfig, Sources
from mlm_dist.mlm import MLM
from mlm_dist.stream import DataConfig
from mlm_dist.vocab import Vocab

SEED, RATE = 5, 0.15
BATCH = BatchConfig(seq_len=32, global_rows=8, micro_rows=4)
SHAPE = EncoderConfig(layers=1, width=32, heads=2, mlp_width=48, max_positions=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources, of which law and web have held-out documents."""
    folder = tmp_path_factory.mktemp("sources")
    tokenizer = vocab.train(toy_documents(400, seed=1), 300)
    for number, (name, held_out) in enumerate({"code": 0, "law": 30, "web": 10}.items()):
        tokenizer.save(folder / name / "tokenizer")
        write_toy_split(folder / name / "train", tokenizer, toy_documents(20, seed=number), 2)
        if held_out:
            write_toy_split(folder / name / "valid", tokenizer, toy_documents(held_out, seed=10 + number), 2)
    return folder


def opened(folder: Path) -> tuple[Sources, Vocab]:
    folders = {name: SourceConfig(str(folder / name)) for name in ("code", "law", "web")}
    cache = make_cache(None, 1.0, 1.0)
    return mixture.open_sources(folders, "valid", cache), vocab.load(folder / "law/tokenizer")


def model_of(tokenizer: Vocab) -> MLM:
    world.seed_everything(SEED)
    model = MLM(Encoder(SHAPE, tokenizer.size), **masking.mlm_keywords(MaskingConfig(), tokenizer)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape) * 0.2  # not all tokens as likely
    return model


def on_rank(folder: Path) -> dict[str, float]:
    with world.join(60) as here:
        sources, tokenizer = opened(folder)
        model = model_of(tokenizer)
        data = DataConfig(shards="unused", workers=0)
        batches = stream.held_out_batches(sources, tokenizer, data, BATCH, here.rank, here.size)
        return evaluate(
            lambda batch: held_out_pass(model, batch, RATE, SEED, here.device),
            batches, here, tokenizer, mixture.named(sources),
        )  # fmt: skip


@torch.no_grad()
def plainly(folder: Path) -> dict[str, float]:
    """Target by target, in one process."""
    sources, tokenizer = opened(folder)
    model, seen = model_of(tokenizer), {"law": [], "web": []}
    names, data = {1: "law", 2: "web"}, DataConfig(shards="unused", workers=0)
    for batch in stream.held_out_batches(sources, tokenizer, data, BATCH, 0, 1):
        masked = model.masker(batch.ids, masking.row_keys_by_sample(SEED, batch.row_keys), RATE, batch.segments)
        logits = model.transformer(masked.ids, segments=batch.segments).double()
        for row, source in enumerate(batch.sources.tolist()):
            for position, label in zip(masked.positions[row].tolist(), masked.labels[row].tolist(), strict=True):
                if label != masking.IGNORED_LABEL:
                    loss = F.cross_entropy(logits[row, position], torch.tensor(label)).item()
                    correct = int(logits[row, position].argmax()) == label
                    text = tokenizer.tokenizer.id_to_token(label)  # byte-level: a character for each byte
                    seen[names[source]].append((loss, correct, len(text)))
    numbers = {}
    for prefix, rows in {"law/": seen["law"], "web/": seen["web"], "": seen["law"] + seen["web"]}.items():
        losses, correct, lengths = zip(*rows, strict=True)
        loss = sum(losses) / len(rows)
        numbers |= {
            f"{prefix}loss": loss,
            f"{prefix}perplexity": math.exp(loss),
            f"{prefix}accuracy": sum(correct) / len(rows),
            f"{prefix}bits_per_byte": sum(losses) / math.log(2) / sum(lengths),
            f"{prefix}targets": len(rows),
        }
    return numbers


def test_held_out_numbers_are_the_same_for_any_number_of_ranks(folder: Path) -> None:
    [alone], ranks, expected = on_ranks(1, on_rank, folder), on_ranks(2, on_rank, folder), plainly(folder)
    assert ranks[0] == ranks[1]
    assert ranks[0] == pytest.approx(alone, rel=1e-6)
    assert {name: alone[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert expected["law/loss"] != pytest.approx(expected["web/loss"], rel=1e-3) and 0 < expected["accuracy"] < 1
    by_source = {name for name in alone if "/" in name}
    assert by_source == {name for name in expected if "/" in name}, "a source without held-out rows has no numbers"
    for name in ("mask_rate", "by_mask", "by_random", "kept", "packing", "document_tokens", "unknown_tokens"):
        assert math.isfinite(alone[name]), name
