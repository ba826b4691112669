"""Every file in configs/, as it is shipped."""

import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from mlm_dist import batch_size, config, models, schedule, schema
from mlm_dist.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.name for path in (ROOT / "configs").glob("*.yaml") if path.name != "base.yaml")
VOCAB = 50_368
PEAK = 989e12  # FLOP/s of an H100 in bf16

# millions of parameters with that vocabulary, where the name doesn't say how many
MILLIONS = {"quickstart": 2.8 + 0.256 * (50.368 - 4.096), "bert-base": 125, "code": 150, "domain": 110, "long-8k": 150}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published encoder's folder, of which --dry-run reads the configuration alone: BERT-base."""
    path = tmp_path_factory.mktemp("models") / "encoder"
    BertConfig(vocab_size=30_522).save_pretrained(path)
    (path / "model.safetensors").touch()
    return path


def load(name: str, folder: Path) -> tuple[RunConfig, int]:
    """A recipe, and a vocabulary to describe it with."""
    overrides = [f"model.from={folder}"] if name == "domain.yaml" else []
    return config.load(ROOT / "configs" / name, overrides), 30_522 if overrides else VOCAB


def shape_of(cfg: RunConfig, vocab_size: int) -> torch.nn.Module:
    with torch.device("meta"):
        return models.build(cfg.model, vocab_size, cfg.batch.seq_len)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_described_and_has_the_size_that_its_name_says(name: str, folder: Path) -> None:
    cfg, vocab_size = load(name, folder)
    assert schema.from_mapping(RunConfig, schema.to_mapping(cfg)) == cfg
    text = config.describe(cfg, 8, torch.device("cpu"), vocab_size)
    parameters = models.count_parameters(shape_of(cfg, vocab_size))
    assert f"parameters           {parameters:,} (vocabulary {vocab_size:,})" in text
    stem = name.removesuffix(".yaml")
    named = re.search(r"-(\d+)m$", stem)
    assert parameters / 1e6 == pytest.approx(float(named[1]) if named else MILLIONS[stem], rel=0.02)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_divides_over_its_ranks(name: str, folder: Path) -> None:
    """No recipe makes a rank hold more rows at a time than it says, nor fewer than it could."""
    cfg, _ = load(name, folder)
    for world_size in (1, 8, 64):
        batch_size.check(cfg.batch, world_size)
        share = cfg.batch.global_rows // world_size
        rows = batch_size.micro_rows(cfg.batch, world_size)
        assert rows == min(cfg.batch.micro_rows, share)
        assert batch_size.accumulation(cfg.batch, world_size) * rows * world_size == cfg.batch.global_rows


@pytest.mark.parametrize("name", RECIPES)
def test_every_head_tells_hardware_time_and_loss(name: str) -> None:
    lines = (ROOT / "configs" / name).read_text().splitlines()
    head = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    assert re.search(r"GPU|H100|CPU cores", head) and re.search(r"[\d.]+[BM] tokens", head)
    assert "hours by estimate" in head or "minutes" in head
    assert "loss: not measured" in head or "held-out loss of" in head


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"quickstart.yaml"}))
def test_the_page_and_the_head_say_what_the_arithmetic_says(name: str, folder: Path) -> None:
    cfg, vocab_size = load(name, folder)
    page = (ROOT / "docs/recipes.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith(f"| `{name.removesuffix('.yaml')}` |")]
    shape, estimate = (row.strip(" |").split(" | ") for row in rows)
    assert shape[2] == f"{cfg.batch.global_rows} x {cfg.batch.seq_len}"
    assert float(shape[3]) == cfg.optim.lr
    _, parameters, tokens, flops, utilisation, hours = estimate
    model = shape_of(cfg, vocab_size)
    counted = models.flops_per_token(cfg.model, model, vocab_size, cfg.batch.seq_len, cfg.masking.rate)
    assert parameters == f"{models.count_parameters(model) / 1e6:.0f}M"
    assert tokens == f"{cfg.run.tokens / 1e9:.0f}B"
    assert flops == f"{counted / 1e9:.2g} G"
    expected = cfg.run.tokens * counted / (PEAK * float(utilisation.removesuffix(" %")) / 100) / 3600
    assert float(hours) == float(f"{expected:.2g}")
    assert f"{hours} H100 hours by estimate" in (ROOT / "configs" / name).read_text().replace("\n# ", " ")


def test_the_long_phase_goes_on_from_a_checkpoint_that_its_parent_keeps(folder: Path) -> None:
    parent, phase = (load(name, folder)[0] for name in ("base-150m.yaml", "long-8k.yaml"))
    saved, now = schema.to_mapping(parent), schema.to_mapping(phase)
    assert config.changes(saved, now, (*config.MAY_CHANGE, *config.MAY_DIFFER)) == {}
    start = Path(phase.run.from_)
    step, steps, kept = int(start.name.removeprefix("step_")), config.total_steps(parent), parent.checkpoint
    assert start.parent == Path(parent.run.dir, "checkpoints")
    assert step % kept.every_steps == 0 and step % kept.keep_every_steps == 0
    held, falling = (schedule.lr_at(parent.optim, parent.schedule, at, steps) for at in (step, step + 10_000))
    assert falling < held == parent.optim.lr
    assert phase.model.encoder.rope_theta > parent.model.encoder.rope_theta
    assert phase.batch.seq_len == phase.model.encoder.max_positions == 8192
