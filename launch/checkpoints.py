"""List the checkpoints of a run, and what is wrong with them: every file is compared with its sha256.

python launch/checkpoints.py runs/quickstart
"""

import argparse
import json
from pathlib import Path

import _cli

from mlm_dist import checkpoint
from mlm_dist.schema import ConfigError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder")
    folder = parser.parse_args().run / "checkpoints"
    if not folder.is_dir():
        raise ConfigError(f"{folder} doesn't exist; give the folder of a run that has saved a checkpoint")
    names = checkpoint.newest_first(folder) + sorted(path.name for path in folder.glob("bad-*"))
    print(f"{'checkpoint':24} {'tokens':>15} {'MB':>9} {'ranks':>5} {'stage':>5} {'held-out':>8}  state")
    for name in names:
        print(row(folder / name))
    latest = folder / "latest"
    print(f"latest: {latest.read_text().strip() if latest.exists() else 'none'}")
    return 0


def row(path: Path) -> str:
    """A checkpoint in one line; what can't be read of it is left out."""
    faults = checkpoint.verify(path)
    try:
        state, manifest = checkpoint.load_state(path), json.loads((path / "manifest.json").read_text())
        size = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
        loss = f"{state.valid_loss:.4f}" if state.valid_loss is not None else "-"
        facts = f"{state.tokens:>15,} {size:>9,.1f} {manifest['world_size']:>5} {manifest['zero_stage']:>5} {loss:>8}"
    except (OSError, ValueError, KeyError, TypeError):
        facts = f"{'-':>15} {'-':>9} {'-':>5} {'-':>5} {'-':>8}"
    return f"{path.name:24} {facts}  {'; '.join(faults) or 'whole'}"


if __name__ == "__main__":
    _cli.run(main)
