"""docs/metrics.md names what runs log, all of it and nothing else."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import toy_documents, write_toy_split
from launching import ROOT, overridden
from ranks import on_ranks

from mlm_dist import config, train, vocab, world
from mlm_dist.manifest import REASONS
from mlm_dist.world import StopFlag

GPU_ONLY = {"loss_scale"}  # fp16 needs one
STANDS_FOR = {"NAME": r"[\w-]+", "REASON": "|".join(REASONS)}


def rows() -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/metrics.md").read_text(encoding="utf-8"), re.MULTILINE)


def pattern(row: str) -> str:
    return re.sub("|".join(STANDS_FOR), lambda found: f"({STANDS_FOR[found[0]]})", row)


def run_both(toy: Path, folder: Path) -> None:
    sources = [f"data.sources.{name}.shards={folder / name}" for name in ("law", "web-1")]
    with world.join(120) as here, StopFlag() as stop:
        for name, more in (
            ("plain", ()),
            ("mixed", ("data.shards=null", *sources, "data.max_bad_shards=1", "data.lanes=4")),
        ):
            overrides = overridden(
                toy, folder / name, "run.steps=8", "evaluate.every_steps=4", "checkpoint.every_steps=4", *more
            )
            assert train.train_on(config.load(ROOT / "configs/quickstart.yaml", overrides), here, stop) == 0


@pytest.fixture(scope="module")
def logged(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in metrics.jsonl of a run of one folder, and of one of two sources, one shard of which is bad."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = vocab.load(toy / "tokenizer")
    shutil.copytree(toy, folder / "law")
    tokenizer.save(folder / "web-1/tokenizer")
    write_toy_split(folder / "web-1/train", tokenizer, toy_documents(40, seed=3), 4)
    write_toy_split(folder / "web-1/valid", tokenizer, toy_documents(10, seed=4), 1)
    bad = folder / "web-1/train/000000.tar"
    data = bytearray(bad.read_bytes())
    data[512 + 3] ^= 1
    bad.write_bytes(data)
    on_ranks(2, run_both, toy, folder)
    lines = [line for name in ("plain", "mixed") for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {name for line in lines for name in json.loads(line)}


def test_every_metric_has_a_row_and_every_row_is_a_metric(logged: set[str]) -> None:
    patterns = {row: pattern(row) for row in rows()}
    assert len(patterns) == len(rows()), "a row for each"
    unnamed = {name for name in logged if not any(re.fullmatch(each, name) for each in patterns.values())}
    unheard_of = {row for row, each in patterns.items() if not any(re.fullmatch(each, name) for name in logged)}
    assert unnamed == set() and unheard_of == GPU_ONLY


def test_every_row_says_what_it_is_and_has_all_its_cells() -> None:
    table = [line for line in (ROOT / "docs/metrics.md").read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]
    for line in table:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == 5 and len(cells[1]) > 5, line
