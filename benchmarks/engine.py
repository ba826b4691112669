"""What DeepSpeed's ZeRO stages cost a step, beside plain DistributedDataParallel: `python benchmarks/engine.py`.

    python benchmarks/engine.py                 seconds a step, and its parts
    python benchmarks/engine.py --memory        the peak of a rank, by stage, micro-batch and recomputing of layers
    python benchmarks/engine.py --scaling       tokens a second of a rank, by the number of ranks

All systems train in the same processes, turn by turn: the same model in the same MLM wrapper, weights, batches, masks,
optimizer (AdamW, fused) and clipping. On random ids, or on --shards or --text. A CPU rank has one thread, in fp32;
where there are GPUs, they are used. Prints a line of JSON for each system and round (or cell), one for each system
with medians over the rounds, and a table on stderr.

step_seconds   of the slowest rank, from a barrier to the last of the round's steps; the parts are those of rank 0
loss           of the round: the same for all systems, up to rounding
over_ddp       step_seconds over those of DDP: median of the rounds' own ratios
peak_mb        what a rank takes at its most, beyond what it took before there was a model; of CPU ranks the resident
               set, of GPUs what tensors took; the largest of the ranks
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import Failed, add_shape, build_shards, machine, run, shape_of  # noqa: E402

SYSTEMS = {
    "ddp": "DistributedDataParallel",
    "zero0": "mlm_dist, ZeRO 0",
    "zero1": "mlm_dist, ZeRO 1",
    "zero2": "mlm_dist, ZeRO 2",
    "zero3": "mlm_dist, ZeRO 3",
}
PARTS = ("forward_seconds", "backward_seconds", "optimizer_seconds")
MEASURED = ("step_seconds", *PARTS, "tokens_per_second", "loss")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--memory", action="store_true", help="measure memory, each cell in processes of its own")
    what.add_argument("--scaling", action="store_true", help="measure numbers of ranks, as many rows on each")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--shards", type=Path, help="a folder that shards/build.py made")
    text.add_argument("--text", type=Path, nargs="+", help="whatever shards/build.py takes as --input")
    add("--systems", nargs="+", choices=SYSTEMS, help="what to measure (default: all; with --scaling ddp and zero1)")
    add("--rounds", type=int, default=5, help="in which all systems take turns (default: 5)")
    add("--steps", type=int, default=4, help="of each system in a round (default: 4)")
    add("--warm-steps", type=int, default=2, help="of each system before the first round (default: 2)")
    add("--micro-rows", type=int, nargs="+", help="of a micro-batch (default: all rows; with --memory a quarter, too)")
    add("--recompute", action="store_true", help="compute layers again in the backward pass (--memory does both)")
    add("--rank-counts", type=int, nargs="+", default=[1, 2], help="of --scaling (default: 1 2)")
    add_shape(parser)
    args = parser.parse_args(argv)
    args.systems = args.systems or (["ddp", "zero1"] if args.scaling else list(SYSTEMS))
    args.micro_rows = args.micro_rows or ([max(1, args.rows // 4), args.rows] if args.memory else [args.rows])
    if any(args.rows % rows for rows in args.micro_rows):
        parser.error("--rows must be a multiple of --micro-rows")
    if len(args.micro_rows) > 1 and not args.memory:
        parser.error("several --micro-rows are for --memory")
    if min(args.rounds, args.steps, args.warm_steps) < 1:
        parser.error("--rounds, --steps and --warm-steps must be at least 1")
    return args


def measure(args: argparse.Namespace, folder: Path, ranks: int, **changes: Any) -> list[dict[str, Any]]:
    """The lines that ranks of their own write about a task. Raises Failed."""
    shape = vars(shape_of(args))
    encoder = {name: shape[name] for name in ("layers", "width", "heads", "mlp_width")} | {"recompute": args.recompute}
    names = ("rounds", "steps", "warm_steps", "rows", "row_tokens", "vocab_size", "mask_rate", "systems")
    task = {name: getattr(args, name) for name in names} | {"micro_rows": args.micro_rows[0], "encoder": encoder}
    task |= {"out": str(folder / "out"), "shards": str(args.shards.resolve()) if args.shards else None}
    task |= {**changes, "encoder": encoder | changes.get("encoder", {})}
    (folder / "task.json").write_text(json.dumps(task))
    launcher = ["launch/local.sh", "--num_gpus", ranks]
    run([*launcher, "benchmarks/engine_rank.py", folder / "task.json"], {"PYTHON": sys.executable})
    return [json.loads(line) for line in (folder / "out").read_text().splitlines()]


# ---- speed


def measure_speed(args: argparse.Namespace, folder: Path) -> None:
    lines = measure(args, folder, args.ranks)[:-1]
    for line in lines:
        say(**line)
    summary = summarise(lines)
    for line in summary:
        say(**line)
    parts = " ".join(f"{part.removesuffix('_seconds'):>9}" for part in PARTS)
    rows = [f"{'':24} {'s a step':>9} {'over DDP':>9} {parts} {'tokens/s':>9} {'loss':>8}"]
    for line in summary:
        parts = " ".join(f"{line[part]:9.4f}" for part in PARTS)
        over = f"{line['over_ddp']:.3f}" if "over_ddp" in line else ""
        rows.append(
            f"{SYSTEMS[line['system']]:24} {line['step_seconds']:9.4f} {over:>9} {parts} "
            f"{line['tokens_per_second']:9,.0f} {line['loss']:8.4f}"
        )
    print("\n".join(rows), file=sys.stderr)


def summarise(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each system that has figures: medians over the rounds, the loss of the last one."""
    rounds: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if "round" in line:
            rounds.setdefault(line["system"], []).append(line)
    summary = []
    for name in sorted(rounds, key=list(SYSTEMS).index):
        found = {"system": name, "summary": True, "rounds": len(rounds[name])}
        found |= {key: round(statistics.median(line[key] for line in rounds[name]), 5) for key in MEASURED}
        found["loss"] = rounds[name][-1]["loss"]
        if "ddp" in rounds and name != "ddp":
            pairs = zip(rounds[name], rounds["ddp"], strict=True)
            found["over_ddp"] = round(statistics.median(a["step_seconds"] / b["step_seconds"] for a, b in pairs), 4)
        summary.append(found)
    return summary


# ---- memory


def measure_memory(args: argparse.Namespace, folder: Path) -> None:
    rows = [f"{'':24} {'micro-batch':>11} {'recompute':>9} {'peak MB':>9} {'s a step':>9}"]
    for micro_rows in args.micro_rows:
        for recompute in (False, True):
            for name in args.systems:
                cell = {"systems": [name], "rounds": 1, "micro_rows": micro_rows, "encoder": {"recompute": recompute}}
                *lines, memory = measure(args, folder, args.ranks, **cell)
                said = {"system": name, "micro_rows": micro_rows, "recompute": recompute}
                if "skipped" in lines[0]:
                    say(**said, skipped=lines[0]["skipped"])
                    continue
                peak, seconds = max(memory["peak_mb"]), lines[0]["step_seconds"]
                say(**said, peak_mb=peak, step_seconds=seconds, loss=lines[0]["loss"])
                words = "yes" if recompute else "no"
                rows.append(f"{SYSTEMS[name]:24} {micro_rows:11} {words:>9} {peak:9,.0f} {seconds:9.4f}")
    print("\n".join(rows), file=sys.stderr)


# ---- scaling


def measure_scaling(args: argparse.Namespace, folder: Path) -> None:
    found: dict[int, list[dict[str, Any]]] = {ranks: [] for ranks in args.rank_counts}
    for number in range(1, args.rounds + 1):
        for ranks in args.rank_counts:
            lines = measure(args, folder, ranks, rounds=1)[:-1]
            found[ranks] += [line | {"round": number} for line in lines]
            for line in lines:
                say(ranks=ranks, **line | {"round": number})
    rows = [f"{'':24} {'ranks':>6} {'tokens/s of a rank':>18} {'s a step':>9} {'efficiency':>10}"]
    first: dict[str, float] = {}
    for ranks, lines in found.items():
        for line in summarise(lines):
            name, rate = line["system"], line["tokens_per_second"] / ranks
            efficiency = rate / first.setdefault(name, rate)
            say(ranks=ranks, **line, tokens_per_second_of_a_rank=round(rate, 1), efficiency=round(efficiency, 4))
            rows.append(
                f"{SYSTEMS[name]:24} {ranks:6} {rate:18,.0f} {line['step_seconds']:9.4f} {100 * efficiency:9.1f} %"
            )
    print("\n".join(rows), file=sys.stderr)


# ---- what is said


def say(**result: Any) -> None:
    print(json.dumps({"benchmark": "engine", **result}), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    measure_it = measure_memory if args.memory else measure_scaling if args.scaling else measure_speed
    with tempfile.TemporaryDirectory(prefix="engine-", dir=args.scratch) as name:
        folder = Path(name)
        try:
            if args.text:
                args.shards = folder / "shards"
                build_shards(args, args.shards)
            names = ("ranks", "rows", "row_tokens", "layers", "width", "heads", "mlp_width", "mask_rate")
            text = str(args.text or args.shards or "random ids")
            say(work={name: getattr(args, name) for name in names} | {"text": text}, **machine())
            measure_it(args, folder)
        except Failed as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
