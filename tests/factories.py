"""Models for `model.factory` that are well, but not as others."""

import shutil
from pathlib import Path

from torch import nn

from mlm_dist.encoder import Encoder, EncoderConfig

SHAPE = EncoderConfig(layers=1, width=32, heads=2, mlp_width=48, max_positions=64)


def half_frozen(vocab_size: int) -> nn.Module:
    """An encoder whose embeddings, and with them its output layer, are not trained."""
    model = Encoder(SHAPE, vocab_size)
    model.model.embeddings.requires_grad_(False)
    return model


def that_deletes(vocab_size: int, folder: str) -> nn.Module:
    """An encoder; while it is made, all checkpoints in a folder lose their weights."""
    for saved in Path(folder).glob("step_*/deepspeed"):
        shutil.rmtree(saved, ignore_errors=True)
    return Encoder(SHAPE, vocab_size)
