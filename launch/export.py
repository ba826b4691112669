"""Turn a run's checkpoint into a Hugging Face folder that AutoModelForMaskedLM and pipeline("fill-mask") load.

python launch/export.py --run runs/quickstart --out export/quickstart
"""

import argparse
import sys
from pathlib import Path

import _cli
from transformers.utils import logging

from mlm_dist import __version__, assembly, card, checkpoint, config, export, schema, train, vocab
from mlm_dist.mirror import LogConfig, Mirror, wandb_mode

SECONDS_TO_SEND = 3600.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--step", type=int, help="checkpoint's step (default: the newest whole one)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder where it exists")
    parser.add_argument("--license", help="of the model, for the card's head, as the hub names it: mit, ...")
    parser.add_argument("--language", help="of the text, for the card's head, as the hub names it: en, ...")
    parser.add_argument("--wandb", action="store_true", help="log the folder as an artifact of the run in W&B, too")
    return parser.parse_args()


def main() -> int:
    args = parse()
    logging.disable_progress_bar()
    export.refuse_used(args.out, args.overwrite)
    path = checkpoint.find(args.run, args.step)
    state = checkpoint.load_state(path)
    cfg = schema.from_mapping(config.RunConfig, state.facts["config"])
    tokenizer = vocab.load(args.run / "tokenizer")
    model = assembly.load_model(cfg, tokenizer, path)
    facts = card.facts_of_run(args.run, path, state, cfg)
    facts |= {"exported with": f"mlm_dist {__version__}", "license": args.license, "language": args.language}
    print(export.write(args.out, model.transformer, cfg.model, tokenizer, facts, overwrite=args.overwrite))
    if args.wandb:
        return upload(args.run, args.out, cfg.log, {"step": state.step, "loss": state.valid_loss})
    return 0


def upload(run: Path, folder: Path, log: LogConfig, facts: dict[str, float | None]) -> int:
    mirror = Mirror(log, run, print, wandb_mode(log))
    mirror.start({}, sys.maxsize, [])
    mirror.upload("model", "model", folder, facts)
    mirror.finish(0, SECONDS_TO_SEND)
    return 0 if mirror.is_on else 1


if __name__ == "__main__":
    _cli.run(main, train.REFUSALS)
