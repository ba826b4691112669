"""From text files to shards: every document once, whatever the order and the processes; refusals that leave nothing."""

import collections
import functools
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm_dist import vocab
from mlm_dist.manifest import Manifest, load_manifest
from mlm_dist.schema import ConfigError
from mlm_dist.shards import read_records
from shards import build, stages, texts, workplace
from shards import files as inputs
from shards.buckets import bucket_count, is_held_out

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small tokenizer, trained once."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab.train(prose(50), 400).save(folder)
    return str(folder)


def prose(count: int, seed: int = 0) -> list[str]:
    """Documents that are all different."""
    rng = np.random.default_rng(seed)
    words = ["shard", "token", "lane", "row", "mask", "naïve", "東京", "window", "epoch", "rank", "\n"]
    return [f"{i}: " + " ".join(rng.choice(words, size=rng.integers(20, 200))) for i in range(count)]


def json_lines(path: Path, documents: list[str], key: str = "text") -> Path:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": 1, key: text}) + "\n" for text in documents)
    return path


def run(out: Path, tokenizer: str, /, *inputs: Path, **options: object) -> int:
    named = [(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
    flags = [part for flag, value in named for part in ([flag] if value is True else [flag, *str(value).split()])]
    paths = [str(path) for path in inputs]
    return build.main(["--input", *paths, "--out", str(out), "--tokenizer", tokenizer, "--workers", "1", *flags])


def documents(manifest: Manifest, tokenizer: str) -> list[str]:
    made = vocab.load(tokenizer)
    return [
        made.decode(ids)
        for shard in range(len(manifest.shards))
        for record in read_records(manifest, shard)
        for ids in np.split(record.tokens, np.cumsum(record.lengths)[:-1])
    ]


def built(out: Path, tokenizer: str) -> collections.Counter[str]:
    """All documents of both splits."""
    splits = (out / name for name in ("train", "valid") if (out / name).exists())
    return collections.Counter(text for split in splits for text in documents(load_manifest(split), tokenizer))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- every document, once


def test_every_kind_of_file_is_read_once(tmp_path: Path, tokenizer: str) -> None:
    source, said = tmp_path / "in", prose(12)
    (source / "deep" / "er").mkdir(parents=True)
    (source / "a.txt").write_text(said[0])
    (source / "deep" / "b.MD").write_text(said[1])
    (source / "deep" / "er" / "c.rst").write_text(said[2])
    (source / "d.py").write_text(said[3])
    (source / "e.txt.gz").write_bytes(gzip.compress(said[4].encode()))
    (source / "bom.txt").write_bytes(b"\xef\xbb\xbf" + said[5].encode())
    json_lines(source / "f.jsonl", said[6:9])
    json_lines(source / "g.jsonl.gz", said[9:12])
    (source / "f.jsonl").write_text((source / "f.jsonl").read_text() + "\n  \n")
    # what is left out
    (source / "h.bin").write_bytes(b"no text")
    (source / ".hidden.txt").write_text("no")
    (source / "__pycache__").mkdir()
    (source / "__pycache__" / "i.py").write_text("no")
    (source / "deep" / "skipped").mkdir()
    (source / "deep" / "skipped" / "j.txt").write_text("no")
    (source / "deep" / "loop").symlink_to(source)
    (source / "dangling.txt").symlink_to(source / "nowhere")
    (source / "again.txt").symlink_to(source / "a.txt")
    assert run(tmp_path / "out", tokenizer, source, source / "deep", exclude="skipped", valid_fraction=0.3) == 0
    assert built(tmp_path / "out", tokenizer) == collections.Counter(said)


def test_bytes_depend_on_neither_processes_nor_order(tmp_path: Path) -> None:
    said = prose(3000)
    one, two = json_lines(tmp_path / "1.jsonl", said[:2000]), json_lines(tmp_path / "2.jsonl.gz", said[2000:])
    small = {"tokenizer_sample_mb": 1, "valid_fraction": 0.1}
    assert run(tmp_path / "a", "train:400", one, two, **small) == 0
    assert run(tmp_path / "b", "train:400", two, one, **small, workers=3) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")
    train = load_manifest(tmp_path / "a" / "train")
    assert len(train.shards) > 8 and 4000 < train.tokens / train.samples < 12000
    assert built(tmp_path / "a", str(tmp_path / "a" / "tokenizer")) == collections.Counter(said)
    assert run(tmp_path / "c", str(tmp_path / "a" / "tokenizer"), one, two, seed=1) == 0
    assert (
        documents(load_manifest(tmp_path / "c" / "train"), str(tmp_path / "c" / "tokenizer"))[:50]
        != documents(train, str(tmp_path / "a" / "tokenizer"))[:50]
    )


def test_documents_that_do_not_fit_into_memory_go_through_files(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = json_lines(tmp_path / "in.jsonl", prose(3000))
    assert run(tmp_path / "a", tokenizer, source) == 0
    monkeypatch.setattr(stages, "RUN_BYTES", 10_000)
    assert run(tmp_path / "b", tokenizer, source) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_held_out_text_is_apart(tmp_path: Path, tokenizer: str) -> None:
    said = prose(1000)
    source = json_lines(tmp_path / "in.jsonl", said + said[:500])  # half of them twice
    assert run(tmp_path / "out", tokenizer, source, valid_fraction=0.2) == 0
    train, valid = (set(documents(load_manifest(tmp_path / "out" / name), tokenizer)) for name in ("train", "valid"))
    assert not train & valid and train | valid == set(said)
    assert 150 < len(valid) < 250
    assert built(tmp_path / "out", tokenizer) == collections.Counter(said + said[:500])


def test_held_out_text_of_its_own(tmp_path: Path, tokenizer: str) -> None:
    train, valid = prose(50), prose(20, seed=1)
    sources = json_lines(tmp_path / "in.jsonl", train), json_lines(tmp_path / "held.jsonl", valid)
    assert run(tmp_path / "out", tokenizer, sources[0], valid_input=sources[1]) == 0
    assert set(documents(load_manifest(tmp_path / "out" / "train"), tokenizer)) == set(train)
    assert set(documents(load_manifest(tmp_path / "out" / "valid"), tokenizer)) == set(valid)


def test_a_share_of_the_keys_is_held_out() -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, size=100_000, dtype=np.uint64)
    assert abs(is_held_out(keys, 0.01).mean() - 0.01) < 0.002
    assert not is_held_out(keys, 0.0).any() and is_held_out(keys, 1.0).all()
    assert all(
        is_held_out(int(key), 0.3) == held for key, held in zip(keys[:100], is_held_out(keys, 0.3)[:100], strict=True)
    )


@pytest.mark.parametrize(
    ("megabytes", "shards"), [(0, 1), (0.2, 2), (1, 8), (4.3, 64), (1000, 64), (10_000, 128), (100_000, 1536)]
)
def test_number_of_shards(megabytes: float, shards: int) -> None:
    assert bucket_count(megabytes * 1e6, 16_000_000) == shards


# ---- documents that are long, broken or empty


@given(data=st.text(alphabet="ab \né東🙂", max_size=60).map(str.encode), longest=st.integers(4, 20))
def test_cutting_loses_nothing(data: bytes, longest: int) -> None:
    pieces, rest = [], data
    while rest:
        end = texts.cut(rest, longest)
        pieces.append(rest[:end])
        rest = rest[end:]
    assert b"".join(pieces) == data
    assert all(0 < len(piece) <= longest for piece in pieces)
    assert "".join(piece.decode() for piece in pieces) == data.decode()
    for piece in pieces[:-1]:
        assert piece[-1:] == b"\n" or b"\n" not in piece


def test_long_documents_are_cut_at_lines(tmp_path: Path, tokenizer: str) -> None:
    lines = [f"line {i} of a long file\n" for i in range(500)]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("".join(lines).encode()))
    json_lines(tmp_path / "b.jsonl", ["".join(lines)])
    options = {"document_bytes": 1024, "valid_fraction": 0}
    for source in ("a.txt.gz", "b.jsonl"):
        assert run(tmp_path / source[0], tokenizer, tmp_path / source, **options) == 0
        found = documents(load_manifest(tmp_path / source[0] / "train"), tokenizer)
        assert sorted(line for text in found for line in text.splitlines(keepends=True)) == sorted(lines)
        assert all(900 < len(text) <= 1024 for text in found if "line 499 " not in text)
    assert not (tmp_path / "a" / "valid").exists()


def test_bytes_that_are_not_text_are_replaced_and_counted(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.txt").write_text("a genuine \ufffd stays")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 and \xff\xfe")
    (tmp_path / "pair.jsonl").write_text('{"text": "lone \\ud83d here"}\n{"text": "a pair \\ud83d\\ude42"}\n')
    (tmp_path / "empty.txt").write_text(" \n")
    sources = [tmp_path / name for name in ("good.txt", "bad.txt", "pair.jsonl", "empty.txt")]
    assert run(tmp_path / "out", tokenizer, *sources, valid_fraction=0) == 0
    said = ["a genuine \ufffd stays", "caf\ufffd and \ufffd\ufffd", "lone \ufffd here", "a pair 🙂"]
    assert built(tmp_path / "out", tokenizer) == collections.Counter(said)
    about = load_manifest(tmp_path / "out" / "train").about
    assert (about["replaced_bytes"], about["empty_documents"]) == (4, 1)
    printed = capsys.readouterr().out
    assert "4 bytes are not UTF-8 and became U+FFFD, in" in printed and "bad.txt (3)" in printed
    assert "1 empty documents left out" in printed
    for name in ("bad.txt", "pair.jsonl"):
        assert run(tmp_path / "strict", tokenizer, tmp_path / name, strict=True) == 2
        assert f"{name}{':1' if name == 'pair.jsonl' else ''} is not UTF-8" in capsys.readouterr().err


# ---- refusals


@pytest.mark.parametrize(
    ("name", "content", "options", "problem"),
    [
        ("in.jsonl", b'{"text": "a"}\n{"text": \n', {}, "in.jsonl:2 is not JSON"),
        (
            "in.jsonl",
            b'\n{"body": "a", "n": 1}\n',
            {},
            "in.jsonl:2 has no text under 'text': it has 'body' (str), 'n' (int)",
        ),
        ("in.jsonl", b'{"text": null}\n', {}, "in.jsonl:1 has no text under 'text': it has 'text' (NoneType)"),
        ("in.jsonl", b'["a"]\n', {}, "in.jsonl:1 has no text under 'text': it is a list, not an object"),
        ("in.jsonl", b"[" * 100_000 + b"\n", {}, "in.jsonl:1 is not JSON"),
        ("in.jsonl", b'{"text": "a"}\n', {"text_key": "body"}, "in.jsonl:1 has no text under 'body'"),
        ("in.txt.gz", gzip.compress(b"a" * 9999)[:-9], {}, "in.txt.gz is not a whole gzip file"),
        ("in.txt.gz", b"plain", {}, "in.txt.gz is not a whole gzip file"),
        ("in.txt", b" \n", {}, "there is nothing to train on: every document is empty or held out"),
        (
            "in.pdf",
            b"%PDF",
            {},
            "in.pdf is of a kind that isn't read: .txt, .md, .rst, .py, .html, .htm and .jsonl, each also with .gz or "
            ".zst, and .parquet",
        ),
        (
            "in.txt",
            b"text",
            {"tokenizer": "train:many"},
            "--tokenizer train:many: the size of the vocabulary must be a number",
        ),
        ("in.txt", b"text", {"tokenizer": "train:100"}, "a vocabulary of 100 is too small"),
        ("in.txt", b"text", {"tokenizer": "nowhere"}, "tokenizer nowhere doesn't exist"),
        ("in.txt", b"text", {"valid_input": "nowhere"}, "input nowhere doesn't exist"),
    ],
)
def test_refusals_are_one_sentence_and_leave_nothing(
    tmp_path: Path,
    tokenizer: str,
    capfd: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    options: dict[str, str],
    problem: str,
) -> None:
    (tmp_path / name).write_bytes(content)
    assert run(tmp_path / "out", tokenizer, tmp_path / name, **options) == 2
    said = capfd.readouterr().err
    assert problem in said and said.startswith("error: ") and said.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_inputs_without_text_are_refused(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "image.png").write_bytes(b"")
    assert run(tmp_path / "out", tokenizer, tmp_path / "in") == 2
    assert "in: the files read are .txt, .md, .rst, .py, .html, .htm and .jsonl, each" in capsys.readouterr().err
    assert run(tmp_path / "out", tokenizer, tmp_path / "in", tmp_path / "gone") == 2
    assert f"input {tmp_path / 'gone'} doesn't exist" in capsys.readouterr().err


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LONGEST_LINE", 1 << 20)
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "a"}\n[' + b"1, " * (1 << 19))
    with pytest.raises(ConfigError, match=r"in\.jsonl:2 is longer than 1 MiB: is it really JSON lines\?"):
        list(texts.batches(inputs.pieces([tmp_path / "in.jsonl"], False), texts.Reading("text", 1 << 20, False)))


@pytest.mark.parametrize(
    "flags", [["--valid-fraction", "1"], ["--workers", "0"], ["--valid-input", "x", "--valid-fraction", "0"]]
)
def test_options_that_cannot_be_meant_are_refused(tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        build.main(["--input", str(tmp_path), "--out", str(tmp_path / "out"), "--tokenizer", "train:400", *flags])
    assert refused.value.code == 2


def test_shards_are_replaced_on_request_alone(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = json_lines(tmp_path / "1.jsonl", prose(30)), json_lines(tmp_path / "2.jsonl", prose(30, seed=1))
    assert run(tmp_path / "out", tokenizer, old) == 0
    before = files(tmp_path / "out")
    assert run(tmp_path / "out", tokenizer, new) == 2
    assert "already holds shards; give another --out, or --force to replace them" in capsys.readouterr().err
    assert files(tmp_path / "out") == before
    (tmp_path / "bad.jsonl").write_text("{")
    assert run(tmp_path / "out", tokenizer, tmp_path / "bad.jsonl", force=True) == 2
    assert files(tmp_path / "out") == before
    assert run(tmp_path / "out", tokenizer, new, force=True, valid_fraction=0) == 0
    assert built(tmp_path / "out", tokenizer) == collections.Counter(prose(30, seed=1))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokenizer", "train"]


@pytest.mark.parametrize("moved", [1, 2])
@pytest.mark.parametrize("force", [False, True])
def test_a_build_that_was_stopped_while_it_moved_into_place_is_not_in_the_way(
    tmp_path: Path, tokenizer: str, moved: int, force: bool
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    source = json_lines(tmp_path / "in.jsonl", prose(60))
    assert run(whole, tokenizer, source, valid_fraction=0.3) == 0
    (out / ".building").mkdir(parents=True)
    for place, part in enumerate(workplace.OUTPUT):
        (whole / part).rename((out if place < moved else out / ".building") / part)
    with pytest.raises(ConfigError, match="doesn't exist"):
        load_manifest(out / "train")
    said = prose(30, seed=1)
    options = {"force": True} if force else {}
    new = json_lines(tmp_path / "new.jsonl", said)
    assert run(out, str(out / "tokenizer"), new, valid_fraction=0, **options) == 0  # a valid/ that's left is stale
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer", "train"]
    assert built(out, tokenizer) == collections.Counter(said)


@pytest.mark.parametrize("name", ["train/mine.txt", "valid/deep/mine.txt", "train/000000.tar/mine.txt", "valid"])
@pytest.mark.parametrize("force", [False, True])
def test_files_that_no_build_made_are_never_replaced(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], name: str, force: bool
) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("text of mine")
    before = files(tmp_path / "out")
    source = json_lines(tmp_path / "in.jsonl", prose(30))
    assert run(tmp_path / "out", tokenizer, source, **({"force": True} if force else {})) == 2
    said = capsys.readouterr().err
    assert "is no part of a build, and would be lost; give another --out" in said and said.count("\n") == 1
    assert files(tmp_path / "out") == before


def test_a_full_disk_leaves_nothing(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = json_lines(tmp_path / "in.jsonl", prose(800))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        assert run(tmp_path / "out", tokenizer, source) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "error: File too large: " in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_two_builds_do_not_share_a_folder(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = json_lines(tmp_path / "in.jsonl", prose(30))
    folder = tmp_path / "out" / ".building"
    monkeypatch.setattr(workplace, "LOCK_SECONDS", 0.1)
    with workplace.occupied(folder):
        (folder / "train").mkdir()
        assert run(tmp_path / "out", tokenizer, source) == 2
        assert "another build is writing to" in capsys.readouterr().err
        assert (folder / "train").exists()
    assert run(tmp_path / "out", tokenizer, source) == 0


@pytest.mark.parametrize(
    ("sent", "after_seconds", "code"), [(signal.SIGINT, 0, 130), (signal.SIGTERM, 0.5, 130), (signal.SIGKILL, 0.5, -9)]
)
def test_a_build_that_is_stopped_is_never_taken_for_whole(
    tmp_path: Path, tokenizer: str, sent: int, after_seconds: float, code: int
) -> None:
    source = json_lines(tmp_path / "in.jsonl", prose(2000) * 20)
    command = [
        sys.executable,
        "shards/build.py",
        "--input",
        source,
        "--out",
        tmp_path / "out",
        "--tokenizer",
        tokenizer,
    ]
    # as from a terminal: what a shell starts in the background is deaf to Ctrl-C, and so are its children
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := children.read_text().split()) < len(os.sched_getaffinity(0)):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(after_seconds)
    process.send_signal(sent)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert not (tmp_path / "out" / "train").exists()
    if sent == signal.SIGKILL:
        assert (tmp_path / "out" / ".building").exists()
    else:
        assert said.endswith(
            f"interrupted: no shards came into {tmp_path / 'out'}; the same command goes on from here\n"
        )
        assert list((tmp_path / "out").iterdir()) == []
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}/cwd").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)
    # and the next build clears up
    assert run(tmp_path / "out", tokenizer, json_lines(tmp_path / "small.jsonl", prose(10)), valid_fraction=0) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokenizer", "train"]
