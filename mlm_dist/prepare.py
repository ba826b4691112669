"""A run on this rank before its first step, wherever it starts from."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlm_dist import assembly, checkpoint, gpu_attention, mixture, models, schema, start, stream, world
from mlm_dist.checkpoint import State
from mlm_dist.config import RunConfig
from mlm_dist.cursor import Progress
from mlm_dist.engine import Engine
from mlm_dist.engine_config import resolve_precision, resolve_stage
from mlm_dist.metrics import Meter
from mlm_dist.mixture import Sources
from mlm_dist.redaction import redact
from mlm_dist.run_folder import write_inputs
from mlm_dist.saver import Saver
from mlm_dist.schema import ConfigError
from mlm_dist.stream import TrainBatches
from mlm_dist.tracker import Tracker
from mlm_dist.vocab import Vocab
from mlm_dist.watchdog import Watchdog
from mlm_dist.world import World


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
    batches: TrainBatches
    bad_shards: dict[str, str] = field(default_factory=dict)  # those of all ranks that were told: label -> reason
    bad_shards_seen: int = 0  # the sum over the ranks of what each has met


def prepare(cfg: RunConfig, folder: Path, here: World, watchdog: Watchdog, stack: ExitStack) -> Run:
    """Build the run on this rank, where it starts from."""
    sources, valid, tokenizer = assembly.open_data(cfg, here.size)
    folders = " and ".join(folder.shards for folder in cfg.data.folders().values())
    if len(set(here.gather(mixture.hash_of(sources)))) > 1:
        raise ConfigError(f"the ranks found different manifests at {folders}; start again when it is settled")
    facts = {
        "manifest": mixture.hash_of(sources),
        "tokenizer": tokenizer.fingerprint,
        "data": mixture.counts(sources),
        "precision": resolve_precision(cfg.engine, here.device),
        "zero_stage": resolve_stage(cfg.engine, here.device).zero_stage,
        "config": redact(schema.to_mapping(cfg)),
        "from": None,
    }
    tracker = Tracker(cfg.log, folder, here.is_main, lambda: state.total_steps)
    begun = start.find(cfg, folder, facts, here, tracker.say)
    saved, state = begun.saved, begun.state

    world.seed_everything(cfg.run.seed)
    transformer = assembly.build_model(cfg, tokenizer, is_trained=saved is not None)
    flops = models.flops_per_token(cfg.model, transformer, tokenizer.size, cfg.batch.seq_len, cfg.masking.rate)
    model = assembly.objective(cfg, transformer, tokenizer)
    if gpu_attention.use_flash_attention_3(here.device):
        tracker.say("attention by FlashAttention-3")
    resharded = saved is not None and checkpoint.needs_resharding(saved, here)
    engine = Engine(model, cfg.engine, cfg.optim, cfg.batch, cfg.masking, cfg.run.seed, here, cfg.deepspeed, resharded)
    if engine.is_compiled:
        tracker.say("the model is compiled as one graph for each shape of batch: the first steps take a while")
    if saved:
        checkpoint.load(saved, engine, here, folder / "checkpoints")
        tracker.say(begun.told)
    if here.is_main:
        tracker.start(state.step, describe(cfg, folder, here, tokenizer, engine, state.facts), begun.own)
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
    more = {name: facts[name] for name in ("manifest", "tokenizer", "precision", "from")}
    more |= {"ranks": here.size, "device": here.device_name}
    return schema.flatten(facts["config"] | write_inputs(folder, engine.json, more, cfg.log.log_diff))
