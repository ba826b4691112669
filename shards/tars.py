"""One tar of text for build.py --index: every sample checked and counted, and samples grouped into records."""

import itertools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlm_dist.manifest import MEMBERS, RECORDS, ShardError, ShardInfo, TextContent, sha256_of
from mlm_dist.samples import Sample, encode, samples, text_of
from mlm_dist.schema import ConfigError
from shards.buckets import RECORD_TOKENS
from shards.stages import load_once
from shards.texts import Counts

ONE_UP = "../"  # from the manifest in FOLDER/train to tars that lie in FOLDER
TOGETHER = 256  # samples tokenized in one call


class Job(NamedTuple):
    """A tar to index. number: of the shard in its split."""

    split: str
    number: int
    name: str

    def path(self, folder: Path) -> Path:
        """Where the tar lies; FOLDER/train may not exist yet where it lies in FOLDER."""
        return (
            folder / self.name.removeprefix(ONE_UP) if self.name.startswith(ONE_UP) else folder / self.split / self.name
        )


class Indexed(NamedTuple):
    """What was found in a tar. records: (samples,) RECORDS."""

    info: ShardInfo
    records: np.ndarray
    counts: Counts


def index_tar(folder: Path, tokenizer: Path, content: TextContent, either: bool, job: Job) -> Indexed:
    """Read a tar, in a worker. either: a .txt beside a .json is not to be passed over but refused."""
    path = job.path(folder)
    rows, counts = Rows(job.number), Counts()
    try:
        found = checked(path, content, either)
        while batch := list(itertools.islice(found, TOGETHER)):
            texts = [text_in(path, sample, content, counts) for sample in batch]
            for sample, said, ids in zip(batch, texts, encode(load_once(tokenizer), texts), strict=True):
                rows.add(sample, len(ids))
                counts.text_bytes += len(said.encode()) if ids else 0
                counts.empty += not ids
    except ShardError as error:
        raise ConfigError(f"{error.args[0]}: {error.args[1]}") from error
    records = rows.finished()
    if not rows.documents:
        raise ConfigError(f"{path} holds no document; take it out of the folder")
    info = ShardInfo(
        name=job.name,
        samples=len(records),
        documents=rows.documents,
        tokens=rows.tokens,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        first_record=0,
    )
    return Indexed(info, records, counts)


def checked(path: Path, content: TextContent, either: bool) -> Iterator[Sample]:
    """A tar's samples, each with its text and its members together. Raises ShardError for others."""
    met: set[str] = set()
    with path.open("rb") as file:
        for sample in samples(path, file, 0, path.stat().st_size, True, content.member):
            if sample.key in met:
                raise ShardError(path, f"sample {sample.key!r}: its members don't stand together; pack the tar sorted")
            if either and sample.extensions.issuperset(MEMBERS):
                raise ShardError(path, f"sample {sample.key!r} has a .txt and a .json: say which with --member")
            if sample.data is None:
                has = ", ".join(map(repr, sorted(sample.extensions)))
                raise ShardError(path, f"sample {sample.key!r} has no .{content.member} beside its {has}")
            met.add(sample.key)
            yield sample


def text_in(path: Path, sample: Sample, content: TextContent, counts: Counts) -> str:
    """A sample's text; what became U+FFFD is counted."""
    assert sample.data is not None
    try:
        said, replaced = text_of(sample.data, content)
    except ValueError as error:
        raise ShardError(path, f"sample {sample.key!r}: its .json {error}") from error
    if replaced:
        where = next(iter(counts.replaced), f"{path}, first in sample {sample.key!r}")
        counts.replaced[where] += replaced
    return said


class Rows:
    """Groups samples into records: those that begin within the same 8,192 tokens, whole, at least one with tokens."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.rows: list[list[int]] = []
        self.documents = self.tokens = self.slot = 0

    def add(self, sample: Sample, tokens: int) -> None:
        """The shard's next sample. One without tokens goes with those before it."""
        slot = self.tokens // RECORD_TOKENS
        if not self.rows or (tokens and self.rows[-1][2] and slot != self.slot):
            self.rows.append([self.number, sample.offset, 0, 0, 0])
        row = self.rows[-1]
        if tokens:
            self.slot = slot
            row[2] += 1
            row[3] += tokens
            self.documents += 1
            self.tokens += tokens
        row[4] = zlib.crc32(sample.data or b"", row[4])

    def finished(self) -> np.ndarray:
        """(samples,) RECORDS"""
        return np.array([tuple(row) for row in self.rows], RECORDS)


def content_of(folder: Path, jobs: Sequence[Job], member: str | None, text_key: str) -> TextContent:
    """Where the text is: as --member says, or as the first sample has it."""
    if member is None:
        path = jobs[0].path(folder)
        try:
            with path.open("rb") as file:
                first = next(samples(path, file, 0, path.stat().st_size, True, MEMBERS[0]), None)
        except ShardError as error:
            raise ConfigError(f"{error.args[0]}: {error.args[1]}") from error
        if first is None:
            raise ConfigError(f"{path} holds no document; take it out of the folder")
        has = [name for name in MEMBERS if name in first.extensions]
        if len(has) != 1:
            others = ", ".join(map(repr, sorted(first.extensions)))
            fix = "say which with --member" if has else "the text must be in a .txt, or in a .json"
            raise ConfigError(f"{path}: sample {first.key!r} has {others}: {fix}")
        member = has[0]
    return TextContent(member, text_key)
