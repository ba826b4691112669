import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mlm_dist import shards, vocab
from mlm_dist.cpu_products import is_amd_with_avx512, use_faster_library
from mlm_dist.shards import Record

# before anything imports deepspeed: tests run on the CPU, wherever they run
os.environ.setdefault("DS_ACCELERATOR", "cpu")

WORDS = (
    "the a of heart lung patient was given dose and then showed no court held that law may not apply to code return"
).split()


def toy_documents(count: int, seed: int) -> list[str]:
    """Documents of 5 to 200 words in which words follow each other by rule, so that there is something to learn."""
    rng = random.Random(seed)
    documents = []
    for _ in range(count):
        place = rng.randrange(len(WORDS))
        words = []
        for _ in range(rng.randint(5, 200)):
            words.append(WORDS[place])
            place = (place * 5 + rng.choice((1, 2))) % len(WORDS)
        documents.append(" ".join(words) + ".")
    return documents


def write_toy_split(folder: Path, tokenizer: vocab.Vocab, documents: list[str], count: int) -> None:
    """`count` shards of the documents, a few documents a record."""
    encoded = [np.array(ids, np.uint16) for ids in tokenizer.encode_batch(documents)]
    records = [
        Record(np.concatenate(encoded[i : i + 5]), np.array([len(ids) for ids in encoded[i : i + 5]], np.uint32))
        for i in range(0, len(encoded), 5)
    ]
    shards.write_split(folder, [records[i::count] for i in range(count)], tokenizer.size, tokenizer.fingerprint)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard folder as shards/build.py makes it: tokenizer, 8 training shards, 2 held-out ones; some 60k tokens."""
    folder = tmp_path_factory.mktemp("toy")
    documents = toy_documents(400, seed=1)
    tokenizer = vocab.train(documents, 300)
    tokenizer.save(folder / "tokenizer")
    write_toy_split(folder / "train", tokenizer, documents, 8)
    write_toy_split(folder / "valid", tokenizer, toy_documents(40, seed=2), 2)
    return folder


@pytest.fixture
def usual_precision() -> Iterator[None]:
    """torch's matmul precision as it is in a new process, whatever the test makes of it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=["MKL", "oneDNN"])
def library(request: pytest.FixtureRequest, usual_precision: None) -> None:
    """Products on the CPU by each library that a run may take."""
    if request.param == "oneDNN" and not is_amd_with_avx512():
        pytest.skip("no run takes oneDNN on this processor")
    assert request.param == "MKL" or use_faster_library()
