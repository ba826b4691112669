"""build.py --index: tars of text give the batches that shards of their tokens would, and no damage passes."""

import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from mlm_dist import lanes, samples, vocab
from mlm_dist.batch_size import BatchConfig
from mlm_dist.cache import make_cache
from mlm_dist.cursor import Cursor, merge_cursors
from mlm_dist.manifest import Manifest, ShardError, load_manifest, verify
from mlm_dist.remote import open_split
from mlm_dist.schema import ConfigError
from mlm_dist.shards import Record, read_records, write_split
from mlm_dist.stream import DataConfig, held_out_batches, train_batches
from mlm_dist.vocab import Vocab
from shards import build, index, inspect, tars
from tests.conftest import toy_documents
from tests.launching import ROOT, metrics, pretrain
from tests.web import Server

SHARDS, LANES, SEED = 8, 4, 5
RECORD_TOKENS = 700  # a few toy documents
SEQ_LEN, GLOBAL_ROWS = 64, 8

Members = list[tuple[str, bytes]]


def pack(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def as_text(number: int, document: str) -> Members:
    return [(f"{number:04d}.txt", document.encode())]


def as_json(number: int, document: str) -> Members:
    return [(f"{number:04d}.json", json.dumps({"id": number, "body": document}).encode())]


def with_others(number: int, document: str) -> Members:
    """Members around the text that nothing may look at: longer than a block, or of a kind that runs when unpickled."""
    jpg, cls = (f"a/{number:04d}.v1.jpg", os.urandom(1500)), (f"a/{number:04d}.cls", b"7")
    return [jpg, (f"a/{number:04d}.TXT", document.encode()), cls, (f"a/{number:04d}.pyd", b"cos\nabort\n(tR.")]


def documents_of(shard: int) -> list[str]:
    documents = toy_documents(20 + 3 * (shard % 4), seed=shard)
    return [*documents[:5], " \n", *documents[5:], ""] if shard % 2 else ["", *documents]


def run(folder: Path, tokenizer: Path, *flags: str) -> int:
    return build.main(["--index", str(folder), "--tokenizer", str(tokenizer), "--workers", "2", *flags])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab.train(toy_documents(200, seed=1), 300).save(folder)
    return folder


@pytest.fixture(scope="module")
def known(tokenizer: Path) -> Vocab:
    return vocab.load(tokenizer)


@pytest.fixture(autouse=True)
def small_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "RECORD_TOKENS", RECORD_TOKENS)


def plant(folder: Path, form: Callable[[int, str], Members], format: int = tarfile.USTAR_FORMAT) -> None:
    for shard in range(SHARDS):
        members = itertools.chain.from_iterable(form(*numbered) for numbered in enumerate(documents_of(shard)))
        pack(folder / "train" / f"part {shard}.tar", members, format)


@pytest.fixture
def indexed(tmp_path: Path, tokenizer: Path) -> Path:
    plant(tmp_path / "own", as_text)
    assert run(tmp_path / "own", tokenizer) == 0
    return tmp_path / "own"


def reference(folder: Path, manifest: Manifest, known: Vocab) -> Manifest:
    """Shards of tokens of the same documents, grouped in records as the index groups them."""
    split = []
    for shard, info in enumerate(manifest.shards):
        encoded = iter([ids for ids in known.encode_batch([d for d in documents_of(shard) if d.strip()])])
        rows = manifest.records[info.first_record :][: info.samples]
        groups = [list(itertools.islice(encoded, count)) for count in rows["documents"].tolist()]
        assert next(encoded, None) is None
        split.append([Record(np.concatenate(group), np.array([len(ids) for ids in group])) for group in groups])
    return write_split(folder, split, known.size, known.fingerprint)


def deliver(
    manifest: Manifest, known: Vocab, rows: int, world: int = 1, workers: int = 0, start: Cursor | None = None
) -> tuple[list[list], Cursor]:
    """The run's next rows of all ranks, in order, and the cursor behind them."""
    micro, begun = GLOBAL_ROWS // world, start["rows"] if start else 0
    data = DataConfig("unused", lanes=LANES, window_records=2, workers=workers)
    taken: dict[int, list] = {}
    cursors = []
    for rank in range(world):
        with train_batches(
            manifest, known, data, BatchConfig(SEQ_LEN, GLOBAL_ROWS, micro), SEED, rank, world, start
        ) as b:
            batches = list(itertools.islice(b, rows // GLOBAL_ROWS))
        columns = ("ids", "segments", "maskable", "row_keys")
        found = [list(zip(*(getattr(batch, name).tolist() for name in columns), strict=True)) for batch in batches]
        taken |= dict(zip(itertools.count(begun + rank, world), itertools.chain(*found), strict=False))
        cursors.append(batches[-1].cursor)
    return [taken[place] for place in sorted(taken)], json.loads(json.dumps(merge_cursors(cursors)))


# ---- the same batches


@pytest.mark.parametrize(
    ("form", "flags"),
    [(as_text, []), (as_json, ["--text-key", "body"]), (with_others, [])],
)
def test_batches_are_those_of_shards_of_the_tokens(
    tmp_path: Path, tokenizer: Path, known: Vocab, form: Callable[[int, str], Members], flags: list[str]
) -> None:
    """Over more than an epoch: so each document comes once an epoch, as there."""
    plant(tmp_path / "own", form)
    assert run(tmp_path / "own", tokenizer, *flags) == 0
    manifest = load_manifest(tmp_path / "own" / "train")
    tokens = reference(tmp_path / "tokens", manifest, known)
    assert (manifest.documents, manifest.tokens, manifest.samples) == (tokens.documents, tokens.tokens, tokens.samples)
    assert min(shard.samples for shard in manifest.shards) > 2
    expected, cursor = deliver(tokens, known, 1200)
    assert all(place[0] > 0 for place in cursor["lanes"])
    assert deliver(manifest, known, 1200) == (expected, cursor)
    data = DataConfig("unused", window_records=3)
    whole = [held_out_batches(m, known, data, BatchConfig(SEQ_LEN, 4, 4), 0, 1) for m in (manifest, tokens)]
    for one, other in zip(*whole, strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.row_keys.tolist() == other.row_keys.tolist()


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 0), (4, 0), (2, 2)])
def test_the_order_is_the_same_for_any_ranks_and_workers(indexed: Path, known: Vocab, world: int, workers: int) -> None:
    manifest = load_manifest(indexed / "train")
    assert deliver(manifest, known, 240, world, workers) == deliver(manifest, known, 240)


@pytest.mark.parametrize("stop", [8, 40, 400])
def test_resume_goes_on_exactly_and_reads_only_its_windows(
    indexed: Path, known: Vocab, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = load_manifest(indexed / "train")
    expected, _ = deliver(manifest, known, stop + 80)
    first, cursor = deliver(manifest, known, stop, world=2, workers=1)
    assert first + deliver(manifest, known, 80, world=4, start=cursor)[0] == expected
    walked = []
    real = samples.members
    monkeypatch.setattr(samples, "members", lambda *place: (walked.append(place[2:4]), real(*place))[1])
    deliver(manifest, known, 8, start=cursor)
    size = max(shard.bytes for shard in manifest.shards)
    assert len(walked) <= 2 * LANES * 2 and sum(end - begin for begin, end in walked) < LANES * size


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_any_dialect_of_tar_is_read_as_webdataset_reads_it(
    tmp_path: Path, tokenizer: Path, known: Vocab, format: int
) -> None:
    names = ["d" * 80 + "/" + "long" * 9 + f"{number}.txt" for number in range(40)]  # a header in two parts
    if format != tarfile.USTAR_FORMAT:
        names += ["n" * 300 + f"{number}.txt" for number in range(40)] + ["übung.txt"]
    documents = toy_documents(len(names), seed=3)
    path = pack(
        tmp_path / "own" / "train" / "a.tar", [(n, d.encode()) for n, d in zip(names, documents, strict=True)], format
    )
    with tarfile.open(path, "a", format=format) as tar:
        for kind, name in ((tarfile.DIRTYPE, "deep"), (tarfile.SYMTYPE, "deep/link.txt"), (tarfile.REGTYPE, "README")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a" if kind == tarfile.SYMTYPE else ""
            tar.addfile(member, io.BytesIO())
    found = list(wds.WebDataset(str(path), shardshuffle=False))
    with path.open("rb") as file:
        ours = list(samples.samples(path, file, 0, path.stat().st_size, True, "txt"))
    assert [(s["__key__"], s["txt"]) for s in found] == [(s.key, s.data) for s in ours] and len(ours) == len(names)
    with tarfile.open(path) as tar:
        assert [m.offset for m in tar if m.isreg() and m.name.endswith(".txt")] == [s.offset for s in ours]
    assert run(tmp_path / "own", tokenizer) == 0
    manifest = load_manifest(tmp_path / "own" / "train")
    records = list(read_records(manifest, 0, vocab=known))
    assert [known.decode(ids) for r in records for ids in np.split(r.tokens, np.cumsum(r.lengths)[:-1])] == documents


# ---- what --index says and leaves


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_tars_are_left_as_they_are_and_manifests_need_force(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "own"
    plant(folder, as_text)
    before = snapshot(folder)
    assert run(folder, tokenizer) == 0
    after = snapshot(folder)
    assert {name: data for name, data in after.items() if name.endswith(".tar")} == before
    assert sorted(set(after) - set(before)) == [
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "train/manifest.json", "train/records.npy",
    ]  # fmt: skip
    assert "no tar is held out" in capsys.readouterr().out
    assert run(folder, tokenizer) == 2
    assert "train has a manifest already; --force writes it anew" in capsys.readouterr().err
    assert run(folder, folder / "tokenizer", "--force", "--workers", "1") == 0
    assert snapshot(folder) == after, "the same whatever the number of processes"
    manifest = load_manifest(folder / "train")
    assert verify(manifest) == [] and [shard.name for shard in manifest.shards] == sorted(
        path.name for path in (folder / "train").glob("*.tar")
    )


def test_a_build_never_replaces_tars_of_text(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though they may be named as its own are."""
    path = pack(tmp_path / "own" / "train" / "000000.tar", as_text(0, "a text"))
    (tmp_path / "more.txt").write_text("other text\n" * 50)
    command = ["--input", str(tmp_path / "more.txt"), "--out", str(tmp_path / "own"), "--tokenizer", str(tokenizer)]
    before = path.read_bytes()
    assert build.main(command) == 2 and path.read_bytes() == before
    assert run(tmp_path / "own", tokenizer) == 0
    assert build.main([*command, "--force"]) == 2 and path.read_bytes() == before
    assert capsys.readouterr().err.count("000000.tar is no part of a build, and would be lost") == 2


def test_tars_beside_the_splits_and_held_out_ones(
    tmp_path: Path, tokenizer: Path, known: Vocab, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "own"
    plant(tmp_path, as_text)
    (tmp_path / "train").rename(folder)
    (folder / "notes.md").write_text("not read")
    pack(folder / ".hidden.tar", [])
    assert run(folder, tokenizer, "--valid-shards", "3") == 0
    train, valid = load_manifest(folder / "train"), load_manifest(folder / "valid")
    assert (len(train.shards), len(valid.shards)) == (5, 3) and verify(train) == verify(valid) == []
    names = [shard.name for split in (train, valid) for shard in split.shards]
    assert sorted(names) == [f"../part {number}.tar" for number in range(SHARDS)]
    deliver(train, known, 80)
    assert inspect.main([str(folder), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "in .txt members" in said and "verified: 8 shards are as they were written" in said
    # the choice goes by the names alone, and without a held-out part valid/ is gone
    held_out = {shard.name for shard in valid.shards}
    assert run(folder, tokenizer, "--valid-shards", "2", "--force") == 0
    assert {shard.name for shard in load_manifest(folder / "valid").shards} < held_out
    assert run(folder, tokenizer, "--force") == 0
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["tokenizer", "train"]
    assert len(load_manifest(folder / "train").shards) == SHARDS


def test_what_is_not_text_is_counted_and_comes_the_same_each_time(
    tmp_path: Path, tokenizer: Path, known: Vocab, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [b"good", b"\xef\xbb\xbfmarked", b"caf\xe9 \xff", b"  ", b""]
    pack(tmp_path / "t" / "train" / "a.tar", [(f"{n}.txt", data) for n, data in enumerate(texts)])
    pack(
        tmp_path / "j" / "train" / "a.tar",
        [("0.json", b'{"text": "half \\ud83d of one"}'), ("1.json", b'{"text": ""}')],
    )
    expected = {"t": ["good", "marked", "caf\ufffd \ufffd"], "j": ["half \ufffd of one"]}
    for name, replaced, key in (("t", 2, "2"), ("j", 1, "0")):
        assert run(tmp_path / name, tokenizer) == 0
        said = capsys.readouterr().out
        where = f"{tmp_path / name / 'train' / 'a.tar'}, first in sample '{key}' ({replaced})"
        assert f"note: {replaced} bytes are not UTF-8 and become U+FFFD: {where}" in said
        assert f"note: {2 if name == 't' else 1} empty documents are passed over" in said
        manifest = load_manifest(tmp_path / name / "train")
        (record,) = read_records(manifest, 0, vocab=known)
        found = [known.decode(ids) for ids in np.split(record.tokens, np.cumsum(record.lengths)[:-1])]
        assert found == expected[name]
        assert manifest.about["replaced_bytes"] == replaced


TXT, JSON = ("a.txt", b"text"), ("a.json", b'{"text": "words"}')


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([TXT, JSON], "sample 'a' has 'json', 'txt': say which with --member"),
        ([("a.jpg", b"")], "sample 'a' has 'jpg': the text must be in a .txt, or in a .json"),
        ([TXT, ("b.jpg", b"")], "sample 'b' has no .txt beside its 'jpg'"),
        ([TXT, ("b.json", b"{}")], "sample 'b' has no .txt beside its 'json'"),
        ([TXT, ("b.txt", b"x"), ("b.json", b"")], "sample 'b' has a .txt and a .json: say which with --member"),
        ([TXT, ("b.txt", b"x"), ("a.cls", b"1"), ("b.cls", b"1")], "sample 'a': its members don't stand together"),
        ([TXT, TXT], "sample 'a' has two members 'txt'"),
        ([("a.txt", b"x"), ("a.TXT", b"y")], "sample 'a' has two members 'txt'"),
        ([("a.json", b"{")], "sample 'a': its .json is not JSON (Expecting"),
        ([("a.json", b"[" * 100_000)], "sample 'a': its .json is not JSON ("),
        ([("a.json", b'["text"]')], "sample 'a': its .json has no text under 'text': it is a list, not an object"),
        ([("a.json", b'{"body": "x", "n": 1}')], "under 'text': it has 'body' (str), 'n' (int); see --text-key"),
        ([("a.json", b'{"text": null}')], "sample 'a': its .json has no text under 'text': it has 'text' (NoneType)"),
        ([TXT, ("../../b.txt", b"x")], "names a member '../../b.txt', which leads out of its folder"),
        ([TXT, ("/tmp/b.txt", b"x")], "names a member '/tmp/b.txt', which leads out of its folder"),
        ([], "holds no document; take it out of the folder"),
        ([("a.txt", b" "), ("b.txt", b"")], "holds no document; take it out of the folder"),
        ([("README", b"x"), (".txt", b"x"), ("__meta__/a.txt", b"x")], "holds no document; take it out of the folder"),
    ],
)
def test_tars_that_are_no_text_are_refused_by_shard_and_key(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], members: Members, said: str
) -> None:
    path = pack(tmp_path / "train" / "odd.tar", members)
    before = snapshot(tmp_path)
    assert run(tmp_path, tokenizer) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}") and said in error and error.count("\n") == 1
    assert snapshot(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["train"]


def test_of_two_texts_the_one_that_is_named_is_taken(tmp_path: Path, tokenizer: Path, known: Vocab) -> None:
    for member, expected in (("txt", "text"), ("json", "words")):
        pack(tmp_path / member / "train" / "a.tar", [TXT, JSON])
        assert run(tmp_path / member, tokenizer, "--member", member) == 0
        (record,) = read_records(load_manifest(tmp_path / member / "train"), 0, vocab=known)
        assert known.decode(record.tokens) == expected


def damages() -> dict[str, Callable[[bytes], bytes]]:
    def header(data: bytes) -> bytes:
        return data[:1030] + b"!" + data[1031:]  # in the second member's name

    def negative(data: bytes) -> bytes:
        """A size that would lead back, with a checksum that is right."""
        block = bytearray(data[1024:1536])
        block[124:136] = b"\xff" * 10 + b"\xfc\x00"
        block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
        return data[:1024] + bytes(block) + data[1536:]

    return {
        "has a damaged header at byte 1,024 (bad checksum)": header,
        "has a damaged header at byte 1,024 (a size of -1024)": negative,
        "is cut short at byte 1,300": lambda data: data[:1300],
        "is cut short at byte 1,540: a member ends at 2,048": lambda data: data[:1540],
        "is cut short at byte 2,048: a tar's end is marked, and this one's isn't": lambda data: data[:2048],
        "is cut short at byte 0": lambda data: b"",
        "ends at byte 1,024 and holds more behind": lambda data: data[:1024] + bytes(512) + data[1536:],
        "ends at byte 2,048 and holds more behind: zeroed, or two tars in one file": lambda data: data + data,
    }


@pytest.mark.parametrize("said", list(damages()))
def test_damaged_tars_are_not_indexed(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], said: str
) -> None:
    pack(tmp_path / "train" / "a.tar", [("a.txt", b"good")])
    path = pack(tmp_path / "train" / "b.tar", [("a.txt", b"one"), ("b.txt", b"two")])
    path.write_bytes(damages()[said](path.read_bytes()))
    assert run(tmp_path, tokenizer) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and said in error
    assert not (tmp_path / "train" / "manifest.json").exists()


def test_folders_that_cannot_be_meant_are_refused(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*flags: str, by: Path = tokenizer) -> str:
        assert run(tmp_path / "own", by, *flags) == 2
        return capsys.readouterr().err

    assert "own is no folder" in refused()
    (tmp_path / "own").mkdir()
    assert "there is no .tar in" in refused()
    train = pack(tmp_path / "own" / "train" / "a.tar", [TXT])
    assert "is compressed, and there is no seeking in it" in refused_with(train.with_name("b.tar.gz"), refused)
    assert "is compressed, and there is no seeking in it" in refused_with(train.with_name("A.TGZ"), refused)
    assert "holds tars and so does" in refused_with(tmp_path / "own" / "c.tar", refused)
    assert "--valid-shards is for tars directly in" in refused_with(tmp_path / "own" / "valid" / "c.tar", refused, "1")
    assert "valid holds no .tar" in refused_with(tmp_path / "own" / "valid" / "c.txt", refused)
    assert "train one first" in refused(by=Path("train:300"))
    vocab.train(["another"], 300).save(tmp_path / "own" / "tokenizer")
    assert "is another tokenizer; name that one, or give --force" in refused()
    (tmp_path / "own" / ".indexing" / "replaced" / "deep").mkdir(parents=True)  # left by one that was killed
    with index.workplace(tmp_path / "own"):
        assert "is being indexed by another process" in refused("--force")
    (tmp_path / "own" / ".indexing" / "replaced" / "deep").mkdir(parents=True)
    assert run(tmp_path / "own", tokenizer, "--force") == 0
    train.rename(tmp_path / "own" / "a.tar")
    assert "--valid-shards 1 leaves nothing of 1 tars to train on" in refused("--valid-shards", "1", "--force")
    assert not (tmp_path / "own" / ".indexing").exists()


def refused_with(extra: Path, refused: Callable[..., str], valid_shards: str = "0") -> str:
    """What is said while another file is there."""
    extra.parent.mkdir(exist_ok=True)
    extra.write_bytes(b"")
    said = refused("--valid-shards", valid_shards)
    extra.unlink()
    if extra.parent.name == "valid":
        extra.parent.rmdir()
    return said


def test_a_gzipped_tar_under_another_name_is_refused(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "a.tar", "w:gz") as tar:
        member = tarfile.TarInfo("a.txt")
        member.size = 2000
        tar.addfile(member, io.BytesIO(os.urandom(2000)))
    assert run(tmp_path, tokenizer) == 2
    assert "a.tar: is compressed, and there is no seeking in it" in capsys.readouterr().err


def test_it_runs_as_a_command(tmp_path: Path, tokenizer: Path) -> None:
    pack(tmp_path / "train" / "a.tar", [TXT])
    command = [sys.executable, "shards/build.py", f"--index={tmp_path}", "--tokenizer", tokenizer]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 documents" in done.stdout, done.stderr


# ---- damage that comes afterwards


def texts_of(manifest: Manifest, shard: int, known: Vocab) -> list[list[int]]:
    records = read_records(manifest, shard, vocab=known)
    return [ids.tolist() for r in records for ids in np.split(r.tokens, np.cumsum(r.lengths)[:-1])]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_no_flipped_bit_passes_for_data(tmp_path: Path, tokenizer: Path, known: Vocab, format: int, bit: int) -> None:
    """Each place of a tar: either the reader refuses it, or what it yields is untouched; verify sees every one."""
    members = [member for n, text in enumerate(toy_documents(3, seed=2)) for member in as_text(n, text)]
    path = pack(tmp_path / "train" / "a.tar", [("n" * 200 + "ü.txt", b"long"), *members] if format else members, format)
    assert run(tmp_path, tokenizer) == 0
    manifest = load_manifest(tmp_path / "train")
    whole, expected = path.read_bytes(), texts_of(manifest, 0, known)
    refused = 0
    for place in range(0, len(whole), 17):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        try:
            assert texts_of(manifest, 0, known) == expected, f"byte {place}"
        except ShardError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 50
    assert verify(manifest) == [f"{path} is altered: its sha256 is not the manifest's"]


def test_a_shard_that_is_cut_short_or_gone_is_named(indexed: Path, known: Vocab) -> None:
    manifest = load_manifest(indexed / "train")
    path, rows = indexed / "train" / "part 0.tar", manifest.records[: manifest.shards[0].samples]
    whole = path.read_bytes()
    middle = int(rows["offset"][2])
    before = list(read_records(manifest, 0, 0, 2, known))
    for size in (middle, middle + 1, middle + 600, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ShardError, match=r"part 0\.tar: is cut short at byte"):
            list(read_records(manifest, 0, vocab=known))
        if size:
            found = list(read_records(manifest, 0, 0, 2, known))
            assert [r.tokens.tolist() for r in found] == [r.tokens.tolist() for r in before]
    path.unlink()
    with pytest.raises(ShardError, match=r"part 0\.tar: can't be read \(No such file"):
        deliver(manifest, known, 800)
    assert verify(manifest) == [f"{path} is missing"]


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m, bad: [m[0], *m[2:]], "record 0 fails its crc32"),
        (lambda m, bad: [m[1], m[0], *m[2:]], "record 0 fails its crc32"),
        (lambda m, bad: [m[0], ("0001.pyd", bad), *m[2:]], "record 0: sample '0001' has no .txt"),
        (lambda m, bad: [("../" + m[0][0], m[0][1]), *m[1:]], r"names a member '\.\./0000\.txt', which leads out"),
        (lambda m, bad: [("0000.txt", bad), *m[1:]], "record 0 fails its crc32"),
        (lambda m, bad: [("0000.txt.gz", m[0][1]), *m[1:]], "record 0: sample '0000' has no .txt"),
        (lambda m, bad: [m[0], m[0], *m[1:]], "sample '0000' has two members 'txt'"),
        (lambda m, bad: [], "fails its crc32"),
        (lambda m, bad: m[:-2], "fails its crc32"),
    ],
)
def test_tars_that_were_packed_anew_are_refused_and_nothing_runs(
    tmp_path: Path, tokenizer: Path, known: Vocab, change: Callable[[Members, bytes], Members], said: str
) -> None:
    members = [member for n, text in enumerate(toy_documents(4, seed=2)) for member in as_text(n, text)]
    path = pack(tmp_path / "own" / "train" / "a.tar", members)
    assert run(tmp_path / "own", tokenizer) == 0
    size = path.stat().st_size
    pack(path, change(members, pickle.dumps(Payload(tmp_path / "ran"))))
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    with pytest.raises(ShardError, match=said):
        list(read_records(load_manifest(tmp_path / "own" / "train"), 0, vocab=known))
    assert [found.name for found in tmp_path.iterdir()] == ["own"]


def test_a_payload_beside_the_text_never_runs(tmp_path: Path, tokenizer: Path, known: Vocab) -> None:
    bad = pickle.dumps(Payload(tmp_path / "ran"))
    members = [("0.txt", b"text"), *((f"0.{kind}", bad) for kind in ("pyd", "pickle", "pth", "npy"))]
    pack(tmp_path / "own" / "train" / "a.tar", members)
    assert run(tmp_path / "own", tokenizer) == 0
    assert len(texts_of(load_manifest(tmp_path / "own" / "train"), 0, known)) == 1
    assert [found.name for found in tmp_path.iterdir()] == ["own"]


def test_a_bad_shard_can_be_skipped(indexed: Path, known: Vocab) -> None:
    manifest = load_manifest(indexed / "train")
    (indexed / "train" / "part 2.tar").write_bytes(b"")
    data = DataConfig("unused", lanes=LANES, window_records=2, workers=1, max_bad_shards=1)
    with train_batches(manifest, known, data, BatchConfig(SEQ_LEN, 8, 8), SEED, 0, 1) as batches:
        assert any("part 2.tar" in batch.bad_shards for batch in itertools.islice(batches, 100))


def test_tokens_that_come_out_otherwise_are_refused(
    indexed: Path, known: Vocab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "encode", lambda vocab, texts: [[5] for _ in texts])
    with pytest.raises(ShardError, match="the text is whole, so another version of tokenizers cuts it"):
        list(read_records(load_manifest(indexed / "train"), 0, vocab=known))


def test_another_tokenizer_is_refused(indexed: Path) -> None:
    other = vocab.train(["other text"], 300)
    with pytest.raises(ConfigError, match="the tokenizer does not match the shards"):
        lanes.make_reader(load_manifest(indexed / "train"), other, SEQ_LEN, "best_fit", 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"content": "video"}, "is damaged"),
        ({"member": None}, "text in TextContent"),
        ({"member": "pyd"}, "text in TextContent"),
        ({"text_key": 7}, "text in TextContent"),
        *(
            ({"name": name}, "shard 0 is named")
            for name in (
                "../../a.tar",
                "/a.tar",
                "x/a.tar",
                "../x/a.tar",
                "..",
                "a.tar\0",
                "../.tar",
                "pipe:touch ran",
                7,
            )
        ),
    ],
)
def test_a_manifest_that_was_edited_is_refused(indexed: Path, change: dict[str, object], said: str) -> None:
    file = indexed / "train" / "manifest.json"
    manifest = json.loads(file.read_text())
    (manifest["shards"][0] if "name" in change else manifest).update(change)
    file.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=said):
        load_manifest(indexed / "train")


# ---- the whole


@pytest.mark.slow
def test_a_real_run_on_tars_of_text_stops_and_goes_on(tmp_path: Path, tokenizer: Path) -> None:
    """Two ranks with a worker each, tars with pictures beside the texts: resumed equals never stopped."""
    plant(tmp_path, with_others)
    (tmp_path / "train").rename(tmp_path / "own")
    assert run(tmp_path / "own", tokenizer, "--valid-shards", "1") == 0
    flags = ("schedule.name=constant", "data.workers=1", "data.window_records=2", "evaluate.every_steps=6")
    whole = pretrain(tmp_path / "own", tmp_path / "whole", *flags, "run.steps=12")
    assert whole.returncode == 0, whole.stdout
    for steps in (5, 12):
        part = pretrain(tmp_path / "own", tmp_path / "parts", *flags, f"run.steps={steps}")
        assert part.returncode == 0, part.stdout
    for name in ("loss", "valid/loss"):
        one, other = metrics(tmp_path / "whole", name), metrics(tmp_path / "parts", name)
        assert one.items() <= other.items() and one


def test_text_shards_at_a_url(tmp_path: Path, tokenizer: Path, known: Vocab) -> None:
    """Tars that lie beside the manifest's folder, with a blank in their names."""
    plant(tmp_path / "own", as_text)
    for tar in (tmp_path / "own" / "train").iterdir():
        tar.rename(tmp_path / "own" / tar.name)
    (tmp_path / "own" / "train").rmdir()
    assert run(tmp_path / "own", tokenizer) == 0
    local = load_manifest(tmp_path / "own" / "train")
    assert local.shards[0].name == "../part 0.tar"
    with Server(tmp_path / "own") as server:
        cache = make_cache(str(tmp_path / "cache"), 1.0, 20)
        remote = open_split(f"{server.address}/train", cache)
        assert deliver(remote, known, 80) == deliver(local, known, 80)


def test_what_else_lies_in_valid_is_left_and_so_is_the_index(tmp_path: Path, tokenizer: Path) -> None:
    plant(tmp_path / "own", as_text)
    for tar in (tmp_path / "own" / "train").iterdir():
        tar.rename(tmp_path / "own" / tar.name)
    (tmp_path / "own" / "train").rmdir()
    assert run(tmp_path / "own", tokenizer, "--valid-shards", "1") == 0
    (tmp_path / "own" / "valid" / "notes.txt").write_text("mine")
    assert run(tmp_path / "own", tokenizer, "--force") == 2
    assert load_manifest(tmp_path / "own" / "train") and load_manifest(tmp_path / "own" / "valid")


def test_a_tar_with_another_kind_of_name_is_not_passed_over(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture
) -> None:
    plant(tmp_path / "own", as_text)
    (tmp_path / "own" / "train" / "part 0.tar").rename(tmp_path / "own" / "train" / "part 0.TAR")
    assert run(tmp_path / "own", tokenizer) == 2
    assert "part 0.TAR is no name of a tar that is read" in capsys.readouterr().err
