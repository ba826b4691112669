"""Text files to tokenizer and shards:

    python shards/build.py --input TEXT... --out FOLDER --tokenizer train:32768

makes FOLDER/tokenizer, FOLDER/train and FOLDER/valid. Reads .txt .md .rst .py .html .jsonl, each also with .gz or
.zst, .parquet, and folders of these. The shards depend on the texts, the tokenizer and the seed alone: not on the order
of the inputs, nor on the number of processes or parts. A build that is stopped leaves nothing that could be taken for a
whole one; the same command goes on from there. In parts, on several machines that share FOLDER:

    python shards/build.py --input TEXT... --out FOLDER --tokenizer train:32768 --tokenizer-only
    python shards/build.py --input TEXT... --out FOLDER --tokenizer FOLDER/tokenizer --part 1/16    # ... to 16/16
    python shards/build.py --out FOLDER --merge

For WebDataset tars of text, which it leaves where they are and writes a manifest for (--index FOLDER --help has more):

    python shards/build.py --index FOLDER --tokenizer PATH
"""

import os
import sys

if __name__ == "__main__":  # as a script this folder comes first, and its inspect.py hides the standard library's
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import contextlib
import errno
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from mlm_dist import vocab
from mlm_dist.manifest import Manifest, dtype_for, load_manifest
from mlm_dist.schema import ConfigError
from mlm_dist.vocab import Vocab
from shards import files, index, parts, stages
from shards.buckets import RECORD_TOKENS
from shards.files import Piece
from shards.jobs import Job, job_of, vocabulary_size
from shards.runs import Run, Shelf, Spill
from shards.texts import Counts
from shards.workplace import BUILDING, OUTPUT, PARTS, TOKENIZER, Workplace, check_free, check_ours, difference, occupied

EXIT_REFUSED, EXIT_INTERRUPTED = 2, 130
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", type=Path, metavar="PATH", help="files and folders of text")
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder to make")
    add("--tokenizer", help="train:SIZE, a tokenizer.json, or a Hugging Face folder")
    add("--text-key", default="text", help="key of the text in .jsonl lines, column of a .parquet (default: text)")
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
    step = parser.add_mutually_exclusive_group()
    step.add_argument("--tokenizer-only", action="store_true", help="make FOLDER/tokenizer and stop")
    step.add_argument("--part", metavar="I/N", help="tokenize the Ith of N parts of the input, for a later --merge")
    step.add_argument("--merge", action="store_true", help="make the shards out of the N parts in FOLDER")
    return checked(parser, parser.parse_args(argv))


def checked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, if they can be meant together; else the parser ends the process."""
    for name in ("input", "tokenizer"):
        if getattr(args, name) is None and (not args.merge or args.input):
            parser.error(f"the following arguments are required: --{name}")
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
    counts: Counts
    files: int


# ---- the ways to build; each raises ConfigError for what the user has to put right


def build(args: argparse.Namespace) -> Built:
    """Make tokenizer, train and valid in OUT."""
    with occupied(args.out / BUILDING) as place:
        job = job_of(args)
        check_free(args.out, args.force, place, job.plan)
        if not place.concluded(job.plan):
            place.adopt(job.plan)
            tokenizer = with_tokenizer(place, job, args.tokenizer)
            spill = tokenized(place, job, tokenizer, job.pieces)
            make_splits(place, args.workers, spill.runs, tokenizer)
        return finished(place, args.out)


def build_part(args: argparse.Namespace) -> None:
    """Tokenize one part of the inputs into OUT/.parts."""
    part = parts.part_of(args.part)
    if args.tokenizer.startswith("train:"):
        raise ConfigError(
            f"--part needs a tokenizer that all parts share: train it first with --tokenizer {args.tokenizer} "
            f"--tokenizer-only, then give --tokenizer {args.out / 'tokenizer'}"
        )
    with occupied(part.folder(args.out)) as place:
        job = job_of(args)
        check_free(args.out, args.force, place, job.plan)
        own = files.deal(job.pieces, part.count)[part.number - 1]
        place.adopt(job.plan | {"part": str(part), "pieces": len(own)})
        spill = tokenized(place, job, with_tokenizer(place, job, args.tokenizer), own)
    documents, tokens = (sum(int(run.index[name].sum()) for run in spill.runs) for name in ("documents", "tokens"))
    print(f"part {part}: {tokens:,} tokens, {documents:,} documents; with all parts done: --merge --out {args.out}")


def merge(args: argparse.Namespace) -> Built:
    """Make tokenizer, train and valid in OUT of all parts."""
    with occupied(args.out / BUILDING) as place, contextlib.ExitStack() as locks:
        if (args.out / PARTS).exists() or not place.concluded((place.plan or {}) | {"part": "merge"}):
            whole = locks.enter_context(parts.whole_parts(args.out))
            plan = whole.plan | {"part": "merge"}
            if args.input and (changed := difference(plan, job_of(args).plan, parts.OWN)):
                raise ConfigError(f"the parts in {args.out} differ from this command in {changed}; run them again")
            check_free(args.out, args.force, place, plan)
            if not place.concluded(plan):
                place.adopt(plan)
                if not (place.folder / "tokenizer").exists():
                    shutil.copytree(whole.tokenizer, place.folder / "tokenizer.tmp", dirs_exist_ok=True)
                    (place.folder / "tokenizer.tmp").rename(place.folder / "tokenizer")
                make_splits(place, args.workers, whole.runs, vocab.load(place.folder / "tokenizer"))
        return finished(place, args.out)


def build_tokenizer(args: argparse.Namespace) -> Vocab:
    """Make OUT/tokenizer alone; if this very command has made it before, it is left as it is."""
    with occupied(args.out / TOKENIZER) as place:
        if (args.out / "train").exists():
            raise ConfigError(f"{args.out} holds shards, which another tokenizer would not fit; give another --out")
        job = job_of(args)
        plan = job.plan | {"part": "tokenizer"}
        if place.concluded(plan):
            place.publish(args.out)
            made = vocab.load(args.out / "tokenizer") if (args.out / "tokenizer").exists() else None
            if made and made.fingerprint == place.outcome["fingerprint"]:
                return made
            place.clear()  # somebody has changed it
        place.adopt(plan)
        made = with_tokenizer(place, job, args.tokenizer)
        place.conclude({"output": ["tokenizer"], "fingerprint": made.fingerprint})
        place.publish(args.out)
        return made


# ---- their steps


def with_tokenizer(place: Workplace, job: Job, name: str) -> Vocab:
    """The tokenizer, saved in the workplace; trained now if it has to be and isn't there yet."""
    folder = place.folder / "tokenizer"
    if not folder.exists():
        train = [piece for piece in job.pieces if not piece.held_out]
        made = job.tokenizer or stages.train_tokenizer(job.settings, train, vocabulary_size(name))
        made.save(folder.with_suffix(".tmp"))
        folder.with_suffix(".tmp").rename(folder)
    return vocab.load(folder)


def tokenized(place: Workplace, job: Job, tokenizer: Vocab, pieces: Sequence[Piece]) -> Spill:
    """The pieces' documents in the workplace's runs."""
    train, valid = job.plan["buckets"]
    spill = Spill(place.folder / "runs", train + valid, dtype_for(tokenizer.size))
    stages.fill(job.settings, place.folder / "tokenizer", pieces, (train, valid), spill)
    return spill


def make_splits(place: Workplace, workers: int, runs: Sequence[Run], tokenizer: Vocab) -> None:
    """The shards in the workplace, ready to be moved."""
    plan = place.plan
    assert plan is not None
    shelf, (train, valid) = Shelf(runs, dtype_for(tokenizer.size)), plan["buckets"]
    if not shelf.documents[:train].any():
        raise ConfigError("there is nothing to train on: every document is empty or held out")
    counts = Counts()
    for run in runs:
        counts.add(run.counts)
    about = {
        "seed": plan["seed"],
        "valid_fraction": plan["valid_fraction"],
        "text_bytes": counts.text_bytes,
        "empty_documents": counts.empty,
        "replaced_bytes": counts.replaced.total(),
        "versions": plan["versions"],
    }  # no paths, which differ where the shards don't
    made = ["tokenizer"]
    for name, buckets in (("train", range(train)), ("valid", range(train, train + valid))):
        if stages.write_split(workers, shelf, buckets, place.folder / name, tokenizer, about):
            made.append(name)
    place.conclude({"output": made, "counts": vars(counts), "files": plan["files"]})


def finished(place: Workplace, out: Path) -> Built:
    """What came out, all of it in place; the workplace is empty then."""
    outcome = place.outcome
    assert outcome is not None
    place.publish(out)
    counts = Counts(**outcome["counts"])
    counts.replaced = Counter(counts.replaced)
    splits = {name: load_manifest(out / name) for name in reversed(OUTPUT[1:]) if name in outcome["output"]}
    built = Built(splits, counts, outcome["files"])
    if (place.plan or {}).get("part") == "merge" and (out / PARTS).exists():
        (out / PARTS).rename(place.folder / "merged")
    shutil.rmtree(out / TOKENIZER, ignore_errors=True)
    place.clear()
    return built


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
    print(f"  tokenizer {built.splits['train'].vocab_size:>15,} tokens, {per_token:.2f} bytes of text a token")
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


def run(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    start = time.monotonic()
    check_ours(args.out)
    if args.tokenizer_only:
        print(f"{args.out / 'tokenizer'}: {build_tokenizer(args).size:,} tokens")
    elif args.part:
        build_part(args)
    else:
        built = merge(args) if args.merge else build(args)
        report(args.out, built, time.monotonic() - start)


def main(argv: Sequence[str] | None = None) -> int:
    """Build; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if any(str(word).split("=")[0] == "--index" for word in argv):
        return index.main(argv)
    args = parse(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        print(f"interrupted: no shards came into {args.out}; the same command goes on from here", file=sys.stderr)
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
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    sys.exit(main())
