"""One rank of benchmarks/engine.py, which starts it: `launch/local.sh benchmarks/engine_rank.py TASK.json`.

Trains the task's systems in turn, on the same batches with the same masks from the same weights. Rank 0 writes a line
of JSON for each system and round, and a last one about memory, to the task's `out`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from mlm_dist import masking, metrics, optim, stream, vocab, world
from mlm_dist.batch_size import BatchConfig
from mlm_dist.encoder import Encoder, EncoderConfig
from mlm_dist.engine import Engine, forward_sums
from mlm_dist.engine_config import EngineConfig, resolve_precision
from mlm_dist.manifest import load_manifest
from mlm_dist.masking import MaskingConfig
from mlm_dist.mlm import MLM
from mlm_dist.optim import OptimConfig
from mlm_dist.pace import PARTS, Stopwatch
from mlm_dist.schema import ConfigError
from mlm_dist.stream import Batch, DataConfig
from mlm_dist.world import World

SEED, LR, CLIP = 0, 5e-4, 1.0
TIMEOUT_SECONDS = 600
# of random ids: as our tokenizers have them
PAD, CLS, MASK, SPECIAL = 0, 2, 4, 5
DOCUMENT_TOKENS = 300


@dataclass(frozen=True)
class Task:
    out: str  # where the results go
    shards: str | None  # a folder, or none: random ids
    systems: list[str]
    rounds: int  # in which the systems take turns
    steps: int  # of each system in a round
    warm_steps: int  # of each system before the first round
    rows: int  # of a rank in a step
    micro_rows: int
    row_tokens: int
    vocab_size: int  # of random ids
    mask_rate: float
    encoder: dict[str, Any]

    @property
    def masking(self) -> MaskingConfig:
        return MaskingConfig(rate=self.mask_rate)

    def batch(self, here: World) -> BatchConfig:
        return BatchConfig(self.row_tokens, self.rows * here.size, self.micro_rows)


# ---- the work


class Work:
    """What all systems train on: this rank's micro-batches of each step, and its targets over all ranks."""

    def __init__(self, task: Task, here: World) -> None:
        self.task, self.here = task, here
        count = task.warm_steps + task.rounds * task.steps
        if task.shards is None:
            self.vocab_size, self.keywords = task.vocab_size, keywords_for_random_ids(task)
            draw = np.random.default_rng((SEED, here.rank))
            batches = [random_batch(draw, task) for _ in range(count * task.rows // task.micro_rows)]
        else:
            tokenizer = vocab.load(Path(task.shards) / "tokenizer")
            self.vocab_size, self.keywords = tokenizer.size, masking.mlm_keywords(task.masking, tokenizer)
            data = DataConfig(shards=task.shards, workers=0)
            manifest = load_manifest(Path(task.shards) / "train")
            batch = task.batch(here)
            with stream.train_batches(manifest, tokenizer, data, batch, SEED, here.rank, here.size) as drawn:
                batches = [next(drawn) for _ in range(count * task.rows // task.micro_rows)]
        a_step = task.rows // task.micro_rows
        self.steps = [batches[first : first + a_step] for first in range(0, len(batches), a_step)]
        counted = [sum(int(masking.targets_of(b.maskable, task.mask_rate).sum()) for b in step) for step in self.steps]
        self.targets = here.sum(torch.tensor(counted)).tolist()
        self.tokens = here.sum(torch.tensor([sum(b.tokens for b in step) for step in self.steps])).tolist()

    def model(self) -> MLM:
        world.seed_everything(SEED)
        shape = EncoderConfig(max_positions=self.task.row_tokens, **self.task.encoder)
        return MLM(Encoder(shape, self.vocab_size), **self.keywords)


def keywords_for_random_ids(task: Task) -> dict[str, Any]:
    return {
        "mask_prob": task.mask_rate, "replace_prob": 8 / 9, "random_token_prob": 0.1, "num_tokens": task.vocab_size,
        "mask_token_id": MASK, "pad_token_id": PAD, "mask_ignore_token_ids": range(SPECIAL),
    }  # fmt: skip


def random_batch(draw: np.random.Generator, task: Task) -> Batch:
    """Random ids in full rows, of documents of random lengths."""
    shape = task.micro_rows, task.row_tokens
    begins = draw.random(shape) < 1 / DOCUMENT_TOKENS
    begins[:, 0] = True
    ids = np.where(begins, CLS, draw.integers(SPECIAL, task.vocab_size, shape)).astype(np.int32)
    tokens = torch.full(shape[:1], task.row_tokens, dtype=torch.int32)
    return Batch(
        ids=torch.from_numpy(ids),
        segments=torch.from_numpy(begins.cumsum(axis=1).astype(np.int16)),
        maskable=torch.from_numpy((~begins).sum(axis=1, dtype=np.int32)),
        row_keys=torch.from_numpy(draw.integers(2**62, size=shape[0])),
        sources=torch.zeros(shape[0], dtype=torch.int16),
        stand=None,
        row_tokens=tokens,
        tokens=ids.size,
        text=int((~begins).sum()),
        documents=int(begins.sum()),
        opened=ids.size,
    )


# ---- the systems


class Plain:
    """The same model and optimizer in torch's own DistributedDataParallel, as a user's loop would have it."""

    def __init__(self, model: MLM, here: World) -> None:
        self.here = here
        devices = [here.device] if here.device.type == "cuda" else None
        self.model = DistributedDataParallel(model.to(here.device), device_ids=devices)
        self.optimizer = optim.build(OptimConfig(lr=LR), model)
        self.watches = {part: Stopwatch(here.device) for part in PARTS}

    def train_step(self, batches: Sequence[Batch], targets: int, step: int, rate: float) -> torch.Tensor:
        """The sum of this rank's losses."""
        scale, total = self.here.size / targets, torch.zeros((), device=self.here.device)
        for micro_step, batch in enumerate(batches):
            last = micro_step + 1 == len(batches)
            with nullcontext() if last else self.model.no_sync():
                with self.watches["forward"].lap():
                    rows = len(batch.ids)
                    keys = masking.row_keys_by_rank(SEED, self.here.rank, step, micro_step, rows, self.here.device)
                    loss = forward_sums(self.model, batch, keys, rate, self.here.device)["loss"]
                with self.watches["backward"].lap():
                    (loss * scale).backward()
                total += loss.detach()
        with self.watches["optimizer"].lap():
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return total

    def seconds(self) -> dict[str, float]:
        return {part: watch.read() for part, watch in self.watches.items()}


class Ours(Engine):
    """The engine of mlm_dist."""

    def train_step(self, batches: Sequence[Batch], targets: int, step: int, rate: float) -> torch.Tensor:
        return super().train_step(batches, targets, step, LR, rate).loss


def build(name: str, work: Work) -> Plain | Ours:
    """Raises ConfigError for a system that the device's precision rules out."""
    task, here = work.task, work.here
    if name == "ddp":
        precision = resolve_precision(EngineConfig(), here.device)
        if precision != "fp32":
            raise ConfigError(f"plain DDP has no fp32 weights beside {precision} ones: nothing to compare with")
        return Plain(work.model(), here)
    config = EngineConfig(zero_stage=int(name.removeprefix("zero")), clip=CLIP)
    optimizer = OptimConfig(lr=LR)
    return Ours(work.model(), config, optimizer, task.batch(here), task.masking, SEED, here, {})


# ---- the measurement


def measure(task: Task, here: World) -> list[dict[str, Any]]:
    work = Work(task, here)
    before = memory_now(here)
    lines, systems = [], {}
    for name in task.systems:
        try:
            systems[name] = build(name, work)
        except ConfigError as error:
            lines.append({"system": name, "skipped": str(error)})
    for name in systems:
        train(systems[name], work, range(task.warm_steps))
    for number in range(task.rounds):
        first = task.warm_steps + number * task.steps
        names = list(systems)
        for name in names[number % len(names) :] + names[: number % len(names)]:  # each begins with another
            result = train(systems[name], work, range(first, first + task.steps))
            lines.append({"system": name, "round": number + 1, **result})
    peaks = here.gather(metrics.peak_memory(here.device) - before)
    return [*lines, {"peak_mb": [round(peak / 1e6, 1) for peak in peaks]}]


def train(system: Plain | Ours, work: Work, steps: range) -> dict[str, float]:
    """Seconds a step of the slowest rank, and of the parts on this one; tokens a second of all ranks; the mean loss."""
    here, rate = work.here, work.task.mask_rate
    system.seconds()
    here.barrier()
    started = time.perf_counter()
    losses = [system.train_step(work.steps[step], work.targets[step], step, rate) for step in steps]
    if here.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = here.max(torch.tensor(time.perf_counter() - started, dtype=torch.float64)).item()
    parts = {part: round(taken / len(steps), 5) for part, taken in system.seconds().items() if part != "data"}
    loss = here.sum(torch.stack(losses).sum().double().cpu()).item() / sum(work.targets[step] for step in steps)
    tokens = sum(work.tokens[step] for step in steps)
    return {
        "step_seconds": round(seconds / len(steps), 5),
        **{f"{part}_seconds": taken for part, taken in parts.items()},
        "tokens_per_second": round(tokens / seconds, 1),
        "loss": round(loss, 5),
    }


def memory_now(here: World) -> int:
    """Bytes that this rank takes."""
    if here.device.type == "cuda":
        return torch.cuda.memory_allocated(here.device)
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    task = Task(**json.loads(parser.parse_args().task.read_text()))
    with world.join(TIMEOUT_SECONDS) as here:
        lines = measure(task, here)
        if here.is_main:
            Path(task.out).write_text("".join(json.dumps(line) + "\n" for line in lines))
        here.barrier()
    os._exit(0)  # past gloo's threads


if __name__ == "__main__":
    main()
