"""What a save costs a run: `python benchmarks/checkpoint.py`.

Trains an encoder of 20M parameters on two CPU ranks, through launch/local.sh, and saves every few steps: in turn with
`checkpoint.background` and without. Prints one line of JSON for each, all medians: seconds that training stands still
at a save, seconds until the checkpoint is complete, its size, and seconds a step, of those that run beside a write and
of those that don't.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mlm_dist import shards, vocab  # noqa: E402
from mlm_dist.shards import Record  # noqa: E402

RANKS = 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--launches", type=int, default=2, help="of each kind, in turn (default: 2)")
    add("--saves", type=int, default=4, help="in each launch, of which training goes on after (default: 4)")
    add("--every-steps", type=int, default=8, help="steps between two saves (default: 8)")
    add("--layers", type=int, default=9, help="of the encoder (default: 9, with --width 512 20M parameters)")
    add("--width", type=int, default=512, help="of the encoder (default: 512)")
    add("--zero-stage", type=int, default=1)
    add("--scratch", type=Path, help="a folder for shards and checkpoints, on the disk in question (default: /tmp)")
    return parser.parse_args(argv)


def make_shards(folder: Path) -> None:
    """Random words, enough of them for a few steps."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(500)]
    texts = [" ".join(draw.choices(words, k=60)) for _ in range(800)]
    tokenizer = vocab.train(texts, 1000)
    tokenizer.save(folder / "tokenizer")
    records = [
        Record(np.array(ids, np.uint16), np.array([len(ids)], np.uint32)) for ids in tokenizer.encode_batch(texts)
    ]
    shards.write_split(folder / "train", [records[i::4] for i in range(4)], tokenizer.size, tokenizer.fingerprint)


def launch(args: argparse.Namespace, folder: Path, run: Path, background: bool) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of one launch."""
    overrides = [
        f"data.shards={folder / 'shards'}", f"run.dir={run}", f"run.steps={args.saves * args.every_steps + 1}",
        "batch.seq_len=64", "batch.global_rows=4", "batch.micro_rows=2", "data.workers=0",
        f"model.encoder.layers={args.layers}", f"model.encoder.width={args.width}",
        f"model.encoder.mlp_width={args.width * 3 // 2}", f"engine.zero_stage={args.zero_stage}",
        "optim.name=adamw", "schedule.warmup_steps=2", "log.every_steps=1", "log.wandb=off", "checkpoint.keep_last=1",
        f"checkpoint.every_steps={args.every_steps}", f"checkpoint.background={str(background).lower()}",
    ]  # fmt: skip
    settings = {"DS_ACCELERATOR": "cpu", "CPU_RANKS": str(RANKS), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    done = subprocess.run(
        ["launch/local.sh", "launch/pretrain.py", "--config", "configs/quickstart.yaml", *overrides],
        cwd=ROOT, env=os.environ | settings, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"error: the run ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def measure(lines: list[dict[str, Any]]) -> tuple[list[dict[str, float]], list[float], list[float]]:
    """The saves that training went on after, seconds of each step beside a write, and of each other one."""
    saves = [line for line in lines if "checkpoint/seconds" in line]
    steps = [line for line in lines if "step_seconds" in line]
    last = steps[-1]["step"]
    saves = [save for save in saves if save["step"] != last]
    begun = [save["time"] - save["checkpoint/seconds"] + save["checkpoint/stall_seconds"] for save in saves]
    written = list(zip(begun, (save["time"] for save in saves), strict=True))
    beside, alone = [], []
    for step in steps[3:]:  # the first ones allocate memory
        end, begin = step["time"], step["time"] - step["step_seconds"]
        if any(begin < until and since < end for since, until in written if until > since + 1e-3):
            beside.append(step["step_seconds"])
        else:
            alone.append(step["step_seconds"])
    return saves, beside, alone


def median(values: list[float]) -> float | None:
    return round(statistics.median(values), 4) if values else None


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    found: dict[bool, list[tuple]] = {True: [], False: []}
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=args.scratch) as name:
        folder = Path(name)
        make_shards(folder / "shards")
        for number in range(args.launches):
            for background in (True, False):
                lines = launch(args, folder, folder / f"{number}-{background}", background)
                found[background].append(measure(lines))
    for background, launches in found.items():
        saves = [save for saved, _, _ in launches for save in saved]
        result = {
            "benchmark": "checkpoint",
            "background": background,
            "stall_seconds": median([save["checkpoint/stall_seconds"] for save in saves]),
            "longest_stall_seconds": round(max(save["checkpoint/stall_seconds"] for save in saves), 4),
            "complete_after_seconds": median([save["checkpoint/seconds"] for save in saves]),
            "megabytes": median([save["checkpoint/megabytes"] for save in saves]),
            "saves": len(saves),
            "step_seconds": median([seconds for *_, alone in launches for seconds in alone]),
            "step_seconds_beside_a_write": median([seconds for _, beside, _ in launches for seconds in beside]),
            "steps_beside_a_write": sum(len(beside) for _, beside, _ in launches),
            "ranks": RANKS,
            "zero_stage": args.zero_stage,
            "device": platform.processor() or "cpu",
            "cores": len(os.sched_getaffinity(0)),
            "load": round(os.getloadavg()[0], 1),
            "torch": torch.__version__,
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
