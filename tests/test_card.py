import json
import re
from pathlib import Path

import pytest
from launching import ROOT, plain

from mlm_dist import card, config, export, models, vocab
from mlm_dist.checkpoint import State
from mlm_dist.config import RunConfig
from mlm_dist.vocab import Vocab

COUNTS = {"": {"shards": 8, "documents": 1234, "tokens": 50_000}}


@pytest.fixture(scope="module")
def tokenizer() -> Vocab:
    return vocab.train(["the quick brown fox jumps over the lazy dog"] * 3, 300)


def configured(*overrides: str) -> RunConfig:
    return config.load(ROOT / "configs/quickstart.yaml", plain(*overrides))


def state(**more) -> State:
    facts = {"manifest": "a" * 64, "tokenizer": "b" * 64, "precision": "bf16", "data": COUNTS}
    return State(**{"step": 600, "tokens": 75_000, "total_steps": 1300, "train_seconds": 7200.0, "facts": facts} | more)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with what the card reads, evaluated at two steps."""
    folder = tmp_path / "run"
    (folder / "checkpoints/step_00000600").mkdir(parents=True)
    manifest = {"world_size": 8, "zero_stage": 2, "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"}}
    (folder / "checkpoints/step_00000600/manifest.json").write_text(json.dumps(manifest))
    command = ["/home/me/mlm/launch/pretrain.py", "--local_rank=0", "--config", "a b.yaml", "deepspeed.api_key=hidden"]
    (folder / "environment.json").write_text(json.dumps({"command": command, "versions": {"transformers": "5.23.0"}}))
    lines = [{"step": 500, "valid/loss": 3.25, "valid/accuracy": 0.412, "valid/targets": 150, "valid/mask_rate": 0.15}]
    lines += [{"step": 510, "loss": 3.0}, {**lines[0], "step": 1000, "valid/loss": 2.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 10')
    return folder


def told(run: Path, stands: State, cfg: RunConfig) -> dict[str, str | int | None]:
    return card.facts_of_run(run, run / "checkpoints/step_00000600", stands, cfg)


def test_the_facts_are_those_of_the_run(run: Path) -> None:
    facts = told(run, state(valid_loss=3.25, skipped_steps=2), configured("masking.rate_end=0.15", "optim.lr=0.003"))
    assert facts["data"] == "1,234 documents of 50,000 tokens, in 8 shards"
    assert facts["steps"] == "600 of 1,300, of which 2 were skipped"
    assert facts["tokens"] == "75,000, padding not counted: some 1.5 times the data"
    assert "0.3, falling to 0.15, of the tokens (policy `token`)" in facts["objective"]
    assert facts["optimizer"].startswith("adamw: learning rate 0.003, betas 0.9 and 0.999,")
    assert facts["schedule"].startswith("50 steps of linear warm-up, constant, then falling as 1 - sqrt")
    assert (facts["precision"], facts["ranks"]) == ("bf16", "8, ZeRO stage 2")
    assert facts["time"] == "2 hours of training steps"
    assert "torch 2.13.0, deepspeed 0.19.8, transformers 5.23.0" in facts["software"]
    assert facts["weights at the start"] == "random"
    first = {"run": "short", "step": 4000, "tokens": 9_000_000, "is_phase": True, "from": None}
    origin = {"run": "long", "step": 200, "tokens": 1_000_000, "is_phase": False, "from": first}
    assert card.about_start(origin, configured().model) == (
        "those of `long` at step 200, after 1,000,000 tokens that count here too; there at the start: "
        "those of `short` at step 4,000, after 9,000,000 tokens; there at the start: random"
    )
    assert "  lr: 0.003" in facts["configuration"]


def test_what_muon_does_with_hidden_matrices_is_told(run: Path) -> None:
    facts = told(run, state(), configured("optim.name=muon", "optim.muon.lr_factor=2", "optim.muon.momentum=0.9"))
    assert facts["optimizer"].startswith("muon: learning rate 0.003, betas")
    text = "clipped at 1; hidden matrices: 2 times the learning rate, momentum 0.9, 5 Newton-Schulz steps"
    assert facts["optimizer"].endswith(text)


def test_a_batch_that_grew_and_a_decay_in_steps_are_told(run: Path) -> None:
    grown = ("batch.warmup_rows=4", "batch.warmup_tokens=100000", "schedule.decay_steps=1000")
    facts = told(run, state(), configured(*grown, "schedule.decay_shape=linear"))
    assert facts["batch"] == "16 rows, 2,048 positions, growing from 4 rows over the first 100,000 positions"
    assert "constant, then falling linearly over the last 1,000 steps to 0 of the peak" in facts["schedule"]


def test_the_held_out_loss_is_that_of_the_last_evaluation_and_says_its_step(run: Path) -> None:
    facts = told(run, state(valid_loss=3.25), configured())
    assert facts["held-out loss"] == "3.2500 at step 500 (perplexity 25.79)"
    assert facts["held-out accuracy"] == "41.2 %"
    assert facts["held-out text"] == "150 tokens predicted, of 1,000"
    (run / "metrics.jsonl").unlink()
    facts = told(run, state(valid_loss=3.25), configured())
    assert facts["held-out loss"] == "3.2500 (perplexity 25.79)" and "held-out text" not in facts
    assert told(run, state(), configured())["held-out loss"] == "not evaluated"


def test_sources_are_told_with_their_shares(run: Path) -> None:
    counts = {name: {"shards": 2, "documents": 10, "tokens": 100} for name in ("law", "web")}
    sources = (
        "data.shards=null",
        "data.sources.law.shards=a",
        "data.sources.web.shards=b",
        "data.sources.law.weight=3",
    )
    facts = told(run, state(facts=state().facts | {"data": counts}), configured(*sources))
    assert facts["data, law"] == "0.75 of the rows: 10 documents of 100 tokens, in 2 shards"
    assert facts["data, web"].startswith("0.25 of the rows") and "times the data" not in facts["tokens"]


def test_nothing_secret_is_published(run: Path) -> None:
    secret = ("data.shards=https://me:hidden@host/shards?sig=hidden", "deepspeed.api_key=hidden")
    facts = told(run, state(), configured(*secret, "model.from=/home/me/models/some-bert", "model.kind=encoder"))
    assert "hidden" not in json.dumps(facts)
    assert "shards: https://host/shards" in facts["configuration"]
    assert facts["command"] == "launch/pretrain.py \\\n    --config 'a b.yaml' \\\n    'deepspeed.api_key=[redacted]'"
    assert facts["weights at the start"] == "`some-bert`"


def test_what_an_older_checkpoint_does_not_tell_is_left_out(run: Path) -> None:
    (run / "environment.json").unlink()
    facts = told(run, state(facts={name: fact for name, fact in state().facts.items() if name != "data"}), configured())
    assert "data" not in facts and facts["command"] is None and facts["tokens"] == "75,000, padding not counted"


def test_the_card_shows_them_and_its_snippet_runs(run: Path, tokenizer: Vocab, tmp_path: Path, capsys) -> None:
    cfg = configured("model.encoder.width=32", "model.encoder.layers=1", "model.encoder.mlp_width=48")
    facts = told(run, state(valid_loss=3.25), cfg) | {"license": "mit", "odd": "a|b", "fence": "```\nx\n```"}
    model = models.build(cfg.model, tokenizer.size, 128, tokenizer).eval()
    export.write(tmp_path / "encoder", model, cfg.model, tokenizer, facts)
    text = (tmp_path / "encoder/README.md").read_text()
    assert "\n# encoder\n" in text and '\nlicense: "mit"\n' in text
    assert "| held-out loss | 3.2500 at step 500 (perplexity 25.79) |\n" in text and "| odd | a\\|b |" in text
    assert "<summary>configuration</summary>\n\n```\nrun:\n" in text and "````\n```\nx\n```\n````" in text
    table = text.split("|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in table)

    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    capsys.readouterr()
    exec(snippet.replace("path/to/this/folder", str(tmp_path / "encoder")), {})
    scores = re.findall(r" ([\d.e-]+)$", capsys.readouterr().out, re.MULTILINE)  # the tokens may be line breaks
    assert len(scores) == 5 and all(0 < float(score) < 1 for score in scores)
