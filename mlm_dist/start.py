"""What a run starts from: its own newest checkpoint, a checkpoint of another run, or nothing.

Another run's is never written to. Where rows and batches stay those of that run, this one goes on with it: step, data,
masks. Where they change it is a phase of its own, which takes over weights and optimizer, and counts from 0.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlm_dist import checkpoint, config
from mlm_dist.checkpoint import State
from mlm_dist.config import MAY_CHANGE, MAY_DIFFER, RunConfig, is_among
from mlm_dist.cursor import upgraded
from mlm_dist.schema import ConfigError
from mlm_dist.world import World

# What the order of the rows follows from, and what a step is made of: a run with others of these is a phase.
ROWS = ("run.seed", "data", "batch.seq_len")
STEPS = (*ROWS, "batch")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """saved: whose weights and optimizer state to load; own: it is a checkpoint of this very run."""

    state: State
    saved: Path | None = None
    own: bool = False
    told: str = ""


def find(cfg: RunConfig, folder: Path, facts: dict[str, Any], here: World, say: Say) -> Start:
    """The newest checkpoint in the run folder; where there is none yet, what `run.from` names. All ranks call it.

    facts: what the run is made of, as checkpoints keep it
    Raises ConfigError or CheckpointError with the same sentence on every rank.
    """
    saved = checkpoint.newest_whole(folder / "checkpoints", here, say)
    if saved:
        return resumed(cfg, folder, saved, facts)
    if cfg.run.from_:
        return branched(cfg, branch_point(Path(cfg.run.from_), here, say), facts)
    return Start(State(facts=facts, total_steps=config.total_steps(cfg)))


def resumed(cfg: RunConfig, folder: Path, saved: Path, facts: dict[str, Any]) -> Start:
    """At a checkpoint of the run itself. Raises ConfigError for a changed configuration or other data."""
    state = checkpoint.load_state(saved)
    changes = [*changed(state.facts, facts, MAY_CHANGE).values(), *misfits(state.facts, facts)]
    if state.facts["manifest"] != facts["manifest"]:
        changes.append(other_manifest(cfg))
    if changes:
        raise ConfigError(f"{folder} can't be resumed: {'; '.join(changes)}; change it back, or set another run.dir")
    total = length(cfg, state)
    state = replace(
        state,
        total_steps=total if total is None else max(total, state.step),
        cursor=upgraded(state.cursor) if state.cursor else None,
        facts=facts | {"from": state.facts.get("from")},
    )
    return Start(state, saved, own=True, told=f"resumed from step {state.step}")


def branched(cfg: RunConfig, saved: Path, facts: dict[str, Any]) -> Start:
    """At a checkpoint of another run.

    Raises ConfigError for one of another model, and for a run that would be over; CheckpointError for one that is gone.
    """
    with checkpoint.while_it_stands(saved):
        parent = checkpoint.load_state(saved)
    refused = [*changed(parent.facts, facts, (*MAY_CHANGE, *MAY_DIFFER)).values(), *misfits(parent.facts, facts)]
    if refused:
        raise ConfigError(f"run.from = {cfg.run.from_} can't be gone on from: {'; '.join(refused)}; change it back")
    differs = changed(parent.facts, facts, MAY_CHANGE)
    if parent.facts["manifest"] != facts["manifest"]:
        differs["data"] = other_manifest(cfg)
    anew = [text for key, text in differs.items() if is_among(key, STEPS)]
    has_other_rows = any(is_among(key, ROWS) for key in differs)
    cursor = upgraded(parent.cursor) if parent.cursor and not has_other_rows else None
    origin = {"run": saved.resolve().parent.parent.name, "checkpoint": str(saved), "is_phase": bool(anew)}
    origin |= {"step": parent.step, "tokens": parent.tokens, "from": parent.facts.get("from")}
    facts = facts | {"from": origin}
    if anew:
        data = "the data begin at their epoch 0" if has_other_rows else "the data go on"
        told = f"a phase of its own, from step 0, with the weights and optimizer of {saved}; {data}: {'; '.join(anew)}"
        return Start(State(cursor=cursor, total_steps=config.total_steps(cfg), facts=facts), saved, told=told)
    total = length(cfg, parent)
    if total is not None and total <= parent.step:
        raise ConfigError(
            f"run.from = {cfg.run.from_} stands at step {parent.step}, and this run would end at step {total}: its "
            "length counts the steps before that checkpoint too; make it longer"
        )
    # the best one is no checkpoint of this run
    state = replace(parent, total_steps=total, cursor=cursor, facts=facts, valid_loss=None, best=None)
    return Start(state, saved, told=f"goes on from step {parent.step} of {saved}")


def length(cfg: RunConfig, saved: State) -> int | None:
    """Steps of a run that goes on: those that its hours came to where they are the same, else as it states them."""
    same = cfg.run.hours is not None and cfg.run.hours == saved.facts["config"]["run"]["hours"]
    return saved.total_steps if same else config.total_steps(cfg)


# ---- what is another


def changed(saved: dict[str, Any], facts: dict[str, Any], allowed: tuple[str, ...]) -> dict[str, str]:
    return config.changes(saved["config"], facts["config"], allowed)


def misfits(saved: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """What no checkpoint can be gone on from with: another precision, ZeRO stage or tokenizer."""
    found = []
    before = saved.get("zero_stage", facts["zero_stage"])  # older ones don't tell
    if before != facts["zero_stage"]:
        found.append(f"engine.zero_stage came to {before} and comes to {facts['zero_stage']} now")
    if saved["precision"] != facts["precision"]:
        found.append(f"engine.precision came to {saved['precision']} and comes to {facts['precision']} now")
    if saved["tokenizer"] != facts["tokenizer"]:
        found.append("the tokenizer of the data is another")
    return found


def other_manifest(cfg: RunConfig) -> str:
    return f"the manifest of {'data.shards' if cfg.data.shards else 'data.sources'} is another"


# ---- a checkpoint of another run


def branch_point(source: Path, here: World, say: Say) -> Path:
    """The checkpoint that `run.from` names, or the newest whole one of the run that it names. All ranks call it.

    Raises ConfigError where there is none.
    """
    advice = "give the folder of a run, or of one of its checkpoints"
    candidates, problem = here.broadcast(candidates_of(source))
    if problem:
        raise ConfigError(f"run.from = {source} {problem}; {advice}")
    faults = []
    for path in candidates:
        faults = checkpoint.faults_of(path, here)
        if not faults:
            return path
        if path is not candidates[-1]:
            say(f"checkpoint {path} is refused: {faults[0]}; the one before it is tried")
    raise ConfigError(f"run.from: {candidates[-1]} is no whole checkpoint ({faults[0]}); {advice}")


def candidates_of(source: Path) -> tuple[list[Path], str | None]:
    """Where the checkpoint may be, the likeliest first; or what is wrong."""
    if not source.is_dir():
        return [], "is not there"
    folder = source / "checkpoints"
    if not folder.is_dir():
        return [source], None
    found = [folder / name for name in checkpoint.newest_first(folder)]
    return found, None if found else "holds no complete checkpoint"
