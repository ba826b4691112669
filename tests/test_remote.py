"""Remote shards: the batches of the folder, each shard fetched once, and no fault of a server passes for data."""

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from launching import metrics, overridden, pretrain, run
from web import Server

from mlm_dist import fetch, vocab
from mlm_dist.batch_size import BatchConfig
from mlm_dist.cache import Cache, default_folder, locked, make_cache
from mlm_dist.fetch import FetchError, Patience, checked, is_remote, public
from mlm_dist.manifest import Manifest, ShardError, load_manifest, verify
from mlm_dist.mixture import SourceConfig, is_roomy, open_sources
from mlm_dist.remote import find_split, join, open_split, open_tokenizer
from mlm_dist.schema import ConfigError
from mlm_dist.shards import read_records
from mlm_dist.stream import Batch, DataConfig, held_out_batches, train_batches
from shards import inspect

QUICK = Patience(total_seconds=20, stall_seconds=0.3, attempts=3, first_wait_seconds=0.01, longest_wait_seconds=0.05)
TAR = "train/000003.tar"
BATCH = BatchConfig(seq_len=32, global_rows=16, micro_rows=16)


@pytest.fixture
def server(toy: Path) -> Iterator[Server]:
    with Server(toy) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10**9, QUICK)


@pytest.fixture
def shard_bytes(toy: Path) -> int:
    return max(shard.bytes for shard in load_manifest(toy / "train").shards)


def batches_of(
    manifest: Manifest, toy: Path, count: int, workers: int = 0, bad: int = 0, lanes: int = 4
) -> list[Batch]:
    data = DataConfig("unused", lanes=lanes, window_records=3, workers=workers, max_bad_shards=bad)
    with train_batches(manifest, vocab.load(toy / "tokenizer"), data, BATCH, 7, 0, 1) as batches:
        return list(itertools.islice(batches, count))


def same(some: list[Batch], others: list[Batch]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(
        torch.equal(a.ids, b.ids) and torch.equal(a.row_keys, b.row_keys) and a.cursor == b.cursor for a, b in pairs
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# ---- the same data


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_are_those_of_the_folder(toy: Path, server: Server, cache: Cache, workers: int) -> None:
    expected = batches_of(load_manifest(toy / "train"), toy, 500)
    assert expected[-1].cursor["lanes"][0][0] >= 2, "several epochs"
    manifest = open_split(f"{server.address}/train", cache)
    assert same(batches_of(manifest, toy, 500, workers), expected)
    assert server.shards() == {f"train/{shard.name}": 1 for shard in manifest.shards}, "each is fetched once"


def test_held_out_batches_too(toy: Path, server: Server, cache: Cache) -> None:
    tokenizer, data = vocab.load(open_tokenizer(f"{server.address}/tokenizer", cache)), DataConfig("unused")
    remote_, local = (
        list(held_out_batches(manifest, tokenizer, data, BATCH, 0, 1))
        for manifest in (open_split(f"{server.address}/valid/", cache), load_manifest(toy / "valid"))
    )
    assert same(remote_, local)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_fsspec_addresses(toy: Path, tmp_path: Path, cache: Cache, scheme: str) -> None:
    root = f"{scheme}://{tmp_path}/remote"
    filesystem, path = fsspec.url_to_fs(root)
    filesystem.put(f"{toy}/", f"{path}/", recursive=True)
    expected = batches_of(load_manifest(toy / "train"), toy, 40)
    assert same(batches_of(open_split(join(root, "train"), cache), toy, 40, workers=1), expected)
    assert vocab.load(open_tokenizer(join(root, "tokenizer"), cache)).size == 300
    assert find_split(join(root, "nothing"), cache) is None
    filesystem.rm(f"{path}/train/000003.tar")
    (cache.path(load_manifest(toy / "train").shards[3])).unlink()
    with pytest.raises(ShardError, match=r"000003\.tar: can't be fetched: it isn't there"):
        list(read_records(open_split(join(root, "train"), cache), 3))
    if scheme == "memory":
        filesystem.store.clear()


def test_a_manifest_goes_into_another_process_with_its_source(server: Server, cache: Cache) -> None:
    manifest = open_split(f"{server.address}/train", cache)
    copy = pickle.loads(pickle.dumps(manifest))
    assert copy == manifest and copy.source.address == manifest.source.address and copy.source.largest
    assert len(list(read_records(copy, 2))) == manifest.shards[2].samples


# ---- a server that fails


@pytest.mark.parametrize(
    "faults",
    [
        ["drop"], ["stall"], ["truncate"], ["503"], ["429"], ["altered"], ["longer"], ["drip"],
        ["drop no range", "no range"],
        ["drop", "no range drop", "no range"], ["drop", "503"], ["altered", "drop"],
    ],
)  # fmt: skip
def test_what_passes_is_tried_again(toy: Path, server: Server, cache: Cache, faults: list[str]) -> None:
    manifest = open_split(f"{server.address}/train", cache)
    server.faults[TAR] = list(faults)
    with manifest.open(3) as file:
        assert file.read() == (toy / TAR).read_bytes()
    asked = [begin for path, begin in server.requests if path == TAR]
    assert len(asked) >= 2 and not server.faults[TAR]
    if faults == ["drop"]:
        assert asked[1] == manifest.shards[3].bytes // 2, "it goes on where it broke off"
    assert [path.suffix for path in cache.shards.iterdir()] == [".tar"]


@pytest.mark.parametrize(
    ("fault", "said", "requests"),
    [
        ("404", "the server said 404 Not Found", 1),
        ("403", "the server said 403 Forbidden", 1),
        ("503", r"the server said 503 Service Unavailable; given up after 3 attempts in \d+\.\d s", 3),
        ("stall", r"nothing came for 0\.3 s; given up after", None),
        ("drip", r"less than 1024 bytes a second came", None),
        ("drop no range", r"the connection ended at byte [\d,]+ of [\d,]+; given up after 3", 3),
        ("altered", "what came is not the file of the manifest", 2),
        ("longer", "it holds more than the", 3),
        ("truncate no range", "bytes, the manifest says", 3),
        ("to ftp://127.0.0.1/x", "the server sends http on to ftp: not followed", 1),
        ("to file:///etc/passwd", "the server said 302", 1),
    ],
)
def test_what_lasts_is_named(
    toy: Path, server: Server, cache: Cache, fault: str, said: str, requests: int | None
) -> None:
    server.always[TAR] = fault
    cache = replace(cache, patience=replace(QUICK, total_seconds=3))
    with pytest.raises(ShardError, match=rf"^{server.address}/{TAR}: can't be fetched: .*{said}"):
        list(read_records(open_split(f"{server.address}/train", cache), 3))
    assert requests in (None, server.counts()[TAR])
    assert not list(cache.shards.glob("*.tar"))


def test_a_server_that_is_gone_is_named(toy: Path, cache: Cache) -> None:
    with Server(toy) as server:
        manifest = open_split(f"{server.address}/train", cache)
    with pytest.raises(ShardError, match=r"the server can't be reached .*Connection refused"):
        manifest.open(0)
    with pytest.raises(ConfigError, match=r"can't be opened: manifest\.json: the server can't be reached"):
        open_split(f"{server.address}/train", cache)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_never_comes_counts_as_bad(toy: Path, server: Server, cache: Cache, workers: int) -> None:
    server.always[TAR] = "404"
    manifest = open_split(f"{server.address}/train", cache)
    with pytest.raises(ShardError, match=r"000003\.tar: can't be fetched: the server said 404"):
        batches_of(manifest, toy, 100, workers)
    assert batches_of(manifest, toy, 100, workers, bad=1)[-1].bad_shards == {"000003.tar": "missing"}


def test_a_trickle_ends_at_the_deadline(server: Server, cache: Cache) -> None:
    manifest = open_split(f"{server.address}/train", replace(cache, patience=replace(QUICK, total_seconds=0.2)))
    server.always[TAR] = "drip"
    began = time.monotonic()
    with pytest.raises(ShardError, match=r"it took longer than 0\.2 s"):
        manifest.open(3)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("name", ["manifest.json", "records.npy"])
@pytest.mark.parametrize("fault", ["drop", "stall", "503", "truncate", "altered"])
def test_the_small_files_are_tried_again_too(toy: Path, server: Server, cache: Cache, name: str, fault: str) -> None:
    server.faults[f"train/{name}"] = [fault]
    if name == "manifest.json" and fault in ("truncate", "altered"):  # which nothing but its form can tell
        with pytest.raises(ConfigError, match=r"train/manifest\.json is damaged"):
            open_split(f"{server.address}/train", cache)
    assert open_split(f"{server.address}/train", cache) == replace(
        load_manifest(toy / "train"), path=next((cache.folder / "splits").glob("*-*"))
    )


# ---- one cache for all


def read_all(address: str, cache: Cache, start: "multiprocessing.synchronize.Barrier") -> None:
    start.wait()
    manifest = open_split(address, cache)
    for shard in range(len(manifest.shards)):
        assert len(list(read_records(manifest, shard))) == manifest.shards[shard].samples


def test_processes_at_once_download_each_file_once(server: Server, cache: Cache) -> None:
    server.always = {f"train/{number:06d}.tar": "slow" for number in range(8)} | {"train/manifest.json": "slow"}
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    readers = [context.Process(target=read_all, args=(f"{server.address}/train", cache, start)) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0, 0, 0]
    assert server.shards() == {f"train/{number:06d}.tar": 1 for number in range(8)}
    assert server.counts()["train/records.npy"] == 1 and server.counts()["train/manifest.json"] == 1


def test_threads_at_once_too(server: Server, cache: Cache) -> None:
    server.always[TAR] = "slow"
    manifest = open_split(f"{server.address}/train", cache)
    threads = [threading.Thread(target=lambda: manifest.open(3).close()) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.counts()[TAR] == 1


def test_one_that_was_killed_leaves_what_the_next_goes_on_from(toy: Path, server: Server, cache: Cache) -> None:
    patience = replace(QUICK, stall_seconds=30, total_seconds=60)
    manifest = open_split(f"{server.address}/train", replace(cache, patience=patience))
    server.faults[TAR] = ["stall"]
    process = multiprocessing.get_context("fork").Process(target=manifest.open, args=(3,))
    process.start()
    part = cache.part(manifest.shards[3])
    half = manifest.shards[3].bytes // 2
    wait_for(lambda: part.exists() and part.stat().st_size == half)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with open_split(f"{server.address}/train", cache).open(3) as file:
        assert file.read() == (toy / TAR).read_bytes()
    assert [begin for path, begin in server.requests if path == TAR] == [0, half]
    assert not part.exists()


def test_what_a_dead_process_left_may_be_anything(toy: Path, server: Server, cache: Cache) -> None:
    manifest = open_split(f"{server.address}/train", cache)
    for left in (b"x" * 100, b"x" * manifest.shards[3].bytes, b"x" * (manifest.shards[3].bytes + 1)):
        cache.part(manifest.shards[3]).write_bytes(left)
        with manifest.open(3) as file:
            assert file.read() == (toy / TAR).read_bytes()
        cache.path(manifest.shards[3]).unlink()


def test_a_file_cut_short_in_the_cache_is_fetched_again(server: Server, cache: Cache) -> None:
    manifest = open_split(f"{server.address}/train", cache)
    manifest.open(3).close()
    path = cache.path(manifest.shards[3])
    path.write_bytes(path.read_bytes()[:-1])
    assert len(list(read_records(manifest, 3))) == manifest.shards[3].samples
    assert server.counts()[TAR] == 2


# ---- the bound


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_of_three_shards_trains_on(
    toy: Path, server: Server, cache: Cache, shard_bytes: int, workers: int
) -> None:
    small = replace(cache, bytes=3 * shard_bytes)
    manifest = open_split(f"{server.address}/train", small)
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            with contextlib.suppress(FileNotFoundError):  # evicted, or given its name, between the look and the size
                most[0] = max(most[0], sum(file.stat().st_size for file in present(small)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        batches = batches_of(manifest, toy, 200, workers)
    finally:
        ended.set()
        watcher.join()
    assert same(batches, batches_of(load_manifest(toy / "train"), toy, 200))
    assert shard_bytes < most[0] <= small.bytes


def present(cache: Cache) -> Iterator[Path]:
    for path in cache.shards.iterdir():
        try:
            path.stat()
        except FileNotFoundError:
            continue
        yield path


def test_the_longest_unused_goes_and_what_is_in_use_stays(server: Server, cache: Cache, shard_bytes: int) -> None:
    manifest = open_split(f"{server.address}/train", replace(cache, bytes=3 * shard_bytes))
    cached = lambda: {number for number, shard in enumerate(manifest.shards) if cache.path(shard).exists()}
    for number in (0, 1, 2):
        manifest.open(number).close()
        os.utime(cache.path(manifest.shards[number]), (number + 1, number + 1))
    manifest.open(0).close()
    manifest.open(3).close()
    assert cached() == {0, 2, 3}, "1 was unused for longest: 0 has been read again"
    os.utime(cache.path(manifest.shards[2]), (1, 1))
    with manifest.open(2):
        os.utime(cache.path(manifest.shards[2]), (1, 1))
        manifest.open(4).close()
        assert 2 in cached()
    in_use = [manifest.open(number) for number in cached()]
    impatient = replace(
        manifest.source, cache=replace(manifest.source.cache, patience=replace(QUICK, total_seconds=0.2))
    )
    with pytest.raises(ShardError, match=r"all that the cache holds is in use, for 0\.2 s"):
        impatient.open(manifest.shards[7])
    for file in in_use:
        file.close()


def test_files_that_are_not_the_caches_stay(server: Server, cache: Cache, shard_bytes: int) -> None:
    manifest = open_split(f"{server.address}/train", replace(cache, bytes=2 * shard_bytes))
    for name in ("000000.tar", "mine.part", "x.7.part", "f" * 63 + ".tar"):
        (cache.shards / name).write_bytes(b"x" * 10 * shard_bytes)
    for number in range(8):
        manifest.open(number).close()
    assert sum(len(path.stem) == 64 for path in cache.shards.iterdir()) == 2
    assert len(list(cache.shards.iterdir())) == 6


def test_a_bound_below_two_shards_is_refused(server: Server, cache: Cache, shard_bytes: int) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.cache_gb = .* has no room for two shards of .*: set it to .* or more"
    ):
        open_split(f"{server.address}/train", replace(cache, bytes=2 * shard_bytes - 1))
    open_split(f"{server.address}/train", replace(cache, bytes=2 * shard_bytes))


def test_a_full_disk_is_named(server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = open_split(f"{server.address}/train", cache)
    manifest.open(0).close()
    room = lambda: not cache.path(manifest.shards[0]).exists()

    def write(file, data, real=fetch.write):
        if not room():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, data)

    monkeypatch.setattr(fetch, "write", write)
    with manifest.open(0), pytest.raises(ShardError, match=r"000001\.tar can't be kept in .*No space left.*make room"):
        manifest.open(1)
    manifest.open(1).close()
    assert room(), "what nobody reads has made room"


def test_a_folder_that_cannot_be_made_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir = .*file/cache can't be written to"):
        open_split(f"{server.address}/train", Cache(tmp_path / "file" / "cache", 10**9, QUICK))


def test_the_cache_has_its_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert make_cache(None, 2.5, 60) == Cache(Path("/somewhere/mlm_dist"), 2_500_000_000, Patience(total_seconds=60))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "mlm_dist"


# ---- ahead


def test_a_lane_s_next_shard_comes_while_it_reads(toy: Path, server: Server, cache: Cache) -> None:
    manifest = open_split(f"{server.address}/train", cache)
    batches_of(manifest, toy, 1, lanes=2)
    wait_for(lambda: len(server.shards()) == 4)
    assert set(server.shards().values()) == {1}, "the first two, and the one after each"


def test_nothing_comes_ahead_where_it_would_push_out_what_is_read(
    toy: Path, server: Server, cache: Cache, shard_bytes: int
) -> None:
    manifest = open_split(f"{server.address}/train", replace(cache, bytes=3 * shard_bytes))
    assert not manifest.source.roomy(2) and manifest.source.roomy(1)
    batches_of(manifest, toy, 1, lanes=2)
    assert manifest.source.queue.process is None


# ---- what stands at the address changes


def test_a_changed_manifest_is_noticed(toy: Path, tmp_path: Path, cache: Cache) -> None:
    shutil.copytree(toy, tmp_path / "copy")
    with Server(tmp_path / "copy") as server:
        before = open_split(f"{server.address}/train", cache)
        assert open_split(f"{server.address}/train", cache).path == before.path
        shutil.rmtree(tmp_path / "copy/train")
        shutil.copytree(toy / "valid", tmp_path / "copy/train")
        after = open_split(f"{server.address}/train", cache)
        assert after.hash == load_manifest(toy / "valid").hash != before.hash
        assert [path for path in (cache.folder / "splits").iterdir() if path.is_dir()] == [after.path]
        assert before.records["tokens"].sum() == before.tokens, "a reader of the old one goes on"
        assert len(list(read_records(after, 1))) == after.shards[1].samples


def test_a_copy_that_is_damaged_in_the_cache_is_fetched_again(server: Server, cache: Cache) -> None:
    manifest = open_split(f"{server.address}/train", cache)
    (manifest.path / "records.npy").write_bytes(b"")
    assert open_split(f"{server.address}/train", cache) == manifest
    assert server.counts()["train/records.npy"] == 2


@pytest.mark.parametrize(("key", "value"), [("sha256", "../../../../tmp/x"), ("sha256", 7), ("sha256", "A" * 64)])
def test_a_manifest_cannot_name_files_of_the_cache(
    toy: Path, tmp_path: Path, cache: Cache, key: str, value: object
) -> None:
    shutil.copytree(toy, tmp_path / "copy")
    file = tmp_path / "copy/train/manifest.json"
    said = json.loads(file.read_text())
    said["shards"][3][key] = value
    file.write_text(json.dumps(said))
    with Server(tmp_path / "copy") as server, pytest.raises(ConfigError, match=r"is damaged \(at 000003\.tar\)"):
        open_split(f"{server.address}/train", cache)


# ---- addresses


def test_what_is_no_folder_of_shards_is_named(server: Server, cache: Cache) -> None:
    with pytest.raises(ConfigError, match=r"/train/train holds no manifest\.json; give the URL of a folder"):
        open_split(f"{server.address}/train/train", cache)
    with pytest.raises(ConfigError, match=r"tokenizer .*/nothing can't be opened: tokenizer\.json: .* 404 Not Found"):
        open_tokenizer(f"{server.address}/nothing", cache)
    assert find_split(f"{server.address}/nothing", cache) is None
    server.always["train/manifest.json"] = "403"
    with pytest.raises(ConfigError, match=r"can't be opened: manifest\.json: the server said 403"):
        find_split(f"{server.address}/train", cache)


def test_schemes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in (
        "pipe:touch ran",
        "pipe://touch",
        "ftp://host/x",
        "simplecache::memory://x",
        "reference://x",
        "s3:x",
    ):
        assert is_remote(address)
        with pytest.raises(
            ConfigError, match=r"are not read from \w+: addresses; give a local folder or a URL with one"
        ):
            checked(address)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    assert not any(map(is_remote, ("a:b", "shards/mine", "/data/x", "./pipe:x", "C")))


@pytest.mark.parametrize(
    ("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs"), ("sftp", "paramiko")]
)
def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"^{scheme}:// needs the package {package}: pip install {package}$"):
        checked(f"{scheme}://bucket/shards")


@pytest.mark.parametrize(
    "address",
    [
        "https://me:SECRET@host/x", "http://SECRET@host/x", "https://host/x?token=SECRET", "s3://key:SECRET@bucket/x",
        "https://host/x#SECRET", "sftp://me:SEC@RET@host/x",
    ],
)  # fmt: skip
def test_credentials_are_refused_and_not_repeated(address: str, cache: Cache) -> None:
    with pytest.raises(ConfigError, match="was given with a name, a password or a query") as refused:
        open_split(f"{address}/train" if "?" not in address else address, cache)
    assert "SEC" not in str(refused.value) and "RET" not in str(refused.value)
    assert public("https://a:b@host/x?q#f") == "https://host/x"


def test_a_login_comes_from_netrc(server: Server, cache: Cache, tmp_path: Path, monkeypatch) -> None:
    server.authorization = "Basic " + b64encode(b"me:SECRET").decode()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match="the server said 401"):
        open_split(f"{server.address}/train", cache)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password SECRET\n")
    manifest = open_split(f"{server.address}/train", cache)
    with Server(server.folder) as other:
        server.always[TAR] = f"to {other.address.replace('127.0.0.1', 'localhost')}/{TAR}"
        manifest.open(3).close()
        assert other.logins == [None], "another host is not told"
    (tmp_path / "netrc").write_text("machine 127.0.0.1 logon me password SECRET\n")
    with pytest.raises(ShardError, match=r"netrc can't be read \(.*\)") as failed:
        manifest.open(0)
    assert "SECRET" not in str(failed.value)
    assert not [path for path in cache.folder.rglob("*") if "SECRET" in path.name]


def test_what_a_driver_says_is_cleaned() -> None:
    assert fetch.harmless("GET https://me:pw@host/a?sig=SECRET\n failed") == "GET https://host/a failed"


def test_waits_grow_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def fail() -> None:
        raise FetchError("no")

    patience = Patience(attempts=8, first_wait_seconds=1, longest_wait_seconds=10)
    with pytest.raises(FetchError, match="no; given up after 8 attempts"):
        fetch.persist(fail, patience, patience.deadline())
    assert [top / 2 <= wait <= top for wait, top in zip(waits, (1, 2, 4, 8, 10, 10, 10), strict=True)] == [True] * 7
    waits.clear()
    with pytest.raises(FetchError, match="given up after 1 attempts"):
        fetch.persist(fail, patience, time.monotonic() + 0.1)
    assert waits == []


# ---- the commands


def test_inspect_takes_an_address(
    toy: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["--cache-dir", str(tmp_path / "cache")]
    assert inspect.main([server.address, "--verify", *cache]) == 0
    printed = capsys.readouterr().out
    assert "verified: 10 shards are as they were written" in printed and f"{server.address}/train\n" in printed
    assert inspect.main([str(toy), "--verify"]) == 0
    assert capsys.readouterr().out.replace(str(toy), server.address) == printed
    assert inspect.main([f"{server.address}/valid/", *cache]) == 0
    assert server.shards() == {
        f"{split}/{n:06d}.tar": 1 for split, count in (("train", 8), ("valid", 2)) for n in range(count)
    }

    shard = load_manifest(toy / "train").shards[3]
    altered = tmp_path / "cache/shards" / f"{shard.sha256}.tar"
    altered.write_bytes(altered.read_bytes()[:-1] + b"x")
    assert inspect.main([server.address, "--verify", *cache]) == 0
    assert server.counts()[TAR] == 2, "what was altered in the cache is fetched again"
    altered.unlink()
    server.always[TAR] = "404"
    capsys.readouterr()
    assert inspect.main([server.address, "--verify", *cache]) == 1
    assert capsys.readouterr().err == (
        f"damaged: {server.address}/{TAR}: can't be fetched: the server said 404 Not Found\n"
    )
    assert verify(open_split(f"{server.address}/valid", make_cache(cache[1], 1, 10))) == []


@pytest.mark.slow
def test_a_run_of_two_ranks(toy: Path, tmp_path: Path) -> None:
    """From a URL: the losses of the local folder, each shard fetched once, resume, evaluation and --dry-run."""
    shutil.copytree(toy, tmp_path / "web/shards/mine")
    cached = ("data.workers=1", f"data.cache_dir={tmp_path / 'cache'}")
    with Server(tmp_path / "web") as server:
        server.faults["shards/mine/train/000002.tar"] = ["drop"]
        address, folder = f"{server.address}/shards/mine", tmp_path / "run"
        done = pretrain(address, folder, *cached, "run.steps=6", "evaluate.every_steps=3", "schedule.name=constant")
        assert done.returncode == 0, done.stdout
        again = pretrain(address, folder, *cached, "run.steps=12", "evaluate.every_steps=3", "schedule.name=constant")
        assert again.returncode == 0 and "resumed from step 6" in again.stdout, again.stdout
        read = [
            *(f"train/{number:06d}.tar" for number in range(8)),
            "valid/000000.tar",
        ]  # evaluate.max_rows needs no more
        assert server.shards() == {f"shards/mine/{name}": 2 if name == "train/000002.tar" else 1 for name in read}

        local = pretrain(toy, tmp_path / "local", "run.steps=12", "evaluate.every_steps=3", "schedule.name=constant")
        assert local.returncode == 0, local.stdout
        for name in ("loss", "valid/loss"):
            assert metrics(folder, name) == metrics(tmp_path / "local", name)

        evaluated = run("launch/evaluate.py", "--run", str(folder), "--json")
        assert evaluated.returncode == 0, evaluated.stdout
        assert json.loads(evaluated.stdout.splitlines()[-1])["loss"] == pytest.approx(metrics(folder, "valid/loss")[12])
        config = ("--config", "configs/quickstart.yaml", *overridden(address, tmp_path / "x", *cached))
        tried = run("launch/pretrain.py", "--dry-run", *config)
        assert tried.returncode == 0 and f"shards: {address}" in tried.stdout, tried.stdout
    gone = run(
        "launch/pretrain.py", "--config", "configs/quickstart.yaml",
        *overridden(address, folder, *cached, "run.steps=14", "data.fetch_seconds=2", "schedule.name=constant"),
    )  # fmt: skip
    assert gone.returncode == 2 and "the server can't be reached" in gone.stdout and "Traceback" not in gone.stdout
    secret = run(
        "launch/pretrain.py", "--config", "configs/quickstart.yaml",
        *overridden("http://me:SECRET@127.0.0.1/x", tmp_path / "secret", *cached),
    )  # fmt: skip
    assert secret.returncode == 2 and "SECRET" not in secret.stdout, secret.stdout
    leaks = [p for p in tmp_path.rglob("*") if p.is_file() and b"SECRET" in p.read_bytes()]
    assert leaks == []


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:1000] + bytes([data[1000] ^ 1]) + data[1001:], "altered"),
        (lambda data: data + b"more", "altered"),
        (lambda data: data[:3000], "truncated"),
        (lambda data: b"", "empty"),
    ],
)
def test_what_is_wrong_with_a_remote_shard_is_counted_as_it_is_with_a_local_one(
    toy: Path, tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    shutil.copytree(toy / "train", tmp_path / "shards" / "train")
    file = tmp_path / "shards" / TAR
    file.write_bytes(damage(file.read_bytes()))
    with Server(tmp_path / "shards") as server:
        manifest = open_split(f"{server.address}/train", Cache(tmp_path / "cache", 10**9, QUICK))
        assert batches_of(manifest, toy, 100, bad=1)[-1].bad_shards == {"000003.tar": reason}


def test_a_shard_that_is_damaged_in_the_cache_is_fetched_again(toy: Path, server: Server, cache: Cache) -> None:
    expected = batches_of(load_manifest(toy / "train"), toy, 100)
    manifest = open_split(f"{server.address}/train", cache)
    assert same(batches_of(manifest, toy, 100), expected)
    for shard in manifest.shards:
        manifest.source.open(shard).close()  # those that are still on their way too
        data = bytearray(cache.path(shard).read_bytes())
        data[700] ^= 1
        cache.path(shard).write_bytes(data)
    before = server.shards()
    assert same(batches_of(open_split(f"{server.address}/train", cache), toy, 100, workers=2), expected)
    again = [server.shards()[name] - count for name, count in before.items()]
    assert max(again) == 1, "those that were read to the damage, once more and no oftener"


def test_a_process_that_is_forked_while_a_lock_is_held_does_not_keep_it(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", time.monotonic() + 5):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path / "lock", time.monotonic() + 1):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_disk_that_is_full_is_no_fault_of_a_shard(toy: Path, server: Server, tmp_path: Path) -> None:
    """With any budget: else a run would go on without good shards, one after the other."""
    cache = Cache(tmp_path / "cache", 10**9, QUICK)
    manifest = open_split(f"{server.address}/train", cache)
    shutil.rmtree(tmp_path / "cache" / "shards")
    (tmp_path / "cache" / "shards").write_text("no folder")
    with pytest.raises(ShardError, match=r"can't be kept in .*make room there"):
        batches_of(manifest, toy, 10, bad=7)


def test_sources_share_the_cache_that_they_are_fetched_ahead_into(toy: Path, server: Server, tmp_path: Path) -> None:
    folders = {name: SourceConfig(server.address) for name in ("one", "two")}
    largest = max(shard.bytes for shard in load_manifest(toy / "train").shards)
    for room, roomy in ((4 * 4 * largest, True), (4 * 4 * largest - 1, False)):
        sources = open_sources(folders, "train", Cache(tmp_path / "cache", room, QUICK))
        assert is_roomy(sources, 4) == roomy
        assert all(source.manifest.source.roomy(4) == roomy for source in sources)


@pytest.mark.parametrize("address", ["http:///x", "https://host:abc/x", "file:///x::memory://y"])
def test_addresses_that_can_not_be_are_refused_at_once(address: str) -> None:
    with pytest.raises(ConfigError, match=r"names no server|chain of file systems"):
        checked(address)
