"""WebDataset tars of text as they are, with a manifest of their own:

    python shards/build.py --index FOLDER --tokenizer PATH

reads every .tar in FOLDER/train and FOLDER/valid, or in FOLDER itself, once: counts, checks, and writes where each
record begins. The tars are not touched; training tokenizes them as it reads.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from mlm_dist import vocab
from mlm_dist.manifest import (
    MEMBERS,
    TAR_OF_TEXT,
    Manifest,
    TextContent,
    sync_folder,
    write_manifest,
)
from mlm_dist.schema import ConfigError
from mlm_dist.vocab import Vocab
from shards.pool import Progress, in_order, workers
from shards.tars import ONE_UP, Indexed, Job, content_of, index_tar
from shards.texts import Counts

EXIT_REFUSED, EXIT_INTERRUPTED = 2, 130
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
WORKPLACE = ".indexing"  # in FOLDER: the lock, and the tokenizer until it is in place


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="build.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--index", type=Path, required=True, metavar="FOLDER", help="the tars, in train/ and valid/ or directly")
    add("--tokenizer", required=True, help="a tokenizer.json or a Hugging Face folder")
    add("--member", choices=MEMBERS, help="what holds the text, where samples have a .txt and a .json")
    add("--text-key", default="text", help="key of the text in .json members (default: text)")
    add(
        "--valid-shards", type=int, default=0, help="tars held out of those directly in FOLDER, by a hash of their name"
    )
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one a core)")
    add("--force", action="store_true", help="write the manifests anew where there are some")
    args = parser.parse_args(argv)
    for name, least in (("workers", 1), ("valid_shards", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return args


# ---- which tars


def find(folder: Path, valid_shards: int) -> dict[str, list[str]]:
    """The tars of each split, sorted, as the manifest in FOLDER/train or FOLDER/valid names them."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give --index the folder that holds the tars")
    here, train, valid = (tars_in(part) for part in (folder, folder / "train", folder / "valid"))
    if not here and not train:
        raise ConfigError(f"there is no .tar in {folder} or {folder / 'train'}")
    if here and (train or valid):
        raise ConfigError(
            f"{folder} holds tars and so does {folder / ('train' if train else 'valid')}: which are meant?"
        )
    if not train and (folder / "valid").is_dir() and not is_left_over(folder / "valid"):
        raise ConfigError(f"{folder / 'valid'} holds other files, and no tar; take them away")
    if train and valid_shards:
        raise ConfigError(f"--valid-shards is for tars directly in {folder}; these are in train/: move some to valid/")
    if train:
        if not valid and (folder / "valid").exists() and not is_left_over(folder / "valid"):
            raise ConfigError(f"{folder / 'valid'} holds no .tar; put the held-out ones there, or take it away")
        return {"train": train, "valid": valid} if valid else {"train": train}
    if valid_shards >= len(here):
        raise ConfigError(f"--valid-shards {valid_shards} leaves nothing of {len(here)} tars to train on")
    by_hash = sorted(here, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    held_out = set(by_hash[:valid_shards])
    splits = {"train": [name for name in here if name not in held_out], "valid": sorted(held_out)}
    return {split: [ONE_UP + name for name in names] for split, names in splits.items() if names}


def tars_in(folder: Path) -> list[str]:
    """The names of a folder's tars, sorted; hidden files are left out."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    packed = [name for name in names if name.lower().endswith(COMPRESSED)]
    if packed:
        raise ConfigError(f"{folder / packed[0]} is compressed, and there is no seeking in it: unpack it to a .tar")
    named = [name for name in names if name.lower().endswith(".tar") and not name.startswith(".")]
    odd = [name for name in named if not TAR_OF_TEXT.fullmatch(name)]
    if odd:
        raise ConfigError(f"{folder / odd[0]} is no name of a tar that is read: let it end in .tar, in small letters")
    return [name for name in names if TAR_OF_TEXT.fullmatch(name)]


def is_left_over(part: Path) -> bool:
    """True for a folder that holds nothing but a manifest, as an index of tars elsewhere leaves it."""
    return all(path.name.removesuffix(".tmp") in ("manifest.json", "records.npy") for path in part.iterdir())


# ---- the whole


def index(args: argparse.Namespace) -> tuple[dict[str, Manifest], Vocab, Counts]:
    """Read every tar, and write the manifests. Raises ConfigError for what the user has to put right."""
    folder: Path = args.index
    if args.tokenizer.startswith("train:"):
        raise ConfigError("--index tokenizes with a tokenizer that exists; train one first: build.py --input ... --out")
    names = find(folder, args.valid_shards)
    tokenizer = vocab.load(args.tokenizer)
    check_place(folder, tokenizer, args.force)
    jobs = [Job(split, number, name) for split in names for number, name in enumerate(names[split])]
    with workplace(folder):
        tokenizer.save(folder / WORKPLACE / "tokenizer")
        content = content_of(folder, jobs, args.member, args.text_key)
        found = index_all(
            folder,
            jobs,
            functools.partial(index_tar, folder, folder / WORKPLACE / "tokenizer", content, args.member is None),
            args.workers,
        )
        counts = Counts()
        for indexed in found:
            counts.add(indexed.counts)
        by_split = {split: [one for one, job in zip(found, jobs, strict=True) if job.split == split] for split in names}
        manifests = publish(folder, by_split, tokenizer, content, describe(counts))
    return manifests, tokenizer, counts


def index_all(folder: Path, jobs: Sequence[Job], work: Callable[[Job], Indexed], processes: int) -> list[Indexed]:
    """What is in each tar, in the order of the jobs."""
    sizes = [job.path(folder).stat().st_size for job in jobs]
    progress = Progress("indexing", sum(sizes))
    found = []
    done = tokens = 0
    with workers(min(processes, len(jobs))) as pool:
        for size, (_, indexed) in zip(sizes, in_order(pool, processes, work, jobs), strict=True):
            found.append(indexed)
            done, tokens = done + size, tokens + indexed.info.tokens
            progress.show(done, f"{len(found):,} of {len(jobs):,} tars, {tokens:,} tokens")
    progress.close()
    return found


def check_place(folder: Path, tokenizer: Vocab, force: bool) -> None:
    """Raise ConfigError where manifests or another tokenizer would be replaced unasked."""
    for split in ("train", "valid"):
        if (folder / split / "manifest.json").exists() and not force:
            raise ConfigError(f"{folder / split} has a manifest already; --force writes it anew")
    if (folder / "tokenizer").exists() and not force and not is_same(folder / "tokenizer", tokenizer):
        raise ConfigError(f"{folder / 'tokenizer'} is another tokenizer; name that one, or give --force to replace it")


def is_same(place: Path, tokenizer: Vocab) -> bool:
    """True where a folder holds this tokenizer."""
    try:
        return vocab.load(place).fingerprint == tokenizer.fingerprint
    except ConfigError:
        return False


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[None]:
    """FOLDER/.indexing, with a lock in it, gone afterwards."""
    place = folder / WORKPLACE
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{folder} is being indexed by another process; wait for it") from error
        try:
            for left in place.iterdir():  # by an index that was killed
                if left.is_dir():
                    shutil.rmtree(left)
            yield
        finally:
            shutil.rmtree(place, ignore_errors=True)


def publish(
    folder: Path,
    found: Mapping[str, Sequence[Indexed]],
    tokenizer: Vocab,
    content: TextContent,
    about: Mapping[str, object],
) -> dict[str, Manifest]:
    """Put tokenizer and manifests in place, train's manifest last: without it no index is whole."""
    for split in ("train", "valid"):
        (folder / split / "manifest.json").unlink(missing_ok=True)
    if not is_same(folder / "tokenizer", tokenizer):
        if (folder / "tokenizer").exists():
            (folder / "tokenizer").rename(folder / WORKPLACE / "replaced")
        (folder / WORKPLACE / "tokenizer").rename(folder / "tokenizer")
        sync_folder(folder)
    manifests = {}
    for split in ("valid", "train"):
        if split in found:
            (folder / split).mkdir(exist_ok=True)
            written = [(one.info, one.records) for one in found[split]]
            manifests[split] = write_manifest(
                folder / split, written, tokenizer.size, tokenizer.fingerprint, about, content
            )
        elif (folder / split).exists():  # of an index with other --valid-shards
            (folder / split / "records.npy").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds something else
                (folder / split).rmdir()
    return manifests


def describe(counts: Counts) -> dict[str, object]:
    """What the manifests say of how they came about."""
    return {
        "text_bytes": counts.text_bytes,
        "empty_documents": counts.empty,
        "replaced_bytes": counts.replaced.total(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("tokenizers", "numpy")},
    }


def report(folder: Path, manifests: Mapping[str, Manifest], tokenizer: Vocab, counts: Counts, seconds: float) -> None:
    """The summary."""
    tokens = sum(split.tokens for split in manifests.values())
    print(f"{folder}: {tokens:,} tokens of {counts.text_bytes / 1e6:,.1f} MB of text; {seconds:.1f} s")
    for name, split in sorted(manifests.items()):
        print(
            f"  {name:9} {split.tokens:>15,} tokens {split.documents:>11,} documents {split.samples:>9,} records "
            f"{len(split.shards):>5,} shards {split.bytes / 1e6:>10,.1f} MB"
        )
    print(f"  tokenizer {tokenizer.size:>15,} tokens, {counts.text_bytes / tokens:.2f} bytes of text a token")
    if counts.empty:
        print(f"  note: {counts.empty:,} empty documents are passed over")
    if counts.replaced:
        worst = "; ".join(f"{where} ({count:,})" for where, count in counts.replaced.most_common(3))
        more = len(counts.replaced) - 3
        print(
            f"  note: {counts.replaced.total():,} bytes are not UTF-8 and become U+FFFD: {worst}"
            f"{f'; and in {more:,} more tars' if more > 0 else ''}"
        )
    if "valid" not in manifests:
        print("  note: no tar is held out, so training can't be evaluated; give --valid-shards, or fill valid/")


def main(argv: Sequence[str]) -> int:
    """Index; returns the exit code."""
    args = parse(argv)
    start = time.monotonic()
    try:
        manifests, tokenizer, counts = index(args)
    except KeyboardInterrupt:
        print(f"interrupted: {args.index} has no new manifest", file=sys.stderr)
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
        print(f"error: {error.strerror or error}: {error.filename or args.index}", file=sys.stderr)
        return EXIT_REFUSED
    report(args.index, manifests, tokenizer, counts, time.monotonic() - start)
    return 0
