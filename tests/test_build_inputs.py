"""The kinds of files that a build reads: pages, zstd, parquet; what is damaged in them is refused by name."""

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from mlm_dist import vocab
from mlm_dist.manifest import load_manifest
from mlm_dist.schema import ConfigError
from mlm_dist.shards import read_records
from shards import build, files, parquet, stages, texts
from shards.markup import html_text

ROOT = Path(__file__).parent.parent


def read(path: Path, longest: int = 1 << 20, strict: bool = False, key: str = "text") -> list[str]:
    """All documents of one file."""
    reading, counts = texts.Reading(key, longest, strict), texts.Counts()
    batches = list(texts.batches(files.pieces(files.find([path]), held_out=False), reading))
    return [text for batch in batches for text in texts.documents(batch, reading, counts)]


def table(said: list[str | None], kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"id": list(range(len(said))), "text": pa.array(said, kind or pa.string())})


# ---- pages


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("plain", "plain"),
        ("<p>one</p><p>two</p>", "one\ntwo"),
        ("<p>one\n  two\t three<br>four", "one two three\nfour"),
        ("a <b>bold</b>, an <i>italic</i>word", "a bold, an italicword"),
        ("&lt;tag&gt; &amp;amp; caf&eacute; &#8212; &#x1F642; &nbsp;x", "<tag> &amp; café — 🙂 \xa0x"),
        ("a &unknown; & b &#xD800; c", "a &unknown; & b \ufffd c"),
        ("<html><head><title>T</title><style>p{}</style></head><body>text</body></html>", "text"),
        ("<head><meta charset=utf-8><title>T</title><p>no end of the head", "no end of the head"),
        ("a<script>if (x < 1) { '<p>' }</script>b<style>p > a {}</style>c<template>t</template>", "abc"),
        ("a<SCRIPT src=x></SCRIPT>b<noscript>turn it on</noscript>c", "abc"),
        ("<ul><li>one<li>two</ul><h1>head</h1>tail", "one\ntwo\nhead\ntail"),
        ("<table><tr><td>1</td><td>2</td></tr><tr><th>3</th></tr></table>", "1 2\n3"),
        ("<pre>def f():\n    return 1\n\n  x</pre>after", "def f():\n    return 1\n\n  x\nafter"),
        ("<!DOCTYPE html><!-- no --><p>yes</p><?php no ?>", "yes"),
        ("a</b></p></div>b", "a\nb"),
        ("a<![;>b<![endif]>c<![CDATA[x > y]]>d", "abcd"),
        ("a<![if word]>b", "ab"),
        ("<p title='a > b'>x</p>", "x"),
        ("<script>never ends", ""),
        ("", ""),
    ],
)
def test_the_text_of_a_page(html: str, text: str) -> None:
    assert html_text(html) == text


@example("<![;")
@example("<![word[")
@given(st.text(alphabet="<>/!-&;#x \nabpre\"'=?[]", max_size=80))
def test_no_page_is_too_broken(html: str) -> None:
    html_text(html)


@given(st.lists(st.text(alphabet="abé東 &<", min_size=1).map(str.strip).filter(bool), max_size=6))
def test_escaped_text_comes_back(paragraphs: list[str]) -> None:
    from html import escape

    page = "".join(f"<p>{escape(text)}</p>\n" for text in paragraphs)
    assert html_text(page) == "\n".join(" ".join(text.split(" ")) for text in map(collapsed, paragraphs))


def collapsed(text: str) -> str:
    return " ".join(text.split())


def test_pages_are_read_whole_and_cut_as_text(tmp_path: Path) -> None:
    lines = [f"line {i} of a page" for i in range(300)]
    (tmp_path / "a.HTM").write_text("<script>" + "x" * 3000 + "</script>" + "".join(f"<p>{line}" for line in lines))
    found = read(tmp_path / "a.HTM", longest=1024)
    assert "".join(found).splitlines() == lines and all(len(text) <= 1024 for text in found) and len(found) > 4
    (tmp_path / "b.html.gz").write_bytes(gzip.compress("<p>caf\xe9".encode("latin-1")))
    assert read(tmp_path / "b.html.gz") == ["caf\ufffd"]
    with pytest.raises(ConfigError, match=r"b\.html\.gz is not UTF-8"):
        read(tmp_path / "b.html.gz", strict=True)


def test_a_page_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LONGEST_PAGE", 1 << 20)
    (tmp_path / "a.html").write_bytes(b"x" * (1 << 20) + b"y")
    with pytest.raises(ConfigError, match=r"a\.html is longer than 1 MiB: is it really a page"):
        read(tmp_path / "a.html")


# ---- zstd


@pytest.mark.parametrize("size", [0, 1, 100_000, 3_000_000])
def test_zstd_is_unpacked_frame_after_frame(tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(0).integers(97, 105, size).astype(np.uint8).tobytes()
    path = tmp_path / "a.txt.zst"
    packer = zstandard.ZstdCompressor()
    path.write_bytes(packer.compress(data) + packer.compress(b" and more"))
    assert "".join(read(path, longest=10_000)) == data.decode() + " and more"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(ConfigError, match=r"a\.txt\.zst is not a whole zstd file \(it ends inside a frame\)"):
        read(path)
    path.write_bytes(whole + b"rubbish")
    with pytest.raises(ConfigError, match=r"a\.txt\.zst is not a whole zstd file"):
        read(path)


def test_streamed_zstd_with_a_long_window_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    with zstandard.open(
        tmp_path / "a.jsonl.zst", "wt", cctx=zstandard.ZstdCompressor(compression_params=parameters)
    ) as file:
        file.writelines(json.dumps({"text": f"line {i}"}) + "\n" for i in range(5000))
    assert read(tmp_path / "a.jsonl.zst") == [f"line {i}" for i in range(5000)]


# ---- parquet


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_is_read_in_order(tmp_path: Path, kind: pa.DataType, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [f"row {i} naïve 東京" + " x" * (i % 7) for i in range(2000)]
    made = pa.table({"other": [b"\xff"] * 2000, "text": pa.array(said).cast(kind)})
    pq.write_table(made, tmp_path / "a.parquet", row_group_size=300)
    monkeypatch.setattr(parquet, "READ_BYTES", 5000)
    monkeypatch.setattr(texts, "BATCH_BYTES", 2000)
    assert read(tmp_path / "a.parquet") == said
    monkeypatch.setattr(files, "PIECE_BYTES", 3000)
    pieces = files.pieces([tmp_path / "a.parquet"], held_out=False)
    assert len(pieces) > 3 and all(one.stop == next.start for one, next in itertools.pairwise(pieces))
    assert read(tmp_path / "a.parquet") == said


def test_long_and_empty_rows(tmp_path: Path) -> None:
    long = "\n".join(f"line {i}" for i in range(500))
    pq.write_table(table(["", long, " \n", "short"]), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", longest=1024)
    assert "".join(found[:-1]) == long and found[-1] == "short" and all(len(text) <= 1024 for text in found)


def test_parquet_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(["a"] * 250 + [None]), path, row_group_size=100)
    with pytest.raises(ConfigError, match=r"a\.parquet, row 251 has no text under 'text': it is null; see --text-key"):
        read(path)
    with pytest.raises(ConfigError, match=r"no text under 'body': it has 'id' \(int64\), 'text' \(string\); see --t"):
        read(path, key="body")
    with pytest.raises(ConfigError, match=r"no text under 'id': it has 'id' \(int64\), 'text' \(string\)"):
        read(path, key="id")
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"text": bad}), path)
    assert read(path) == ["fine", "caf\ufffd"]
    with pytest.raises(ConfigError, match=r"a\.parquet, row 2 is not UTF-8"):
        read(path, strict=True)


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table([f"row {i}" * 20 for i in range(1000)]), path, compression="zstd", write_page_checksum=True)
    whole = path.read_bytes()
    assert len(whole) > 11_000
    for data in (b"", b"PAR1", whole[:-20], whole[:6000] + b"\0" * 4000 + whole[10_000:]):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"a\.parquet is not a whole parquet file \(.*\)$"):
            read(path)


@pytest.mark.slow
def test_a_row_group_is_not_held_in_memory(tmp_path: Path) -> None:
    """One row group of 400 MB of text, read with 150 MB more than an empty one takes."""
    rng = np.random.default_rng(0)
    said = ["".join(map(chr, rng.integers(97, 123, 4000))) + f" {i}" for i in range(1000)]
    pq.write_table(table(said * 100), tmp_path / "a.parquet", row_group_size=1 << 30, use_dictionary=False)
    script = (
        "import resource, sys; from pathlib import Path; from shards import files, texts\n"
        "reading, path = texts.Reading('text', 1 << 20, False), Path(sys.argv[1])\n"
        "print(sum(len(c.lengths) for b in texts.batches(files.pieces([path], False), reading) for c in b.chunks),\n"
        "      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    pq.write_table(table(said[:1]), tmp_path / "small.parquet")
    for name, rows in (("small.parquet", 1), ("a.parquet", 100_000)):
        run = [sys.executable, "-c", script, tmp_path / name]
        printed = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        assert int(printed[0]) == rows
        peaks.append(int(printed[1]) / 1024)
    assert peaks[1] - peaks[0] < 150


# ---- all of them


def test_a_build_reads_them_all(tmp_path: Path) -> None:
    said = [f"document {i}: " + "some text " * (i % 5 + 1) for i in range(60)]
    source = tmp_path / "in"
    source.mkdir()
    packer = zstandard.ZstdCompressor()
    (source / "a.html").write_text(f"<html><head><title>no</title></head><p>{said[0]}")
    (source / "b.htm.zst").write_bytes(packer.compress(f"<p>{said[1]}".encode()))
    (source / "c.txt.zst").write_bytes(packer.compress(said[2].encode()))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in said[3:30])
    (source / "d.jsonl.zst").write_bytes(packer.compress(lines.encode()))
    pq.write_table(table(said[30:]), source / "e.parquet", row_group_size=7)
    (source / "f.parquet.gz").write_bytes(b"not read")
    command = ["--input", source, "--out", tmp_path / "out", "--tokenizer", "train:300", "--valid-fraction", "0"]
    assert build.main([str(word) for word in [*command, "--workers", "2"]]) == 0
    made, manifest = vocab.load(tmp_path / "out" / "tokenizer"), load_manifest(tmp_path / "out" / "train")
    found = [
        made.decode(ids)
        for record in read_records(manifest, 0)
        for ids in np.split(record.tokens, np.cumsum(record.lengths)[:-1])
    ]
    assert sorted(found) == sorted([text.strip() if text in said[:2] else text for text in said])


def test_documents_are_tokenized_together_as_one_by_one(tmp_path: Path) -> None:
    said = ["", "a", "x" * 999, "naïve 東京 🙂", "  two  spaces ", "[MASK] is text", "\n\n"] * 40 + ["y " * 300_000]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in said))
    made = vocab.train(said, 300)
    made.save(tmp_path / "tokenizer")
    reading = texts.Reading("text", 1 << 20, False)
    settings = stages.Settings(1, reading, 0, 0.0, 0)
    for batch in texts.batches(files.pieces([tmp_path / "a.jsonl"], False), reading):
        done = stages.tokenize(settings, tmp_path / "tokenizer", batch)
        found = [ids.tolist() for ids in np.split(done.tokens, np.cumsum(done.lengths)[:-1])]
        alone = [made.encode_batch([text])[0] for text in texts.documents(batch, reading, texts.Counts())]
        assert found == alone
