import pytest
import torch

from mlm_dist.batch_size import BatchConfig
from mlm_dist.engine_config import EngineConfig, deepspeed_json, merge, resolve_precision, resolve_stage
from mlm_dist.schema import ConfigError

BATCH = BatchConfig(seq_len=64, global_rows=16, micro_rows=4)


def test_only_a_gpu_and_offload_shard_by_themselves() -> None:
    for config, device, stage in (
        (EngineConfig(), "cpu", 0),
        (EngineConfig(), "cuda", 1),
        (EngineConfig(offload_optimizer=True), "cpu", 1),
        (EngineConfig(zero_stage=3), "cpu", 3),
        (EngineConfig(zero_stage=0), "cuda", 0),
    ):
        assert resolve_stage(config, torch.device(device)).zero_stage == stage


def test_what_deepspeed_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="zero_stage=0 with bf16"):
        resolve_precision(EngineConfig(zero_stage=0, precision="bf16"), torch.device("cpu"))
    with pytest.raises(ConfigError, match="zero_stage=0 with fp16"):
        resolve_precision(EngineConfig(zero_stage=0, precision="fp16"), torch.device("cuda"))
    with pytest.raises(ConfigError, match="offload_optimizer needs"):
        resolve_precision(EngineConfig(zero_stage=0, offload_optimizer=True), torch.device("cpu"))
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        resolve_precision(EngineConfig(precision="fp16"), torch.device("cpu"))
    assert resolve_precision(EngineConfig(), torch.device("cpu")) == "fp32"
    assert resolve_precision(EngineConfig(), torch.device("cuda")) == "bf16"


def test_the_passthrough_reaches_deepspeed_but_not_what_a_section_owns() -> None:
    extra = {"zero_optimization": {"reduce_bucket_size": 1000}, "comms_logger": {"enabled": True}}
    made = deepspeed_json(EngineConfig(zero_stage=2), BATCH, "fp32", 2, extra)
    assert made["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000, "allgather_bucket_size": 50_000_000}
    assert made["comms_logger"] == {"enabled": True}
    assert made["gradient_accumulation_steps"] == 2
    with pytest.raises(ConfigError, match=r"deepspeed\.zero_optimization\.stage is decided by engine.zero_stage"):
        merge({}, {"zero_optimization": {"stage": 3}})
    for value in (None, 3):
        with pytest.raises(ConfigError, match=r"deepspeed\.bf16 can't be set as a whole"):
            merge({}, {"bf16": value})
