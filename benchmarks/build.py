"""How fast shards/build.py tokenizes beside `tokenizers` alone: `python benchmarks/build.py --input TEXT`.

Both have the same documents, the same tokenizer and one thread or process; they take turns. The figure of each is the
median of MB of text a second of CPU time (user and system, of all its processes), which other programs on the machine
disturb little; `wall` has the same by the clock. The build's time is that of a whole command, from Python's start to
shards; for `tokenizers` it is that of `encode_batch` on texts that are in memory, a thousand at a time. `share` is the
build's rate over that of `tokenizers`; `share_of_large_text` leaves out the time of `build.py --help`, the start of
Python and its libraries, which counts the less the longer a build takes. Prints one line of JSON.
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of this folder
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tokenizers  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from shards import files, texts  # noqa: E402

TOGETHER = 1000  # documents in one call of encode_batch


def cpu_seconds() -> float:
    """User and system time of this process and of those that it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of a call."""
    gc.collect()
    cpu, wall = cpu_seconds(), time.perf_counter()
    run()
    return cpu_seconds() - cpu, time.perf_counter() - wall


def quietly(argv: list[str]) -> None:
    """One run of build.py, in a process of its own as users start it; it must succeed."""
    done = subprocess.run([sys.executable, str(ROOT / "shards" / "build.py"), *argv], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, required=True)
    parser.add_argument("--tokenizer", default="train:8192", help="as for build.py (default: train:8192)")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    reading = texts.Reading("text", 1 << 20, strict=False)
    pieces = files.pieces(files.find(arguments.input), held_out=False)
    documents = [
        text for batch in texts.batches(pieces, reading) for text in texts.documents(batch, reading, texts.Counts())
    ]
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        command = ["--input", *map(str, arguments.input), "--workers", "1", "--out"]
        quietly(
            [*command, folder, "--tokenizer", arguments.tokenizer, "--tokenizer-sample-mb", "8", "--tokenizer-only"]
        )
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer/tokenizer.json")
        tokenizer.encode_special_tokens = True

        def alone() -> None:
            for start in range(0, len(documents), TOGETHER):
                tokenizer.encode_batch(documents[start : start + TOGETHER], add_special_tokens=False)

        def whole() -> None:
            quietly([*command, f"{folder}/out", "--tokenizer", f"{folder}/tokenizer", "--force"])

        def start() -> None:
            quietly(["--help"])

        measured = {"tokenizers": alone, "build": whole, "start": start}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in measured}
        for _ in range(arguments.repeats):
            for name, run in measured.items():
                seconds[name].append(timed(run))
    cpu, wall = ({name: statistics.median(t[i] for t in many) for name, many in seconds.items()} for i in (0, 1))
    said = {
        "megabytes": round(megabytes, 1),
        "documents": len(documents),
        "megabytes_per_cpu_second": {name: round(megabytes / cpu[name], 2) for name in ("tokenizers", "build")},
        "share": round(cpu["tokenizers"] / cpu["build"], 3),
        "share_of_large_text": round(cpu["tokenizers"] / (cpu["build"] - cpu["start"]), 3),
        "wall": {name: round(megabytes / wall[name], 2) for name in ("tokenizers", "build")},
        "repeats": arguments.repeats,
        "versions": {"python": platform.python_version(), "tokenizers": tokenizers.__version__},
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
