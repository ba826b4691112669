"""The manifest of a split: what every file of it must hold, with counts and checksums.

A split is a folder of shards, of tokens or of text. `records.npy` holds the place, the counts and the crc32 of every
record; `manifest.json`, written last, holds the counts and the sha256 of every file.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from mlm_dist.schema import ConfigError

FORMAT = 1
RECORDS = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("documents", "<u4"), ("tokens", "<u8"), ("crc32", "<u4")])
MEMBERS = ("txt", "json")  # that text is read from
TAR_OF_TEXT = re.compile(r"(\.\./)?[^./\0][^/\0]*\.tar")  # beside the manifest, or one folder up: nowhere else
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
REBUILD = (
    "copy this file again from where the shards were built, rebuild them with shards/build.py, "
    "or let training skip bad shards with data.max_bad_shards"
)


# Why a shard can't be used: what is counted, by the name it is logged under.
REASONS = (
    "missing",  # no such file
    "unreadable",  # the file system refuses
    "unreachable",  # the place it comes from does not answer
    "empty",  # a file of no bytes, or a tar of no members
    "truncated",  # shorter than the manifest says
    "altered",  # a checksum fails, or a header is none
    "malformed",  # records or members missing, repeated or out of order
    "foreign_member",  # something else than tokens and lengths
    "foreign_ids",  # ids that the tokenizer doesn't have
)


class ShardError(RuntimeError):
    """A shard that is not what its manifest says: `ShardError(file, what is wrong, reason)`.

    Or a whole sentence alone, of what is no fault of the shard: then it is no use to skip it.
    """

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}; {REBUILD}" if len(self.args) > 1 else str(self.args[0])

    @property
    def of_the_shard(self) -> bool:
        """Whether going on without the shard would help."""
        return len(self.args) > 1

    @property
    def reason(self) -> str:
        """One of REASONS."""
        reason = self.args[2] if len(self.args) > 2 else "unreadable"
        assert reason in REASONS, reason
        return reason


@dataclass(frozen=True)
class TextContent:
    """Shards of text. member: the extension that holds a sample's text; text_key: where the text is in a .json."""

    member: str
    text_key: str


@dataclass(frozen=True)
class ShardInfo:
    """One tar of a split. samples: its records; bytes: of the file; first_record: its first row of records.npy."""

    name: str
    samples: int
    documents: int
    tokens: int
    bytes: int
    sha256: str
    first_record: int


class Source(Protocol):
    """Where the shards of a split come from that is not in a folder of this machine."""

    address: str

    def open(self, shard: ShardInfo) -> BinaryIO:
        """The shard's file as its manifest says, fetched first where it must be. Raises ShardError."""

    def ahead(self, shard: ShardInfo, lanes: int) -> None:
        """Begin to fetch a shard that will be wanted soon; lanes: how many read at the same time."""

    def roomy(self, lanes: int) -> bool:
        """True where so many lanes can read, and have their next shards fetched, without a shard coming twice."""

    def check(self, shard: ShardInfo) -> bool:
        """Compare a shard with its sha256; True where what was kept was damaged, and was fetched again.

        Raises ShardError.
        """


@dataclass(frozen=True)
class Manifest:
    """A split of the shards: what every file must hold. `hash` is the sha256 of manifest.json's bytes."""

    path: Path
    shards: tuple[ShardInfo, ...]
    dtype: str
    vocab_size: int
    tokenizer_sha256: str
    hash: str
    records: np.ndarray = field(compare=False, repr=False)  # (samples,) RECORDS, memory mapped
    about: dict[str, Any] = field(compare=False, repr=False)  # how it was built: versions, counts
    text: TextContent | None = None  # none: the shards hold tokens
    source: Source | None = field(default=None, compare=False, repr=False)  # none: the shards stand in `path`

    def __reduce__(self) -> tuple[Callable[..., "Manifest"], tuple[Path, Source | None]]:
        return load_manifest, (self.path, self.source)  # a worker process maps records.npy instead of copying it

    def place(self, name: str = "") -> str:
        """Where the user finds the split, or a file of it: a path or a URL."""
        return beside(self.source.address, name) if self.source else str(self.path / name)

    def open(self, shard: int) -> BinaryIO:
        """A shard's file. Raises OSError or ShardError."""
        info = self.shards[shard]
        return self.source.open(info) if self.source else (self.path / info.name).open("rb")

    def mended(self, shard: int) -> bool:
        """Whether a shard was found damaged in this machine's cache, and has been fetched again. Raises ShardError."""
        return self.source is not None and self.source.check(self.shards[shard])

    def ahead(self, shard: int, lanes: int) -> None:
        """Tell that a shard will be wanted soon, after those that the `lanes` lanes read now."""
        if self.source:
            self.source.ahead(self.shards[shard], lanes)

    @property
    def samples(self) -> int:
        return len(self.records)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


# ---- writing


def dtype_for(vocab_size: int) -> str:
    """The name of the smallest stored type that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def write_manifest(
    split_dir: str | Path,
    written: Sequence[tuple[ShardInfo, np.ndarray]],
    vocab_size: int,
    tokenizer_sha256: str,
    about: Mapping[str, Any],
    text: TextContent | None = None,
) -> Manifest:
    """Write records.npy and then manifest.json, atomically: from here on the split is whole.

    written: `(info, records)` of every shard, shard 0 first; about: how it was built, kept for the reader; text: where
    shards of text have it.
    """
    split_dir = Path(split_dir)
    shards = []
    first = 0
    for number, (info, rows) in enumerate(written):
        assert names_shard(info.name, number, text) and len(rows) == info.samples and (rows["shard"] == number).all()
        shards.append(asdict(info) | {"first_record": first})
        first += info.samples
    records = io.BytesIO()
    np.save(records, np.concatenate([np.zeros(0, RECORDS), *(rows for _, rows in written)]), allow_pickle=False)
    replace_file(split_dir / "records.npy", records.getvalue())
    manifest = {
        "format": FORMAT,
        **({"content": "text", **asdict(text)} if text else {}),
        "dtype": dtype_for(vocab_size),
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_sha256,
        "records_sha256": hashlib.sha256(records.getvalue()).hexdigest(),
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "about": dict(about),
        "shards": shards,
    }
    replace_file(split_dir / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    return load_manifest(split_dir)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader, or a crash, meets the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # half a file takes what is left of a full disk
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading


def load_manifest(split_dir: str | Path, source: Source | None = None) -> Manifest:
    """The manifest of a split (OUT/train, OUT/valid); source: of its shards, where they are not beside it.

    Raises ConfigError for a folder that is not a whole split.
    """
    split_dir = Path(split_dir)
    file = split_dir / "manifest.json"
    if re.match(r"\w[\w+.-]*:", str(split_dir)) and not split_dir.exists():
        raise ConfigError(
            f"shards are read from a local folder, not from {str(split_dir)!r}; copy them, give the folder"
        )
    if (split_dir / "train" / "manifest.json").exists():
        raise ConfigError(f"{split_dir} holds several splits; give {split_dir / 'train'} or {split_dir / 'valid'}")
    if not file.exists():
        state = "is a build that did not finish: it has no manifest.json" if split_dir.is_dir() else "doesn't exist"
        raise ConfigError(
            f"{split_dir} {state}; build it with `python shards/build.py --input TEXT --out FOLDER`, "
            "or write the manifest of WebDataset tars of text with `--index FOLDER`"
        )
    raw = file.read_bytes()
    try:
        said = json.loads(raw)
        if said["format"] != FORMAT:
            raise ConfigError(f"{file} is of format {said['format']}, this version reads {FORMAT}; rebuild the shards")
        shards = tuple(ShardInfo(**shard) for shard in said["shards"])
        manifest = Manifest(
            path=split_dir,
            shards=shards,
            dtype=said["dtype"],
            vocab_size=said["vocab_size"],
            tokenizer_sha256=said["tokenizer_sha256"],
            hash=hashlib.sha256(raw).hexdigest(),
            records=load_records(split_dir / "records.npy", said["records_sha256"]),
            about=said["about"],
            text=text_content(said),
            source=source,
        )
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is damaged ({error!r}); copy it again or rebuild the shards") from error
    check(manifest)
    return manifest


def beside(address: str, name: str) -> str:
    """The address of a split's file; `../name` stands beside the split's folder, which few servers make out."""
    if name.startswith("../"):
        address, name = address.rsplit("/", 1)[0], name.removeprefix("../")
    return f"{address}/{name}".rstrip("/")


def text_content(said: Mapping[str, Any]) -> TextContent | None:
    """What a manifest says of shards of text; none where the shards hold tokens."""
    if "content" not in said:
        return None
    if said["content"] != "text":
        raise KeyError(said["content"])
    return TextContent(said["member"], said["text_key"])


def names_shard(name: Any, number: int, text: TextContent | None) -> bool:
    """True where shard `number` may have this name: ours have their number, tars of text any that stays in place."""
    if text is None:
        return name == f"{number:06d}.tar"
    return isinstance(name, str) and TAR_OF_TEXT.fullmatch(name) is not None


def load_records(file: Path, sha256: str) -> np.ndarray:
    """records.npy, memory mapped. Raises ConfigError where it is missing or altered."""
    if not file.exists():
        raise ConfigError(f"{file} is missing; copy it again or rebuild the shards")
    if sha256_of(file) != sha256:
        raise ConfigError(f"{file} is not the file its manifest was written for; copy it again or rebuild the shards")
    records = np.load(file, mmap_mode="r", allow_pickle=False)
    if records.dtype != RECORDS:
        raise ConfigError(f"{file} has columns {records.dtype}, expected {RECORDS}; rebuild the shards")
    return records


def check(manifest: Manifest) -> None:
    """Raises ConfigError where a manifest contradicts itself or names a file outside its folder."""
    first = 0
    wrong = "" if manifest.dtype in DTYPES else f"dtype {manifest.dtype!r}"
    if manifest.text and (manifest.text.member not in MEMBERS or not isinstance(manifest.text.text_key, str)):
        wrong = f"text in {manifest.text}"
    for number, shard in enumerate(manifest.shards):
        rows = manifest.records[first : first + shard.samples]
        counts = (shard.first_record, len(rows), int(rows["documents"].sum()), int(rows["tokens"].sum()))
        if not names_shard(shard.name, number, manifest.text):
            wrong = f"shard {number} is named {shard.name!r}"
        elif shard.samples < 1:
            wrong = f"{shard.name} holds no record"
        elif counts != (first, shard.samples, shard.documents, shard.tokens) or (rows["shard"] != number).any():
            wrong = f"{shard.name} and records.npy count differently"
        first += shard.samples
    if first != len(manifest.records):
        wrong = f"{first} records in the shards, {len(manifest.records)} in records.npy"
    if wrong:
        raise ConfigError(f"{manifest.path / 'manifest.json'} contradicts itself: {wrong}; rebuild the shards")


def verify(manifest: Manifest) -> list[str]:
    """What is wrong with the shards' files, one sentence each: every size and sha256 compared. Empty if all is well."""
    problems = []
    for shard in manifest.shards:
        path = manifest.path / shard.name
        if manifest.source:
            try:
                manifest.source.check(shard)
            except ShardError as error:
                problems.append(": ".join(map(str, error.args[:2])))
        elif not path.exists():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != shard.bytes:
            problems.append(f"{path} has {path.stat().st_size:,} bytes, the manifest says {shard.bytes:,}")
        elif sha256_of(path) != shard.sha256:
            problems.append(f"{path} is altered: its sha256 is not the manifest's")
    return problems


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
