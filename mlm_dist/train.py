"""The loop: next micro-batches, one step, and what is due."""

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from mlm_dist import batch_size, config, masking, mixture, schedule, schema, stream, world
from mlm_dist.checkpoint import CheckpointError, State
from mlm_dist.config import RunConfig
from mlm_dist.cursor import merge_cursors
from mlm_dist.evaluate import evaluate
from mlm_dist.logs import logs
from mlm_dist.manifest import ShardError
from mlm_dist.metrics import bad_shard_numbers
from mlm_dist.predictions import Picker
from mlm_dist.prepare import Run, prepare
from mlm_dist.redaction import secrets_of
from mlm_dist.report import write_at_end
from mlm_dist.run_folder import open_folder, write_status
from mlm_dist.schema import ConfigError
from mlm_dist.stream import Batch
from mlm_dist.watchdog import Watchdog
from mlm_dist.world import EXIT_HANG, EXIT_NON_FINITE, EXIT_STOPPED, StopFlag, World, exit_code_of

# A run measured in hours fixes its number of steps here, so that the schedule is a function of the step from then on.
STEPS_TO_MEASURE = 20

COLLECTIVE_MARGIN_SECONDS = 120.0
SECONDS_TO_SEND, SECONDS_FOR_LAST_WORDS = 60.0, 10.0  # how long the end of a run waits for W&B

# What ends a run with one sentence and exit code 2.
REFUSALS = (ConfigError, ShardError, CheckpointError)


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
    """This rank's micro-batches of the next step, and what is wrong with a shard or with them, if anything is."""
    batch, ranks = run.config.batch, run.world.size
    rows = batch_size.rows_at(batch, run.state.step)
    try:
        micro_rows, count = batch_size.micro_rows(batch, ranks, rows), batch_size.accumulation(batch, ranks, rows)
        micro_batches = [run.batches.draw(micro_rows) for _ in range(count)]
        return micro_batches, run.engine.problem_with(micro_batches)
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
    hours, batch = run.config.run.hours, run.config.batch
    if state.total_steps is None and state.step >= STEPS_TO_MEASURE:
        assert hours is not None
        # by rows: the first steps may have fewer than those to come
        per_row = run.world.broadcast(state.train_seconds / batch_size.rows_before(batch, state.step))
        state.total_steps = max(state.step, batch_size.steps_of(batch, round(hours * 3600 / per_row)))
        seconds = hours * 3600 / state.total_steps
        run.tracker.say(f"{hours} hours are {state.total_steps:,} steps at {seconds:.3f} s each")
        try:
            config.check_length(run.config, state.total_steps)
        except ConfigError as error:  # the run has begun
            run.tracker.say(f"warning: {error}")


def report(run: Run) -> None:
    """Log what the steps since the last report came to, and count those that were skipped."""
    numbers = run.meter.report(run.engine.seconds()) | run.engine.numbers()
    count_skips(run)
    numbers |= {"global_rows": batch_size.rows_at(run.config.batch, run.state.step - 1)}
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
