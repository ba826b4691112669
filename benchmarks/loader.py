"""What the loader does a second, beside others on the same text:

    python benchmarks/loader.py --text TEXT.jsonl.gz --peers PEERS/bin/python

Builds shards of the text in a temporary folder and prints one line of JSON for each measurement: tokens a second of one
core from open tar to packed batch, time to the first batch, memory of a worker over epochs, share of positions that
are not padding, MB of text a second that shards/build.py makes shards of. Rates are medians of whole epochs by CPU
time; a token is a token of the text, no [CLS] and no [SEP].
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.loader_data import cut_in_documents, dump_documents, make_large_split  # noqa: E402
from mlm_dist import vocab  # noqa: E402
from mlm_dist.batch_size import BatchConfig  # noqa: E402
from mlm_dist.cursor import Cursor  # noqa: E402
from mlm_dist.lanes import LaneEpoch, resolve_lanes  # noqa: E402
from mlm_dist.manifest import load_manifest  # noqa: E402
from mlm_dist.stream import DataConfig, TrainBatches, train_batches  # noqa: E402

PEERS = {
    "webdataset": "read_webdataset.py",
    "datasets": "read_datasets.py",
    "megatron-energon": "read_energon.py",
    "mosaicml-streaming": "read_streaming.py",
}
LENGTHS = (128, 512, 1024)
SEED, ROWS, ROW_TOKENS = 0, 32, 512
PEER_TIMEOUT_SECONDS = 900


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, required=True, help="a .jsonl or .jsonl.gz file, the text under the key `text`")
    add("--peers", type=Path, help="the python of an environment with benchmarks/requirements.txt; none: no peers")
    add("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), help="what to measure (default: all)")
    add("--seconds", type=float, default=10.0, help="for each rate, at least; four epochs at the least (default: 10)")
    add("--build-repeats", type=int, default=5, help="builds that are timed (default: 5)")
    add("--epochs", type=int, default=10, help="of which memory is read (default: 10)")
    add("--epoch-tokens", type=float, nargs="+", default=[1e9], help="epochs for the first batch (default: 1e9)")
    add("--vocab-size", type=int, default=32768, help="of the tokenizer trained on the text (default: 32768)")
    add("--scratch", type=Path, help="a folder for the temporary files (default: the system's)")
    return parser.parse_args(argv)


def say(measurement: str, **result: Any) -> None:
    print(json.dumps({"benchmark": "loader", "measurement": measurement, **result}), flush=True)


# ---- the shards


def build(text: Path, out: Path, tokenizer: str) -> None:
    """shards/build.py, nothing held out."""
    options = ["--input", str(text), "--out", str(out), "--tokenizer", tokenizer, "--valid-fraction", "0"]
    subprocess.run([sys.executable, str(ROOT / "shards" / "build.py"), *options], check=True, stdout=sys.stderr)


class Kind:
    """One way to cut the text in documents, as shards: `name` is short or whole."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.manifest = load_manifest(folder / "train")
        self.vocab = vocab.load(folder / "tokenizer")

    def batches(self, workers: int = 0, row_tokens: int = ROW_TOKENS, start: Cursor | None = None) -> TrainBatches:
        data = DataConfig(shards=str(self.folder), workers=workers)
        batch = BatchConfig(seq_len=row_tokens, micro_rows=ROWS)
        return train_batches(self.manifest, self.vocab, data, batch, SEED, 0, 1, start)

    def about(self) -> dict[str, Any]:
        mean = self.manifest.tokens / self.manifest.documents
        return {"documents": self.name, "document_tokens_mean": round(mean), "shards": len(self.manifest.shards)}


# ---- tokens a second


def text_tokens(batches: TrainBatches, at_least: int) -> int:
    """Take batches with `at_least` tokens of text; returns how many they held."""
    tokens = 0
    while tokens < at_least:
        tokens += int(next(batches).maskable.sum())
    return tokens


def rate(kind: Kind, seconds: float, workers: int) -> dict[str, Any]:
    """Tokens a second of CPU time: of this process, or of one worker's."""
    rates = []
    with kind.batches(workers) as batches:

        def clock() -> float:
            # a worker's CPU time is told in hundredths of a second
            return cpu_seconds(batches.workers[0]._workers[0].pid) if workers else time.process_time()

        text_tokens(batches, kind.manifest.tokens)  # to warm up
        began = time.perf_counter()
        while len(rates) < 3 or time.perf_counter() - began < seconds:
            started, epochs = clock(), 20 if workers else 1
            rates.append(text_tokens(batches, epochs * kind.manifest.tokens) / max(clock() - started, 0.01))
    return {"tokens_per_second": round(statistics.median(rates)), "epochs": len(rates)}


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peer_rates(name: str, python: Path, documents: Path, scratch: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """What a peer's script measured in its own environment, or why it did not."""
    script = ROOT / "benchmarks" / "peers" / PEERS[name]
    command = [python, script, documents, scratch, seconds, ROW_TOKENS, ROWS]
    # mlm_dist.shards sets WDS_SECURE, with which webdataset opens no file by itself
    settings = os.environ | {"WDS_SECURE": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            timeout=PEER_TIMEOUT_SECONDS,
            env=settings,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield {"reader": name, "skipped": str(error)}
        return
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            yield {"reader": json.loads(line).pop("name")} | json.loads(line)
    if done.returncode:
        yield {"reader": name, "skipped": (done.stderr.strip().splitlines() or ["no message"])[-1]}


def measure_throughput(args: argparse.Namespace, kinds: list[Kind], scratch: Path) -> None:
    rated = {}
    for kind in kinds:
        for reader, workers in (("mlm_dist", 0), ("mlm_dist, a worker process", 1)):
            result = rate(kind, args.seconds, workers)
            rated[kind.name, reader] = result["tokens_per_second"]
            say("throughput", **kind.about(), reader=reader, **result)
        if not args.peers:
            continue
        documents = dump_documents(kind.manifest, scratch / f"documents-{kind.name}")
        for name in PEERS:
            for result in peer_rates(name, args.peers, documents, scratch / f"{name}-{kind.name}", args.seconds):
                result.pop("name", None)
                rated[kind.name, result["reader"]] = result.get("tokens_per_second")
                say("throughput", **kind.about(), **result)
    for (documents, reader), peer in rated.items():
        if peer and not reader.startswith("mlm_dist"):
            ratio = round(rated[documents, "mlm_dist"] / peer, 2)
            say("ratio", documents=documents, mlm_dist_over=reader, ratio=ratio)


# ---- the first batch


def cursor_at(kind: Kind, share: float) -> Cursor:
    """Where a run stands after a share of its first epoch: in the middle of a window."""
    lanes = resolve_lanes(len(kind.manifest.shards), None, 1)
    most = DataConfig("unused").window_records
    windows = [len(LaneEpoch(kind.manifest, most, SEED, 0, lane, lanes)) for lane in range(lanes)]
    return {"rows": lanes * 1000, "lanes": [[0, int(share * count), 7] for count in windows], "bad_shards": []}


def measure_first_batch(args: argparse.Namespace, kinds: list[Kind], scratch: Path) -> None:
    """Seconds from nothing to a batch: read the manifest, start a worker, receive."""
    whole = next(kind for kind in kinds if kind.name == "whole")
    for tokens in args.epoch_tokens:
        folder = scratch / f"large-{tokens:.0e}"
        make_large_split(whole.manifest, whole.vocab, folder, int(tokens))
        kind = Kind("whole, repeated", folder)
        size = {"epoch_tokens": kind.manifest.tokens, "shards": len(kind.manifest.shards)}
        for share in (0.0, 0.01, 0.5, 0.99):
            start = cursor_at(kind, share) if share else None
            times = []
            for _ in range(5):
                moments = [time.perf_counter()]
                kind.manifest = load_manifest(folder / "train")
                moments.append(time.perf_counter())
                with kind.batches(1, start=start) as batches:
                    next(batches)
                    moments.append(time.perf_counter())
                times.append([after - before for before, after in pairwise(moments)])
            with kind.batches(0, start=start) as batches:
                used = time.process_time()
                next(batches)
                used = round(time.process_time() - used, 3)
            manifest, batch = (round(statistics.median(column), 3) for column in zip(*times, strict=True))
            total = round(statistics.median(map(sum, times)), 3)
            parts = {"manifest_seconds": manifest, "batch_seconds": batch, "batch_cpu_seconds": used}
            say("first_batch", **size, resumed_at=share, seconds=total, **parts)
        say("throughput", **kind.about(), reader="mlm_dist", **rate_of_part(kind, args.seconds))


def rate_of_part(kind: Kind, seconds: float) -> dict[str, Any]:
    """Tokens a second of CPU time with windows of full size, over parts of an epoch: two windows of each lane."""
    shards = kind.manifest.shards
    window_tokens = shards[0].tokens // -(-shards[0].samples // DataConfig("unused").window_records)
    part = 2 * resolve_lanes(len(shards), None, 1) * window_tokens
    with kind.batches() as batches:
        text_tokens(batches, part)
        rates = []
        began = time.perf_counter()
        while len(rates) < 3 or time.perf_counter() - began < seconds:
            started = time.process_time()
            rates.append(text_tokens(batches, part) / (time.process_time() - started))
    return {"tokens_per_second": round(statistics.median(rates)), "parts": len(rates)}


# ---- memory and packing


def measure_memory(args: argparse.Namespace, kinds: list[Kind], scratch: Path) -> None:
    """MB of a worker after each epoch: resident and its own (not of a file), and what it shares with nobody."""
    for kind in kinds:
        resident, private = [], []
        with kind.batches(1) as batches:
            pid = batches.workers[0]._workers[0].pid
            for _ in range(args.epochs):
                text_tokens(batches, kind.manifest.tokens)
                resident.append(kilobytes(f"/proc/{pid}/status", "RssAnon:") / 1e3)
                private.append(kilobytes(f"/proc/{pid}/smaps_rollup", "Private_Dirty:") / 1e3)
        growth = round(100 * (max(resident) / resident[0] - 1), 2)
        say(
            "memory",
            documents=kind.name,
            rss_anon_mb=[round(value, 1) for value in resident],
            private_mb=[round(value, 1) for value in private],
            growth_percent=growth,
        )


def kilobytes(file: str, key: str) -> int:
    return next(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(key))


def measure_packing(args: argparse.Namespace, kinds: list[Kind], scratch: Path) -> None:
    """Share of the positions of an epoch that are not padding."""
    for kind in kinds:
        for row_tokens in LENGTHS:
            tokens = positions = text = 0
            with kind.batches(row_tokens=row_tokens) as batches:
                while text < kind.manifest.tokens:
                    batch = next(batches)
                    text += int(batch.maskable.sum())
                    tokens += batch.tokens
                    positions += batch.ids.numel()
            efficiency = round(tokens / positions, 4)
            say("packing", documents=kind.name, row_tokens=row_tokens, efficiency=efficiency)


def measure_build(args: argparse.Namespace, kinds: list[Kind], scratch: Path) -> None:
    """What benchmarks/build.py says of the same text and tokenizer."""
    options = ["--input", str(args.text), "--tokenizer", str(scratch / "whole" / "tokenizer")]
    command = [sys.executable, str(ROOT / "benchmarks" / "build.py"), *options, "--repeats", str(args.build_repeats)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    say("build", **json.loads(done.stdout))


MEASUREMENTS = {
    "memory": measure_memory,  # first: a worker begins with what this process holds
    "packing": measure_packing,
    "throughput": measure_throughput,
    "first_batch": measure_first_batch,
    "build": measure_build,
}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "webdataset", "numpy")}
    machine = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
    say("machine", **machine, python=platform.python_version(), **versions)
    with tempfile.TemporaryDirectory(prefix="loader-", dir=args.scratch) as folder:
        scratch = Path(folder)
        build(args.text, scratch / "whole", f"train:{args.vocab_size}")
        short = scratch / "short.jsonl.gz"
        cut_in_documents(args.text, short)
        build(short, scratch / "short", str(scratch / "whole" / "tokenizer"))
        kinds = [Kind("short", scratch / "short"), Kind("whole", scratch / "whole")]
        for name in MEASUREMENTS:
            if name in args.only:
                MEASUREMENTS[name](args, kinds, scratch)


if __name__ == "__main__":
    main()
