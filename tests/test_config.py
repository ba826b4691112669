from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from mlm_dist import batch_size, config, schema
from mlm_dist.config import RunConfig
from mlm_dist.schema import ConfigError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QUICK = CONFIGS / "quickstart.yaml"


def test_the_resolved_configuration_round_trips_through_yaml(tmp_path: Path) -> None:
    cfg = config.load(QUICK, ["optim.lr=1e-4", "run.steps=null", "run.hours=1.5"])
    (tmp_path / "resolved.yaml").write_text(schema.to_yaml(cfg))
    assert config.load(tmp_path / "resolved.yaml") == cfg


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.tokens=1000"], "steps and tokens"),
        (["run.steps=null"], "none of them"),
        (["schedule.warmup_steps=70", "run.steps=70"], "warmup_steps = 70 leaves nothing of a run of 70 steps"),
        (["batch.seq_len=256"], "max_positions"),
        (["masking.keep=0.3"], "mask \\+ random \\+ keep"),
        (["schedule.decay_steps=600", "run.steps=600"], "set decay_steps to 550 or less"),
        (["run.dir=runs/x", "run.from=runs/x"], "run: from = runs/x stands in dir = runs/x"),
        (["run.dir=runs/x", "run.from=runs/y/../x/checkpoints/step_00000400"], "set another run.dir"),
        (["batch.warmup_rows=4"], "warmup_tokens is missing"),
        (["batch.warmup_rows=4", "batch.warmup_tokens=1e9"], "would never grow to 64 rows"),
    ],
)
def test_sections_that_contradict_each_other_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.load(QUICK, overrides)


def test_length_in_tokens_is_rounded_up_to_steps() -> None:
    cfg = config.load(QUICK, ["run.steps=null", "run.tokens=1_000_000"])
    assert config.total_steps(cfg) == -(-1_000_000 // (cfg.batch.global_rows * 128))
    assert config.total_steps(config.load(QUICK, ["run.steps=null", "run.hours=2"])) is None
    growing = ["batch.warmup_rows=2", "batch.warmup_tokens=100_000"]
    grown = config.load(QUICK, ["run.steps=null", "run.tokens=1_000_000", *growing])
    steps = config.total_steps(grown)
    before, after = (batch_size.rows_before(grown.batch, count) * 128 for count in (steps - 1, steps))
    assert before < 1_000_000 <= after and steps > config.total_steps(cfg)


def changes(before: RunConfig, after: RunConfig, allowed: tuple[str, ...] = config.MAY_CHANGE) -> dict[str, str]:
    return config.changes(schema.to_mapping(before), schema.to_mapping(after), allowed)


def test_only_listed_keys_may_change_on_resume() -> None:
    cfg = config.load(QUICK)
    longer = replace(cfg, run=replace(cfg.run, steps=9999), log=replace(cfg.log, every_steps=1))
    assert changes(cfg, longer) == {}
    other = replace(cfg, optim=replace(cfg.optim, lr=0.5), batch=replace(cfg.batch, global_rows=32))
    assert list(changes(cfg, other)) == ["batch.global_rows", "optim.lr"]
    assert list(changes(cfg, replace(cfg, run=replace(cfg.run, from_="runs/other")))) == ["run.from"]


def test_a_key_that_an_older_run_did_not_have_counts_as_its_default() -> None:
    cfg = config.load(QUICK, ["optim.muon.lr_factor=1"])
    saved, now = schema.to_mapping(cfg), schema.to_mapping(cfg)
    del saved["optim"]["muon"], saved["engine"]["max_non_finite_steps"]
    assert config.changes(saved, now, config.MAY_CHANGE) == {}
    del saved["optim"]["lr"]
    refused = config.changes(saved, now, config.MAY_CHANGE)
    assert list(refused.values()) == ["optim.lr was 0.001 and is 0.008 now"]
    saved["optim"]["gone"] = 1
    assert "optim.gone" in config.changes(saved, now, config.MAY_CHANGE)


def test_null_drops_a_parent_s_source() -> None:
    both = ["data.shards=null", "data.sources={law: {shards: x}, web: {shards: y}}"]
    assert list(config.load(QUICK, [*both, "data.sources.law=null"]).data.folders()) == ["web"]
    with pytest.raises(ConfigError, match="neither is given"):
        config.load(QUICK, [*both, "data.sources.law=null", "data.sources.web=null"])


def test_a_sources_folder_may_move_and_its_weight_may_not_change() -> None:
    overrides = ["data.shards=null", "data.sources.law.shards=x", "data.sources.web.shards=y"]
    mixed = config.load(QUICK, [*overrides, "data.sources.law.weight=0.7"])
    moved = config.load(QUICK, ["data.shards=null", "data.sources.law={shards: z, weight: 0.7}", overrides[2]])
    assert changes(mixed, moved) == {}
    refused = changes(mixed, config.load(QUICK, overrides))
    assert list(refused.values()) == ["data.sources.law.weight was 0.7 and is 1.0 now"]
    assert list(changes(mixed, config.load(QUICK)).values()) == [
        "data.sources.law.weight was 0.7 and is None now",
        "data.sources.web.weight was 1.0 and is None now",
    ]


def test_every_key_that_may_change_exists() -> None:
    mixed = config.load(QUICK, ["data.shards=null", "data.sources.law.shards=x"])
    keys = schema.flatten(schema.to_mapping(mixed)) | {"data.shards": "x"}
    for allowed in (*config.MAY_CHANGE, *config.MAY_DIFFER):
        assert any(fnmatchcase(key, allowed) or key.startswith(f"{allowed}.") for key in keys), allowed


def test_what_may_differ_from_the_run_that_a_run_starts_from() -> None:
    """Lengths, schedules, data and batches; never what makes the weights or the optimizer's state others."""
    cfg, allowed = config.load(QUICK), (*config.MAY_CHANGE, *config.MAY_DIFFER)
    free = [
        "run.dir=runs/b", "run.from=runs/a", "run.steps=500", "run.seed=1", "schedule.decay_steps=100",
        "batch.seq_len=512", "batch.global_rows=32", "model.encoder.max_positions=512", "model.encoder.rope_theta=1e6",
        "model.encoder.rope_factor=4",
        "data.shards=null", "data.sources.law.shards=x", "data.packing=pad", "optim.lr=1e-4", "optim.beta2=0.95",
        "masking.rate=0.15",
    ]  # fmt: skip
    assert changes(cfg, config.load(QUICK, free), allowed) == {}
    fixed = ["model.encoder.layers=4", "engine.zero_stage=2", "deepspeed.zero_optimization.reduce_bucket_size=1000"]
    refused = changes(cfg, config.load(QUICK, fixed), allowed)
    assert sorted(refused) == [
        "deepspeed", "deepspeed.zero_optimization.reduce_bucket_size", "engine.zero_stage", "model.encoder.layers",
    ]  # fmt: skip


def test_memory_by_stage_falls_to_a_share_of_the_whole() -> None:
    memory = config.memory_by_stage(10**9, "bf16", 8)
    assert memory[0] == pytest.approx(18e9 / 2**30)
    assert memory[0] > memory[1] > memory[2] > memory[3] == pytest.approx(memory[0] / 8)
    lean = config.memory_by_stage(10**9, "bf16", 8, with_one_moment=10**8)
    assert [memory[stage] - lean[stage] for stage in (0, 1)] == pytest.approx([4e8 / 2**30, 4e8 / 8 / 2**30])


def test_dry_run_counts_the_state_of_the_optimizer_that_is_named() -> None:
    said = {}
    for name in ("adamw", "stable_adamw", "muon"):
        cfg = config.load(QUICK, [f"optim.name={name}", "model.encoder.layers=20"])
        text = config.describe(cfg, 2, torch.device("cpu"), 4096)
        (line,) = (line for line in text.splitlines() if line.startswith("memory per rank"))
        said[name] = float(line.split("stage 0: ")[1].split()[0])
    matrices = 20 * (3 * 256**2 + 256**2 + 3 * 256 * 384) + 256**2
    assert said["adamw"] == said["stable_adamw"]
    assert said["adamw"] - said["muon"] == pytest.approx(4 * matrices / 2**30, abs=0.011)


def test_dry_run_describes_the_run() -> None:
    cfg = config.load(QUICK, ["batch.global_rows=32", "batch.micro_rows=8"])
    text = config.describe(cfg, 2, torch.device("cpu"), 4096)
    assert "ranks                2 x 2 micro-batches x 8 rows, fp32 on cpu" in text
    assert '"gradient_accumulation_steps": 2' in text and "batch warm-up" not in text
    text = config.describe(cfg, 8, torch.device("cpu"), 4096)
    assert "ranks                8 x 1 micro-batches x 4 rows" in text, "a rank's share may be less than micro_rows"


def test_dry_run_tells_how_the_batch_grows() -> None:
    growing = ["batch.global_rows=32", "batch.micro_rows=8", "batch.warmup_rows=8", "batch.warmup_tokens=30_720"]
    text = config.describe(config.load(QUICK, [*growing, "run.steps=100"]), 2, torch.device("cpu"), 4096)
    # a ramp over 240 rows: at 80 it has reached 16 rows, at 240 all 32
    assert "batch warm-up        steps 1 to 10: 8 rows, 2 x 1 micro-batches x 4 rows\n" in text
    assert "batch warm-up        steps 11 to 20: 16 rows, 2 x 1 micro-batches x 8 rows\n" in text
    assert "ranks                2 x 2 micro-batches x 8 rows, fp32 on cpu" in text
    assert f"length               100 steps, {(10 * 8 + 10 * 16 + 80 * 32) * 128:,} tokens" in text
