"""Benchmarks run and say what they should; the figures are another matter."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import TINY

from benchmarks import gpu, products, time_to_loss
from mlm_dist.encoder import Encoder, EncoderConfig, attention_mask
from mlm_dist.models import ModelConfig, flops_per_token

ROOT = Path(__file__).parent.parent


def test_the_loader_benchmark_measures_all_it_promises(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(200)]
    texts = [" ".join(draw.choices(words, k=draw.randint(50, 2000))) for _ in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--text", tmp_path / "text.jsonl", "--scratch", tmp_path, "--peers", tmp_path / "no-python"]
    options += ["--seconds", 0, "--epochs", 2, "--vocab-size", 300, "--epoch-tokens", 2e6, "--build-repeats", 1]
    command = [sys.executable, ROOT / "benchmarks" / "loader.py", *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["benchmark"] for line in lines} == {"loader"}

    def of(measurement: str) -> list[dict]:
        return [line for line in lines if line["measurement"] == measurement]

    assert len(of("machine")) == len(of("build")) == 1
    rates = [line for line in of("throughput") if line["reader"].startswith("mlm_dist")]
    assert len(rates) == 5 and all(line["tokens_per_second"] > 0 for line in rates)
    skipped = [line for line in of("throughput") if "skipped" in line]
    assert {line["reader"] for line in skipped} == {"webdataset", "datasets", "megatron-energon", "mosaicml-streaming"}
    assert [line["resumed_at"] for line in of("first_batch")] == [0, 0.01, 0.5, 0.99]
    assert all(len(line["rss_anon_mb"]) == 2 for line in of("memory"))
    assert {line["row_tokens"] for line in of("packing")} == {128, 512, 1024}
    assert all(0.5 < line["efficiency"] <= 1 for line in of("packing"))


@pytest.mark.slow
def test_the_checkpoint_benchmark_measures_both_kinds_of_save(tmp_path: Path) -> None:
    options = ["--launches", 1, "--saves", 2, "--every-steps", 4, "--layers", 1, "--width", 64, "--scratch", tmp_path]
    command = [sys.executable, ROOT / "benchmarks" / "checkpoint.py", *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["background"], line["saves"]) for line in lines] == [(True, 2), (False, 2)]
    for line in lines:
        assert 0 < line["stall_seconds"] <= line["complete_after_seconds"] and line["megabytes"] > 1
        assert line["step_seconds"] > 0
    assert lines[1]["stall_seconds"] == lines[1]["complete_after_seconds"] and lines[1]["steps_beside_a_write"] == 0
    assert list(tmp_path.iterdir()) == []


def throughput(folder: Path, *options: object) -> list[dict]:
    """The lines of a short run on a tiny shape."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(200)]
    texts = [" ".join(draw.choices(words, k=draw.randint(50, 500))) for _ in range(300)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "scratch").mkdir()
    shape = ["--layers", 2, "--width", 32, "--heads", 1, "--mlp-width", 48, "--vocab-size", 300]
    shape += [
        "--row-tokens",
        32,
        "--rows",
        2,
        "--micro-rows",
        1,
        "--ranks",
        2,
        "--rounds",
        1,
        "--steps",
        8,
        "--repeats",
        2,
    ]
    command = [sys.executable, ROOT / "benchmarks" / "throughput.py", "--text", folder / "text.jsonl", *shape, *options]
    command += ["--scratch", folder / "scratch"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((folder / "scratch").iterdir()) == []
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["benchmark"] for line in lines} == {"throughput"}
    return lines[1:]


@pytest.mark.parametrize("window", [128, 16])
def test_the_limit_counts_all_arithmetic_where_every_token_is_a_target_and_less_elsewhere(window: int) -> None:
    shape = EncoderConfig(layers=4, width=64, heads=2, mlp_width=96, max_positions=64, window=window)
    model = Encoder(shape, 300)

    def counted(mask_rate: float) -> float:
        """Of a token."""
        return sum(product.flops for product in products.products_of(shape, 300, 3, 64, mask_rate)) / (3 * 64)

    whole = flops_per_token(ModelConfig(encoder=shape), model, 300, 64, 1.0)
    whole -= 6 * sum(weight.numel() for weight in model.model.layers.parameters() if weight.ndim == 1)  # no products
    if window == 16:
        whole -= 2 * 12 * 64  # in 2 of the layers 16 keys a query on average, not 17: fewer at a row's ends
    assert counted(1.0) == whole
    assert counted(0.25) < counted(0.5) < counted(1.0)


@pytest.mark.parametrize(("length", "half_window"), [(1, 4), (10, 1), (64, 8), (64, 63), (64, 200)])
def test_a_query_has_as_many_keys_as_the_mask_of_attention_leaves(length: int, half_window: int) -> None:
    mask = attention_mask(None, length, half_window, like=torch.ones(()))
    seen = length if mask is None else (mask == 0).sum().item() / length
    assert products.keys_in_window(length, half_window) == round(seen)


@pytest.mark.parametrize("as_is", [False, True])
def test_the_limit_multiplies_what_it_says_and_a_weights_gradient_either_way_round(as_is: bool) -> None:
    (product,), (of_left,), of_right = products.calls_of(products.Product(2, 3, 4, 5, as_is=as_is))
    (left, right), (out, _) = product.args, of_left.args
    torch.testing.assert_close(product(), left @ right)
    torch.testing.assert_close(of_left(), out @ right.mT)
    made = [call() for call in of_right]
    torch.testing.assert_close(made, [left.mT @ out] if as_is else [left.mT @ out, out.mT @ left])


@pytest.mark.slow
def test_the_throughput_benchmark_measures_training_and_its_limit(tmp_path: Path) -> None:
    ours, limit, our_summary, limit_summary = throughput(tmp_path, "--only", "mlm_dist", "limit")
    assert ours["system"] == our_summary["system"] == "mlm_dist" and ours["steps"] == 8
    assert limit["system"] == limit_summary["system"] == "limit"
    assert 0 < ours["tokens_per_second"] < limit["tokens_per_second"]
    assert 0.2 < ours["mask_rate"] < 0.4 and ours["loss"] > 0 and 0 <= ours["data_wait"] < 1
    assert our_summary["share_of_limit"] == pytest.approx(
        ours["tokens_per_second"] / limit["tokens_per_second"], abs=1e-3
    )


@pytest.mark.slow
def test_a_peer_that_is_not_there_is_told_and_the_throughput_benchmark_goes_on(tmp_path: Path) -> None:
    peers = ["--peers", tmp_path / "no-python"]
    *skipped, limit, _ = throughput(tmp_path, "--only", "modernbert", "mlm-pytorch", "limit", *peers)
    assert [line["skipped"].count("no-python") for line in skipped] == [1, 1]
    assert limit["tokens_per_second"] > 0


def engine(*options: object) -> list[dict]:
    """The lines of a short run on a tiny shape."""
    shape = ["--layers", 2, "--width", 32, "--heads", 1, "--mlp-width", 48, "--vocab-size", 300, "--row-tokens", 32]
    shape += ["--rows", 4, "--rounds", 2, "--steps", 2, "--warm-steps", 1]
    command = [sys.executable, ROOT / "benchmarks" / "engine.py", *shape, *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["benchmark"] for line in lines} == {"engine"}
    return lines[1:]


@pytest.mark.slow
def test_the_engine_benchmark_sets_every_stage_beside_plain_ddp(toy: Path) -> None:
    lines = engine("--shards", toy, "--micro-rows", 2)
    rounds, summary = lines[:-5], lines[-5:]
    systems = ["ddp", "zero0", "zero1", "zero2", "zero3"]
    assert [line["system"] for line in summary] == systems
    assert [line["system"] for line in rounds] == [*systems, *systems[1:], "ddp"]  # each begins with another
    for line in lines:
        parts = [line[f"{part}_seconds"] for part in ("forward", "backward", "optimizer")]
        assert all(part > 0 for part in parts) and sum(parts) < 1.1 * line["step_seconds"]
        assert line["tokens_per_second"] > 0
    for number in (1, 2):  # the same work: the same loss
        losses = [line["loss"] for line in rounds if line["round"] == number]
        assert losses == pytest.approx([losses[0]] * 5, abs=1e-4)
    assert "over_ddp" not in summary[0] and all(line["over_ddp"] > 0 for line in summary[1:])


@pytest.mark.slow
def test_the_engine_benchmark_measures_memory_and_scaling() -> None:
    cells = engine("--memory", "--systems", "zero1", "--rows", 64, "--layers", 6, "--row-tokens", 128)
    assert [(line["micro_rows"], line["recompute"]) for line in cells] == [
        (16, False), (16, True), (64, False), (64, True)
    ]  # fmt: skip
    few, few_again, all_at_once, all_again = (line["peak_mb"] for line in cells)
    assert all_at_once > few > 0 and all_at_once > all_again and few_again > 0
    lines = engine("--scaling", "--rounds", 1)
    summary = [(line["ranks"], line["system"], line["efficiency"]) for line in lines if "summary" in line]
    assert [each[:2] for each in summary] == [(1, "ddp"), (1, "zero1"), (2, "ddp"), (2, "zero1")]
    assert summary[0][2] == summary[1][2] == 1 and all(each[2] > 0 for each in summary)


def points(*losses: float, seconds: float = 1.0) -> list[dict[str, float]]:
    """One each 100 tokens and so many seconds."""
    return [
        {"step": i, "tokens": 100.0 * i, "seconds": seconds * i, "loss": loss} for i, loss in enumerate(losses, start=1)
    ]


def test_a_loss_is_reached_between_two_points() -> None:
    run = points(5.0, 4.0, 3.0, 3.5)
    for loss, tokens in ((6.0, 100), (5.0, 100), (4.5, 150), (4.0, 200), (3.0, 300), (2.9, None)):
        assert time_to_loss.reached(run, loss, "tokens") == tokens


def test_the_peer_counts_at_its_best_learning_rate_on_average() -> None:
    def result(system: str, settings: str, seed: int, *losses: float, seconds: float = 1.0) -> dict:
        found = points(*losses, seconds=seconds)
        return {"system": system, "settings": settings, "seed": seed, "points": found}

    results = [
        result(time_to_loss.PEER, "lr=1", 0, 5.0, 4.0),
        result(time_to_loss.PEER, "lr=1", 1, 5.0, 4.2),
        result(time_to_loss.PEER, "lr=2", 0, 5.0, 3.9),
        result(time_to_loss.PEER, "lr=2", 1, 5.0, 4.5),
        result(time_to_loss.OURS, "muon", 0, 4.0, 3.0, seconds=0.5),
        result(time_to_loss.OURS, "muon", 1, 4.4, 4.3, seconds=0.5),
        result(time_to_loss.OURS, "adamw", 0, 1.0, 1.0),
    ]
    first, second = time_to_loss.summarise(results, "muon")
    assert (first["peer"], first["tokens"], first["seconds"], first["loss"]) == ("lr=1", 0.5, 0.25, 3.0)
    assert second["seed"] == 1 and second["tokens"] is second["seconds"] is None  # never as good
    assert time_to_loss.table([first, second]).splitlines()[2:] == [
        "| 0 | lr=1 | 4.000 | 3.000 | 50% | 25% |", "| 1 | lr=1 | 4.200 | 4.300 | never | never |"
    ]  # fmt: skip
    assert time_to_loss.summarise(results[4:], "muon") == []


@pytest.mark.slow
def test_time_to_loss_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(200)]
    for name in ("train", "valid"):
        texts = [" ".join(draw.choices(words, k=draw.randint(50, 500))) for _ in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--text", tmp_path / "train.jsonl", "--valid-text", tmp_path / "valid.jsonl", "--out", tmp_path / "out"]
    options += ["--layers", 1, "--width", 32, "--heads", 1, "--mlp-width", 48, "--vocab-size", 300, "--row-tokens", 32]
    options += ["--rows", 2, "--tokens", 1024, "--share", 1, "--points", 2, "--seeds"]
    command = [str(part) for part in (sys.executable, ROOT / "benchmarks" / "time_to_loss.py", *options)]
    for seeds in (["0"], ["0", "1"]):
        done = subprocess.run([*command, *seeds], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("held-out loss") == 1  # of the run that was missing
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1]
    for line in lines:
        assert [each["tokens"] for each in line["points"]] == [512, 1024]
        assert 0 < line["points"][0]["seconds"] < line["points"][1]["seconds"] and line["points"][1]["loss"] > 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"shards", "documents", "results.jsonl"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_gpu_benchmark_says_that_it_needs_one() -> None:
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "benchmarks/gpu.py needs a GPU, and torch finds none here\n"


@pytest.mark.slow
def test_the_gpu_benchmark_reads_a_run_on_the_shards_that_it_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = gpu.make_shards(tmp_path / "shards", vocab_size=300, count=2, tokens=20_000)
    tiny = [*(key for key in TINY if not key.startswith("log.every_steps")), "data.lanes=2", "engine.precision=fp32"]
    args = gpu.parse(["--steps", "8", "--config", "configs/base-150m.yaml", *tiny])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    reports = gpu.train(args, folder, tmp_path / "run")
    assert [report["step"] for report in reports] == [2, 4, 6, 8]
    said = gpu.figures(reports, cards=2)
    assert said["tokens_per_second"] > 0 and 0 < said["mfu"] and 0.9 < said["packing"] <= 1
    assert said["steps_measured"] == 6 and abs(said["tokens_per_second_per_card"] * 2 - said["tokens_per_second"]) <= 1
    args.overrides.append(f"run.dir={tmp_path / 'other'}")
    with pytest.raises(gpu.Failed, match=r"run\.dir is already set"):
        gpu.train(args, folder, tmp_path / "run")
