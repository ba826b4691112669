"""The loop: next micro-batches, one step, and what is due."""

import fcntl
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from mlm_dist import checkpoint, config, masking, models, optim, schema, shards, stream, vocab, world
from mlm_dist.checkpoint import State
from mlm_dist.config import RunConfig
from mlm_dist.engine import Engine
from mlm_dist.evaluate import evaluate
from mlm_dist.metrics import Meter
from mlm_dist.mlm import MLM
from mlm_dist.schema import ConfigError
from mlm_dist.shards import Manifest
from mlm_dist.stream import Batch
from mlm_dist.tracker import Tracker
from mlm_dist.vocab import Vocab
from mlm_dist.world import EXIT_NON_FINITE, EXIT_STOPPED, StopFlag, World

# A run measured in hours fixes its number of steps here, so that the schedule is a function of the step from then on.
STEPS_TO_MEASURE = 20

LIBRARIES = ("torch", "deepspeed", "webdataset", "transformers", "tokenizers", "wandb", "numpy")


@dataclass
class Run:
    """Everything one rank needs to train: made once by `prepare`, used by the loop."""

    config: RunConfig
    folder: Path
    world: World
    vocab: Vocab
    valid: Manifest | None
    engine: Engine
    state: State
    meter: Meter
    tracker: Tracker
    batches: Iterator[Batch]


def train(cfg: RunConfig) -> int:
    """Train, or go on with what stands in the run folder, to the end or to a signal. Returns the exit code.

    All ranks call it. Raises ConfigError, ShardError or CheckpointError with one sentence for the user.
    """
    with ExitStack() as stack:
        here = stack.enter_context(world.join(cfg.engine.timeout_seconds))
        stop = stack.enter_context(StopFlag())
        folder = open_folder(cfg, here, stack)
        run = prepare(cfg, folder, here, stack)
        if run is None:
            return 0
        write_status(run, "running", None)
        exit_code = 1
        try:
            exit_code = loop(run, stop)
        finally:
            write_status(run, {0: "done", EXIT_STOPPED: "stopped"}.get(exit_code, "failed"), exit_code)
            run.tracker.finish(exit_code)
        return exit_code


def loop(run: Run, stop: StopFlag) -> int:
    """Step until the run's length is reached or a rank was told to stop. Returns the exit code."""
    cfg, state = run.config, run.state
    while state.total_steps is None or state.step < state.total_steps:
        started = time.perf_counter()
        micro_batches = [next(run.batches) for _ in range(stream.accumulation(cfg.batch, run.world.size))]
        data_seconds = time.perf_counter() - started
        rate = masking.rate_at(cfg.masking, state.step, state.total_steps)
        targets, tokens, stopping = agree(run, micro_batches, rate, bool(stop))
        if stopping:
            save(run)
            run.tracker.say(
                f"stopped by {stop.signal_name or 'another rank'} at step {state.step}; start again to go on"
            )
            return EXIT_STOPPED

        lr = optim.lr_at(cfg.optim, cfg.schedule, state.step, state.total_steps)
        sums = run.engine.train_step(micro_batches, targets, state.step, lr, rate)
        run.meter.add(sums, micro_batches, data_seconds)
        advance(run, micro_batches, tokens, time.perf_counter() - started)

        last = state.step == state.total_steps
        if last or state.step % cfg.log.every_steps == 0:
            numbers = run.meter.report() | {
                "lr": lr,
                "grad_norm": run.engine.grad_norm(),
                "skipped_steps": state.skipped_steps,
            }
            run.tracker.log(state.step, numbers, state.tokens)
            if not math.isfinite(numbers["loss"]):
                run.tracker.say(
                    f"the loss is not finite at step {state.step}: training ends, the last checkpoint stands"
                )
                return EXIT_NON_FINITE
        if run.valid and (last or state.step % cfg.evaluate.every_steps == 0):
            evaluate_now(run)
        if last or state.step % cfg.checkpoint.every_steps == 0:
            save(run)
    run.tracker.say(f"done: {state.step} steps, {state.tokens:,} tokens, in {run.folder}")
    return 0


def agree(run: Run, micro_batches: list[Batch], rate: float, stop: bool) -> tuple[int, int, bool]:
    """Over all ranks: the step's targets, its real tokens, and whether a rank was told to stop."""
    targets = sum(int(masking.targets_of(batch.maskable, rate).sum()) for batch in micro_batches)
    mine = torch.tensor([targets, sum(batch.tokens for batch in micro_batches), int(stop)])
    targets, tokens, stopping = run.world.sum(mine).tolist()
    return targets, tokens, stopping > 0


def advance(run: Run, micro_batches: list[Batch], tokens: int, seconds: float) -> None:
    """Move the state past a finished step."""
    state = run.state
    state.step += 1
    state.tokens += tokens
    state.train_seconds += seconds
    state.cursor = micro_batches[-1].cursor
    state.skipped_steps = run.engine.skipped_steps()
    if state.total_steps is None and state.step == STEPS_TO_MEASURE:
        hours = run.config.run.hours
        assert hours is not None
        per_step = run.world.broadcast(state.train_seconds / state.step)
        state.total_steps = max(state.step + 1, round(hours * 3600 / per_step))
        run.tracker.say(f"{hours} hours are {state.total_steps:,} steps at {per_step:.3f} s each")


def evaluate_now(run: Run) -> None:
    """Held-out loss of the weights as they stand, logged; the lowest is remembered."""
    cfg, state, started = run.config, run.state, time.perf_counter()
    assert run.valid is not None
    batches = stream.held_out_batches(
        run.valid, run.vocab, cfg.data, cfg.batch, run.world.rank, run.world.size, max_rows=cfg.evaluate.max_rows
    )
    numbers = evaluate(lambda b: run.engine.eval_step(b, cfg.evaluate.rate, cfg.evaluate.seed), batches, run.world)
    run.tracker.log(state.step, {f"valid/{name}": value for name, value in numbers.items()}, state.tokens)
    state.valid_loss = numbers["loss"]
    if state.best is None or state.valid_loss < state.best["loss"]:
        state.best = {"step": state.step, "loss": state.valid_loss}
    run.meter.leave_out(time.perf_counter() - started)


def save(run: Run) -> None:
    """Save a checkpoint of the step that was just finished."""
    if run.state.step == 0:
        return
    started = time.perf_counter()
    saved = State(**vars(run.state))
    saved.cursor = stream.merge_cursors(run.world.gather(run.state.cursor))
    checkpoint.save(run.folder / "checkpoints", run.engine, saved, run.config.checkpoint, run.world)
    run.meter.leave_out(time.perf_counter() - started)


def prepare(cfg: RunConfig, folder: Path, here: World, stack: ExitStack) -> Run | None:
    """Build the run on this rank, and load its newest checkpoint where there is one. None: the run is complete."""
    root = Path(cfg.data.shards)
    manifest = shards.load_manifest(root / "train")
    tokenizer = vocab.load(root / "tokenizer")
    valid = shards.load_manifest(root / "valid") if (root / "valid").exists() else None
    stream.check(manifest, tokenizer, cfg.data, cfg.batch, here.size)
    world.seed_everything(cfg.run.seed)
    transformer = models.build(cfg.model, tokenizer.size, cfg.batch.seq_len, tokenizer, cfg.data.packing)
    flops = models.flops_per_token(cfg.model, transformer, tokenizer.size, cfg.batch.seq_len, cfg.masking.rate)
    model = objective(cfg, transformer, tokenizer)
    engine = Engine(model, cfg.engine, cfg.optim, cfg.batch, cfg.masking, cfg.run.seed, here, cfg.deepspeed)

    facts = {"manifest": manifest.hash, "tokenizer": tokenizer.fingerprint, "config": schema.to_mapping(cfg)}
    tracker = Tracker(cfg.log, folder, schema.flatten(facts["config"]), here.is_main, lambda: state.total_steps)
    state = resume(cfg, folder, engine, here, tracker, facts)
    if state.total_steps is not None and state.step >= state.total_steps:
        tracker.say(f"the run in {folder} is complete: {state.step} steps; raise run.steps, or set another run.dir")
        return None
    if here.is_main:
        tokenizer.save(folder / "tokenizer")
        (folder / "config.yaml").write_text(schema.to_yaml(cfg))
        (folder / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    tracker.start(state.step)
    batches = stack.enter_context(
        stream.train_batches(manifest, tokenizer, cfg.data, cfg.batch, cfg.run.seed, here.rank, here.size, state.cursor)
    )
    return Run(cfg, folder, here, tokenizer, valid, engine, state, Meter(here, flops), tracker, batches)


def objective(cfg: RunConfig, transformer: torch.nn.Module, tokenizer: Vocab) -> MLM:
    """The MLM wrapper as the configuration states it."""
    return MLM(transformer, **masking.mlm_keywords(cfg.masking, tokenizer))


def load_model(cfg: RunConfig, tokenizer: Vocab, saved: Path) -> MLM:
    """The bare model of a run with a checkpoint's weights, in fp32 on the host."""
    model = objective(
        cfg, models.build(cfg.model, tokenizer.size, cfg.batch.seq_len, tokenizer, cfg.data.packing), tokenizer
    )
    model.load_state_dict(checkpoint.full_weights(saved))
    return model


def resume(cfg: RunConfig, folder: Path, engine: Engine, here: World, tracker: Tracker, facts: dict) -> State:
    """The state to start from: the newest whole checkpoint's, or a fresh one. Refuses a changed config or data."""
    state = checkpoint.resume(folder / "checkpoints", engine, here, tracker.say)
    fresh = state is None
    if state is None:
        state = State(facts=facts)
    changes = config.refused_changes(state.facts["config"], facts["config"])
    for name in ("manifest", "tokenizer"):
        if state.facts[name] != facts[name]:
            changes.append(f"the {name} of data.shards is another")
    if changes:
        raise ConfigError(f"{folder} can't be resumed: {'; '.join(changes)}; change it back, or set another run.dir")
    state.facts = facts
    if cfg.run.hours is None:
        state.total_steps = config.total_steps(cfg)
    if not fresh:
        tracker.say(f"resumed from step {state.step}")
    return state


def open_folder(cfg: RunConfig, here: World, stack: ExitStack) -> Path:
    """Make the run folder and hold its lock while the run lasts: two launches must not share it."""
    folder = Path(cfg.run.dir)
    taken = False
    if here.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(open(folder / "lock", "w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
    if here.any(taken):
        raise ConfigError(f"{folder} is in use by another launch; wait for it to end, or set another run.dir")
    return folder


def write_status(run: Run, status: str, exit_code: int | None) -> None:
    """Tell in RUN/status.json how the run stands: launchers may hide the exit code."""
    if run.world.is_main:
        content = {
            "status": status,
            "exit_code": exit_code,
            "step": run.state.step,
            "total_steps": run.state.total_steps,
        }
        checkpoint.write_text(run.folder / "status.json", json.dumps(content) + "\n")


def environment() -> dict[str, object]:
    """What the run ran on: versions, platform, command."""
    versions = {name: version(name) for name in LIBRARIES}
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }
