"""The model card: what a model is and how it was trained, from what its run left.

It is made to be published: no secrets, and no paths but those that the configuration names.
"""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mlm_dist import schema
from mlm_dist.batch_size import BatchConfig
from mlm_dist.checkpoint import State
from mlm_dist.config import RunConfig
from mlm_dist.masking import MaskingConfig
from mlm_dist.models import ModelConfig, count_parameters
from mlm_dist.optim import OptimConfig
from mlm_dist.redaction import redact, redact_text
from mlm_dist.schedule import ScheduleConfig
from mlm_dist.vocab import Vocab
from mlm_dist.yaml_tree import dump

# facts that Hugging Face reads from the head of a card
METADATA = ("license", "language", "datasets")

CARD = """\
---
{metadata}
---

# {name}

A masked language model of {parameters:,} parameters ({architecture}), pretrained with mlm_dist.

## Use

{usage}
## How it was trained

{training}
"""
DECAY_NAMES = {"sqrt": "as 1 - sqrt", "linear": "linearly"}
USAGE = """\
```python
from transformers import pipeline

fill = pipeline("fill-mask", model="path/to/this/folder")
for guess in fill("Paris is the {mask} of France."):
    print(guess["token_str"], guess["score"])
```
"""
USAGE_OF_FACTORY = """\
The model was made by a Python function, `{factory}`, which no `config.json` describes: `AutoModelForMaskedLM` can't
load this folder. Make the model with the function and read the weights with `safetensors.torch.load_model`; the
tokenizer loads with `AutoTokenizer`.
"""


def write(name: str, saved: nn.Module, config: ModelConfig, vocab: Vocab, facts: Mapping[str, Any]) -> str:
    """The text of a card. `facts` become rows of a table; of several lines, blocks to unfold; None is left out."""
    factory = config.kind == "factory"
    metadata = {} if factory else {"library_name": "transformers", "pipeline_tag": "fill-mask"}
    metadata |= {key: facts[key] for key in METADATA if facts.get(key) is not None}
    told = {key: value for key, value in facts.items() if key not in METADATA and value is not None}
    blocks = {key: value for key, value in told.items() if isinstance(value, str) and "\n" in value}
    rows = {"vocabulary": vocab.size} | {key: value for key, value in told.items() if key not in blocks}
    training = ["| | |", "|---|---|", *(f"| {key} | {cell(value)} |" for key, value in rows.items())]
    training += [folded(key, value) for key, value in blocks.items()]
    return CARD.format(
        metadata="\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in metadata.items()),
        name=name,
        parameters=count_parameters(saved),
        architecture=type(saved).__name__,
        usage=(USAGE_OF_FACTORY if factory else USAGE).format(mask=vocab.roles()["mask"], factory=config.factory),
        training="\n".join(training),
    )


def cell(value: object) -> str:
    text = f"{value:,}" if type(value) is int else str(value)
    return text.replace("|", "\\|")


def folded(title: str, text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"\n<details>\n<summary>{title}</summary>\n\n{fence}\n{text.rstrip()}\n{fence}\n\n</details>"


# ---- what a run left


def facts_of_run(run: Path, saved: Path, state: State, cfg: RunConfig) -> dict[str, str | int | None]:
    """How the weights of a checkpoint came to be, row by row.

    run, saved: the run folder and its checkpoint; state, cfg: what the checkpoint holds
    """
    manifest = json.loads((saved / "manifest.json").read_text())
    environment = read_json(run / "environment.json")
    versions = manifest["versions"] | environment.get("versions", {})
    length = f"{state.step:,}" + (f" of {state.total_steps:,}" if (state.total_steps or 0) > state.step else "")
    packed = "several documents a row, which don't see each other"
    packing = {"best_fit": packed, "pad": "one document a row, and padding"}[cfg.data.packing]
    rows, seq_len = cfg.batch.global_rows, cfg.batch.seq_len
    return {
        "tokenizer": f"sha256 `{state.facts['tokenizer'][:16]}`",
        "weights at the start": about_start(state.facts.get("from"), cfg.model),
        **about_data(state, cfg),
        "steps": length + (f", of which {state.skipped_steps:,} were skipped" if state.skipped_steps else ""),
        "tokens": f"{state.tokens:,}, padding not counted" + passes(state),
        "sequence length": f"{seq_len:,} ({packing})",
        "batch": f"{rows:,} rows, {rows * seq_len:,} positions" + growth(cfg.batch),
        "objective": about_masking(cfg.masking),
        "optimizer": about_optimizer(cfg.optim, cfg.engine.clip),
        "schedule": about_schedule(cfg.schedule),
        "precision": state.facts["precision"],
        "ranks": f"{manifest['world_size']}, ZeRO stage {manifest['zero_stage']}",
        "time": f"{state.train_seconds / 3600:.2g} hours of training steps",
        **about_held_out(run, state, cfg),
        "software": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "command": command(environment.get("command", [])),
        "configuration": dump(redact(schema.to_mapping(cfg))),
    }


def about_start(origin: Mapping[str, Any] | None, model: ModelConfig) -> str:
    """Where the weights came from, back to the first run. origin: the run that this one started from, if any."""
    if origin is None:
        return f"`{Path(model.from_).name}`" if model.from_ else "random"
    counted = "" if origin["is_phase"] else " that count here too"
    before = about_start(origin["from"], model)
    return (
        f"those of `{origin['run']}` at step {origin['step']:,}, after {origin['tokens']:,} tokens{counted}; "
        f"there at the start: {before}"
    )


def about_data(state: State, cfg: RunConfig) -> dict[str, str]:
    """The shards by source, and the hash that tells them from any others."""
    counts, sources = state.facts.get("data", {}), cfg.data.folders()
    weights = sum(source.weight for source in sources.values())
    rows = {}
    for name, count in counts.items():
        share = f"{sources[name].weight / weights:.3g} of the rows: " if len(counts) > 1 else ""
        rows[f"data, {name}" if name else "data"] = (
            f"{share}{count['documents']:,} documents of {count['tokens']:,} tokens, in {count['shards']:,} shards"
        )
    return rows | {"manifest of the data": f"sha256 `{state.facts['manifest']}`"}


def passes(state: State) -> str:
    """How often the data were read, where they have one source; special tokens are in one count alone."""
    counts = list(state.facts.get("data", {}).values())
    return f": some {state.tokens / counts[0]['tokens']:.2g} times the data" if len(counts) == 1 else ""


def growth(config: BatchConfig) -> str:
    """What to add where the batch was smaller at first."""
    if config.warmup_rows is None:
        return ""
    return f", growing from {config.warmup_rows:,} rows over the first {config.warmup_tokens:,} positions"


def about_masking(config: MaskingConfig) -> str:
    rate = f"{config.rate:.3g}" + (f", falling to {config.rate_end:.3g}," if config.rate_end is not None else "")
    return (
        f"masked language modelling, {rate} of the tokens (policy `{config.policy}`): of these {config.mask:.3g} "
        f"masked, {config.random:.3g} replaced at random, {config.keep:.3g} kept"
    )


def about_optimizer(config: OptimConfig, clip: float) -> str:
    text = (
        f"{config.name}: learning rate {config.lr:.3g}, betas {config.beta1:.3g} and {config.beta2:.3g}, epsilon "
        f"{config.eps:.3g}, weight decay {config.weight_decay:.3g}, "
        + (f"gradients clipped at {clip:.3g}" if clip else "no clipping")
    )
    if config.name != "muon":
        return text
    muon = config.muon
    factor = f"{muon.lr_factor:.3g} times the learning rate, " if muon.lr_factor != 1 else ""
    return f"{text}; hidden matrices: {factor}momentum {muon.momentum:.3g}, {muon.ns_steps} Newton-Schulz steps"


def about_schedule(config: ScheduleConfig) -> str:
    decay = f"{config.decay_steps:,} steps" if config.decay_steps else f"{config.decay_fraction:.3g} of the run"
    shape = {
        "wsd": f"constant, then falling {DECAY_NAMES[config.decay_shape]} over the last {decay}",
        "cosine": "falling as a cosine",
        "linear": "falling linearly",
        "constant": "constant",
    }[config.name]
    end = "" if config.name == "constant" else f" to {config.final:.3g} of the peak"
    return f"{config.warmup_steps:,} steps of linear warm-up, {shape}{end}"


def about_held_out(run: Path, state: State, cfg: RunConfig) -> dict[str, str]:
    """The last evaluation up to the checkpoint, which may be of an earlier step."""
    if state.valid_loss is None:
        return {"held-out loss": "not evaluated"}
    found = last_evaluation(run, state)
    at = f" at step {found['step']:,}" if found else ""
    rows = {
        "held-out loss": f"{state.valid_loss:.4f}{at} (perplexity {math.exp(min(state.valid_loss, 700.0)):,.2f})",
        "held-out masks": f"{cfg.evaluate.rate:.3g} of the tokens, the same at every evaluation",
    }
    if found:
        read = found["valid/targets"] / found["valid/mask_rate"]
        rows["held-out accuracy"] = f"{100 * found['valid/accuracy']:.1f} %"
        rows["held-out text"] = f"{found['valid/targets']:,.0f} tokens predicted, of {read:,.0f}"
    return rows


def last_evaluation(run: Path, state: State) -> dict[str, Any] | None:
    """The line of metrics.jsonl that the state's held-out loss came from, where the file is still there."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # a killed run may leave half a line
            continue
        if record.get("valid/loss") == state.valid_loss and record["step"] <= state.step:
            return record
    return None


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def command(arguments: list[str]) -> str | None:
    """The command line of the run's last launch, a line for each option."""
    if not arguments:
        return None
    parts = [f"launch/{Path(arguments[0]).name}"]
    for argument in arguments[1:]:
        if argument.startswith("--local"):  # the launcher's own
            continue
        shown = shlex.quote(redact_text(argument))
        if parts[-1].startswith("--") and " " not in parts[-1]:
            parts[-1] += f" {shown}"
        else:
            parts.append(shown)
    return " \\\n    ".join(parts)
