"""Tokens a second of training, beside others on the same work:

    python benchmarks/throughput.py --text TEXT.jsonl.gz --peers build/bench/bin/python

Builds shards of the text in a temporary folder and trains each system in turn, `--rounds` times: the same text,
tokenizer, shape of model, rows a step and a micro-batch, number of ranks, one thread each, on CPU in fp32. Prints a
line of JSON for each system and round, then one for each system with its median, and a table on stderr.

tokens_per_second  of all ranks, positions that are not padding, over the steps after the first quarter: by the wall
                   clock, with all that a step takes: loader, masks, engine, logging, W&B (offline)
loss               mean training loss of the last quarter of the steps
limit              what the machine's matrix products at the encoder's shapes would allow, counting only the
                   arithmetic that the objective needs (benchmarks/products.py)
"""

import argparse
import json
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import ON_CPU, Failed, add_shape, build_shards, machine, run, shape_of  # noqa: E402
from benchmarks.loader_data import dump_documents  # noqa: E402
from benchmarks.products import products_of, seconds_of  # noqa: E402
from mlm_dist import models, vocab  # noqa: E402
from mlm_dist.encoder import padded  # noqa: E402
from mlm_dist.manifest import load_manifest  # noqa: E402
from mlm_dist.models import ModelConfig  # noqa: E402

SEED = 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, nargs="+", required=True, help="whatever shards/build.py takes as --input")
    add("--peers", type=Path, help="the python of an environment with benchmarks/requirements-throughput.txt")
    add("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="what to measure (default: all)")
    add("--rounds", type=int, default=2, help="in which all systems take turns (default: 2)")
    add("--steps", type=int, default=16, help="of each system in each round, a multiple of 4 (default: 16)")
    add_shape(parser)
    parser.set_defaults(rows=64)
    add("--micro-rows", type=int, default=16, help="of a rank at a time (default: 16)")
    add("--lr", type=float, default=1e-3, help="after a warm-up of a tenth of the steps (default: 1e-3)")
    add("--zero-stage", type=int, default=0, help="of mlm_dist (default: 0)")
    add("--repeats", type=int, default=5, help="of the products, in each round (default: 5)")
    args = parser.parse_args(argv)
    if args.steps < 4 or args.steps % 4:
        parser.error("--steps must be a multiple of 4: speed leaves out a quarter, the loss is of another")
    if args.rows % args.micro_rows:
        parser.error("--rows must be a multiple of --micro-rows")
    return args


# ---- the work


class Work:
    """What all systems train on and with."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.shards = args, folder, folder / "shards"
        build_shards(args, self.shards)
        self.manifest = load_manifest(self.shards / "train")
        self.vocab = vocab.load(self.shards / "tokenizer")
        self.shape = shape_of(args)
        with torch.device("meta"):
            model = models.build(ModelConfig(encoder=self.shape), self.vocab.size, args.row_tokens)
        self.parameters = models.count_parameters(model)
        self.warm_steps, self.warmup_steps = args.steps // 4, args.steps // 10

    def task(self, model: str, scratch: Path) -> dict[str, Any]:
        """What a peer's script is told."""
        documents = self.folder / "documents"
        if not documents.exists():
            dump_documents(self.manifest, documents)
        names = ("ranks", "steps", "row_tokens", "rows", "micro_rows", "layers", "width", "heads", "mlp_width")
        return {name: getattr(self.args, name) for name in names} | {
            "model": model, "seed": SEED, "mask_rate": self.args.mask_rate, "lr": self.args.lr,
            "scratch": str(scratch), "documents": str(documents),
            "tokenizer": str(self.shards / "tokenizer"), "vocab_size": self.vocab.size,
            "vocab_rows": padded(self.vocab.size), "pad_id": self.vocab.pad_id, "cls_id": self.vocab.cls_id,
            "sep_id": self.vocab.sep_id, "mask_id": self.vocab.mask_id, "global_every": self.shape.global_every,
            "window": self.shape.window, "warm_steps": self.warm_steps, "warmup_steps": self.warmup_steps,
        }  # fmt: skip


# ---- the systems: each trains once and returns its figures


def train_mlm_dist(work: Work, scratch: Path) -> dict[str, Any]:
    """`launch/local.sh launch/pretrain.py` as users run it; what it logs are the figures."""
    args, never, quarter = work.args, 10 * work.args.steps, work.args.steps // 4
    overrides = [
        f"run.dir={scratch / 'run'}", f"run.steps={args.steps}", f"run.seed={SEED}",
        # in the training process, as configs/quickstart.yaml has it: no core is free for a loader of its own
        f"data.shards={work.shards}", "data.workers=0",
        f"batch.seq_len={args.row_tokens}", f"batch.global_rows={args.ranks * args.rows}",
        f"batch.micro_rows={args.micro_rows}", f"masking.rate={args.mask_rate}", f"engine.zero_stage={args.zero_stage}",
        f"optim.lr={args.lr}", "schedule.name=constant", f"schedule.warmup_steps={work.warmup_steps}",
        *(f"model.encoder.{name}={getattr(work.shape, name)}"
          for name in ("layers", "width", "heads", "mlp_width", "max_positions")),
        f"log.every_steps={quarter}", "log.wandb=offline",
        # both come after the last step, and are not measured
        f"checkpoint.every_steps={never}", f"evaluate.every_steps={never}", "evaluate.max_rows=32",
    ]  # fmt: skip
    settings = ON_CPU | {"CPU_RANKS": str(args.ranks), "PYTHON": sys.executable}
    run(["launch/local.sh", "launch/pretrain.py", "--config", "configs/base.yaml", *overrides], settings)
    written = (scratch / "run" / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, written) if "loss" in line]
    assert [line["step"] for line in lines] == [quarter * n for n in (1, 2, 3, 4)]
    # by the moments at which the lines were written, so that nothing that happens between them is left out
    seconds = lines[-1]["time"] - lines[0]["time"]
    measured = lines[1:]
    mean = {name: round(statistics.fmean(line[name] for line in measured), 5) for name in measured[0]
            if name in ("mfu", "data_wait", "packing", "mask_rate") or name.startswith("time/")}  # fmt: skip
    return {
        "tokens_per_second": round((lines[-1]["tokens"] - lines[0]["tokens"]) / seconds, 1),
        "step_seconds": round(seconds / (args.steps - work.warm_steps), 4),
        "loss": round(lines[-1]["loss"], 4),
        "parameters": work.parameters,
        "steps": args.steps,
        **mean,
        "versions": {"torch": torch.__version__},
    }


def peer(script: str, model: str = "") -> Callable[[Work, Path], dict[str, Any]]:
    """A script of benchmarks/peers, in its own environment."""

    def train(work: Work, scratch: Path) -> dict[str, Any]:
        task = scratch / "task.json"
        task.write_text(json.dumps(work.task(model, scratch)))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", work.args.ranks, "--master-port", port]
        try:
            out = run([work.args.peers, *launcher, ROOT / "benchmarks" / "peers" / script, task], ON_CPU)
        except OSError as error:
            raise Failed(str(error)) from error
        return next(json.loads(line) for line in out.splitlines() if line.startswith('{"tokens_per_second"'))

    return train


def measure_limit(work: Work, scratch: Path) -> dict[str, Any]:
    """The tokens a second at which matrix products alone would do the objective's arithmetic."""
    args = work.args
    products = products_of(work.shape, work.vocab.size, args.micro_rows, args.row_tokens, args.mask_rate)
    seconds = seconds_of(args.ranks, products, args.repeats)
    return {
        "tokens_per_second": round(args.ranks * args.micro_rows * args.row_tokens / seconds, 1),
        "gflops": round(args.ranks * sum(product.flops for product in products) / seconds / 1e9, 2),
    }


SYSTEMS: dict[str, tuple[str, Callable[[Work, Path], dict[str, Any]]]] = {
    "mlm_dist": ("mlm_dist", train_mlm_dist),
    "bert": ("transformers Trainer, BertForMaskedLM", peer("train_trainer.py", "bert")),
    "modernbert": ("transformers Trainer, ModernBertForMaskedLM", peer("train_trainer.py", "modernbert")),
    "modernbert-sparse": (
        "transformers Trainer, ModernBertForMaskedLM, sparse_prediction",
        peer("train_trainer.py", "modernbert-sparse"),
    ),
    "mlm-pytorch": ("mlm-pytorch, x-transformers, DDP", peer("train_mlm_pytorch.py")),
    "limit": ("limit", measure_limit),
}
OWN = ("mlm_dist", "limit")  # need no other environment


# ---- what is said


def say(**result: Any) -> None:
    print(json.dumps({"benchmark": "throughput", **result}), flush=True)


def summarise(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A line for each system that has figures, medians over the rounds."""
    medians = {
        name: {key: statistics.median(result[key] for result in results)
               for key in ("tokens_per_second", "loss", "parameters") if key in results[0]}
        for name, results in found.items() if results
    }  # fmt: skip
    ours = medians.get("mlm_dist", {}).get("tokens_per_second")
    lines = []
    for name, median in medians.items():
        line = {"system": SYSTEMS[name][0], "summary": True, "rounds": len(found[name]), **median}
        if ours and name != "mlm_dist":
            line["mlm_dist_over_it"] = round(ours / median["tokens_per_second"], 3)
        if name == "mlm_dist" and "limit" in medians:
            line["share_of_limit"] = round(ours / medians["limit"]["tokens_per_second"], 3)
        lines.append(line)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    width = max(len(line["system"]) for line in lines)
    rows = [f"{'':{width}}  {'tokens/s':>9}  {'mlm_dist over it':>16}  {'loss':>7}  {'parameters':>10}"]
    for line in lines:
        ratio, loss, parameters = (line.get(name) for name in ("mlm_dist_over_it", "loss", "parameters"))
        rows.append(
            f"{line['system']:{width}}  {line['tokens_per_second']:9,.0f}  {f'{ratio:.2f}' if ratio else '':>16}  "
            f"{f'{loss:.3f}' if loss else '':>7}  {f'{parameters:,.0f}' if parameters else '':>10}"
        )
        if "share_of_limit" in line:
            rows[-1] += f"  {100 * line['share_of_limit']:.1f} % of the limit"
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    names = [name for name in SYSTEMS if name in args.only and (args.peers or name in OWN)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="throughput-", dir=args.scratch) as folder:
        try:
            work = Work(args, Path(folder))
        except Failed as error:
            sys.exit(f"error: no shards were made of the text: {error}")
        shape = {name: getattr(args, name) for name in ("ranks", "rows", "micro_rows", "row_tokens", "steps", "lr")}
        say(work=shape | vars(work.shape), **machine())
        for number in range(1, args.rounds + 1):
            for name in names:
                said = {"system": SYSTEMS[name][0], "round": number}
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    try:
                        result = SYSTEMS[name][1](work, Path(scratch))
                        found[name].append(result)
                    except Failed as error:
                        result = {"skipped": str(error)}
                say(**said, **result)
    lines = summarise(found)
    for line in lines:
        say(**line)
    if lines:
        print(table(lines), file=sys.stderr)
    if "mlm_dist" in names and not found["mlm_dist"]:
        sys.exit("error: mlm_dist itself did not train; its line says why")


if __name__ == "__main__":
    main()
