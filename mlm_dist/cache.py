"""A bounded folder of fetched files that the processes of a machine share.

    CACHE/shards/SHA256.tar           whole and checked; the time of change is that of the last use
    CACHE/shards/SHA256.BYTES.part    on its way: locked by whoever fetches it, left for the next where that one died
    CACHE/splits/ADDRESS-VERSION/     manifest.json and records.npy, as they were when somebody looked last
    CACHE/tokenizers/...              the same

Nothing is kept in memory or in a list: who holds what are file locks (flock), which end with their process, and how
much room is taken follows from the names and sizes. What is made or removed in shards/ is so under CACHE/shards.lock.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mlm_dist.fetch import FetchError, Patience, read
from mlm_dist.manifest import ShardInfo, replace_file, sync_folder
from mlm_dist.schema import ConfigError

POLL_SECONDS = 0.02


def default_folder() -> Path:
    """The cache's folder where none is stated: mlm_dist in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlm_dist"


def make_cache(folder: str | None, gigabytes: float, fetch_seconds: float) -> "Cache":
    """The cache that data.cache_dir, data.cache_gb and data.fetch_seconds describe; nothing is made on the disk yet."""
    patience = Patience(total_seconds=fetch_seconds)
    return Cache(Path(folder).expanduser() if folder else default_folder(), int(gigabytes * 1e9), patience)


@contextmanager
def locked(file: Path, deadline: float) -> Iterator[None]:
    """Hold an exclusive lock on a file that exists for nothing else. Raises FetchError at the deadline."""
    with file.open("ab") as lock:
        while not try_lock(lock):
            if time.monotonic() > deadline:
                raise FetchError(f"another process holds {file} and doesn't get on")
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            # to close the file is not enough: a process that was forked meanwhile, a loader's, has it open as well
            fcntl.flock(lock, fcntl.LOCK_UN)


def try_lock(file: BinaryIO) -> bool:
    """Take an exclusive lock on an open file, unless another has one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclass(frozen=True)
class Cache:
    """Where what is fetched is kept, on a file system of this machine; bytes: the most that the shards take there."""

    folder: Path
    bytes: int
    patience: Patience = field(default_factory=Patience)

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    def make(self) -> None:
        """Make the folders. Raises ConfigError where that fails."""
        try:
            for name in ("shards", "splits", "tokenizers"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
                if not os.access(self.folder / name, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir = {self.folder} can't be written to ({error.strerror}); set another"
            ) from error

    def whole(self, shard: ShardInfo) -> BinaryIO | None:
        """A shard's file, open, locked against eviction and marked as just used; None where it isn't there."""
        path = self.path(shard)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_size != shard.bytes:
            path.unlink(missing_ok=True)
            file.close()
            return None
        os.utime(file.fileno())
        return file

    def claim(self, shard: ShardInfo, deadline: float) -> BinaryIO | None:
        """The file to fetch a shard into, locked, with room made for it; None where the whole shard has come meanwhile.

        Raises FetchError where there is no room by the deadline, or another process doesn't get on with it.
        """
        part = self.part(shard)
        while True:
            with locked(self.folder / "shards.lock", deadline):
                if self.path(shard).exists():
                    return None
                begun = part.exists()
                if begun or self.make_room(shard.bytes):
                    file = part.open("r+b" if begun else "x+b", buffering=0)
                    if try_lock(file):
                        return file
                    file.close()
            if time.monotonic() > deadline:
                why = "another process doesn't get on with it" if begun else "all that the cache holds is in use"
                raise FetchError(f"{why}, for {self.patience.total_seconds:g} s")
            time.sleep(POLL_SECONDS)

    def finish(self, shard: ShardInfo, file: BinaryIO) -> None:
        """Give a claimed file that is whole its name; its lock is then one of a reader."""
        os.fsync(file.fileno())
        with locked(self.folder / "shards.lock", self.patience.deadline()):
            self.part(shard).replace(self.path(shard))
            fcntl.flock(file, fcntl.LOCK_SH)  # not atomic: in here nobody else asks for an exclusive one
            sync_folder(self.shards)

    def path(self, shard: ShardInfo) -> Path:
        return self.shards / f"{shard.sha256}.tar"

    def part(self, shard: ShardInfo) -> Path:
        return self.shards / f"{shard.sha256}.{shard.bytes}.part"

    def files(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of all shards, longest unused first. One on its way counts with all its bytes.

        Files with names of another kind are not the cache's.
        """
        found = []
        for entry in os.scandir(self.shards):
            named = re.fullmatch(r"[0-9a-f]{64}\.(?:tar|(\d+)\.part)", entry.name)
            if named is None:
                continue
            try:
                facts = entry.stat()
            except FileNotFoundError:
                continue
            size = int(named[1]) if named[1] else facts.st_size
            found.append((facts.st_mtime, size, Path(entry.path)))
        return sorted(found)

    def make_room(self, needed: int) -> bool:
        """Remove the longest unused shards until so many bytes fit in; False where too much is in use."""
        files = self.files()
        used = sum(size for _, size, _ in files)
        for _, size, path in files:
            if used + needed <= self.bytes:
                break
            if evict(path):
                used -= size
        return used + needed <= self.bytes

    def evict_one(self) -> bool:
        """Remove the longest unused shard; False where all are in use, or there is none."""
        with locked(self.folder / "shards.lock", self.patience.deadline()):
            return any(evict(path) for _, _, path in self.files())

    def mirror(self, address: str, kind: str, names: Mapping[str, bool], complete: Callable[[Path], None]) -> Path:
        """A folder of the cache with the files `names` as they stand at the address now, and what `complete` adds.

        A process that waited while another one fetched them takes those. Raises FetchError.
        """
        asked = time.time()
        key = hashlib.sha256(address.encode()).hexdigest()[:32]
        home = self.folder / kind
        current = home / f"{key}.current"
        with locked(home / f"{key}.lock", self.patience.deadline()):
            if current.exists() and current.stat().st_mtime >= asked and (home / current.read_text()).is_dir():
                return home / current.read_text()
            found = {name: self.small(address, name, needed) for name, needed in names.items()}
            files = {name: content for name, content in found.items() if content is not None}
            version = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:32]
            folder = home / f"{key}-{version}"
            for other in home.glob(f"{key}-*"):
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
            if not folder.exists():
                temporary = Path(tempfile.mkdtemp(prefix=f"{key}-", suffix=".tmp", dir=home))
                for name, content in files.items():
                    replace_file(temporary / name, content)
                complete(temporary)
                temporary.rename(folder)
            replace_file(current, folder.name.encode())
            return folder

    def small(self, address: str, name: str, needed: bool) -> bytes | None:
        """A small file; None for one that isn't there and needn't be."""
        try:
            return read(f"{address}/{name}", self.patience)
        except FetchError as error:
            if error.missing and not needed:
                return None
            raise FetchError(f"{name}: {error}", final=error.final, missing=error.missing) from None


def evict(path: Path) -> bool:
    """Remove a file of the cache unless somebody reads or fetches it."""
    try:
        with path.open("r+b") as file:  # for writing: on NFS an exclusive lock asks for it
            if not try_lock(file):
                return False
            path.unlink()
    except FileNotFoundError:
        pass
    return True
