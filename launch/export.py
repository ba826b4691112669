"""Turn a run's checkpoint into a Hugging Face folder that AutoModelForMaskedLM and pipeline("fill-mask") load.

python launch/export.py --run runs/quickstart --out export/quickstart
"""

import argparse
from pathlib import Path

import _cli
from transformers.utils import logging

from mlm_dist import checkpoint, config, export, schema, train, vocab


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--step", type=int, help="checkpoint's step (default: the newest whole one)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder where it exists")
    return parser.parse_args()


def main() -> int:
    args = parse()
    logging.disable_progress_bar()
    export.refuse_used(args.out, args.overwrite)
    path = checkpoint.find(args.run, args.step)
    state = checkpoint.load_state(path)
    cfg = schema.from_mapping(config.RunConfig, state.facts["config"])
    tokenizer = vocab.load(args.run / "tokenizer")
    model = train.load_model(cfg, tokenizer, path)
    facts = {
        "steps": state.step,
        "tokens": state.tokens,
        "held-out loss": state.valid_loss,
        "held-out mask rate": cfg.evaluate.rate,
        "sequence length": cfg.batch.seq_len,
        "training mask rate": cfg.masking.rate,
        "config": schema.to_yaml(cfg),
    }
    print(export.write(args.out, model.transformer, cfg.model, tokenizer, facts, overwrite=args.overwrite))
    return 0


if __name__ == "__main__":
    _cli.run(main, train.REFUSALS)
