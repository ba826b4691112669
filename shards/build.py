"""Text files to tokenizer and shards:

    python shards/build.py --input TEXT... --out FOLDER --tokenizer train:32768

makes FOLDER/tokenizer, FOLDER/train and FOLDER/valid. Reads .txt .md .rst .py .jsonl, each also with .gz, and folders
of these. The shards depend on the texts, the tokenizer and the seed alone: not on the order of the inputs, nor on the
number of processes. A build that is stopped leaves nothing that could be taken for a whole one.

    python shards/build.py --index FOLDER --tokenizer PATH

writes the manifest of WebDataset tars of text instead, and leaves them where they are: --index FOLDER --help has more.
"""

import os
import sys

if __name__ == "__main__":  # as a script this folder comes first, and its inspect.py hides the standard library's
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import contextlib
import errno
import fcntl
import importlib.metadata
import json
import platform
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from mlm_dist import vocab
from mlm_dist.manifest import Manifest, dtype_for, sync_folder
from mlm_dist.schema import ConfigError
from mlm_dist.vocab import Vocab
from shards import index, stages, texts
from shards.buckets import RECORD_TOKENS, Buckets, bucket_count
from shards.stages import Settings
from shards.texts import Counts, Reading

EXIT_REFUSED, EXIT_INTERRUPTED = 2, 130
PARTS = ("tokenizer", "valid", "train")  # of the output; `train` comes into place last
MADE = re.compile(r"(\d{6,}\.tar|records\.npy|manifest\.json|tokenizer\.json|tokenizer_config\.json)(\.tmp)?")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", type=Path, required=True, metavar="PATH", help="files and folders of text")
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder to make")
    add("--tokenizer", required=True, help="train:SIZE, a tokenizer.json, or a Hugging Face folder")
    add("--text-key", default="text", help="key of the text in .jsonl lines (default: text)")
    add("--valid-fraction", type=float, help="share of documents held out, by a hash of the text (default: 0.01)")
    add("--valid-input", nargs="+", type=Path, metavar="PATH", help="held-out text of its own, instead of a share")
    add("--exclude", nargs="+", default=[], metavar="GLOB", help="names or paths below the input folders to leave out")
    add("--strict", action="store_true", help="refuse bytes that are not UTF-8 instead of replacing them")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one a core)")
    add(
        "--seed", type=int, default=0, help="of the shuffle, the held-out share and the tokenizer's sample (default: 0)"
    )
    add("--shard-tokens", type=int, default=16_000_000, help="tokens a shard, roughly (default: 16000000)")
    add("--document-bytes", type=int, default=1 << 20, help="longer documents are cut at a line's end (default: 1 MiB)")
    add("--tokenizer-sample-mb", type=int, default=256, help="text to train a tokenizer on, in MB (default: 256)")
    add("--force", action="store_true", help="replace the shards that FOLDER holds already")
    args = parser.parse_args(argv)
    if args.valid_input and args.valid_fraction is not None:
        parser.error("give --valid-input or --valid-fraction, not both")
    args.valid_fraction = 0.0 if args.valid_input else 0.01 if args.valid_fraction is None else args.valid_fraction
    if not 0 <= args.valid_fraction < 1:
        parser.error("--valid-fraction is a share of the documents: at least 0 and below 1")
    for name, least in (("workers", 1), ("shard_tokens", 1), ("document_bytes", 1024), ("tokenizer_sample_mb", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return args


class Built(NamedTuple):
    """What came out."""

    splits: dict[str, Manifest]
    tokenizer: Vocab
    counts: Counts
    files: int


def build(args: argparse.Namespace, folder: Path) -> Built:
    """Make tokenizer, train and valid in `folder`. Raises ConfigError for what the user has to put right."""
    settings = Settings(
        workers=args.workers,
        reading=Reading(args.text_key, args.document_bytes, args.strict),
        seed=args.seed,
        valid_fraction=args.valid_fraction,
        shard_tokens=args.shard_tokens,
        sample_bytes=args.tokenizer_sample_mb * 1_000_000,
    )
    train_files = texts.find(args.input, args.exclude)
    valid_files = texts.find(args.valid_input, args.exclude) if args.valid_input else []
    tokenizer = make_tokenizer(args.tokenizer, settings, train_files)
    tokenizer.save(folder / "tokenizer")

    size, dtype = texts.text_bytes(train_files), dtype_for(tokenizer.size)
    valid_size = texts.text_bytes(valid_files) or size * args.valid_fraction
    train = Buckets(folder / "spill" / "train", bucket_count(size, args.shard_tokens), dtype)
    valid = Buckets(folder / "spill" / "valid", bucket_count(valid_size, args.shard_tokens), dtype)
    counts = stages.fill(settings, folder / "tokenizer", train_files, train, valid, args.valid_fraction)
    if valid_files:
        counts.add(stages.fill(settings, folder / "tokenizer", valid_files, train, valid, 1.0))
    if not train.documents.any():
        raise ConfigError("there is nothing to train on: every document is empty or held out")

    about = describe(args, counts)
    splits = {
        name: stages.write_split(settings, buckets, folder / name, tokenizer, about)
        for name, buckets in (("train", train), ("valid", valid))
        if buckets.documents.any()
    }
    return Built(splits, tokenizer, counts, len(train_files) + len(valid_files))


def make_tokenizer(name: str, settings: Settings, files: Sequence[Path]) -> Vocab:
    """Load the tokenizer that --tokenizer names, or train it."""
    if not name.startswith("train:"):
        return vocab.load(name)
    size = name.removeprefix("train:")
    if not re.fullmatch("[0-9]+", size):
        raise ConfigError(f"--tokenizer {name}: the size of the vocabulary must be a number, as in train:32768")
    vocab.check_size(int(size))
    return stages.train_tokenizer(settings, files, int(size))


def describe(args: argparse.Namespace, counts: Counts) -> dict[str, object]:
    """What the manifests say of how they came about; no paths, which differ where the shards don't."""
    libraries = ("mlm_dist", "webdataset", "tokenizers", "numpy")
    return {
        "seed": args.seed,
        "valid_fraction": args.valid_fraction,
        "text_bytes": counts.text_bytes,
        "empty_documents": counts.empty,
        "replaced_bytes": counts.replaced.total(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in libraries},
    }


def version(library: str) -> str:
    """The library's version, or "source" where it isn't installed but run from its folder."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "source"


# ---- the output folder


@contextlib.contextmanager
def workplace(out: Path, force: bool) -> Iterator[Path]:
    """An empty folder OUT/.building, gone afterwards. Raises ConfigError where OUT is taken.

    Parts without train/manifest.json are left over from a build that was stopped while it moved them to OUT.
    """
    if (out / "train" / "manifest.json").exists() and not force:
        raise ConfigError(f"{out} already holds shards; give another --out, or --force to replace them")
    if strange := [path for part in PARTS for path in strangers(out / part)]:
        raise ConfigError(f"{strange[0]} is no part of a build, and would be lost; give another --out")
    folder = out / ".building"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another build is writing to {out}; wait for it, or give another --out") from error
        try:
            for left in folder.iterdir():  # by a build that was killed
                if left.is_dir():
                    shutil.rmtree(left)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def strangers(part: Path) -> list[Path]:
    """What stands in the place of a part of the output, or in it, that no build made."""
    if not part.is_dir():
        return [part] if part.exists() else []
    if not is_built(part) and (tars := sorted(part.glob("*.tar"))):
        return tars
    return sorted(path for path in part.iterdir() if path.is_dir() or not MADE.fullmatch(path.name))


def is_built(split_dir: Path) -> bool:
    """False for tars that no build wrote: without a manifest, or with one from --index."""
    try:
        return "content" not in json.loads((split_dir / "manifest.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def publish(folder: Path, out: Path) -> None:
    """Move the parts to OUT, and what stands there to `folder`. Without `train` no build is whole: it comes last."""
    for part in reversed(PARTS):
        if (out / part).exists():
            (out / part).rename(folder / f"replaced-{part}")
    for part in PARTS:
        if (folder / part).exists():
            (folder / part).rename(out / part)
    sync_folder(out)


# ---- what is said


def report(out: Path, built: Built, seconds: float) -> None:
    """The summary."""
    tokens = sum(split.tokens for split in built.splits.values())
    megabytes = built.counts.text_bytes / 1e6
    print(f"{out}: {tokens:,} tokens of {megabytes:,.1f} MB of text in {built.files:,} files; {seconds:.1f} s")
    for name, split in built.splits.items():
        print(
            f"  {name:9} {split.tokens:>15,} tokens {split.documents:>11,} documents {split.samples:>9,} records "
            f"{len(split.shards):>5,} shards {split.bytes / 1e6:>10,.1f} MB"
        )
    per_token = built.counts.text_bytes / tokens
    print(f"  tokenizer {built.tokenizer.size:>15,} tokens, {per_token:.2f} bytes of text a token")
    for line in remarks(built):
        print(f"  note: {line}")


def remarks(built: Built) -> Iterator[str]:
    """What the user should know, one sentence each."""
    if built.counts.empty:
        yield f"{built.counts.empty:,} empty documents left out"
    if built.counts.replaced:
        worst = ", ".join(f"{file} ({count:,})" for file, count in built.counts.replaced.most_common(3))
        more = len(built.counts.replaced) - 3
        yield (
            f"{built.counts.replaced.total():,} bytes are not UTF-8 and became U+FFFD, in {worst}"
            f"{f' and {more:,} more files' if more > 0 else ''}; --strict refuses such files"
        )
    if "valid" not in built.splits:
        yield "no document was held out, so training can't be evaluated; raise --valid-fraction or give --valid-input"
    train = built.splits["train"]
    if train.tokens > 2 * RECORD_TOKENS * train.documents:
        mean = train.tokens // train.documents
        yield f"documents have {mean:,} tokens on average, a coarse shuffle; --document-bytes 65536 cuts them finer"


def main(argv: Sequence[str] | None = None) -> int:
    """Build; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if any(str(word).split("=")[0] == "--index" for word in argv):
        return index.main(argv)
    args = parse(argv)
    start = time.monotonic()
    try:
        with workplace(args.out, args.force) as folder:
            built = build(args, folder)
            publish(folder, args.out)
    except KeyboardInterrupt:
        print(f"interrupted: nothing was written to {args.out}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except BrokenProcessPool:
        print(
            "error: a worker process was killed, most likely for want of memory; use fewer --workers", file=sys.stderr
        )
        return EXIT_REFUSED
    except OSError as error:
        fix = "; free some space or give an --out elsewhere" if error.errno in NO_SPACE else ""
        print(f"error: {error.strerror or error}: {error.filename or args.out}{fix}", file=sys.stderr)
        return EXIT_REFUSED
    report(args.out, built, time.monotonic() - start)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    sys.exit(main())
