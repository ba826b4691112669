"""Compiled training against eager: the same losses, weights and checkpoints; and what can't be compiled is refused."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from comparing import train_here
from launching import metrics, run
from ranks import on_ranks
from torch import nn

from mlm_dist import checkpoint, compiling, masking, models, vocab, world
from mlm_dist.batch_size import BatchConfig
from mlm_dist.encoder import Encoder, EncoderConfig
from mlm_dist.engine import Engine
from mlm_dist.engine_config import EngineConfig
from mlm_dist.manifest import load_manifest
from mlm_dist.masking import MaskingConfig
from mlm_dist.mlm import MLM
from mlm_dist.models import ModelConfig
from mlm_dist.optim import OptimConfig
from mlm_dist.schema import ConfigError
from mlm_dist.stream import DataConfig, train_batches
from mlm_dist.world import StopFlag

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# by name of the run: up to which step, and whether compiled
RUNS = {
    "eager": ((6, False),),
    "compiled": ((6, True),),
    "then_eager": ((3, True), (6, False)),
    "then_compiled": ((3, False), (6, True)),
}


@pytest.mark.parametrize(
    ("choice", "stage", "device", "is_compiled"),
    [("auto", 1, CPU, False), ("auto", 2, GPU, True), ("auto", 3, GPU, False), (True, 0, CPU, True),
     (False, 1, GPU, False), (False, 3, GPU, False)],
)  # fmt: skip
def test_auto_is_a_gpu_at_stages_0_to_2(
    choice: str | bool, stage: int, device: torch.device, is_compiled: bool
) -> None:
    assert compiling.wanted(choice, stage, device) == is_compiled


def test_stage_3_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compile=true can't be had at engine\.zero_stage=3"):
        compiling.wanted(True, 3, GPU)


# ---- runs


def train_all(toy: Path, folder: Path, backend: str, names: tuple[str, ...], *stages: int) -> dict[tuple, int]:
    """The runs on this rank, by stage, with a last held-out batch that is filled up; how many graphs each compiled."""
    compiling.BACKEND = backend
    graphs = {}
    with world.join(200) as here, StopFlag() as stop:
        for stage in stages:
            for name in names:
                torch.compiler.reset()
                torch._dynamo.utils.counters.clear()
                for steps, is_compiled in RUNS[name]:
                    train_here(
                        here, stop, toy, folder / name / str(stage), f"run.steps={steps}", "schedule.name=constant",
                        f"engine.zero_stage={stage}", f"engine.compile={str(is_compiled).lower()}",
                        "evaluate.max_rows=12",
                    )  # fmt: skip
                graphs[stage, name] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return graphs


def check_close(one: Path, other: Path) -> None:
    for name in ("loss", "valid/loss"):
        expected, found = metrics(one, name), metrics(other, name)  # where the other was stopped it was held out too
        assert {step: found[step] for step in expected} == pytest.approx(expected, abs=1e-5)
    weights, others = (checkpoint.full_weights(checkpoint.find(folder)) for folder in (one, other))
    assert weights.keys() == others.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(others[key], weight, atol=1e-5, rtol=0, msg=key)


def test_a_compiled_run_is_the_eager_one_and_is_exported(toy: Path, tmp_path: Path) -> None:
    """What is trained, held out and saved; inductor is left out, which takes half a minute more."""
    for graphs in on_ranks(2, train_all, toy, tmp_path, "aot_eager", ("eager", "compiled"), 1):
        assert graphs == {(1, "eager"): 0, (1, "compiled"): 2}  # training, held-out batches
    check_close(tmp_path / "eager/1", tmp_path / "compiled/1")
    exported = run("launch/export.py", "--run", str(tmp_path / "compiled/1"), "--out", str(tmp_path / "hf"))
    assert exported.returncode == 0 and (tmp_path / "hf/model.safetensors").exists(), exported.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "stages"), [("aot_eager", (0, 1, 2)), ("inductor", (1,))])
def test_runs_go_on_compiled_or_not_at_each_stage(
    toy: Path, tmp_path: Path, backend: str, stages: tuple[int, ...]
) -> None:
    on_ranks(2, train_all, toy, tmp_path, backend, tuple(RUNS), *stages)
    for stage in stages:
        for name in RUNS:
            check_close(tmp_path / "eager" / str(stage), tmp_path / name / str(stage))


# ---- what can't be compiled


class Broken(nn.Module):
    """Looks at a value in the middle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.fixture
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):  # is what it was afterwards
        yield


def test_a_graph_that_breaks_is_refused_with_the_way_out(eager_backend: None) -> None:
    model = Broken()
    compiling.compile_whole(model)
    with pytest.raises(ConfigError, match=r"can't be compiled as one graph \(.+\); set engine.compile=false"):
        model(torch.ones(3))


def test_too_many_shapes_are_refused_and_never_run_eagerly(
    eager_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "MOST_GRAPHS", 2)
    model = nn.Linear(4, 4)
    compiling.compile_whole(model)
    for rows in (2, 3, 2):
        model(torch.ones(rows, 4))
    with pytest.raises(ConfigError, match="more than 2 compiled graphs"):
        model(torch.ones(5, 4))


def test_a_shape_that_changes_is_compiled_as_it_is(eager_backend: None) -> None:
    torch._dynamo.utils.counters.clear()
    model = nn.Linear(4, 4)
    compiling.compile_whole(model)
    for rows in (2, 3, 4, 3, 2):
        assert torch.equal(model(torch.ones(rows, 4)), model(torch.ones(rows, 4)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_names_and_hooks_stay_as_they_are(eager_backend: None) -> None:
    model, heard = nn.Linear(4, 4), []
    names = list(model.state_dict())
    compiling.compile_whole(model)
    model.register_forward_hook(lambda *_: heard.append(torch.compiler.is_compiling()))
    model(torch.ones(2, 4)).sum().backward()
    assert list(model.state_dict()) == names and heard == [False]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_is_written_by_hand_for_a_cpu_stays_out_of_a_graph() -> None:
    torch.compiler.reset()
    called: set[str] = set()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        called.update(str(node.target) for part in graph.modules() if isinstance(part, torch.fx.GraphModule)
                      for node in part.graph.nodes)  # fmt: skip
        return graph.forward

    shape = EncoderConfig(layers=2, width=16, heads=2, mlp_width=16, max_positions=32, window=8)
    mlm = MLM(Encoder(shape, 64), num_tokens=64)
    torch.compile(mlm, fullgraph=True, dynamic=False, backend=backend)(torch.randint(5, 64, (2, 16))).backward()
    assert any("cross_entropy" in name for name in called)
    assert not [name for name in called if "mkldnn" in name or "autograd_function" in name]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert"])
def test_models_of_transformers_compile(eager_backend: None, architecture: str) -> None:
    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = ModelConfig(kind="transformers", architecture=architecture, options=options)
    mlm = MLM(models.build(config, 300, 32), num_tokens=300).eval()
    ids = torch.randint(5, 300, (4, 32))
    segments = torch.arange(32).div(16, rounding_mode="floor").add(1).expand(4, 32)
    asked = {"row_keys": torch.arange(4), "sums": True, "segments": segments}
    expected = mlm(ids, **asked)
    compiling.compile_whole(mlm)
    torch.testing.assert_close(mlm(ids, **asked), expected)


# ---- on a GPU


def steps_on_the_gpu(toy: Path, steps: int) -> int:
    """Steps in bf16, whose micro-batches may not wait for the GPU once it's warm; the number of graphs."""
    batch, mask = BatchConfig(seq_len=64, global_rows=16, micro_rows=4), MaskingConfig()
    tokenizer = vocab.load(toy / "tokenizer")
    data = DataConfig(shards=str(toy), workers=0)
    with world.join(120) as here:
        shape = EncoderConfig(layers=3, width=64, heads=1, mlp_width=96, global_every=2, window=16)
        model = MLM(Encoder(shape, tokenizer.size), **masking.mlm_keywords(mask, tokenizer))
        engine = Engine(model, EngineConfig(), OptimConfig(), batch, mask, 7, here, {})
        batches = train_batches(load_manifest(toy / "train"), tokenizer, data, batch, 7, here.rank, here.size, None)
        for step in range(steps):
            drawn = [batches.draw(4) for _ in range(4)]
            forbid_waiting(engine, drawn if step >= 3 else drawn[:0])
            engine.train_step(drawn, 100, step, lr=1e-3, rate=0.3)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def forbid_waiting(engine: Engine, batches: list) -> None:
    """Have an error raised where the host waits between the beginning of one of the batches, but for the last, and the
    beginning of the next."""
    usual = type(engine)._forward

    def forward(batch: object, *args: object) -> dict[str, torch.Tensor]:
        is_watched = any(batch is each for each in batches[:-1])
        torch.cuda.set_sync_debug_mode("error" if is_watched else "default")
        return usual(engine, batch, *args)

    engine._forward = forward


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_micro_batches_never_wait_for_the_gpu_and_share_one_graph(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert on_ranks(1, steps_on_the_gpu, toy, 8) == [1]
