"""What is in a folder of shards: counts, lengths, the first documents; and with --verify whether every file is whole.

    python shards/inspect.py FOLDER [--verify]

FOLDER is one that build.py made, or one split of it; or the URL of either, whose files come
through a cache. Exits with 1 where --verify finds something wrong, and names it.
"""

import os
import sys

if (
    __name__ == "__main__"
):  # as a script this folder comes first, and this very file hides the standard library's inspect
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
from collections.abc import Iterator, Sequence

import numpy as np

from mlm_dist import remote, vocab
from mlm_dist.cache import Cache, make_cache
from mlm_dist.fetch import Patience
from mlm_dist.manifest import Manifest, ShardError, TextContent, verify
from mlm_dist.schema import ConfigError
from mlm_dist.shards import Record, read_records
from mlm_dist.vocab import Vocab

EXIT_DAMAGED, EXIT_REFUSED = 1, 2
PERCENTILES = (1, 10, 25, 50, 75, 90, 99, 100)
SAMPLED_RECORDS = 2000  # read for the lengths of documents
SAMPLED_TEXT_RECORDS = 200  # of shards of text, which are tokenized for it
SHOWN_CHARACTERS = 300


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a folder made by build.py, or one split of it; or its URL")
    parser.add_argument("--verify", action="store_true", help="compare every file with its checksum")
    parser.add_argument(
        "--documents", type=int, default=2, help="how many documents to show of each split (default: 2)"
    )
    parser.add_argument("--cache-dir", help="where remote shards are kept (default: mlm_dist in your cache folder)")
    parser.add_argument("--cache-gb", type=float, default=50.0, help="most that they take there (default: 50)")
    return parser.parse_args(argv)


def splits_of(folder: str, cache: Cache) -> list[Manifest]:
    """The splits in a folder or at a URL, or the folder itself where it is one. Raises ConfigError for none."""
    found = [remote.find_split(remote.join(folder, name), cache) for name in ("train", "valid")]
    return [manifest for manifest in found if manifest] or [remote.open_split(folder, cache)]


def sampled(manifest: Manifest, tokenizer: Vocab) -> Iterator[Record]:
    """Some 2,000 records, of shards of text 200, from as many shards as that takes, spread over the split."""
    wanted = SAMPLED_TEXT_RECORDS if manifest.text else SAMPLED_RECORDS
    per_shard = max(1, manifest.samples // len(manifest.shards))
    count = min(len(manifest.shards), -(-wanted // per_shard))
    for shard in np.linspace(0, len(manifest.shards) - 1, count).astype(int).tolist():
        records = min(-(-wanted // count), manifest.shards[shard].samples) if manifest.text else None
        yield from read_records(manifest, shard, 0, records, tokenizer)


def show(manifest: Manifest, tokenizer: Vocab, documents: int) -> None:
    """Print a split's numbers and its first documents."""
    print(manifest.place())
    sizes = np.array([shard.tokens for shard in manifest.shards])
    rows = (
        ("tokens", f"{manifest.tokens:,} ({manifest.dtype}, vocabulary of {manifest.vocab_size:,})"),
        ("documents", f"{manifest.documents:,}, {manifest.tokens / manifest.documents:,.0f} tokens each"),
        ("records", f"{manifest.samples:,}, {manifest.tokens / manifest.samples:,.0f} tokens each"),
        ("shards", f"{len(sizes):,}, {sizes.min():,} to {sizes.max():,} tokens, {manifest.bytes / 1e6:,.1f} MB in all"),
        *([("text", described(manifest.text))] if manifest.text else []),
        ("built with", ", ".join(f"{name} {said}" for name, said in manifest.about.get("versions", {}).items())),
    )
    for name, said in rows:
        print(f"  {name:12} {said}")
    records = list(sampled(manifest, tokenizer))
    lengths = np.concatenate([record.lengths for record in records])
    numbers = np.percentile(lengths, PERCENTILES, method="lower")
    print(f"  tokens a document, percentiles over {len(lengths):,} documents:")
    print("   " + "".join(f"{f'{percent} %':>10}" for percent in PERCENTILES))
    print("   " + "".join(f"{int(number):>10,}" for number in numbers))
    for number, ids in enumerate(first_documents(records, documents), 1):
        text = tokenizer.decode(ids[:SHOWN_CHARACTERS])  # a token has a character at least
        print(f"  document {number}, {len(ids):,} tokens: {shortened(text)}")


def described(text: TextContent) -> str:
    """Where shards of text have it, in words."""
    return (
        f"in .{text.member} members{f', under {text.text_key!r}' if text.member == 'json' else ''}; tokenized as read"
    )


def first_documents(records: list[Record], count: int) -> Iterator[np.ndarray]:
    """The token ids of the first `count` documents."""
    for record in records:
        for ids in np.split(record.tokens, np.cumsum(record.lengths)[:-1]):
            if count <= 0:
                return
            count -= 1
            yield ids


def shortened(text: str) -> str:
    """The beginning of a text on one line, control characters escaped."""
    return repr(text[:SHOWN_CHARACTERS]) + (" ..." if len(text) > SHOWN_CHARACTERS else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Inspect; returns the exit code."""
    args = parse(argv)
    try:
        cache = make_cache(args.cache_dir, args.cache_gb, Patience().total_seconds)
        manifests = splits_of(args.folder, cache)
        first = manifests[0]
        parent = first.place().rpartition("/")[0] if first.source else str(first.path.resolve().parent)
        tokenizer_folder = remote.join(parent, "tokenizer")
        tokenizer = vocab.load(remote.open_tokenizer(tokenizer_folder, cache))
        problems = []
        for manifest in manifests:
            if manifest.tokenizer_sha256 != tokenizer.fingerprint:
                problems.append(f"{tokenizer_folder} is not the tokenizer that {manifest.place()} was built with")
            if args.verify:
                problems += verify(manifest)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_DAMAGED if args.verify else EXIT_REFUSED
    for problem in problems:
        print(f"damaged: {problem}", file=sys.stderr)
    if problems:
        return EXIT_DAMAGED
    try:
        for manifest in manifests:
            show(manifest, tokenizer, args.documents)
    except ShardError as error:
        print(f"damaged: {error}", file=sys.stderr)
        return EXIT_DAMAGED
    if args.verify:
        print(f"verified: {sum(len(manifest.shards) for manifest in manifests):,} shards are as they were written")
    return 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
