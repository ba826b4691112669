"""A run's parts from its configuration: the data and their tokenizer, the objective, a trained model."""

from dataclasses import replace
from pathlib import Path

import torch

from mlm_dist import checkpoint, masking, mixture, models, remote, stream, vocab
from mlm_dist.cache import make_cache
from mlm_dist.config import RunConfig
from mlm_dist.mixture import Sources
from mlm_dist.mlm import MLM
from mlm_dist.vocab import Vocab


def open_data(cfg: RunConfig, world_size: int) -> tuple[Sources, Sources, Vocab]:
    """Training sources, those with held-out shards, and their tokenizer. Raises ConfigError for a misfit."""
    folders = cfg.data.folders()
    cache = make_cache(cfg.data.cache_dir, cfg.data.cache_gb, cfg.data.fetch_seconds)
    sources = mixture.open_sources(folders, "train", cache)
    root = folders[sources[0].name].shards
    tokenizer = vocab.load(remote.open_tokenizer(remote.join(root, "tokenizer"), cache))
    stream.check(sources, tokenizer, cfg.data, cfg.batch, world_size)
    valid = mixture.open_sources(folders, "valid", cache)
    if valid:
        stream.check_held_out(valid, tokenizer, cfg.data, cfg.batch)
    return sources, valid, tokenizer


def objective(cfg: RunConfig, transformer: torch.nn.Module, tokenizer: Vocab) -> MLM:
    """The MLM wrapper as the configuration states it."""
    return MLM(transformer, **masking.mlm_keywords(cfg.masking, tokenizer))


def build_model(cfg: RunConfig, tokenizer: Vocab, is_trained: bool) -> torch.nn.Module:
    """The bare model. is_trained: its weights will be a checkpoint's, whatever `model.from` has come to since."""
    model = replace(cfg.model, from_=None) if is_trained and cfg.model.kind == "encoder" else cfg.model
    return models.build(model, tokenizer.size, cfg.batch.seq_len, tokenizer, cfg.data.packing)


def load_model(cfg: RunConfig, tokenizer: Vocab, saved: Path) -> MLM:
    """The bare model of a run with a checkpoint's weights, in fp32 on the host."""
    model = objective(cfg, build_model(cfg, tokenizer, is_trained=True), tokenizer)
    model.load_state_dict(checkpoint.full_weights(saved))
    return model
