"""What a run on two ranks logs, against the same computed plainly from what its ranks saw."""

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import toy_documents
from launching import ROOT, metrics, overridden
from ranks import on_ranks

from mlm_dist import assembly, config, masking, models, schedule, train, vocab, world
from mlm_dist import metrics as metrics_module
from mlm_dist.config import RunConfig
from mlm_dist.engine import Engine
from mlm_dist.manifest import load_manifest
from mlm_dist.shards import Record, write_split
from mlm_dist.stream import Batch
from mlm_dist.vocab import Vocab
from mlm_dist.world import StopFlag, World

STEPS, EVERY = 6, 2
WAITS = (0.02, 0.06)  # seconds a step that each rank waits for its data
PEAKS = (1e9, 3e9)
SOURCES = ("law", "web")


def documents(toy: Path) -> dict[str, list[list[int]]]:
    """The documents of each source, as ids; no two begin alike. Those of web hold unknown tokens."""
    tokenizer = vocab.load(toy / "tokenizer")
    texts = [f"{number} {text}" for number, text in enumerate(toy_documents(500, seed=1))]
    encoded = tokenizer.encode_batch(texts)
    web = [[tokenizer.unk_id if place % 17 == 5 else token for place, token in enumerate(ids)] for ids in encoded[400:]]
    return {"law": encoded[:400], "web": web}


@pytest.fixture(scope="module")
def folder(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of one tokenizer, law and web, and room for the run."""
    folder = tmp_path_factory.mktemp("sources")
    tokenizer = vocab.load(toy / "tokenizer")
    for name, ids in documents(toy).items():
        tokenizer.save(folder / name / "tokenizer")
        records = [Record(np.array(document, np.uint16), np.array([len(document)])) for document in ids]
        write_split(folder / name / "train", [records[i::4] for i in range(4)], tokenizer.size, tokenizer.fingerprint)
    return folder


def run_config(folder: Path) -> RunConfig:
    overrides = overridden(
        folder / "law", folder / "run", "data.shards=null", f"data.sources.law.shards={folder / 'law'}",
        f"data.sources.web.shards={folder / 'web'}", "data.sources.law.weight=0.7", "data.sources.web.weight=0.3",
        f"run.steps={STEPS}", f"log.every_steps={EVERY}", "engine.clip=0.1", "data.lanes=4",
    )  # fmt: skip
    return config.load(ROOT / "configs/quickstart.yaml", overrides)


# ---- what the ranks see


class Witness:
    """Looks at every step of a rank before the engine does, with a model of its own that has the same weights."""

    def __init__(self, cfg: RunConfig, here: World, tokenizer: Vocab) -> None:
        self.cfg, self.here, self.tokenizer = cfg, here, tokenizer
        transformer = models.build(cfg.model, tokenizer.size, cfg.batch.seq_len, tokenizer, cfg.data.packing)
        self.model = assembly.objective(cfg, transformer, tokenizer)
        self.flops = models.flops_per_token(cfg.model, transformer, tokenizer.size, cfg.batch.seq_len, cfg.masking.rate)
        self.steps: list[dict[str, Any]] = []

    def watch(self, train_step: Callable) -> Callable:
        def watched(engine: Engine, batches: list[Batch], targets: int, step: int, lr: float, rate: float) -> Any:
            self.model.load_state_dict(engine.deepspeed.module.state_dict())
            self.model.zero_grad()
            seen = [self.look(batch, step, micro_step, rate) for micro_step, batch in enumerate(batches)]
            gradients = torch.cat([p.grad.flatten().double() for p in self.model.parameters()])
            norm = float(self.here.sum(gradients).norm()) / targets
            started = time.perf_counter()
            sums = train_step(engine, batches, targets, step, lr, rate)
            seconds = time.perf_counter() - started
            lr_of = {group["lr"] for group in engine.optimizer.param_groups}
            self.steps.append({"batches": seen, "norm": norm, "seconds": seconds, "lr": lr_of})
            return sums

        return watched

    def look(self, batch: Batch, step: int, micro_step: int, rate: float) -> dict[str, Any]:
        """One micro-batch, target by target and piece by piece."""
        rows, device = batch.ids.shape[0], torch.device("cpu")
        keys = masking.row_keys_by_rank(self.cfg.run.seed, self.here.rank, step, micro_step, rows, device)
        masked = self.model.masker(batch.ids, keys, rate, batch.segments)
        logits = self.model.transformer(masked.ids, segments=batch.segments)  # (B, T, V)
        loss, targets = torch.zeros(()), []
        for row, (positions, labels) in enumerate(zip(masked.positions.tolist(), masked.labels.tolist(), strict=True)):
            for position, label in zip(positions, labels, strict=True):
                if label != masking.IGNORED_LABEL:
                    loss = loss + F.cross_entropy(logits[row, position], torch.tensor(label))
                    guess = int(logits[row, position].argmax())
                    targets.append((label, guess, int(masked.ids[row, position])))
        loss.backward()
        pieces = [
            (source, tuple(ids[segments == number].tolist()))
            for ids, segments, source in zip(batch.ids, batch.segments, batch.sources.tolist(), strict=True)
            for number in range(1, int(segments.max()) + 1)
        ]
        return {"loss": float(loss), "targets": targets, "pieces": pieces, "rows": batch.sources.tolist()}


def watched_run(folder: Path) -> dict[str, Any]:
    with world.join(120) as here, StopFlag() as stop:
        cfg = run_config(folder)
        witness = Witness(cfg, here, vocab.load(folder / "law/tokenizer"))
        Engine.train_step = witness.watch(Engine.train_step)
        take = train.take

        def slow_take(run: train.Run) -> Any:
            time.sleep(WAITS[here.rank])
            return take(run)

        train.take = slow_take
        metrics_module.peak_flops = lambda device: PEAKS[here.rank]
        assert train.train_on(cfg, here, stop) == 0
        return {"steps": witness.steps, "flops": witness.flops, "memory": metrics_module.peak_memory(here.device)}


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return on_ranks(2, watched_run, folder)


def intervals(ranks: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The micro-batches of all ranks, by the step of the line that tells of them."""
    return {
        step: [batch for rank in ranks for seen in rank["steps"][step - EVERY : step] for batch in seen["batches"]]
        for step in range(EVERY, STEPS + 1, EVERY)
    }


# ---- the numbers


def test_losses_and_masks(ranks: list[dict[str, Any]], folder: Path) -> None:
    mask_id = vocab.load(folder / "law/tokenizer").mask_id
    plain: dict[str, dict[int, float]] = {}
    for step, batches in intervals(ranks).items():
        targets = [target for batch in batches for target in batch["targets"]]
        loss = sum(batch["loss"] for batch in batches) / len(targets)
        text = [token for batch in batches for _, piece in batch["pieces"] for token in piece[1:-1]]
        unknown = text.count(vocab.load(folder / "law/tokenizer").unk_id)
        by_mask = sum(shown == mask_id for _, _, shown in targets)
        changed = sum(shown not in (mask_id, label) for label, _, shown in targets)
        numbers = {
            "loss": loss,
            "perplexity": math.exp(loss),
            "accuracy": sum(label == guess for label, guess, _ in targets) / len(targets),
            "mask_rate": len(targets) / (len(text) - unknown),
            "by_mask": by_mask / len(targets),
            "by_random": changed / len(targets),
            "kept": 1 - (by_mask + changed) / len(targets),
            "unknown_tokens": unknown / len(text),
        }
        for name, value in numbers.items():
            plain.setdefault(name, {})[step] = value
    assert min(plain["unknown_tokens"].values()) > 0
    for name, values in plain.items():
        # a random token may be the very one it stands for
        close = {"abs": 0.01} if name in ("by_random", "kept") else {"rel": 1e-5}
        assert metrics(folder / "run", name) == pytest.approx(values, **close), name


def test_packing_and_documents(ranks: list[dict[str, Any]], folder: Path, toy: Path) -> None:
    longest = 30  # tokens of a piece in a row of 32
    begins = {
        (number, tuple(ids[:longest])): len(ids) for number, name in enumerate(SOURCES) for ids in documents(toy)[name]
    }
    for step, batches in intervals(ranks).items():
        pieces = [piece for batch in batches for piece in batch["pieces"]]
        lengths = [begins[key] for key in ((source, ids[1:-1]) for source, ids in pieces) if key in begins]
        tokens, positions = sum(len(ids) for _, ids in pieces), sum(32 * len(batch["rows"]) for batch in batches)
        told = {
            name: metrics(folder / "run", name)[step] for name in ("packing", "document_tokens", "continued_pieces")
        }
        assert told == pytest.approx(
            {
                "packing": tokens / positions,
                "document_tokens": sum(lengths) / len(lengths),
                "continued_pieces": 1 - len(lengths) / len(pieces),
            }
        )
        assert 0 < told["continued_pieces"] < 1


def test_sources(ranks: list[dict[str, Any]], folder: Path) -> None:
    text, epochs = {name: 0 for name in SOURCES}, {name: {} for name in SOURCES}
    for step, batches in intervals(ranks).items():
        rows = [source for batch in batches for source in batch["rows"]]
        pieces = [piece for batch in batches for piece in batch["pieces"]]
        for number, name in enumerate(SOURCES):
            tokens = [len(ids) for source, ids in pieces if source == number]
            text[name] += sum(tokens) - 2 * len(tokens)
            epochs[name][step] = text[name] / load_manifest(folder / name / "train").tokens
            assert metrics(folder / "run", f"source/{name}")[step] == pytest.approx(rows.count(number) / len(rows))
            share = sum(tokens) / sum(len(ids) for _, ids in pieces)
            assert metrics(folder / "run", f"source/{name}/tokens")[step] == pytest.approx(share)
    for name in SOURCES:
        assert metrics(folder / "run", f"source/{name}/epoch") == pytest.approx(epochs[name], rel=0.2), name


def test_the_optimizer(ranks: list[dict[str, Any]], folder: Path) -> None:
    cfg = run_config(folder)
    for step in range(EVERY, STEPS + 1, EVERY):
        last = [rank["steps"][step - 1] for rank in ranks]
        assert metrics(folder / "run", "grad_norm")[step] == pytest.approx(last[0]["norm"], rel=1e-4)
        assert last[0]["norm"] > cfg.engine.clip, "the norm before clipping"
        lr = schedule.lr_at(cfg.optim, cfg.schedule, step - 1, STEPS)
        assert last[0]["lr"] == last[1]["lr"] == {lr} == {metrics(folder / "run", "lr")[step]}
    assert set(metrics(folder / "run", "skipped_steps").values()) == {0}


def test_tokens_and_speed(ranks: list[dict[str, Any]], folder: Path) -> None:
    total = 0
    for step, batches in intervals(ranks).items():
        tokens = sum(len(ids) for batch in batches for _, ids in batch["pieces"])
        total += tokens
        told = {name: metrics(folder / "run", name)[step] for name in ("tokens", "tokens_per_second", "step_seconds")}
        assert told["tokens"] == total
        assert told["tokens_per_second"] * told["step_seconds"] * EVERY == pytest.approx(tokens)
        utilisation = told["tokens_per_second"] * ranks[0]["flops"] / sum(PEAKS)
        assert metrics(folder / "run", "mfu")[step] == pytest.approx(utilisation)


def test_times_and_memory(ranks: list[dict[str, Any]], folder: Path) -> None:
    told = {
        name: metrics(folder / "run", name)
        for name in ("step_seconds", "data_wait", "data_wait_rank", "slowest_rank", "slowest_rank_lag", "memory_gb")
    }
    parts = {part: metrics(folder / "run", f"time/{part}") for part in ("data", "forward", "backward", "optimizer")}
    other = metrics(folder / "run", "time/other")
    for step in range(EVERY, STEPS + 1, EVERY):
        seconds = told["step_seconds"][step]
        assert sum(part[step] for part in parts.values()) + other[step] == pytest.approx(seconds, rel=0.05)
        assert sum(WAITS) / 2 <= parts["data"][step] < sum(WAITS) / 2 + 0.03
        in_engine = sum(parts[part][step] for part in ("forward", "backward", "optimizer"))
        clocked = [seen["seconds"] for rank in ranks for seen in rank["steps"][step - EVERY : step]]
        assert 0.7 * sum(clocked) / len(clocked) < in_engine <= sum(clocked) / len(clocked)
        assert all(part[step] > 0 for part in parts.values())
        assert WAITS[1] <= told["data_wait"][step] * seconds < WAITS[1] + 0.03
        assert (told["data_wait_rank"][step], told["slowest_rank"][step]) == (1, 1)
        assert 0.02 < told["slowest_rank_lag"][step] * seconds < 0.08
        largest = max(rank["memory"] for rank in ranks) / 1e9
        assert 0.5 * largest < told["memory_gb"][step] <= largest


def test_each_rank_tells_its_own_wait_for_data_in_its_log(ranks: list[dict[str, Any]], folder: Path) -> None:
    for rank, wait in enumerate(WAITS):
        said = (folder / "run" / "logs" / f"rank_{rank:05d}.log").read_text()
        waits = [float(seconds) for seconds in re.findall(r"waited for data for (\S+) of", said)]
        assert len(waits) == STEPS // EVERY
        assert all(EVERY * wait <= waited < EVERY * (wait + 0.03) for waited in waits)
