"""Training on the GPUs of this machine: tokens a second, and what share that is of their bf16 peak.

python benchmarks/gpu.py                                             # configs/base-150m.yaml on made-up documents
python benchmarks/gpu.py --shards SHARDS engine.compile=false        # real ones; keys of the recipe to change

Starts launch/local.sh launch/pretrain.py as users do, and reads the run's metrics.jsonl. The first report is left out:
compiling and warming up fall in it. Prints one line of JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import Failed, run, unless_given  # noqa: E402
from benchmarks.loader_data import LOG_DEVIATION, LOG_MEAN, RECORD_TOKENS  # noqa: E402
from mlm_dist import shards, vocab  # noqa: E402
from mlm_dist.shards import Record  # noqa: E402

VOCAB_SIZE = 50_368  # ModernBERT's
SHARDS, SHARD_TOKENS = 64, 131_072
REPORTS = 4
NEVER = 10**9  # steps: what comes after the last one, and is not measured
SAID = ("mfu", "step_seconds", "data_wait", "packing")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="configs/base-150m.yaml", help="the recipe (default: %(default)s)")
    add("--shards", type=Path, help="a folder of shards (default: made up, a vocabulary of 50,368)")
    add("--steps", type=int, default=40, help=f"a multiple of {REPORTS} (default: %(default)s)")
    add("--scratch", type=Path, help="a folder for the temporary files (default: the system's)")
    add("overrides", nargs="*", metavar="section.key=value", help="change a key of the recipe")
    args = parser.parse_args(argv)
    if args.steps < REPORTS or args.steps % REPORTS:
        parser.error(f"--steps must be a multiple of {REPORTS}")
    return args


def make_shards(folder: Path, vocab_size: int = VOCAB_SIZE, count: int = SHARDS, tokens: int = SHARD_TOKENS) -> Path:
    """Documents of random ids, with lengths as in text: a mean of some 300 tokens."""
    special = [names[0] for names in vocab.NAMES.values()]
    words = special + [f"w{i}" for i in range(vocab_size - len(special))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    made = vocab.vocab_of(tokenizer, {}, "the made-up tokenizer")
    made.save(folder / "tokenizer")
    draw = np.random.default_rng(0)

    def record() -> Record:
        lengths = []
        while sum(lengths) < RECORD_TOKENS:
            lengths.append(1 + int(draw.lognormal(LOG_MEAN, LOG_DEVIATION)))
        ids = draw.integers(len(special), vocab_size, sum(lengths), dtype=np.uint16)
        return Record(ids, np.array(lengths, np.uint32))

    records = [[record() for _ in range(max(1, tokens // RECORD_TOKENS))] for _ in range(count)]
    shards.write_split(folder / "train", records, made.size, made.fingerprint)
    return folder


def train(args: argparse.Namespace, shards: Path, folder: Path) -> list[dict[str, Any]]:
    """The reports of a short run. Raises Failed."""
    usual = [
        "run.tokens=null", f"data.shards={shards}", "log.wandb=off", f"checkpoint.every_steps={NEVER}",
        f"evaluate.every_steps={NEVER}", "evaluate.max_rows=64", "schedule.name=constant", "schedule.warmup_steps=0",
    ]  # fmt: skip
    # what the figures rest on: given a second time, they are refused
    own = [f"run.dir={folder}", f"run.steps={args.steps}", f"log.every_steps={args.steps // REPORTS}"]
    command = [
        "launch/local.sh",
        "launch/pretrain.py",
        "--config",
        args.config,
        *unless_given(usual, args.overrides),
        *own,
    ]
    run(command, {"PYTHON": sys.executable})
    return [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def figures(reports: Sequence[dict[str, Any]], cards: int) -> dict[str, Any]:
    """What the reports after the first come to, by the moments at which they were written."""
    measured, first, last = reports[1:], reports[0], reports[-1]
    rate = (last["tokens"] - first["tokens"]) / (last["time"] - first["time"])
    names = [name for name in last if name in SAID or name.startswith("time/")]
    return {
        "tokens_per_second": round(rate),
        "tokens_per_second_per_card": round(rate / cards),
        **{name: round(statistics.fmean(report[name] for report in measured), 5) for name in names},
        "memory_gb": max(report["memory_gb"] for report in reports),
        "steps_measured": last["step"] - first["step"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a GPU, and torch finds none here", file=sys.stderr)
        return 2
    cards = torch.cuda.device_count()
    said = {"benchmark": "gpu", "card": torch.cuda.get_device_name(0), "cards": cards, "torch": torch.__version__}
    said |= {"config": args.config, "overrides": args.overrides, "data": str(args.shards or "made up")}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        try:
            reports = train(args, args.shards or make_shards(Path(folder) / "shards"), Path(folder) / "run")
        except Failed as error:
            print(f"the run has no result: {error}", file=sys.stderr)
            return 1
    print(json.dumps(said | figures(reports, cards)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
