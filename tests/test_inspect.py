"""shards/inspect.py: the numbers of a folder of shards, and the name of each file that is not what it was."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlm_dist import vocab
from mlm_dist.manifest import load_manifest
from mlm_dist.shards import read_records
from shards import inspect

ROOT = Path(__file__).parent.parent


def test_the_numbers_are_the_manifests(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(toy), "--verify"]) == 0
    printed = capsys.readouterr().out
    for name in ("train", "valid"):
        manifest = load_manifest(toy / name)
        assert f"{manifest.tokens:,} (uint16, vocabulary of 300)" in printed
        assert f"{manifest.documents:,}, {manifest.tokens / manifest.documents:,.0f} tokens each" in printed
    assert "verified: 10 shards are as they were written" in printed
    first = next(read_records(load_manifest(toy / "train"), 0))
    text = vocab.load(toy / "tokenizer").decode(first.tokens[: first.lengths[0]])
    assert repr(text[:100])[:-1] in printed


def test_percentiles_are_those_of_the_lengths(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(toy / "valid"), "--documents", "0"]) == 0
    printed = capsys.readouterr().out
    manifest = load_manifest(toy / "valid")
    lengths = np.sort(np.concatenate([record.lengths for shard in (0, 1) for record in read_records(manifest, shard)]))
    row = [int(word.replace(",", "")) for word in printed.splitlines()[-1].split()]
    assert row == [lengths[int(percent / 100 * (len(lengths) - 1))] for percent in inspect.PERCENTILES]
    assert "document 1" not in printed


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        ("train/000003.tar", "damaged: {path} is altered: its sha256 is not the manifest's"),
        ("valid/000000.tar", "damaged: {path} is altered: its sha256 is not the manifest's"),
        ("train/records.npy", "error: {path} is not the file its manifest was written for"),
    ],
)
def test_what_is_damaged_is_named(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: str, said: str
) -> None:
    shutil.copytree(toy, tmp_path / "copy")
    path = tmp_path / "copy" / damaged
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert inspect.main([str(tmp_path / "copy"), "--verify"]) == 1
    assert capsys.readouterr().err.startswith(said.format(path=path))


def test_missing_files_and_a_foreign_tokenizer_are_named(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(toy, copy)
    vocab.train(["other text"], 300).save(copy / "tokenizer")
    (copy / "train" / "000000.tar").unlink()
    assert inspect.main([str(copy), "--verify"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"damaged: {copy / 'tokenizer'} is not the tokenizer that {copy / 'train'} was built with",
        f"damaged: {copy / 'train' / '000000.tar'} is missing",
        f"damaged: {copy / 'tokenizer'} is not the tokenizer that {copy / 'valid'} was built with",
    ]


def test_it_runs_from_its_own_folder(tmp_path: Path) -> None:
    """Where `import inspect` would find shards/inspect.py instead of the standard library's."""
    done = subprocess.run([sys.executable, "inspect.py", tmp_path], cwd=ROOT / "shards", capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: {tmp_path} is a build that did not finish: it has no manifest.json; build it"
    )
