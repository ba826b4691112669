"""What the model fills in: the same texts at every evaluation and for any number of ranks, told as they are."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import toy_documents, write_toy_split
from launching import ROOT, overridden
from ranks import on_ranks
from test_vocab import sentence_piece, word_piece

from mlm_dist import config, masking, predictions, stream, train, vocab, world
from mlm_dist.batch_size import BatchConfig
from mlm_dist.encoder import Encoder, EncoderConfig
from mlm_dist.engine import held_out_pass
from mlm_dist.manifest import load_manifest
from mlm_dist.masking import MaskingConfig
from mlm_dist.mlm import MLM
from mlm_dist.predictions import LONGEST, Picker, text_of, token_of, window
from mlm_dist.stream import DataConfig
from mlm_dist.vocab import Vocab
from mlm_dist.world import StopFlag

SEED, RATE, COUNT = 5, 0.15, 12
SHAPE = EncoderConfig(layers=1, width=32, heads=2, mlp_width=48, max_positions=256)
ALL_MASKED = MaskingConfig(mask=1.0, random=0.0, keep=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out documents of which some fill a row, and some share one with others."""
    folder = tmp_path_factory.mktemp("shards")
    tokenizer = vocab.train(toy_documents(400, seed=1), 300)
    tokenizer.save(folder / "tokenizer")
    write_toy_split(folder / "valid", tokenizer, toy_documents(60, seed=2), 2)
    return folder


def model_of(tokenizer: Vocab, config: MaskingConfig) -> MLM:
    world.seed_everything(SEED)
    model = MLM(Encoder(SHAPE, tokenizer.size), **masking.mlm_keywords(config, tokenizer)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape) * 0.2
    return model


def picked(folder: Path, config: MaskingConfig, micro_rows: int) -> list[dict]:
    with world.join(60) as here:
        tokenizer = vocab.load(folder / "tokenizer")
        model, picker = model_of(tokenizer, config), Picker(tokenizer, COUNT, SEED)
        batch = BatchConfig(seq_len=128, global_rows=4 * micro_rows, micro_rows=micro_rows)
        data, manifest = DataConfig(shards="unused", workers=0), load_manifest(folder / "valid")
        for taken in stream.held_out_batches(manifest, tokenizer, data, batch, here.rank, here.size):
            picker.look(taken, held_out_pass(model, taken, RATE, SEED, here.device))
        return picker.sentences(here)


def test_the_texts_do_not_depend_on_the_ranks_and_hold_what_was_masked(folder: Path) -> None:
    [alone], ranks = on_ranks(1, picked, folder, ALL_MASKED, 4), on_ranks(3, picked, folder, ALL_MASKED, 2)
    assert ranks[0] == ranks[1] == ranks[2] and len(alone) == COUNT

    def told(sentences: list[dict]) -> list:
        return [(sentence["text"], [mask["truth"] for mask in sentence["masks"]]) for sentence in sentences]

    assert told(alone) == told(ranks[0])
    chances = [
        [p for sentence in each for mask in sentence["masks"] for _, p in mask["guesses"]] for each in (alone, ranks[0])
    ]
    assert chances[0] == pytest.approx(chances[1], abs=1e-4)
    documents, cut = toy_documents(60, seed=2), 0
    for text, truths in told(alone):
        for truth in truths:  # put back, they give a part of a document
            text = text.replace(" [MASK]" if truth.startswith(" ") else "[MASK]", truth, 1)
        cut += "…" in text
        assert any(text.strip("…") in document for document in documents), text
        assert truths
    assert 0 < cut < COUNT, "some are a whole piece, some a part of one"


@torch.no_grad()
def test_the_guesses_are_the_likeliest_of_the_models_own(folder: Path) -> None:
    """Against the logits of the row, by the plain transformer; with random and kept targets, which are no masks."""
    [sentences] = on_ranks(1, picked, folder, MaskingConfig(), 4)
    tokenizer = vocab.load(folder / "tokenizer")
    model, expected = model_of(tokenizer, MaskingConfig()), {}
    data, batch = DataConfig(shards="unused", workers=0), BatchConfig(seq_len=128, global_rows=4, micro_rows=4)
    for taken in stream.held_out_batches(load_manifest(folder / "valid"), tokenizer, data, batch, 0, 1):
        masked = model.masker(taken.ids, masking.row_keys_by_sample(SEED, taken.row_keys), RATE, taken.segments)
        logits = model.transformer(masked.ids, segments=taken.segments)[..., : tokenizer.size]
        for row, position in (masked.ids == tokenizer.mask_id).nonzero().tolist():
            chances, tokens = logits[row, position].softmax(-1).topk(3)
            guesses = [(token_of(tokenizer, int(i)), float(p)) for i, p in zip(tokens, chances, strict=True)]
            expected.setdefault(token_of(tokenizer, int(taken.ids[row, position])), []).append(guesses)
    for sentence in sentences:
        assert sentence["text"].count("[MASK]") == len(sentence["masks"]) > 0
        for mask in sentence["masks"]:
            got = [name for name, _ in mask["guesses"]], pytest.approx([p for _, p in mask["guesses"]], abs=1e-5)
            assert any(got == ([n for n, _ in each], [p for _, p in each]) for each in expected[mask["truth"]]), mask


def test_a_long_piece_is_cut_around_the_mask() -> None:
    segments = torch.tensor([1] * 5 + [2] * 200 + [0] * 3)
    for middle in range(6, 204):
        first, last, cut = window(segments, middle)
        assert first <= middle < last and last - first == LONGEST and 6 <= first and last <= 204
        assert cut == (first > 6, last < 204)
    assert window(segments, 2) == (1, 4, (False, False))


def test_a_mask_has_the_space_of_the_token_behind_it(tmp_path: Path) -> None:
    bpe = vocab.train(toy_documents(100, seed=1), 300)
    for known, text in (
        (bpe, "the court held"),
        (vocab.load(word_piece(tmp_path / "bert")), "the fox jumping"),
        (sentence_piece(), "the fox the naïve"),
    ):
        (ids,) = known.encode_batch([text])
        for place, token in enumerate(ids):
            shown = text_of(known, [*ids[:place], known.mask_id, *ids[place + 1 :]], {place: token})
            name = known.tokenizer.id_to_token(known.mask_id)
            begins_word = place > 0 and known.tokenizer.id_to_token(token)[0] in "Ġ▁"
            assert shown.count(name) == 1 and (not begins_word or f" {name}" in shown), shown
        assert all(token_of(known, i) for i in range(known.size))
    (broken,) = [i for i in range(bpe.size) if bpe.tokenizer.id_to_token(i) == "é"]  # byte 0xE9 alone is no text
    assert token_of(bpe, broken) == "é"


# ---- in a run


def a_run_and_its_continuation(toy: Path, folder: Path) -> None:
    with world.join(120) as here, StopFlag() as stop:
        for name, steps, more in (("run", 4, ()), ("run", 6, ()), ("silent", 3, ("log.log_text=false",))):
            overrides = overridden(
                toy, folder / name, f"run.steps={steps}", "evaluate.every_steps=2", "schedule.name=constant",
                "engine.zero_stage=3", "engine.precision=bf16", "evaluate.predictions=5", *more,
            )  # fmt: skip
            if steps == 6 and here.is_main:  # as if it had been killed beyond its checkpoint
                with open(folder / name / predictions.FILE, "a") as file:
                    file.write('{"step": 6, "text": "planted"}\n{"step": 6, "te')
            assert train.train_on(config.load(ROOT / "configs/quickstart.yaml", overrides), here, stop) == 0


def test_a_run_tells_of_the_same_texts_at_each_evaluation(toy: Path, tmp_path: Path) -> None:
    """Sharded over two ranks, in bf16, packed, and over a restart."""
    on_ranks(2, a_run_and_its_continuation, toy, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run" / predictions.FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [step for step in (2, 4, 6) for _ in range(5)]
    by_step = {step: list(each) for step, each in itertools.groupby(lines, key=lambda line: line["step"])}
    texts = [[(line["text"], [mask["truth"] for mask in line["masks"]]) for line in each] for each in by_step.values()]
    assert texts[0] == texts[1] == texts[2]
    chances = [line["masks"][0]["guesses"][0][1] for line in lines]
    assert all(0 < chance <= 1 for chance in chances) and len(set(chances)) > 5
    assert [line["tokens"] for line in by_step[2]] < [line["tokens"] for line in by_step[4]]
    assert (tmp_path / "silent/metrics.jsonl").exists() and not (tmp_path / "silent" / predictions.FILE).exists()
