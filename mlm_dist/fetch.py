"""Bytes from an address: http and https by the standard library, the object stores that fsspec has a driver for.

A stream comes in pieces that say where in the file they stand, so that an attempt goes on where the last one broke off.
Names and passwords are never part of an address: what the user writes in data.shards ends in the run folder and in W&B.
"""

import base64
import http.client
import netrc
import os
import re
import ssl
import time
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom  # the others are seeded, and draw what the run depends on
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import fsspec

from mlm_dist.schema import ConfigError

WEB = ("http", "https")
# Those of fsspec that hold files themselves; the others wrap one another, or run something.
STORES = tuple("s3 s3a gs gcs az abfs abfss adl oss oci hdfs webhdfs hf sftp ssh smb file memory".split())

PIECE = 1 << 20  # bytes at most
SLOWEST = 1024  # bytes a second; less counts as a stall
PASSING = (408, 425, 429)  # what a server says for now, as it does with all of 5xx

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """How long to try. total_seconds bounds one file with all its attempts; attempts: in a row without progress."""

    total_seconds: float = 600.0
    stall_seconds: float = 30.0
    attempts: int = 6
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 30.0

    def deadline(self) -> float:
        """When to give up what begins now, by the monotonic clock."""
        return time.monotonic() + self.total_seconds


class FetchError(Exception):
    """What went wrong, as the second half of a sentence. final: no use in trying again; missing: there is no such file.

    misfit: what was kept of an earlier attempt can't be the beginning of this file; reason: what a shard is counted
    under; progress: the attempt brought a good deal.
    """

    def __init__(
        self,
        text: str,
        *,
        final: bool = False,
        missing: bool = False,
        misfit: bool = False,
        reason: str = "unreachable",
    ) -> None:
        super().__init__(text)
        self.final = final or missing
        self.missing = missing
        self.reason = "missing" if missing else reason
        self.misfit = misfit
        self.progress = False


class Piece(NamedTuple):
    """Bytes of a file from `offset` on. size: of the whole file, where it is known."""

    offset: int
    data: bytes
    size: int | None


# ---- addresses


def is_remote(address: str) -> bool:
    """True for `scheme:...`, unless there is a file or folder of that name; anything else is a local path."""
    return re.match(r"[A-Za-z][\w+.-]+:", address) is not None and not Path(address).exists()


def checked(address: str) -> str:
    """The URL of a folder, without a slash at its end.

    Raises ConfigError for a scheme that isn't read, for one whose driver isn't installed, and for a URL with a
    password, a query or a fragment.
    """
    scheme, colon, rest = address.partition("://")
    if not colon or scheme not in WEB + STORES:
        raise ConfigError(
            f"shards are not read from {scheme.partition(':')[0]}: addresses; give a local folder or a URL with one of "
            f"{', '.join(f'{known}://' for known in WEB + STORES)}"
        )
    if "::" in address:
        raise ConfigError(f"{public(address)} is a chain of file systems, which is not read; give the URL of one")
    parts = urlsplit(address)
    if scheme in WEB and not has_host(address):
        raise ConfigError(
            f"{public(address)} names no server; write {scheme}://HOST/FOLDER or {scheme}://HOST:PORT/FOLDER"
        )
    if parts.password is not None or (scheme in WEB and parts.username is not None) or "?" in rest or "#" in rest:
        raise ConfigError(
            f"the address {public(address)} was given with a name, a password or a query, which would be written down "
            "in the run folder: give it without, and put a login in ~/.netrc (http) or where the store's driver looks"
        )
    if scheme in STORES:
        load_driver(scheme)
    return address.rstrip("/")


def has_host(address: str) -> bool:
    """True for an http URL with a host and, if any, a port that is a number."""
    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def public(address: str) -> str:
    """A URL without what may be secret in it."""
    scheme, _, rest = address.partition("://")
    host, slash, path = re.split(r"[?#]", rest)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def load_driver(scheme: str) -> None:
    """Raise ConfigError with the pip command where the scheme's fsspec driver is not installed."""
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        missing = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        package = (missing.name or f"that fsspec has for {scheme}").partition(".")[0]
        raise ConfigError(f"{scheme}:// needs the package {package}: pip install {package}") from error


# ---- one attempt


def stream(address: str, begin: int, stall_seconds: float) -> Iterator[Piece]:
    """The pieces of a file from byte `begin` on, or from 0 where the server can't begin elsewhere.

    Raises FetchError with what the server said, or that nothing came for `stall_seconds`.
    """
    try:
        yield from (web if urlsplit(address).scheme in WEB else store)(address, begin, stall_seconds)
    except FetchError:
        raise
    except urllib.error.HTTPError as error:
        said = f"the server said {error.code} {harmless(error.reason)}".rstrip()
        misfit = begin > 0 and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
        passing = misfit or error.code in PASSING or error.code >= 500
        raise FetchError(said, final=not passing, missing=error.code in (404, 410), misfit=misfit) from None
    except TimeoutError:
        raise FetchError(f"nothing came for {stall_seconds:g} s") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise FetchError(f"the server didn't answer in {stall_seconds:g} s") from None
        untrusted = isinstance(error.reason, ssl.SSLCertVerificationError)
        raise FetchError(f"the server can't be reached ({harmless(error.reason)})", final=untrusted) from None
    except (http.client.HTTPException, ConnectionError) as error:
        raise FetchError(f"the connection broke ({type(error).__name__})") from None
    except FileNotFoundError:
        raise FetchError("it isn't there", missing=True) from None
    except PermissionError as error:
        raise FetchError(f"it may not be read ({harmless(error)})", final=True) from None
    except Exception as error:  # each store's driver has errors of its own
        raise FetchError(f"{type(error).__name__}: {harmless(error)}") from None


def harmless(said: object) -> str:
    """A foreign text, on one line and short, without the queries and logins of the URLs in it."""
    text = " ".join(str(said).split())
    text = re.sub(r"://[^/\s@]+@", "://", re.sub(r"\?[^\s'\"]+", "", text))
    return "".join(character for character in text if character.isprintable())[:200]


class SafeRedirects(HTTPRedirectHandler):
    """Follows redirects, but not from https to http."""

    def redirect_request(self, request: Request, *args: Any) -> Request | None:
        following = super().redirect_request(request, *args)
        if following and (following.type not in WEB or (request.type == "https" and following.type == "http")):
            raise FetchError(f"the server sends {request.type} on to {following.type}: not followed", final=True)
        return following


def web(address: str, begin: int, stall_seconds: float) -> Iterator[Piece]:
    """`stream` over http. Proxies are taken from the environment, logins from ~/.netrc."""
    scheme, _, rest = address.partition("://")
    host, _, path = rest.partition("/")
    request = Request(f"{scheme}://{host}/{quote(path, safe='/%')}")  # noqa: S310 - the scheme is checked
    request.add_header("User-Agent", "mlm_dist")
    if begin:
        request.add_header("Range", f"bytes={begin}-")
    if authorization := login(urlsplit(address).hostname or ""):
        request.add_unredirected_header("Authorization", authorization)
    with build_opener(SafeRedirects).open(request, timeout=stall_seconds) as reply:
        offset, size = 0, None
        if reply.status == http.HTTPStatus.PARTIAL_CONTENT:
            offset = begin
            if not reply.headers.get("Content-Range", "").startswith(f"bytes {begin}-"):
                raise FetchError("the server sent another part than was asked for")
        if reply.headers.get("Content-Length", "").isdecimal():
            size = offset + int(reply.headers["Content-Length"])
        while offset != size and (data := reply.read1(PIECE)):
            yield Piece(offset, data, size)
            offset += len(data)
    if size not in (None, offset):
        raise FetchError(f"the connection ended at byte {offset:,} of {size:,}")


def login(host: str) -> str | None:
    """The Authorization header for a host: what ~/.netrc, or the file that NETRC names, says of it."""
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        known = netrc.netrc(file).authenticators(host) if file.exists() else None
    except (OSError, netrc.NetrcParseError) as error:
        why = error.msg if isinstance(error, netrc.NetrcParseError) else error.strerror
        raise FetchError(f"{file} can't be read ({why})", final=True) from None
    if known is None:
        return None
    return "Basic " + base64.b64encode(f"{known[0]}:{known[2]}".encode()).decode()


def store(address: str, begin: int, stall_seconds: float) -> Iterator[Piece]:
    """`stream` through fsspec; what counts as a stall is the driver's own affair.

    The file system is looked up for each file: fsspec keeps one for each process, and one must not outlive a fork.
    """
    filesystem, path = fsspec.url_to_fs(address)
    size = filesystem.size(path)
    with filesystem.open(path, "rb") as file:
        file.seek(begin)
        while data := file.read(PIECE):
            yield Piece(begin, data, size)
            begin += len(data)
    if size not in (None, begin):
        raise FetchError(f"the stream ended at byte {begin:,} of {size:,}")


# ---- until it is there


def persist(attempt: Callable[[], Result], patience: Patience, deadline: float) -> Result:
    """What `attempt` returns, tried again with longer and longer waits. Raises the last FetchError, with the count."""
    started, tried, failures = time.monotonic(), 0, 0
    while True:
        try:
            return attempt()
        except FetchError as error:
            tried += 1
            failures = 1 if error.progress else failures + 1
            wait = min(patience.longest_wait_seconds, patience.first_wait_seconds * 2 ** (failures - 1))
            wait *= SystemRandom().uniform(0.5, 1)
            now = time.monotonic()
            if error.final:
                raise
            if failures >= patience.attempts or now + wait > deadline:
                said = f"{error}; given up after {tried} attempts in {now - started:.1f} s"
                raise FetchError(said, reason=error.reason) from None
            time.sleep(wait)


def read(address: str, patience: Patience) -> bytes:
    """A small file, whole. Raises FetchError."""
    deadline = patience.deadline()
    return persist(lambda: b"".join(p.data for p in steady(address, 0, patience, deadline)), patience, deadline)


def fill(file: BinaryIO, address: str, size: int | None, patience: Patience, deadline: float) -> None:
    """Complete an unbuffered file that may hold the beginning of what stands at the address.

    size: in bytes, where it is known. Raises FetchError, or the OSError of a full disk.
    """

    def attempt() -> None:
        begin = reached = file.seek(0, os.SEEK_END)
        if begin and begin == size:
            return
        try:
            for piece in steady(address, begin, patience, deadline):
                if piece.offset == 0:
                    file.truncate(0)
                if size is not None and piece.offset + len(piece.data) > size:
                    said = f"it holds more than the {size:,} bytes of the manifest"
                    raise FetchError(said, misfit=True, reason="altered")
                file.seek(piece.offset)
                write(file, piece.data)
                reached = max(reached, piece.offset + len(piece.data))
            if size is not None and file.tell() != size:
                said = f"it holds {file.tell():,} bytes, the manifest says {size:,}"
                raise FetchError(said, misfit=True, reason="truncated" if file.tell() else "empty")
        except FetchError as error:
            error.progress = reached >= begin + PIECE
            if error.misfit:
                file.truncate(0)
            raise

    persist(attempt, patience, deadline)


def write(file: BinaryIO, data: bytes) -> None:
    """All of the data, where one call may take a part."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def steady(address: str, begin: int, patience: Patience, deadline: float) -> Iterator[Piece]:
    """`stream`, ended by a FetchError where it becomes a trickle or goes on past the deadline."""
    since, came = time.monotonic(), 0
    for piece in stream(address, begin, min(patience.stall_seconds, patience.total_seconds)):
        yield piece
        now = time.monotonic()
        came += len(piece.data)
        if now > deadline:
            raise FetchError(f"it took longer than {patience.total_seconds:g} s", final=True)
        if now - since > patience.stall_seconds:
            if came < SLOWEST * (now - since):
                raise FetchError(f"less than {SLOWEST} bytes a second came for {now - since:.1f} s")
            since, came = now, 0
