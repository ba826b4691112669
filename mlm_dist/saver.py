"""The saving of checkpoints: each rank's files, hashes, the manifest, the name. Beside training, where it is told to.

A save goes through two tasks. Every rank writes its files, from a copy on the host; when all have done so, rank 0
commits. Ranks learn how the others' tasks stand from two flags in a reduction that each step has anyway.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mlm_dist import checkpoint
from mlm_dist.background import Background, TaskError
from mlm_dist.checkpoint import TAG, CheckpointConfig, CheckpointError, State, step_name
from mlm_dist.engine import CheckpointFiles, Engine
from mlm_dist.manifest import sha256_of
from mlm_dist.world import World

WORTH_A_WORD_SECONDS = 0.1


@dataclass
class Save:
    """One that is under way."""

    state: State
    staging: Path
    final: Path
    started: float
    stall_seconds: float = 0.0
    files: dict[str, dict[str, Any]] | None = None  # of all ranks, once they are written


class Saver:
    """Saves the checkpoints of one launch. Every rank has one, and all call the same methods at the same step.

    folder:   where they go
    beat:     is told what is being done, each time that there is progress (the watchdog's)
    say:      for a word to the user
    on_saved: is told of each one that is complete: where it stands, its state, and numbers to log
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        config: CheckpointConfig,
        world: World,
        beat: Callable[[str], None],
        say: Callable[[str], None],
        on_saved: Callable[[Path, State, dict[str, float]], None],
    ) -> None:
        self.folder, self.engine, self.config, self.world = folder, engine, config, world
        self.beat, self.say, self.on_saved = beat, say, on_saved
        self.background = Background(world, config.background)
        # a rank of a launch before this one may still be writing when rank 0 of it is dead: not in our folder
        self.launch = world.broadcast(secrets.token_hex(4))
        self.under_way: Save | None = None
        self.has_told = self.waiting = False

    def save(self, state: State) -> None:
        """Save weights, optimizer and state as of `state.step`, which must not change any more.

        With `checkpoint.background` it returns as soon as all of it is copied, and `proceed` or `wait` has to be called
        until it's complete; else it is complete. Waits for one that is under way. Raises CheckpointError on every rank
        where the disk has no room, or a rank failed to write: the checkpoints that were there before stand.
        """
        started = time.perf_counter()
        self._wait_for_the_one_before(state.step)
        final = self.folder / step_name(state.step)
        if self.world.broadcast(final.exists()):
            return
        self.beat(f"saving step {state.step}")
        staging = self.folder / f"tmp-{self.launch}-{final.name}"
        if self.world.is_main:
            # what a killed launch or an unfinished deletion left
            for leftover in self.folder.glob("tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            staging.mkdir(parents=True)
        self.world.barrier()
        check_space(self.folder, self.engine, self.world)
        save = self.under_way = Save(state, staging, final, started)
        try:
            files = self.engine.checkpoint_files(staging, TAG, later=self.config.background)
        except (OSError, RuntimeError) as error:
            raise self._failure(error) from error
        text = json.dumps(asdict(state), indent=1) + "\n" if self.world.is_main else None
        self.background.start(lambda: write_files(staging, files, text, self._progress))
        if not self.config.background:
            self.wait()
        save.stall_seconds = time.perf_counter() - started

    def flags(self) -> list[int]:
        """How this rank's part stands: whether it has finished, and whether it has failed; to be summed over ranks."""
        return [int(self.background.finished()), int(self.background.failed())]

    def proceed(self, finished: int, failed: int) -> None:
        """Go on with the save that is under way, if the sums of the flags allow it; it doesn't wait for a disk.

        Raises CheckpointError on every rank where one has failed.
        """
        if self.under_way and (failed or finished == self.world.size):
            self._go_on(self.under_way)

    def wait(self) -> None:
        """Return when no save is under way any more. Raises CheckpointError on every rank where one has failed."""
        self.waiting = True
        while self.under_way:
            self.beat(f"writing the checkpoint of step {self.under_way.state.step}")
            self._go_on(self.under_way)
        self.waiting = False

    def _go_on(self, save: Save) -> None:
        try:
            results = self.background.collect()
        except TaskError as error:
            raise self._failure(error) from error
        if save.files is None:
            save.files = {name: entry for part in results for name, entry in part.items()}
            facts = {"world_size": self.world.size, "zero_stage": self.engine.deepspeed.zero_optimization_stage()}
            self.background.start(lambda: self.world.is_main and commit(save, facts, self.config))
            return
        self.under_way = None
        size = sum(entry["bytes"] for entry in save.files.values())
        seconds = time.perf_counter() - save.started
        numbers = {"seconds": seconds, "stall_seconds": save.stall_seconds or seconds, "megabytes": size / 1e6}
        self.on_saved(save.final, save.state, {f"checkpoint/{name}": value for name, value in numbers.items()})

    def _progress(self) -> None:
        # only where the run waits for it: a write in the background must not hide that training hangs
        if self.waiting:
            self.beat("writing a checkpoint")

    def _wait_for_the_one_before(self, step: int) -> None:
        before, started = self.under_way, time.perf_counter()
        self.wait()
        seconds = time.perf_counter() - started
        if before and before.state.step != step and seconds >= WORTH_A_WORD_SECONDS and not self.has_told:
            self.has_told = True
            self.say(
                f"warning: the save of step {step} had to wait {seconds:.1f} s for that of step {before.state.step}, "
                "still being written (said once); the disk is slow, or checkpoint.every_steps low"
            )

    def _failure(self, error: Exception) -> CheckpointError:
        assert self.under_way is not None
        final, self.under_way = self.under_way.final, None
        # torch says only that a write failed
        reason = (
            "no space left on the disk; " if shutil.disk_usage(self.folder).free < space_needed(self.engine) else ""
        )
        return CheckpointError(f"checkpoint {final} was not saved, those before it stand: {reason}{error}")


def check_space(folder: Path, engine: Engine, world: World) -> None:
    """Raise CheckpointError on every rank where the disk has no room: found out half-way, ranks would wait in vain."""
    needed = space_needed(engine)
    free = world.broadcast(shutil.disk_usage(folder).free)
    if free < needed:
        raise CheckpointError(
            f"no space left for a checkpoint in {folder}: it takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are "
            "free; make room, or set checkpoint.keep_last lower, and start again: the checkpoints before it stand"
        )


def space_needed(engine: Engine) -> int:
    """Bytes of a checkpoint, at most: weights, master weights and AdamW's two states in fp32, 16 a parameter."""
    return 16 * sum(engine.sizes())


def write_files(
    staging: Path, files: CheckpointFiles, state: str | None, progress: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Write this rank's files, on rank 0 the state's too, flush them to the disk; their sizes and hashes by name.

    progress: called after each file
    """
    paths = files.write()
    if state is not None:
        # DeepSpeed drops scripts beside the weights; nothing in a checkpoint is ever to be run
        for script in staging.glob("*.py"):
            script.unlink()
        paths.append(staging / "state.json")
        paths[-1].write_text(state)
    entries = {}
    for path in paths:
        progress()
        checkpoint.sync(path)
        entries[str(path.relative_to(staging))] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return entries


def commit(save: Save, facts: dict[str, int], config: CheckpointConfig) -> None:
    """On rank 0, when all files are on the disk: write the manifest, give the folder its name, move `latest`, prune."""
    versions = {"torch": torch.__version__, "deepspeed": version("deepspeed")}
    manifest = {"step": save.state.step, **facts, "versions": versions, "files": save.files}
    text = json.dumps(checkpoint.sealed(manifest), indent=1) + "\n"
    checkpoint.write_text(save.staging / "manifest.json", text)
    checkpoint.sync(save.staging / TAG)
    checkpoint.sync(save.staging)
    os.rename(save.staging, save.final)
    checkpoint.write_text(save.final.parent / "latest", save.final.name + "\n")
    checkpoint.prune(save.final.parent, config, save.state)
