"""What the peers' scripts share: the documents, the usual packing, the clock. Needs numpy and torch alone.

Each script is called as `python SCRIPT DOCUMENTS SCRATCH SECONDS T B`: it writes the documents of the folder DOCUMENTS
in its own form to SCRATCH, reads them in whole epochs for about SECONDS, and prints one line of JSON for each way of
reading.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

DOCUMENTS_PER_FILE = 512


class Task:
    """The command line."""

    def __init__(self) -> None:
        folder, scratch, seconds, row_tokens, rows = sys.argv[1:]
        self.folder, self.scratch, self.seconds = Path(folder), Path(scratch), float(seconds)
        self.row_tokens, self.rows = int(row_tokens), int(rows)
        self.scratch.mkdir(parents=True)
        torch.set_num_threads(1)

    def documents(self) -> list[np.ndarray]:
        """The tokens of each document, uint16 or uint32."""
        tokens, lengths = np.load(self.folder / "tokens.npy"), np.load(self.folder / "lengths.npy")
        return np.split(tokens, np.cumsum(lengths)[:-1])

    def run(self, name: str, library: str, version: str, epoch: Callable[[], Iterable[np.ndarray]]) -> None:
        """Measure one way of reading. epoch: begins an epoch; yields the tokens of a document, or of several."""
        self.run_packed(
            f"{name}, end to end",
            library,
            version,
            lambda: (batch.numel() for batch in concatenated(epoch(), self.row_tokens, self.rows)),
        )

    def run_packed(self, name: str, library: str, version: str, epoch: Callable[[], Iterable[int]]) -> None:
        """Measure one way of reading and packing. epoch: makes the batches of an epoch; yields the tokens of each."""
        expected = sum(map(len, self.documents()))
        rates = []
        began = time.perf_counter()
        while len(rates) < 4 or time.perf_counter() - began < self.seconds:
            started = time.process_time()
            tokens = sum(epoch())
            rates.append(tokens / (time.process_time() - started))
            assert 0 <= expected - tokens < self.row_tokens * self.rows, f"{tokens} of {expected} tokens were read"
        result = {"name": name, "tokens_per_second": round(statistics.median(rates[1:])), "epochs": len(rates) - 1}
        print(json.dumps(result | {"versions": {library: version, "torch": torch.__version__}}), flush=True)


def concatenated(parts: Iterable[np.ndarray], row_tokens: int, rows: int) -> Iterator[torch.Tensor]:
    """The usual packing: tokens end to end, cut in rows wherever a row is full. The rest of an epoch is dropped."""
    size = row_tokens * rows
    waiting: list[np.ndarray] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += len(part)
        if count >= size:
            tokens = np.concatenate(waiting)
            whole = count // size * size
            for first in range(0, whole, size):
                yield torch.from_numpy(tokens[first : first + size].reshape(rows, row_tokens).astype(np.int32))
            waiting, count = [tokens[whole:]], count - whole


def write_tars(documents: list[np.ndarray], folder: Path) -> list[str]:
    """WebDataset tars with a document a sample, `NNNNNNNN.bin` -> their paths."""
    import webdataset as wds

    folder.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(str(folder / "%06d.tar"), maxcount=DOCUMENTS_PER_FILE, verbose=0) as writer:
        for index, tokens in enumerate(documents):
            writer.write({"__key__": f"{index:08d}", "bin": tokens.tobytes()})
    return [str(path) for path in sorted(folder.glob("*.tar"))]
