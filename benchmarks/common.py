"""What the benchmarks of training share: the shape of the model, shards of a text, commands run to their end."""

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlm_dist.encoder import EncoderConfig

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 1800
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "WANDB_SILENT": "true",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
ON_CPU = {"DS_ACCELERATOR": "cpu"}


class Failed(RuntimeError):
    """Why a command has no result."""


def add_shape(parser: argparse.ArgumentParser) -> None:
    """The options that say what is trained, and on how much of it at a time."""
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="processes (default: 2)")
    add("--row-tokens", type=int, default=256, help="positions in a row (default: 256)")
    add("--rows", type=int, default=16, help="of a rank in a step (default: 16)")
    add("--layers", type=int, default=6)
    add("--width", type=int, default=256)
    add("--heads", type=int, default=4)
    add("--mlp-width", type=int, default=384, help="of the gated MLP, after the gate (default: 384)")
    add("--vocab-size", type=int, default=8192, help="of the tokenizer trained on the text (default: 8192)")
    add("--mask-rate", type=float, default=0.3, help="share of the tokens to predict (default: 0.3)")
    add("--exclude", nargs="+", default=[], help="of the text, as for shards/build.py")
    add("--scratch", type=Path, help="a folder for the temporary files (default: the system's)")


def shape_of(args: argparse.Namespace) -> EncoderConfig:
    return EncoderConfig(
        layers=args.layers, width=args.width, heads=args.heads, mlp_width=args.mlp_width, max_positions=args.row_tokens
    )


def build_shards(args: argparse.Namespace, out: Path) -> None:
    """Shards of `args.text` with a tokenizer trained on it. Raises Failed."""
    options = ["--input", *args.text, "--out", out, "--tokenizer", f"train:{args.vocab_size}"]
    options += ["--valid-fraction", 0.01, *(["--exclude", *args.exclude] if args.exclude else [])]
    run([sys.executable, "shards/build.py", *options], {})


def unless_given(usual: Sequence[str], given: Sequence[str]) -> list[str]:
    """Overrides key=value: the usual ones, but for the keys that are given, and those given."""
    keys = {each.partition("=")[0] for each in given}
    return [*(each for each in usual if each.partition("=")[0] not in keys), *given]


def machine() -> dict[str, Any]:
    """What a line of results says about where it was taken."""
    load = round(os.getloadavg()[0], 2)
    return {"cores": len(os.sched_getaffinity(0)), "load": load, "device": platform.processor() or "cpu"}


def run(command: Sequence[object], settings: Mapping[str, str]) -> str:
    """What a command printed. Raises Failed where it didn't end well; nothing of it goes on running."""
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT, env=os.environ | SETTINGS | settings, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    except BaseException as error:  # Ctrl-C too
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Failed(f"it took more than {TIMEOUT_SECONDS} s") from error
        raise
    if process.returncode:
        raise Failed(reason(out + errors) or f"it ended with {process.returncode}")
    return out


def reason(text: str) -> str:
    """The first error that is named in what a command said: launchers add their own after it."""
    named = re.search(r"(?:\w+Error|error): .*", text)
    return named.group() if named else (text.strip().splitlines() or [""])[-1]
