"""The DeepSpeed engine around an MLM: one optimizer step on the mean loss over every target of the global batch."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Checkpoints are read back with tensors and plain values only, whatever DeepSpeed itself asks torch.load for.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

import deepspeed
from deepspeed.ops import __compatible_ops__ as compatible_ops
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import logger as deepspeed_logger

from mlm_dist import compiling, masking, optim
from mlm_dist.adam import StableAdamW
from mlm_dist.background import copy_to_host
from mlm_dist.batch_size import BatchConfig
from mlm_dist.engine_config import EngineConfig, clips_itself, deepspeed_json, resolve_precision, resolve_stage
from mlm_dist.masking import MaskingConfig
from mlm_dist.mlm import MLM
from mlm_dist.muon import Muon
from mlm_dist.optim import OptimConfig
from mlm_dist.pace import PARTS, Stopwatch
from mlm_dist.redaction import redact
from mlm_dist.schema import ConfigError
from mlm_dist.stream import Batch
from mlm_dist.world import World

for handler in deepspeed_logger.handlers:  # what it says when it is imported; logs.py sees to the rest
    handler.setLevel(logging.WARNING)
# DeepSpeed calls collectives by names that torch renamed; nothing a user could do about it
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
# A shared-memory all-reduce for inference, which training never calls and which takes a minute to compile.
compatible_ops["deepspeed_shm_comm"] = False

ZERO_SUPPORTED_OPTIMIZERS += [StableAdamW, Muon]  # or it warns of them at every start


@dataclass(frozen=True)
class StepSums:
    """What one step or one evaluation batch of this rank adds up to: device tensors, read at log time alone."""

    loss: torch.Tensor
    maskable: torch.Tensor
    targets: torch.Tensor
    correct: torch.Tensor
    by_mask: torch.Tensor
    by_random: torch.Tensor
    kept: torch.Tensor

    def __add__(self, other: "StepSums") -> "StepSums":
        return StepSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def unless(self, skipped: torch.Tensor | bool) -> "StepSums":
        """Zeros where the step was skipped: what wasn't learned from doesn't count, and may not be finite."""
        if not isinstance(skipped, torch.Tensor):  # as a fill: a copy would wait for the device
            skipped = torch.full((), skipped, device=self.loss.device)
        return StepSums(*(torch.where(skipped, 0, getattr(self, f.name)) for f in fields(self)))


class Skips(NamedTuple):
    """Skipped steps: all, the faults among them, those in a row up to the last step.

    Tensors at stage 0, where reading them waits.
    """

    total: torch.Tensor | int
    faults: torch.Tensor | int
    in_a_row: torch.Tensor | int

    def after(self, skipped: torch.Tensor | bool, counts: bool) -> "Skips":
        """One step later. counts: a skip is a fault, and adds to the row."""
        if not counts:
            return Skips(self.total + skipped, self.faults, 0)
        return Skips(self.total + skipped, self.faults + skipped, (self.in_a_row + 1) * skipped)


class CheckpointFiles(TorchCheckpointEngine):
    """What DeepSpeed hands its files of a checkpoint to, on this rank: written at once, or copied and written later.

    They are the same files: torch.save's, under DeepSpeed's names.
    """

    def __init__(self, config: Any, later: bool) -> None:
        super().__init__(config)
        self.later = later
        self.paths: list[Path] = []
        self.copies: list[tuple[Any, str]] = []

    def save(self, state_dict: Any, path: str) -> None:
        self.paths.append(Path(path))
        if "ds_config" in state_dict:  # all of the `deepspeed:` mapping
            state_dict = state_dict | {"ds_config": redact(state_dict["ds_config"])}
        if self.later:
            self.copies.append((copy_to_host(state_dict), path))
        else:
            super().save(state_dict, path)

    def write(self) -> list[Path]:
        """Write what was left for later. Returns the paths of all files."""
        while self.copies:
            super().save(*self.copies.pop(0))  # and let go of its memory
        return self.paths


class Engine:
    """An MLM inside DeepSpeed, on this rank.

    model:     on every rank with the same weights
    mask:      how targets are chosen and replaced; seed: the run's
    extra:     the `deepspeed:` mapping
    universal: the checkpoint that will be loaded was saved by another number of ranks
    """

    def __init__(
        self,
        model: MLM,
        config: EngineConfig,
        optim_config: OptimConfig,
        batch: BatchConfig,
        mask: MaskingConfig,
        seed: int,
        world: World,
        extra: dict[str, Any],
        universal: bool = False,
    ) -> None:
        self.world, self.seed_by, self.seed = world, mask.seed_by, seed
        config = resolve_stage(config, world.device)
        self.precision = resolve_precision(config, world.device)
        self.json = deepspeed_json(config, batch, self.precision, world.size, extra)
        self.batch_grows = batch.warmup_rows is not None
        model = model.to(world.device)
        optimizer = self.inner = optim.build(optim_config, model, model.num_tokens)
        self.lr = optim_config.lr
        self.is_compiled = compiling.wanted(config.compile, config.zero_stage, world.device)
        if self.is_compiled:
            compiling.compile_whole(model)
        self.norm: torch.Tensor | None = None
        self.skips = Skips(0, 0, 0)
        self.watches = {part: Stopwatch(world.device) for part in PARTS}  # `data` is the loop's to run
        if clips_itself(config, self.precision):
            optimizer.register_step_pre_hook(lambda *_: self._clip(config.clip))
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.json | {"checkpoint": {"load_universal": universal}}
        )
        optim.lay_out(optimizer, self.optimizer, config.zero_stage, world)
        if config.zero_stage == 3:  # DeepSpeed's hooks wait for the weights of a part
            self.watches["forward"].leave_out_hooks_of(self.deepspeed.module)

    def train_step(self, batches: Sequence[Batch], targets: int, step: int, lr: float, rate: float) -> StepSums:
        """One optimizer step.

        batches: this rank's micro-batches of the step
        targets: their targets, summed over all ranks (counted on the host before the first forward)
        Returns this rank's sums over the micro-batches.
        """
        self.lr = lr
        optim.set_lr(self.optimizer, lr)
        # DeepSpeed averages gradients over ranks: times the world's size, their sum remains
        scale = self.world.size / max(targets, 1)
        total: StepSums | None = None
        backs_off = self._backs_off()
        self.deepspeed.train()
        for micro_step, batch in enumerate(batches):
            torch.manual_seed(masking.dropout_seed(self.seed, self.world.rank, step, micro_step))
            if self.batch_grows:  # DeepSpeed counts the micro-batches of the full batch
                self.deepspeed.set_gradient_accumulation_boundary(micro_step + 1 == len(batches))
            with self.watches["forward"].lap():
                sums = self._forward(batch, self._row_keys(batch, step, micro_step), rate)
            under_way = len(FWD_MODULE_STACK)
            with self.watches["backward"].lap():
                self.deepspeed.backward(sums["loss"] * scale, scale_wrt_gas=False)
            # a layer that is computed again stops early, and stage 3's hook that ends its forward pass doesn't run
            del FWD_MODULE_STACK[under_way:]
            with self.watches["optimizer"].lap():
                self.deepspeed.step()
            detached = StepSums(**{name: value.detach() for name, value in sums.items()})
            total = detached if total is None else total + detached
        assert total is not None
        skipped = self._skipped()
        self.skips = self.skips.after(skipped, counts=not backs_off)
        return total.unless(skipped)

    def problem_with(self, batches: Sequence[Batch]) -> str | None:
        """Why the model can't take one of these micro-batches, where it can tell on the host; None: it can."""
        transformer = self.deepspeed.module.transformer
        if not hasattr(transformer, "problem_with"):
            return None
        return next(filter(None, (transformer.problem_with(batch.segments) for batch in batches)), None)

    def eval_step(self, batch: Batch, rate: float, seed: int) -> dict[str, torch.Tensor]:
        """What the model makes of one held-out batch of this rank, as `held_out_pass` has it. All ranks call it.

        Raises ConfigError for a batch that it can't take.
        """
        problem = self.problem_with([batch])
        if problem:
            raise ConfigError(problem)
        self.deepspeed.eval()
        return held_out_pass(self.deepspeed, batch, rate, seed, self.world.device)

    def grad_norm(self) -> float | None:
        """Norm of the last gradient before clipping; None where DeepSpeed does not compute it. Waits for the device."""
        norm = self.norm if self.norm is not None else self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    def numbers(self) -> dict[str, float | None]:
        """What is logged of the last step: `lr`, `grad_norm`, and what fp16 scales the loss by now as `loss_scale`."""
        numbers = {"lr": self.lr, "grad_norm": self.grad_norm()}
        return numbers | ({"loss_scale": self.deepspeed.optimizer.loss_scale} if self.precision == "fp16" else {})

    def seconds(self) -> dict[str, float]:
        """What each part of this rank's steps took since the last call, by the device's clock. Waits for the device."""
        return {part: watch.read() for part, watch in self.watches.items()}

    def checkpoint_files(self, folder: Path, tag: str, later: bool) -> CheckpointFiles:
        """This rank's files of a checkpoint in `folder/tag`: written there when this returns, or copied to be written
        `later`. All ranks call it."""
        files, usual = CheckpointFiles(self.deepspeed._config, later), self.deepspeed.checkpoint_engine
        self.deepspeed.checkpoint_engine = files
        try:
            self.deepspeed.save_checkpoint(str(folder), tag=tag, save_latest=False)
        finally:
            self.deepspeed.checkpoint_engine = usual
        return files

    @contextmanager
    def own_optimizer_options(self) -> Iterator[None]:
        """Have a load leave the options of each group (betas, weight decay, ...) as the configuration states them.

        And put right what loading a universal checkpoint does in DeepSpeed 0.19.8: at stage 3 every group gets the
        first one's options, and all the same tensor as their count of steps, so that each step counts once for every
        group; and second moments come for all weights.
        """
        groups = [{name: value for name, value in g.items() if name != "params"} for g in self.optimizer.param_groups]
        yield
        for group, options in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(options)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()
        if isinstance(self.inner, Muon):
            self.inner.drop_second_moments()

    def sizes(self) -> list[int]:
        """The number of elements of each parameter, whole also where the stage shards it."""
        return [getattr(p, "ds_numel", p.numel()) for p in self.deepspeed.module.parameters()]

    def _clip(self, largest: float) -> None:
        self.norm = optim.clip_gradients(self.deepspeed.module.parameters(), largest)
        optim.skip_unless(self.optimizer, self.norm.isfinite())

    def _skipped(self) -> torch.Tensor | bool:
        """Whether the last step was not applied, on any rank, since a gradient was not finite."""
        return ~self.norm.isfinite() if self.norm is not None else not self.deepspeed.was_step_applied()

    def _backs_off(self) -> bool:
        """Whether a step that is skipped will lower fp16's loss scale: the right one is found that way, it is no fault.

        Where the scale is fixed or at its minimum, a skip counts like any other. For the minimum DeepSpeed 0.19.8 has
        an exception of its own ("Current loss scale already at minimum", DynamicLossScaler.update_scale), turned off
        here at every step, since the scaler that a checkpoint brings may have it turned on.
        """
        if self.precision != "fp16" or not self.deepspeed.dynamic_loss_scale():
            return False
        scaler = self.deepspeed.optimizer.loss_scaler
        scaler.raise_error_at_min_scale = False
        return scaler.cur_scale > scaler.min_scale

    def _row_keys(self, batch: Batch, step: int, micro_step: int) -> torch.Tensor:
        if self.seed_by == "sample":
            return masking.row_keys_by_sample(self.seed, batch.row_keys.to(self.world.device, non_blocking=True))
        rows = batch.ids.shape[0]
        return masking.row_keys_by_rank(self.seed, self.world.rank, step, micro_step, rows, self.world.device)

    def _forward(self, batch: Batch, row_keys: torch.Tensor, rate: float) -> dict[str, torch.Tensor]:
        return forward_sums(self.deepspeed, batch, row_keys, rate, self.world.device)


def forward_sums(
    model: torch.nn.Module,
    batch: Batch,
    row_keys: torch.Tensor,
    rate: float,
    device: torch.device,
    details: bool = False,
) -> dict[str, torch.Tensor]:
    """Sums of an MLM (in an engine or bare) over one batch, masked by the keys at the rate; by name, as StepSums has
    them. details: with what `MLM.forward` adds to them."""
    ids, segments = (t.to(device, non_blocking=True) for t in (batch.ids, batch.segments))
    sums = model(ids, row_keys=row_keys, rate=rate, sums=True, details=details, segments=segments)
    # a number that the host knows, as a fill: nothing is copied or waited for
    return sums | {"maskable": torch.full((), int(batch.maskable.sum()), device=device)}


@torch.no_grad()
def held_out_pass(
    model: torch.nn.Module, batch: Batch, rate: float, seed: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Sums and details of one held-out batch, with masks that depend on the seed and the rows alone."""
    keys = masking.row_keys_by_sample(seed, batch.row_keys.to(device))
    return forward_sums(model, batch, keys, rate, device, details=True)
