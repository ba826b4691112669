"""Pretrain a masked language model, or go on with a run that was stopped: the same command does both.

deepspeed launch/pretrain.py --config configs/quickstart.yaml run.dir=runs/mine optim.lr=2e-3
"""

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))
from mlm_dist.signals import STOP_SIGNALS, hear

# Told to stop while it is starting, a rank has nothing to save: it ends as one that was stopped at a step does, with
# 85, so that a scheduler starts it again. It may be among its imports, or inside a library, waiting for a rank that
# never comes. From the first collective on, world.StopFlag takes over.
for each in STOP_SIGNALS:
    signal.signal(each, lambda *_: os._exit(85))
hear(lambda number: number in STOP_SIGNALS and os._exit(85))

import _cli  # noqa: E402

from mlm_dist import assembly, config, schema, train, world  # noqa: E402
from mlm_dist.config import RunConfig  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys (section.key=value overrides the file):\n\n" + schema.help_text(RunConfig),
    )
    parser.add_argument("--config", default="configs/quickstart.yaml", help="YAML file (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a key of the file")
    parser.add_argument("--dry-run", action="store_true", help="print what the run would be, and exit")
    parser.add_argument(
        "--world-size", type=int, help="--dry-run: for so many ranks (default: those that were started)"
    )
    parser.add_argument("--verbose", action="store_true", help="show what the libraries say, too (log.verbose=true)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


def main() -> int:
    args = parse()
    cfg = config.load(args.config, args.overrides + ["log.verbose=true"] * args.verbose)
    if args.dry_run:
        if args.world_size is not None and args.world_size < 1:
            raise schema.ConfigError(f"--world-size = {args.world_size} must be at least 1")
        if os.environ.get("RANK", "0") == "0":
            print(dry_run(cfg, args.world_size or int(os.environ.get("WORLD_SIZE", "1"))))
        return 0
    return train.train(cfg)


def dry_run(cfg: RunConfig, world_size: int) -> str:
    *_, tokenizer = assembly.open_data(cfg, world_size)
    return config.describe(cfg, world_size, world.pick_device(0), tokenizer.size)


if __name__ == "__main__":
    _cli.run(main, train.REFUSALS)
