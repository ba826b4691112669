"""Held-out loss of a run's checkpoint, with the same frozen masks as during training.

The masks go by the row and the source's place in the run: --shards gives the shards of a mixture other ones.

python launch/evaluate.py --run runs/quickstart [--step 500] [--shards OTHER]
"""

import argparse
import json
from pathlib import Path

import _cli
import torch

from mlm_dist import assembly, checkpoint, config, mixture, remote, schema, stream, train, vocab, world
from mlm_dist.cache import make_cache
from mlm_dist.engine import held_out_pass
from mlm_dist.evaluate import HELD_OUT, evaluate
from mlm_dist.mixture import SourceConfig


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--step", type=int, help="checkpoint's step (default: the newest whole one)")
    parser.add_argument("--shards", help="shard folder or URL whose held-out part to use (default: the run's own)")
    parser.add_argument("--cache-dir", help="where remote shards are kept (default: as in the run)")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    path = checkpoint.find(args.run, args.step)
    state = checkpoint.load_state(path)
    cfg = schema.from_mapping(config.RunConfig, state.facts["config"])
    folders = {"": SourceConfig(args.shards)} if args.shards else cfg.data.folders()
    cache = make_cache(args.cache_dir or cfg.data.cache_dir, cfg.data.cache_gb, cfg.data.fetch_seconds)
    root = folders[min(folders)].shards
    tokenizer = vocab.load(remote.open_tokenizer(remote.join(root, "tokenizer"), cache))
    if tokenizer.fingerprint != state.facts["tokenizer"]:
        raise schema.ConfigError(
            f"{root} was built with another tokenizer than {args.run} was trained with; build it again with that one"
        )
    sources = mixture.open_sources(folders, "valid", cache)
    if not sources:
        named = " and ".join(folder.shards for folder in folders.values())
        raise schema.ConfigError(f"{named} holds no held-out documents; give others with --shards")
    model = assembly.load_model(cfg, tokenizer, path)
    with world.join(cfg.engine.timeout_seconds) as here:
        model.to(here.device).eval()
        batches = stream.held_out_batches(
            sources, tokenizer, cfg.data, cfg.batch, here.rank, here.size, max_rows=cfg.evaluate.max_rows
        )

        def step(batch: stream.Batch) -> dict[str, torch.Tensor]:
            return held_out_pass(model, batch, cfg.evaluate.rate, cfg.evaluate.seed, here.device)

        numbers = evaluate(step, batches, here, tokenizer, mixture.named(sources))
        if here.is_main:
            report(args.json, path, numbers)
    return 0


def report(as_json: bool, path: Path, numbers: dict[str, float]) -> None:
    if as_json:
        print(json.dumps({"checkpoint": str(path), **numbers}))
        return
    print(f"{path}: {sentence(numbers)}")
    for name in (key.removesuffix("/loss") for key in numbers if key.endswith("/loss")):
        of_it = {kind: numbers[f"{name}/{kind}"] for kind in HELD_OUT}
        print(f"  {name}: {sentence(of_it)}")


def sentence(numbers: dict[str, float]) -> str:
    return (
        f"held-out loss {numbers['loss']:.4f}, perplexity {numbers['perplexity']:.2f}, "
        f"accuracy {100 * numbers['accuracy']:.1f} %, {numbers['bits_per_byte']:.3f} bits per byte, "
        f"over {numbers['targets']:,.0f} masked tokens"
    )


if __name__ == "__main__":
    _cli.run(main, train.REFUSALS)
