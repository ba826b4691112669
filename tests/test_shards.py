"""Shards: what goes in comes out, ordinary WebDataset reads it, and no damage passes for data."""

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_dist import manifest as manifests
from mlm_dist import shards
from mlm_dist.manifest import Manifest, ShardError, load_manifest, verify
from mlm_dist.schema import ConfigError
from mlm_dist.shards import Record, ShardWriter, read_records, write_split

VOCAB_SIZE = 30_000


def random_records(count: int, seed: int = 0, longest: int = 300) -> list[Record]:
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(count):
        lengths = rng.integers(1, longest, size=rng.integers(1, 9)).astype(np.uint32)
        records.append(Record(rng.integers(5, VOCAB_SIZE, size=lengths.sum()).astype(np.uint16), lengths))
    return records


def split(
    folder: Path, sizes: tuple[int, ...] = (3, 5), vocab_size: int = VOCAB_SIZE
) -> tuple[Manifest, list[list[Record]]]:
    records = [random_records(size, seed) for seed, size in enumerate(sizes)]
    return write_split(folder, records, vocab_size, "f" * 64), records


def same(found: list[Record], expected: list[Record]) -> bool:
    return len(found) == len(expected) and all(
        np.array_equal(a.tokens, b.tokens) and np.array_equal(a.lengths, b.lengths)
        for a, b in zip(found, expected, strict=True)
    )


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


# ---- what goes in comes out


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_records_come_back(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    manifest, records = split(tmp_path, vocab_size=vocab_size)
    assert manifest.dtype == dtype
    for shard, expected in enumerate(records):
        found = list(read_records(manifest, shard))
        assert same(found, expected)
        assert {record.tokens.dtype for record in found} == {np.dtype(dtype)}
        assert {record.lengths.dtype for record in found} == {np.dtype("uint32")}


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_stretch_of_a_shard_can_be_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40))
    first = data.draw(st.integers(0, size))
    count = data.draw(st.integers(0, size - first))
    manifest, records = split(tmp_path_factory.mktemp("split"), (2, size))
    assert same(list(read_records(manifest, 1, first, count)), records[1][first : first + count])


def test_the_manifest_counts_what_is_there(tmp_path: Path) -> None:
    manifest, records = split(tmp_path)
    everything = [record for shard in records for record in shard]
    assert manifest.samples == len(everything) == len(manifest.records)
    assert manifest.documents == sum(len(record.lengths) for record in everything)
    assert manifest.tokens == sum(len(record.tokens) for record in everything)
    assert manifest.bytes == sum(file.stat().st_size for file in tmp_path.glob("*.tar"))
    assert [shard.first_record for shard in manifest.shards] == [0, 3]
    assert manifest.records["tokens"].tolist() == [len(record.tokens) for record in everything]
    assert verify(manifest) == []
    assert load_manifest(tmp_path) == manifest
    for info in manifest.shards:
        rows = manifest.records[info.first_record :][: info.samples]
        with tarfile.open(tmp_path / info.name) as tar:
            starts = [member.offset for member in tar if member.name.endswith(".bin")]
        assert rows["offset"].tolist() == starts


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = split(tmp_path / "a")[0], split(tmp_path / "100%d")[0]
    assert first.hash == second.hash
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "100%d" / file.name).read_bytes()


def test_webdataset_alone_reads_them(tmp_path: Path) -> None:
    manifest, records = split(tmp_path)
    urls = [str(tmp_path / shard.name) for shard in manifest.shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples[:3]] == ["00000000", "00000001", "00000002"]
    found = [Record(np.frombuffer(s["bin"], "<u2"), np.frombuffer(s["len"], "<u4")) for s in samples]
    assert same(found, records[0] + records[1])


def test_a_manifest_goes_to_another_process(tmp_path: Path) -> None:
    manifest, records = split(tmp_path)
    copy = pickle.loads(pickle.dumps(manifest))
    assert copy == manifest and len(pickle.dumps(manifest)) < 1000
    assert same(list(read_records(copy, 0)), records[0])


# ---- damage in a tar


def test_no_flipped_byte_passes_for_data(tmp_path: Path) -> None:
    """Each place of a shard: either the reader refuses it, or what it yields is untouched; verify sees every one."""
    manifest, (records,) = split(tmp_path, (3,))
    path = tmp_path / "000000.tar"
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 23):
        flip(path, place)
        assert verify(manifest) == [f"{path} is altered: its sha256 is not the manifest's"]
        try:
            assert same(list(read_records(manifest, 0)), records), f"byte {place}"
        except ShardError as error:
            assert str(path) in str(error)
            refused += 1
        path.write_bytes(whole)
    assert refused > len(whole) / 23 / 4


def test_a_truncated_shard_is_refused_from_the_cut_on(tmp_path: Path) -> None:
    manifest, (records,) = split(tmp_path, (40,))
    path = tmp_path / "000000.tar"
    whole = path.read_bytes()
    middle = int(manifest.records["offset"][20])
    for size in (0, 1, 512, middle - 1, middle, middle + 600):
        path.write_bytes(whole[:size])
        with pytest.raises(ShardError, match=r"000000\.tar: is cut short at byte"):
            list(read_records(manifest, 0))
        assert verify(manifest) == [f"{path} has {size:,} bytes, the manifest says {len(whole):,}"]
    assert same(list(read_records(manifest, 0, 0, 20)), records[:20])


def test_a_missing_or_foreign_shard_is_refused(tmp_path: Path) -> None:
    manifest, _ = split(tmp_path, (5, 5))
    one, two = tmp_path / "000000.tar", tmp_path / "000001.tar"
    shutil.copy(one, two)
    with pytest.raises(ShardError, match=r"000001\.tar: "):
        list(read_records(manifest, 1))
    one.unlink()
    with pytest.raises(
        ShardError, match=r"000000\.tar: can't be read \(No such file or directory\); copy this file again"
    ):
        list(read_records(manifest, 0))
    assert verify(manifest)[0] == f"{one} is missing"


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def forged(folder: Path, names: list[str], payload: bytes) -> Manifest:
    """A split whose tar holds members of these names, each with the bytes that make two good records of it."""
    manifest, (records,) = split(folder, (2,))
    contents = {}
    for index, record in enumerate(records):
        contents |= {f"{index:08d}.bin": record.tokens.tobytes(), f"{index:08d}.len": record.lengths.tobytes()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            data = contents.get(name.removeprefix("../"), payload)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (folder / "000000.tar").write_bytes(buffer.getvalue())
    return manifest


GOOD = ["00000000.bin", "00000000.len", "00000001.bin", "00000001.len"]


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ([*GOOD[:2], "00000000.pyd", *GOOD[2:]], "record 0 has the unexpected member 'pyd'"),
        ([*GOOD[:1], "00000000.len.gz", *GOOD[1:]], "record 0 has the unexpected member 'len.gz'"),
        (["../00000000.bin", "../00000000.len", *GOOD[2:]], r"record 0 is missing: found '\.\./00000000'"),
        (["/tmp/00000000.bin", *GOOD[1:]], "record 0 is missing: found '/tmp/00000000'"),
        ([GOOD[0], *GOOD], "duplicate file name"),
        ([GOOD[0], GOOD[2], GOOD[1], GOOD[3]], "record 0 lacks its .bin or .len"),
        ([GOOD[0], *GOOD[2:], GOOD[1]], "record 0 lacks its .bin or .len"),
        (GOOD[2:] + GOOD[:2], "record 0 is missing: found '00000001'"),
    ],
)
def test_foreign_members_are_refused_and_nothing_runs(tmp_path: Path, names: list[str], problem: str) -> None:
    manifest = forged(tmp_path / "split", names, pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ShardError, match=problem) as refused:
        list(read_records(manifest, 0))
    assert refused.value.reason == ("foreign_member" if "unexpected" in problem else "malformed")
    assert [path.name for path in tmp_path.iterdir()] == ["split"]


def never(*_: object) -> Iterator[Record]:
    raise AssertionError("webdataset was asked")


def test_only_what_shard_writer_did_not_write_is_left_to_webdataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, (records,) = split(tmp_path, (40,))
    path = tmp_path / "000000.tar"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "decode_any", never)
        assert same(list(read_records(manifest, 0)), records)

    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            member.mtime, member.uname = 1_700_000_000, "somebody"
            tar.addfile(member, io.BytesIO(data))
    assert same(list(read_records(manifest, 0)), records)
    monkeypatch.setattr(shards, "decode_any", never)
    with pytest.raises(AssertionError, match="webdataset was asked"):
        list(read_records(manifest, 0))


def test_an_error_survives_its_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(ShardError(Path("a/000000.tar"), "fails its crc32")))
    assert str(error) == f"a/000000.tar: fails its crc32; {manifests.REBUILD}"
    assert str(ShardError("a sentence")) == "a sentence"
    error = pickle.loads(pickle.dumps(ShardError(Path("a/000000.tar"), "fails its crc32", "altered")))
    assert str(error) == f"a/000000.tar: fails its crc32; {manifests.REBUILD}" and error.reason == "altered"


def test_a_reason_that_the_file_system_gives(tmp_path: Path) -> None:
    manifest, _ = split(tmp_path, (5,))
    (tmp_path / "000000.tar").unlink()
    with pytest.raises(ShardError) as refused:
        list(read_records(manifest, 0))
    assert refused.value.reason == "missing"
    (tmp_path / "000000.tar").mkdir()
    with pytest.raises(ShardError, match="can't be read") as refused:
        list(read_records(manifest, 0))
    assert refused.value.reason == "unreadable"


# ---- damage in the manifest


def test_a_half_built_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="doesn't exist; build it with"):
        load_manifest(tmp_path / "nowhere")
    with ShardWriter(tmp_path, 0, "uint16") as writer:
        writer.write(random_records(1)[0])
    with pytest.raises(ConfigError, match=r"is a build that did not finish: it has no manifest\.json; build it with"):
        load_manifest(tmp_path)


def test_a_folder_of_splits_and_an_address_are_refused(tmp_path: Path) -> None:
    split(tmp_path / "train")
    with pytest.raises(ConfigError, match=r"holds several splits; give .*/train or .*/valid"):
        load_manifest(tmp_path)
    for address in ("pipe:touch ran", "s3://bucket/shards", "https://host/shards"):
        with pytest.raises(ConfigError, match="are read from a local folder"):
            load_manifest(address)


def edits() -> Iterator[tuple[str, object, str]]:
    yield "format", 2, "is of format 2, this version reads 1"
    yield "dtype", "int64", "contradicts itself: dtype 'int64'"
    yield "records_sha256", "0" * 64, r"records\.npy is not the file its manifest was written for"
    yield "shards", [], "contradicts itself: 0 records in the shards, 8 in records.npy"
    yield "shards", 7, "is damaged"
    yield "dtype", None, "is damaged|contradicts itself"


@pytest.mark.parametrize(("key", "value", "problem"), list(edits()))
def test_a_manifest_that_was_edited_is_refused(tmp_path: Path, key: str, value: object, problem: str) -> None:
    split(tmp_path)
    said = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(said | {key: value}))
    with pytest.raises(ConfigError, match=problem):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("name", "../000000.tar", "is named"),
        ("name", "pipe:touch ran", "is named"),
        ("samples", 2, "7 records in the shards, 8 in"),
        ("tokens", 1, "count differently"),
    ],
)
def test_a_shard_entry_that_was_edited_is_refused(tmp_path: Path, key: str, value: object, problem: str) -> None:
    split(tmp_path)
    said = json.loads((tmp_path / "manifest.json").read_text())
    said["shards"][0][key] = value
    (tmp_path / "manifest.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=problem):
        load_manifest(tmp_path)


def test_a_shard_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"000001\.tar holds no record"):
        split(tmp_path, (3, 0))


def test_an_altered_or_missing_records_file_is_refused(tmp_path: Path) -> None:
    split(tmp_path)
    flip(tmp_path / "records.npy", -3)
    with pytest.raises(ConfigError, match=r"records\.npy is not the file"):
        load_manifest(tmp_path)
    (tmp_path / "records.npy").unlink()
    with pytest.raises(ConfigError, match=r"records\.npy is missing"):
        load_manifest(tmp_path)


def test_no_flipped_byte_of_a_manifest_crashes(tmp_path: Path) -> None:
    """A manifest is text, so a flip may make another valid one; but it never ends in anything but a sentence."""
    manifest, _ = split(tmp_path, (1,))
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x80]) + whole[place + 1 :])
        with pytest.raises(ConfigError):
            load_manifest(tmp_path)
        flip_low = whole[:place] + bytes([whole[place] ^ 0x01]) + whole[place + 1 :]
        path.write_bytes(flip_low)
        try:
            assert load_manifest(tmp_path).hash != manifest.hash
        except ConfigError:
            pass
