"""Splits at a URL: their shards are fetched when they are wanted, or a little ahead, through the machine's cache."""

import errno
import hashlib
import json
import os
import queue
import re
import shutil
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from mlm_dist.cache import Cache
from mlm_dist.fetch import WEB, FetchError, checked, fill, is_remote, public
from mlm_dist.manifest import Manifest, ShardError, ShardInfo, beside, load_manifest, sha256_of
from mlm_dist.schema import ConfigError

# True where a split, or a tokenizer, must have the file.
SPLIT_FILES = {"manifest.json": True}
TOKENIZER_FILES = {"tokenizer.json": True, "tokenizer_config.json": False, "special_tokens_map.json": False}

AHEAD_THREADS = 2  # in each process that reads
WRONG_DOWNLOADS = 2  # with another sha256 than the manifest's, before the shard counts as bad


# ---- the shards of a split


@dataclass(frozen=True)
class RemoteShards:
    """The shards of a split at an address: a `manifest.Source`. largest: bytes of the largest of them."""

    address: str
    cache: Cache
    largest: int
    queue: "AheadQueue"
    sharing: int = 1  # how many sources of the run have the cache between them

    def place(self, shard: ShardInfo) -> str:
        """The shard's address; what would end a path in a URL is escaped in its name."""
        name = shard.name
        if self.address.startswith(WEB):
            name = name.replace("%", "%25").replace("#", "%23").replace("?", "%3F")
        return beside(self.address, name)

    def open(self, shard: ShardInfo) -> BinaryIO:
        """The shard's file; closing it lets it be evicted. Raises ShardError with what the server said."""
        deadline = self.cache.patience.deadline()
        try:
            while (file := self.cache.whole(shard)) is None:
                part = self.cache.claim(shard, deadline)
                if part:
                    with part:
                        self.fetch(shard, part, deadline)
                        file = self.cache.whole(shard)  # before the lock goes, and with it perhaps the file
                    assert file
                    break
            return file
        except FetchError as error:
            raise ShardError(self.place(shard), f"can't be fetched: {error}", error.reason) from None
        except OSError as error:
            sentence = f"{self.place(shard)} can't be kept in {self.cache.folder} ({error.strerror or error})"
            raise ShardError(f"{sentence}; make room there, lower data.cache_gb or set data.cache_dir") from error

    def fetch(self, shard: ShardInfo, part: BinaryIO, deadline: float) -> None:
        """Complete a claimed file and give it its name. Raises FetchError or OSError."""
        for _ in range(WRONG_DOWNLOADS):
            while True:
                try:
                    fill(part, self.place(shard), shard.bytes, self.cache.patience, deadline)
                    break
                except OSError as error:
                    if error.errno != errno.ENOSPC or not self.cache.evict_one():
                        part.truncate(0)
                        raise
            if sha256_of(self.cache.part(shard)) == shard.sha256:
                return self.cache.finish(shard, part)
            part.truncate(0)
        said = f"what came is not the file of the manifest ({WRONG_DOWNLOADS} times another sha256)"
        raise FetchError(said, reason="altered")

    def ahead(self, shard: ShardInfo, lanes: int) -> None:
        """Fetch a shard in the background, unless it would push out what the lanes are reading."""
        if self.roomy(lanes) and not self.cache.path(shard).exists():
            self.queue.put(self, shard)

    def roomy(self, lanes: int) -> bool:
        """True where the cache has room for two shards of every lane."""
        return 2 * lanes * self.sharing * self.largest <= self.cache.bytes

    def check(self, shard: ShardInfo) -> bool:
        """Compare the cached shard with its sha256; True where it was altered there, and was fetched again."""
        with self.open(shard) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                return False
            self.cache.path(shard).unlink(missing_ok=True)
        self.open(shard).close()
        return True


class AheadQueue:
    """Shards to fetch in the background, by a few threads of the process that asks first."""

    def __init__(self) -> None:
        self.process: int | None = None
        self.wanted: queue.SimpleQueue[tuple[RemoteShards, ShardInfo]] = queue.SimpleQueue()

    def __reduce__(self) -> tuple[type["AheadQueue"], tuple[()]]:
        return AheadQueue, ()

    def put(self, shards: RemoteShards, shard: ShardInfo) -> None:
        if self.process != os.getpid():  # threads don't come along into a forked process
            self.process = os.getpid()
            self.wanted = queue.SimpleQueue()
            for _ in range(AHEAD_THREADS):
                threading.Thread(target=self.work, name="shards ahead", daemon=True).start()
        self.wanted.put((shards, shard))

    def work(self) -> None:
        while True:
            shards, shard = self.wanted.get()
            try:
                shards.open(shard).close()
            except ShardError:
                continue  # the lane that comes to it meets it too, and says so


# ---- folders of shards, here or at an address


def open_split(address: str, cache: Cache) -> Manifest:
    """The manifest of a split: of a local folder, or of a URL, whose shards are then fetched through the cache.

    The manifest is fetched each time, so that one that was changed is noticed. Raises ConfigError.
    """
    manifest = find_split(address, cache)
    if manifest is None:
        if not is_remote(address):
            return load_manifest(address)  # which says why there is none
        raise ConfigError(
            f"{public(address)} holds no manifest.json; give the URL of a folder that shards/build.py made, "
            "all of it copied"
        )
    return manifest


def find_split(address: str, cache: Cache) -> Manifest | None:
    """The same, or None where there is no such split."""
    if not is_remote(address):
        return load_manifest(address) if Path(address).exists() else None
    address = checked(address)
    cache.make()
    try:
        manifest = load_mirrored(address, cache)
    except FetchError as error:
        if error.missing:
            return None
        raise ConfigError(f"{address} can't be opened: {error}") from None
    for shard in manifest.shards:  # both become part of a file's name
        if not isinstance(shard.bytes, int) or not re.fullmatch("[0-9a-f]{64}", str(shard.sha256)):
            raise ConfigError(f"{address}/manifest.json is damaged (at {shard.name}); copy it there again")
    largest = max((shard.bytes for shard in manifest.shards), default=0)
    if 2 * largest > cache.bytes:
        raise ConfigError(
            f"data.cache_gb = {cache.bytes / 1e9:g} has no room for two shards of {address}: "
            f"set it to {2 * largest / 1e9:.2g} or more"
        )
    return replace(manifest, source=RemoteShards(address, cache, largest, AheadQueue()))


def load_mirrored(address: str, cache: Cache) -> Manifest:
    """The manifest of a split at an address, through the cache. Raises FetchError or ConfigError."""

    def complete(folder: Path) -> None:
        try:
            expected = json.loads((folder / "manifest.json").read_bytes())["records_sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{address}/manifest.json is damaged ({error!r}); copy it there again") from error
        for _ in range(WRONG_DOWNLOADS):
            with (folder / "records.npy").open("w+b", buffering=0) as file:
                try:
                    fill(file, f"{address}/records.npy", None, cache.patience, cache.patience.deadline())
                except FetchError as error:
                    raise FetchError(f"records.npy: {error}") from None
            if sha256_of(folder / "records.npy") == expected:
                return
        raise FetchError("records.npy is not the file its manifest was written for")

    folder = cache.mirror(address, "splits", SPLIT_FILES, complete)
    try:
        return load_manifest(folder)
    except ConfigError:
        shutil.rmtree(folder, ignore_errors=True)  # it may be the copy that is damaged
    folder = cache.mirror(address, "splits", SPLIT_FILES, complete)
    try:
        return load_manifest(folder)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(folder), address)) from None


def shared(manifest: Manifest, sharing: int) -> Manifest:
    """The same split, told that so many sources of the run have the cache between them."""
    if manifest.source is None:
        return manifest
    return replace(manifest, source=replace(manifest.source, sharing=sharing))


def open_tokenizer(address: str, cache: Cache) -> Path:
    """A local folder with the tokenizer that stands at the address, local or URL. Raises ConfigError."""
    if not is_remote(address):
        return Path(address)
    address = checked(address)
    cache.make()
    try:
        return cache.mirror(address, "tokenizers", TOKENIZER_FILES, lambda folder: None)
    except FetchError as error:
        raise ConfigError(f"the tokenizer {address} can't be opened: {error}") from None


def join(address: str, name: str) -> str:
    """A folder inside a local or remote one."""
    return f"{address.rstrip('/')}/{name}" if is_remote(address) else str(Path(address) / name)
