"""The loop: next micro-batches, one step, and what is due."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mlm_dist import assembly, checkpoint, config, masking, mixture, models, schedule, schema, stream, world
from mlm_dist.checkpoint import CheckpointError, State
from mlm_dist.config import RunConfig
from mlm_dist.cursor import Progress, merge_cursors, upgraded
from mlm_dist.engine import Engine, resolve_precision
from mlm_dist.evaluate import evaluate
from mlm_dist.logs import logs
from mlm_dist.manifest import ShardError
from mlm_dist.metrics import Meter, bad_shard_numbers
from mlm_dist.mixture import Sources
from mlm_dist.predictions import Picker
from mlm_dist.redaction import redact, secrets_of
from mlm_dist.report import write_at_end
from mlm_dist.run_folder import open_folder, write_inputs, write_status
from mlm_dist.saver import Saver
from mlm_dist.schema import ConfigError
from mlm_dist.stream import Batch
from mlm_dist.tracker import Tracker
from mlm_dist.vocab import Vocab
from mlm_dist.watchdog import Watchdog
from mlm_dist.world import EXIT_HANG, EXIT_NON_FINITE, EXIT_STOPPED, StopFlag, World, exit_code_of

# A run measured in hours fixes its number of steps here, so that the schedule is a function of the step from then on.
STEPS_TO_MEASURE = 20

COLLECTIVE_MARGIN_SECONDS = 120.0
SECONDS_TO_SEND, SECONDS_FOR_LAST_WORDS = 60.0, 10.0  # how long the end of a run waits for W&B

# What ends a run with one sentence and exit code 2.
REFUSALS = (ConfigError, ShardError, CheckpointError)


@dataclass
class Run:
    """Everything one rank needs to train: made once by `prepare`, used by the loop."""

    config: RunConfig
    folder: Path
    world: World
    watchdog: Watchdog
    vocab: Vocab
    valid: Sources  # those that have held-out rows
    engine: Engine
    state: State
    saver: Saver
    meter: Meter
    tracker: Tracker
    batches: Iterator[Batch]
    bad_shards: dict[str, str] = field(default_factory=dict)  # those of all ranks that were told: label -> reason
    bad_shards_seen: int = 0  # the sum over the ranks of what each has met


def train(cfg: RunConfig) -> int:
    """Train, or go on with what stands in the run folder, to the end or to a signal. Returns the exit code.

    All ranks call it. Raises ConfigError, ShardError or CheckpointError with one sentence for the user.
    """
    # the watchdog speaks first: it knows more than a collective that timed out
    with world.join(cfg.engine.timeout_seconds + COLLECTIVE_MARGIN_SECONDS) as here, StopFlag() as stop:
        return train_on(cfg, here, stop)


def train_on(cfg: RunConfig, here: World, stop: StopFlag) -> int:
    """The same on ranks that have joined already."""
    with ExitStack() as stack:
        folder = open_folder(Path(cfg.run.dir), here, stack)
        watchdog = Watchdog(
            folder,
            here.rank,
            here.size,
            cfg.engine.timeout_seconds,
            on_hang=lambda: write_status(folder, "failed", EXIT_HANG),
        )
        stack.enter_context(watchdog)
        secrets = secrets_of(schema.to_mapping(cfg)) | secrets_of(dict(os.environ))
        stack.enter_context(logs(folder, here.rank, cfg.log.verbose, secrets))
        run, exit_code = None, 1
        try:
            tell(folder, here, "running", None)
            run = prepare(cfg, folder, here, watchdog, stack)
            watchdog.on_hang = lambda: hung(run)
            watchdog.watch_stalls(60 * cfg.log.stall_minutes, lambda doing, seconds: stalled(run, doing, seconds))
            tell(folder, here, "running", None, run.state)
            exit_code = loop(run, stop)
        except BaseException as error:
            exit_code = exit_code_of(error, REFUSALS)
            if run:
                text = f"{type(error).__name__}: {error}"
                run.tracker.alert("failed", text, run.state.step, "ERROR", always=True)
            raise
        finally:
            watchdog.end()
            status = {0: "done", EXIT_STOPPED: "stopped"}.get(exit_code, "failed")
            tell(folder, here, status, exit_code, run and run.state)
            if run:
                close(run, exit_code)
        here.barrier()  # launchers end the ranks that are left when the first one exits with a code
        return exit_code


def tell(folder: Path, here: World, status: str, exit_code: int | None, state: State | None = None) -> None:
    """Tell in RUN/status.json how the run stands, where the disk has room: launchers may hide the exit code."""
    if here.is_main:
        where = {"step": state.step, "total_steps": state.total_steps} if state else {}
        with suppress(OSError):
            write_status(folder, status, exit_code, **where)


def close(run: Run, exit_code: int) -> None:
    """Send what W&B hasn't had, and leave the report."""
    run.tracker.finish(exit_code, SECONDS_TO_SEND if exit_code == 0 else SECONDS_FOR_LAST_WORDS)
    if run.world.is_main:
        write_at_end(run.folder, run.tracker.say)


def stalled(run: Run, doing: str, seconds: float) -> None:
    """What the watchdog does long before it calls it a hang; the run may still go on."""
    text = f"no step was finished for {seconds / 60:.1f} minutes ({doing})"
    run.tracker.alert("stall", text, run.state.step)


def hung(run: Run) -> None:
    """What the watchdog does on one rank that answers, before it ends it."""
    write_status(run.folder, "failed", EXIT_HANG)
    run.tracker.alert("hang", f"no progress {run.watchdog.doing}: the run ends", run.state.step, "ERROR", always=True)
    run.tracker.finish(EXIT_HANG, seconds=SECONDS_FOR_LAST_WORDS)


def loop(run: Run, stop: StopFlag) -> int:
    """Step until the run's length is reached or a rank was told to stop. Returns the exit code."""
    cfg, state = run.config, run.state
    if state.step == state.total_steps:
        run.tracker.say(
            f"the run in {run.folder} is complete: {state.step} steps; make it longer, or set another run.dir"
        )
        return 0
    while state.step != state.total_steps:
        started = time.perf_counter()
        run.watchdog.beat(f"at step {state.step + 1}")
        with run.engine.watches["data"].lap():
            micro_batches, problem = take(run)
        data_seconds = time.perf_counter() - started
        rate = masking.rate_at(cfg.masking, state.step, state.total_steps)
        targets, tokens, stopping = agree(run, micro_batches, rate, bool(stop), problem)
        if stopping:
            save(run)
            text = f"stopped by {stop.signal_name or 'another rank'} at step {state.step}; start again to go on"
            run.tracker.alert("stopped", text, state.step, "INFO", always=True)
            return EXIT_STOPPED

        lr = schedule.lr_at(cfg.optim, cfg.schedule, state.step, state.total_steps)
        sums = run.engine.train_step(micro_batches, targets, state.step, lr, rate)
        run.meter.add(sums, micro_batches, data_seconds)
        advance(run, micro_batches, tokens, time.perf_counter() - started)

        last = state.step == state.total_steps
        to_evaluate = bool(run.valid) and (last or state.step % cfg.evaluate.every_steps == 0)
        to_save = last or state.step % cfg.checkpoint.every_steps == 0
        if to_evaluate or to_save or state.step % cfg.log.every_steps == 0:
            report(run)
            in_a_row = int(run.engine.skips.in_a_row)
            if in_a_row >= cfg.engine.max_non_finite_steps:
                text = f"the last {in_a_row} steps were skipped: the run ends, the last checkpoint stands"
                run.tracker.alert("ended by steps that aren't finite", text, state.step, always=True)
                run.saver.wait()
                return EXIT_NON_FINITE
        if to_evaluate:
            evaluate_now(run, to_save)
        if to_save:
            save(run, wait=last)
    text = f"done: {state.step} steps, {state.tokens:,} tokens, in {run.folder}"
    run.tracker.alert("finished", text, state.step, "INFO", always=True)
    return 0


def take(run: Run) -> tuple[list[Batch], str | None]:
    """This rank's micro-batches of the next step, and what was wrong with a shard, if anything was."""
    try:
        return [next(run.batches) for _ in range(stream.accumulation(run.config.batch, run.world.size))], None
    except ShardError as error:
        return [], str(error)


def agree(run: Run, micro_batches: list[Batch], rate: float, stop: bool, problem: str | None) -> tuple[int, int, bool]:
    """Over all ranks: the step's targets, its real tokens, and whether a rank was told to stop.

    A save that is under way goes on here: the ranks must agree on that too. Raises CheckpointError where it failed.
    A shard that can't be read, or a run folder that can't be written to, ends the run on every rank, with the sentence
    of the rank that met it: raises ShardError, after a save of what was trained so far.
    """
    problem = problem or run.tracker.problem
    targets = sum(int(masking.targets_of(batch.maskable, rate).sum()) for batch in micro_batches)
    bad_shards = micro_batches[-1].bad_shards if micro_batches else {}
    tokens = sum(batch.tokens for batch in micro_batches)
    mine = [targets, tokens, len(bad_shards), int(stop), int(problem is not None), *run.saver.flags()]
    targets, tokens, bad_shards_seen, stopping, failing, *saving = run.world.sum(torch.tensor(mine)).tolist()
    run.saver.proceed(*saving)
    if not failing and bad_shards_seen != run.bad_shards_seen:
        run.bad_shards_seen = bad_shards_seen
        problem = tell_bad_shards(run, bad_shards)
        failing = problem is not None
    if failing:
        save(run)
        raise ShardError(next(text for text in run.world.gather(problem) if text))
    return targets, tokens, stopping > 0


def tell_bad_shards(run: Run, mine: Mapping[str, str]) -> str | None:
    """Say which shards were skipped since the last time, on any rank. Returns what is wrong if they are too many."""
    new = {label: reason for part in run.world.gather(dict(mine)) for label, reason in part.items()}
    new = {label: new[label] for label in sorted(new.keys() - run.bad_shards.keys())}
    run.bad_shards |= new
    most = run.config.data.max_bad_shards
    for label, reason in new.items():
        text = f"shard {label} is skipped from here on: {reason.replace('_', ' ')}"
        run.tracker.alert("bad shard", text, run.state.step)
    if not new or len(run.bad_shards) <= most:
        return None
    names = ", ".join(f"{label} ({reason.replace('_', ' ')})" for label, reason in sorted(run.bad_shards.items()))
    return (
        f"{len(run.bad_shards)} shards are damaged or missing, more than data.max_bad_shards = {most}: {names}; "
        "put them right, or allow more"
    )


def advance(run: Run, micro_batches: list[Batch], tokens: int, seconds: float) -> None:
    """Move the state past a finished step."""
    state = run.state
    state.step += 1
    state.tokens += tokens
    state.train_seconds += seconds
    state.cursor = micro_batches[-1].cursor
    hours = run.config.run.hours
    if state.total_steps is None and state.step >= STEPS_TO_MEASURE:
        assert hours is not None
        per_step = run.world.broadcast(state.train_seconds / state.step)
        state.total_steps = max(state.step, round(hours * 3600 / per_step))
        run.tracker.say(f"{hours} hours are {state.total_steps:,} steps at {per_step:.3f} s each")


def report(run: Run) -> None:
    """Log what the steps since the last report came to, and count those that were skipped."""
    numbers = run.meter.report(run.engine.seconds()) | run.engine.numbers()
    count_skips(run)
    numbers |= {"skipped_steps": run.state.skipped_steps} | bad_shard_numbers(run.bad_shards)
    run.tracker.log(run.state.step, numbers, run.state.tokens)
    if run.meter.warning:
        run.tracker.alert("slow rank", run.meter.warning, run.state.step)


def count_skips(run: Run) -> None:
    """Move the count of skipped steps from the engine to the state, and tell of the faults. Waits for the device."""
    skips, state = run.engine.skips, run.state
    run.engine.skips = skips._replace(total=0, faults=0)
    state.skipped_steps += int(skips.total)
    if int(skips.faults):
        text = (
            f"{int(skips.faults)} of the steps up to step {state.step} had gradients that are not finite on some rank "
            f"and were skipped; {state.skipped_steps} in all"
        )
        run.tracker.alert("skipped steps", text, state.step)


def evaluate_now(run: Run, to_save: bool) -> None:
    """Held-out loss of the weights as they stand, logged; the lowest of those that are saved is remembered."""
    cfg, state, started = run.config, run.state, time.perf_counter()
    batches = stream.held_out_batches(
        run.valid, run.vocab, cfg.data, cfg.batch, run.world.rank, run.world.size, max_rows=cfg.evaluate.max_rows
    )

    def step(batch: Batch) -> Mapping[str, torch.Tensor]:
        run.watchdog.beat(f"evaluating at step {state.step}")
        return run.engine.eval_step(batch, cfg.evaluate.rate, cfg.evaluate.seed)

    count = cfg.evaluate.predictions if cfg.log.log_text is not False else 0
    picker = Picker(run.vocab, count, cfg.evaluate.seed)
    try:
        numbers = evaluate(step, batches, run.world, run.vocab, mixture.named(run.valid), picker)
    except ShardError:
        save(run)  # every rank reads all held-out shards, and meets the same one
        raise
    run.tracker.log(state.step, {f"valid/{name}": value for name, value in numbers.items()}, state.tokens)
    with run.tracker.noting():
        run.tracker.show(picker.record(run.world, run.folder, state.step, state.tokens), state.step, state.tokens)
    state.valid_loss = numbers["loss"]
    lowest = state.best["loss"] if state.best else float("inf")
    if to_save and state.valid_loss < lowest:  # never one that isn't a number
        state.best = {"step": state.step, "loss": state.valid_loss}
    run.meter.leave_out(time.perf_counter() - started)


def save(run: Run, wait: bool = True) -> None:
    """Save a checkpoint of the step that was just finished. wait: until it is complete, though it could be later."""
    if run.state.step > 0:
        if run.meter.steps:  # the run ends between two lines: no later one would tell of these steps
            report(run)
        started = time.perf_counter()
        saved = State(**vars(run.state))
        saved.cursor = merge_cursors(run.world.gather(run.state.cursor))
        run.saver.save(saved)
        tell(run.folder, run.world, "running", None, run.state)
        run.meter.leave_out(time.perf_counter() - started)
    if wait:
        run.saver.wait()


def prepare(cfg: RunConfig, folder: Path, here: World, watchdog: Watchdog, stack: ExitStack) -> Run:
    """Build the run on this rank, at its newest whole checkpoint where there is one."""
    sources, valid, tokenizer = assembly.open_data(cfg, here.size)
    folders = " and ".join(folder.shards for folder in cfg.data.folders().values())
    if len(set(here.gather(mixture.hash_of(sources)))) > 1:
        raise ConfigError(f"the ranks found different manifests at {folders}; start again when it is settled")
    facts = {
        "manifest": mixture.hash_of(sources),
        "tokenizer": tokenizer.fingerprint,
        "data": mixture.counts(sources),
        "precision": resolve_precision(cfg.engine, here.device),
        "config": redact(schema.to_mapping(cfg)),
    }
    tracker = Tracker(cfg.log, folder, here.is_main, lambda: state.total_steps)
    saved = checkpoint.newest_whole(folder / "checkpoints", here, tracker.say)
    state = resumed_state(cfg, folder, saved, facts)

    world.seed_everything(cfg.run.seed)
    transformer = models.build(cfg.model, tokenizer.size, cfg.batch.seq_len, tokenizer, cfg.data.packing)
    flops = models.flops_per_token(cfg.model, transformer, tokenizer.size, cfg.batch.seq_len, cfg.masking.rate)
    model = assembly.objective(cfg, transformer, tokenizer)
    resharded = saved is not None and checkpoint.needs_resharding(saved, here)
    engine = Engine(model, cfg.engine, cfg.optim, cfg.batch, cfg.masking, cfg.run.seed, here, cfg.deepspeed, resharded)
    if saved:
        checkpoint.load(saved, engine, here)
        tracker.say(f"resumed from step {state.step}")
    if here.is_main:
        tracker.start(state.step, describe(cfg, folder, here, tokenizer, engine, facts))
    if not valid:
        tracker.say(f"{folders} holds no held-out documents: nothing is evaluated")
    if not mixture.is_roomy(sources, cfg.data.lanes):
        tracker.say(
            f"data.cache_gb = {cfg.data.cache_gb:g} doesn't hold two shards of every lane: they are not fetched ahead, "
            "and perhaps more than once an epoch"
        )
    batches = stack.enter_context(
        stream.train_batches(sources, tokenizer, cfg.data, cfg.batch, cfg.run.seed, here.rank, here.size, state.cursor)
    )

    def on_saved(path: Path, saved: State, numbers: dict[str, float]) -> None:
        tracker.log(saved.step, numbers, saved.tokens)
        if cfg.log.log_checkpoints:
            tracker.mirror.refer("checkpoint", "checkpoint", path, {"step": saved.step, "loss": saved.valid_loss})

    saver = Saver(folder / "checkpoints", engine, cfg.checkpoint, here, watchdog.beat, tracker.say, on_saved)
    stack.callback(saver.background.close)
    names = [source.name for source in sources] if len(sources) > 1 else ()
    meter = Meter(here, flops, names, cfg.log.slow_rank, Progress(batches.mixture, cfg.run.seed))
    bad_shards = dict(state.cursor["bad_shards"]) if state.cursor else {}
    return Run(cfg, folder, here, watchdog, tokenizer, valid, engine, state, saver, meter, tracker, batches, bad_shards)


def describe(
    cfg: RunConfig, folder: Path, here: World, tokenizer: Vocab, engine: Engine, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write to the run folder what the run comes from; returns it, flat, for W&B. Rank 0 calls it."""
    tokenizer.save(folder / "tokenizer")
    (folder / "config.yaml").write_text(schema.to_yaml(schema.from_mapping(RunConfig, facts["config"])))
    more = {name: facts[name] for name in ("manifest", "tokenizer", "precision")}
    more |= {"ranks": here.size, "device": here.device_name}
    return schema.flatten(facts["config"] | write_inputs(folder, engine.json, more, cfg.log.log_diff))


def resumed_state(cfg: RunConfig, folder: Path, saved: Path | None, facts: dict[str, Any]) -> State:
    """The state to start from, saved or fresh. Raises ConfigError for a changed configuration or other data."""
    state = checkpoint.load_state(saved) if saved else State(facts=facts)
    changes = config.refused_changes(state.facts["config"], facts["config"])
    if state.facts["precision"] != facts["precision"]:
        changes.append(f"engine.precision came to {state.facts['precision']} and comes to {facts['precision']} now")
    for name in ("manifest", "tokenizer"):
        if state.facts[name] != facts[name]:
            changes.append(f"the {name} of {'data.shards' if cfg.data.shards else 'data.sources'} is another")
    if changes:
        raise ConfigError(f"{folder} can't be resumed: {'; '.join(changes)}; change it back, or set another run.dir")
    if cfg.run.hours is None or cfg.run.hours != state.facts["config"]["run"]["hours"]:
        total = config.total_steps(cfg)
        state.total_steps = total if total is None else max(total, state.step)
    state.facts = facts
    state.cursor = upgraded(state.cursor) if state.cursor else None
    return state
