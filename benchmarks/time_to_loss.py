"""Held-out loss against tokens and seconds, beside ModernBERT with AdamW in transformers' Trainer:

    python benchmarks/time_to_loss.py --text TRAIN.jsonl.gz --valid-text VALID.jsonl.gz --peers build/bench/bin/python

The same text, tokenizer, shape of model, batch, mask rate and number of ranks, one thread each, on CPU in fp32; the
peer at several learning rates, of which the best counts, mlm_dist on a share of its tokens. Held-out loss is that of
launch/evaluate.py for both: 15 % of the tokens, with masks that never change. A run that is over stands in
OUT/results.jsonl; started again, the benchmark goes on with those that are missing. Then it prints a table and, where
matplotlib is there, draws OUT/time_to_loss.png.

seconds  of training alone: without the start, evaluations and checkpoints
reached  the share of the peer's tokens and seconds after which mlm_dist's held-out loss was the peer's last one
"""

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # here too, where the peer's weights are evaluated

from benchmarks.common import ON_CPU, Failed, add_shape, machine, run, shape_of, unless_given  # noqa: E402
from benchmarks.loader_data import dump_documents  # noqa: E402
from mlm_dist import assembly, config, mixture, models, stream, vocab, world  # noqa: E402
from mlm_dist.encoder import padded  # noqa: E402
from mlm_dist.engine import held_out_pass  # noqa: E402
from mlm_dist.evaluate import evaluate  # noqa: E402
from mlm_dist.manifest import load_manifest  # noqa: E402

OURS, PEER = "mlm_dist", "ModernBERT, AdamW, Trainer"
RECIPE = (
    "optim.name=muon", "optim.lr=8e-3", "optim.muon.lr_factor=2", "optim.beta2=0.98", "optim.eps=1e-6",
    "schedule.name=linear", "engine.zero_stage=1",
)  # fmt: skip
BUDGET = ("steps", "ranks", "rows", "row_tokens", "layers", "width", "rows_held_out")
POINT = ("step", "tokens", "seconds", "loss")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, nargs="+", required=True, help="whatever shards/build.py takes as --input")
    add("--valid-text", type=Path, nargs="+", required=True, help="what the held-out loss is of")
    add("--peers", type=Path, help="the python of an environment with benchmarks/requirements-throughput.txt")
    add("--out", type=Path, default=Path("build/time-to-loss"), help="shards, results, plot (default: %(default)s)")
    add("--tokens", type=int, default=1_000_000, help="of each of the peer's runs (default: 1,000,000)")
    add("--share", type=float, default=0.5, help="of these tokens that mlm_dist is trained on (default: 0.5)")
    add("--points", type=int, default=16, help="at which the held-out loss is measured (default: 16)")
    add("--rows-held-out", type=int, default=256, help="that it is measured on (default: 256)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help="of the peer")
    add("--set", nargs="+", default=list(RECIPE), help="of mlm_dist, key=value (default: %(default)s)")
    add_shape(parser)
    parser.set_defaults(rows=8, layers=4)  # 4.4M parameters
    args = parser.parse_args(argv)
    rows = args.ranks * args.rows * args.row_tokens
    args.every_steps = max(1, args.tokens // rows // args.points)
    args.steps = args.every_steps * args.points
    args.own_steps = args.every_steps * max(1, round(args.points * args.share))
    args.warmup_steps = max(1, args.steps // 20)
    return args


class Work:
    """What both train on and with."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.shards, self.documents = args, args.out / "shards", args.out / "documents"
        if not (self.shards / "valid" / "manifest.json").exists():
            options = ["--input", *args.text, "--valid-input", *args.valid_text, "--out", self.shards]
            run([sys.executable, "shards/build.py", *options, "--tokenizer", f"train:{args.vocab_size}"], {})
        if not self.documents.exists():
            dump_documents(load_manifest(self.shards / "train"), self.documents)
        self.vocab, self.shape = vocab.load(self.shards / "tokenizer"), shape_of(args)

    def overrides(self, seed: int, folder: Path) -> list[str]:
        """The run of mlm_dist."""
        args = self.args
        usual = [
            f"run.dir={folder}", f"run.steps={args.own_steps}", f"run.seed={seed}",
            f"data.shards={self.shards.resolve()}", "data.workers=0", f"batch.seq_len={args.row_tokens}",
            f"batch.global_rows={args.ranks * args.rows}", f"batch.micro_rows={args.rows}",
            f"masking.rate={args.mask_rate}", f"schedule.warmup_steps={args.warmup_steps}",
            *(f"model.encoder.{name}={getattr(self.shape, name)}"
              for name in ("layers", "width", "heads", "mlp_width", "max_positions")),
            f"log.every_steps={args.every_steps}", "log.wandb=off", f"evaluate.every_steps={args.every_steps}",
            f"evaluate.max_rows={args.rows_held_out}", "evaluate.predictions=0",
            f"checkpoint.every_steps={args.own_steps}",
        ]  # fmt: skip
        return unless_given(usual, args.set)

    def task(self, seed: int, lr: float, scratch: Path) -> dict[str, Any]:
        """What the peer's script is told."""
        names = ("ranks", "steps", "every_steps", "warmup_steps", "row_tokens", "rows", "layers", "width", "heads")
        return {name: getattr(self.args, name) for name in (*names, "mlp_width", "mask_rate")} | {
            "model": "modernbert-sparse", "seed": seed, "lr": lr, "micro_rows": self.args.rows,
            "scratch": str(scratch), "weights": str(scratch), "documents": str(self.documents.resolve()),
            "tokenizer": str((self.shards / "tokenizer").resolve()), "vocab_rows": padded(self.vocab.size),
            "pad_id": self.vocab.pad_id, "cls_id": self.vocab.cls_id, "sep_id": self.vocab.sep_id,
            "global_every": self.shape.global_every, "window": self.shape.window,
        }  # fmt: skip


# ---- the two: each trains once and returns its points


def train_ours(work: Work, seed: int, scratch: Path) -> list[dict[str, float]]:
    settings = ON_CPU | {"CPU_RANKS": str(work.args.ranks), "PYTHON": sys.executable}
    overrides = work.overrides(seed, scratch / "run")
    run(["launch/local.sh", "launch/pretrain.py", "--config", "configs/base.yaml", *overrides], settings)
    lines = [json.loads(line) for line in (scratch / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["valid/loss"] for line in lines if "valid/loss" in line}
    points, seconds = [], 0.0
    for line in (line for line in lines if "step_seconds" in line):
        seconds += line["step_seconds"] * work.args.every_steps
        points.append(point(work, line["step"], seconds, losses[line["step"]]))
    return points


def train_peer(work: Work, seed: int, lr: float, scratch: Path) -> list[dict[str, float]]:
    task = scratch / "task.json"
    task.write_text(json.dumps(work.task(seed, lr, scratch)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", work.args.ranks, "--master-port", port]
    script = ROOT / "benchmarks" / "peers" / "learn_modernbert.py"
    out = run([work.args.peers, *launcher, script, task], ON_CPU)
    found = next(json.loads(line)["points"] for line in out.splitlines() if line.startswith('{"points"'))
    cfg = config.load(ROOT / "configs" / "base.yaml", work.overrides(seed, scratch / "run"))
    return [
        point(work, each["step"], each["seconds"], held_out_loss(cfg, scratch / f"{each['step']}.pt")) for each in found
    ]


def point(work: Work, step: int, seconds: float, loss: float) -> dict[str, float]:
    tokens = step * work.args.ranks * work.args.rows * work.args.row_tokens
    return dict(zip(POINT, (step, tokens, round(seconds, 2), round(loss, 5)), strict=True))


def held_out_loss(cfg: config.RunConfig, weights: Path) -> float:
    """Of transformers' ModernBERT, whose parameters have the names and shapes of our encoder's."""
    _, valid, tokenizer = assembly.open_data(cfg, 1)
    model = assembly.objective(cfg, models.build(cfg.model, tokenizer.size, cfg.batch.seq_len, tokenizer), tokenizer)
    model.transformer.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    with world.join(600) as here:
        batches = stream.held_out_batches(valid, tokenizer, cfg.data, cfg.batch, 0, 1, cfg.evaluate.max_rows)

        def step(batch: stream.Batch) -> dict[str, torch.Tensor]:
            return held_out_pass(model, batch, cfg.evaluate.rate, cfg.evaluate.seed, here.device)

        return evaluate(step, batches, here, tokenizer, mixture.named(valid))["loss"]


# ---- what came of it


def reached(points: Sequence[dict[str, float]], loss: float, by: str) -> float | None:
    """The tokens or seconds after which a run's held-out loss was `loss`, between two points on a straight line."""
    for before, after in pairwise(points):
        if after["loss"] <= loss < before["loss"]:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before[by] + share * (after[by] - before[by])
    return points[0][by] if points[0]["loss"] <= loss else None


def summarise(results: Sequence[dict[str, Any]], ours: str) -> list[dict[str, Any]]:
    """For each seed: the peer at the learning rate that is best on average, and when mlm_dist was as good."""
    last: dict[str, list[float]] = {}
    for result in results:
        if result["system"] == PEER:
            last.setdefault(result["settings"], []).append(result["points"][-1]["loss"])
    if not last:
        return []
    best = min(last, key=lambda settings: statistics.fmean(last[settings]))
    lines = []
    for peer in (each for each in results if each["settings"] == best and each["system"] == PEER):
        for own in (each for each in results if each["settings"] == ours and each["seed"] == peer["seed"]):
            end, line = peer["points"][-1], {"seed": peer["seed"], "peer": best, "ours": ours}
            line |= {"peer_loss": end["loss"], "loss": own["points"][-1]["loss"]}
            for by in ("tokens", "seconds"):
                at = reached(own["points"], end["loss"], by)
                line[by] = None if at is None else round(at / end[by], 3)
            lines.append(line)
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """As Markdown, a line a seed."""

    def percent(share: float | None) -> str:
        return "never" if share is None else f"{share:.0%}"

    head = "| seed | peer's best | its last loss | mlm_dist's last loss | reached with of its tokens | of its seconds |"
    rows = [
        f"| {line['seed']} | {line['peer']} | {line['peer_loss']:.3f} | {line['loss']:.3f} | {percent(line['tokens'])} "
        f"| {percent(line['seconds'])} |"
        for line in lines
    ]
    return "\n".join([head, "|---" * 6 + "|", *rows])


def draw(results: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    shown = {(PEER, line["peer"]) for line in lines} | {(OURS, line["ours"]) for line in lines}
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axis, by in zip(figure.subplots(1, 2, sharey=True), ("tokens", "seconds"), strict=True):
        for result in (each for each in results if (each["system"], each["settings"]) in shown):
            x, y = zip(*((each[by], each["loss"]) for each in result["points"]), strict=True)
            color = "tab:blue" if result["system"] == OURS else "tab:orange"
            axis.plot(x, y, color=color, label=result["system"] if result["seed"] == lines[0]["seed"] else None)
        axis.set(xlabel=by, ylabel="held-out loss, 15 % masked" if by == "tokens" else None)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        work = Work(args)
    except Failed as error:
        sys.exit(f"error: no shards were made of the text: {error}")
    path, ours = args.out / "results.jsonl", " ".join([*args.set, f"run.steps={args.own_steps}"])
    budget = {name: getattr(args, name) for name in BUDGET}
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    results = [result for result in results if result["budget"] == budget]
    runs = [(OURS, ours, seed, None) for seed in args.seeds]
    runs += [(PEER, f"lr={lr:g}", seed, lr) for lr in args.lrs for seed in args.seeds if args.peers]
    for system, settings, seed, lr in runs:
        if any((each["system"], each["settings"], each["seed"]) == (system, settings, seed) for each in results):
            continue
        result = {"system": system, "settings": settings, "seed": seed, "budget": budget, **machine()}
        with tempfile.TemporaryDirectory(dir=args.out) as scratch:
            try:
                own = lr is None
                points = train_ours(work, seed, Path(scratch)) if own else train_peer(work, seed, lr, Path(scratch))
            except (Failed, OSError) as error:
                sys.exit(f"error: {system} ({settings}, seed {seed}) did not train: {error}")
        results.append(result | {"points": points})
        with path.open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
        print(f"{system}, {settings}, seed {seed}: held-out loss {points[-1]['loss']:.4f}", file=sys.stderr, flush=True)
    lines = summarise(results, ours)
    for line in lines:
        print(json.dumps({"benchmark": "time_to_loss", **line}))
    if lines:
        print(table(lines))
        draw(results, lines, args.out / "time_to_loss.png")


if __name__ == "__main__":
    main()
