"""The objective as one compiled graph, or one sentence about what stands in the way."""

from functools import wraps
from typing import Any

import torch
from torch import nn

from mlm_dist.schema import ConfigError

BACKEND = "inductor"
# A graph for each shape: micro-batches while the batch grows, plateaus of the mask rate, held-out batches. More than so
# many are no plan, and each takes a minute or so.
MOST_GRAPHS = 32


def wanted(choice: str | bool, zero_stage: int, device: torch.device) -> bool:
    """Whether to compile; choice: true, false or auto. Raises ConfigError where it was asked for and can't be."""
    if choice is True and zero_stage == 3:
        raise ConfigError(
            "engine.compile=true can't be had at engine.zero_stage=3, where hooks inside the graph fetch the weights; "
            "set engine.compile=false, or engine.zero_stage to 0, 1 or 2"
        )
    return choice is True or (choice == "auto" and device.type == "cuda" and zero_stage < 3)


def compile_whole(model: nn.Module) -> None:
    """Have the module's forward pass run as one graph for each shape, in place.

    Its parameters keep their names, and hooks on the module itself, as DeepSpeed has them, stay outside the graph.
    A call raises ConfigError where the graph can't be made, or would be the one after MOST_GRAPHS: nothing falls back
    to running eagerly.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # takes a second to import

    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    forward = model.forward
    compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend=BACKEND)

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except FailOnRecompileLimitHit as error:
            raise ConfigError(
                f"the shapes of batches come to more than {MOST_GRAPHS} compiled graphs; lower masking.rate_plateaus, "
                "take the batch warm-up out, or set engine.compile=false"
            ) from error
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ConfigError(
                f"the model can't be compiled as one graph ({reason}); set engine.compile=false"
            ) from error

    model.forward = run
