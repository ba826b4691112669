"""What the loader's benchmark reads: the text cut in short documents, the documents for the peers, a large split."""

import gzip
import json
import random
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import numpy as np

from mlm_dist.manifest import Manifest, dtype_for, load_manifest, write_manifest
from mlm_dist.shards import Record, ShardWriter, read_records
from mlm_dist.vocab import Vocab

CHARACTERS_PER_TOKEN = 4.2
# Lengths of documents are lognormal, more or less; these have a mean of 300 tokens and a median of 181.
LOG_MEAN, LOG_DEVIATION = 5.2, 1.0
RECORD_TOKENS = 8192
SHARD_TOKENS, SHARDS = 16_000_000, 64
DIFFERENT_SHARDS = 4


def cut_in_documents(text: Path, out: Path) -> None:
    """Cut the documents of a .jsonl(.gz) at spaces, in pieces of some 300 tokens on average."""
    draw = random.Random(0)
    unpack = gzip.open if text.suffix == ".gz" else open
    with unpack(text, "rt", encoding="utf-8") as lines, gzip.open(out, "wt", compresslevel=1, encoding="utf-8") as file:
        for whole in (json.loads(line)["text"] for line in lines):
            begin = 0
            while begin < len(whole):
                wanted = begin + 1 + int(CHARACTERS_PER_TOKEN * draw.lognormvariate(LOG_MEAN, LOG_DEVIATION))
                space = whole.rfind(" ", begin + 1, wanted)
                end = space if space > 0 and wanted < len(whole) else wanted
                file.write(json.dumps({"text": whole[begin:end]}) + "\n")
                begin = end


def documents_of(manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """All documents of a split end to end, and their lengths."""
    records = [record for shard in range(len(manifest.shards)) for record in read_records(manifest, shard)]
    return np.concatenate([record.tokens for record in records]), np.concatenate([record.lengths for record in records])


def dump_documents(manifest: Manifest, folder: Path) -> Path:
    """The documents of a split for the peers' scripts: tokens.npy and lengths.npy."""
    folder.mkdir()
    tokens, lengths = documents_of(manifest)
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "lengths.npy", lengths)
    return folder


def make_large_split(manifest: Manifest, tokenizer: Vocab, folder: Path, tokens: int) -> Manifest:
    """A split of about `tokens` tokens: a few real shards of the split's documents, under as many names as it takes."""
    shard_tokens = min(SHARD_TOKENS, tokens // SHARDS)
    train = folder / "train"
    train.mkdir(parents=True)
    tokenizer.save(folder / "tokenizer")
    stream = chain.from_iterable(repeat(records_of(manifest)))
    written = []
    for number in range(DIFFERENT_SHARDS):
        with ShardWriter(train, number, dtype_for(tokenizer.size)) as writer:
            count = 0
            while count < shard_tokens:
                record = next(stream)
                writer.write(record)
                count += len(record.tokens)
        written.append((writer.info, writer.records))
    for number in range(DIFFERENT_SHARDS, tokens // shard_tokens):
        info, records = written[number % DIFFERENT_SHARDS]
        name = f"{number:06d}.tar"
        (train / name).symlink_to(info.name)
        records = records.copy()
        records["shard"] = number
        written.append((replace(info, name=name), records))
    write_manifest(train, written, tokenizer.size, tokenizer.fingerprint, {})
    return load_manifest(train)


def records_of(manifest: Manifest) -> list[Record]:
    """The split's records, those of full size where there are such."""
    records = [record for shard in range(len(manifest.shards)) for record in read_records(manifest, shard)]
    return [record for record in records if len(record.tokens) >= RECORD_TOKENS] or records
