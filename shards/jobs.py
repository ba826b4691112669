"""What is to be built: the inputs, the options, and the plan that says whether two builds are the same."""

import argparse
import importlib.metadata
import platform
import re
from typing import Any, NamedTuple

from mlm_dist import vocab
from mlm_dist.manifest import dtype_for
from mlm_dist.schema import ConfigError
from mlm_dist.vocab import Vocab
from shards import files, parts
from shards.buckets import bucket_count
from shards.files import Piece
from shards.stages import Settings
from shards.texts import Reading

PLAN_FORMAT = 1
LIBRARIES = ("mlm_dist", "webdataset", "tokenizers", "numpy")


class Job(NamedTuple):
    """What is to be done. tokenizer: the one that was loaded, or None for one that is still to be trained."""

    settings: Settings
    pieces: list[Piece]
    tokenizer: Vocab | None
    plan: dict[str, Any]


def settings_of(args: argparse.Namespace) -> Settings:
    """The options that the stages need."""
    return Settings(
        workers=args.workers,
        reading=Reading(args.text_key, args.document_bytes, args.strict),
        seed=args.seed,
        valid_fraction=args.valid_fraction,
        sample_bytes=args.tokenizer_sample_mb * 1_000_000,
    )


def job_of(args: argparse.Namespace) -> Job:
    """The job, with a plan that holds all that the shards depend on."""
    train_files = files.find(args.input, args.exclude)
    valid_files = files.find(args.valid_input, args.exclude) if args.valid_input else []
    pieces = files.pieces(train_files, held_out=False) + files.pieces(valid_files, held_out=True)
    size = files.text_bytes(train_files)
    valid_size = files.text_bytes(valid_files) or size * args.valid_fraction
    training = args.tokenizer.startswith("train:")
    tokenizer = None if training else vocab.load(args.tokenizer)
    if training:
        vocabulary_size(args.tokenizer)
    plan = {
        "format": PLAN_FORMAT,
        "part": "1/1",
        "inputs": parts.inputs_hash(pieces),
        "tokenizer": tokenizer.fingerprint if tokenizer else f"{args.tokenizer} on {args.tokenizer_sample_mb} MB",
        "dtype": dtype_for(tokenizer.size) if tokenizer else None,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }
    keys = ("text_key", "document_bytes", "strict", "seed", "valid_fraction", "shard_tokens")
    plan |= {key: getattr(args, key) for key in keys}
    plan |= {  # what follows from the above; these come last, so that a difference is called by its cause
        "pieces": len(pieces),
        "files": len(train_files) + len(valid_files),
        "buckets": [bucket_count(size, args.shard_tokens), bucket_count(valid_size, args.shard_tokens)],
    }
    return Job(settings_of(args), pieces, tokenizer, plan)


def vocabulary_size(name: str) -> int:
    """The size in "train:SIZE"."""
    size = name.removeprefix("train:")
    if not re.fullmatch("[0-9]+", size):
        raise ConfigError(f"--tokenizer {name}: the size of the vocabulary must be a number, as in train:32768")
    vocab.check_size(int(size))
    return int(size)


def version(library: str) -> str:
    """The library's version, or "source" where it isn't installed but run from its folder."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "source"
