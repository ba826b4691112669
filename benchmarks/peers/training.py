"""What the peers' training scripts share: the task, the rows, the clock, the line. Needs numpy and torch alone.

Each script is started by torch.distributed.run as `SCRIPT TASK.json`, trains on rows of T tokens without padding, and
prints one line of JSON from rank 0.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


class Task(SimpleNamespace):
    """The keys of TASK.json, which benchmarks/throughput.py writes."""

    @classmethod
    def read(cls) -> "Task":
        torch.set_num_threads(1)
        task = cls(**json.loads(Path(sys.argv[1]).read_text()))
        assert int(os.environ["WORLD_SIZE"]) == task.ranks
        return task

    @property
    def rank(self) -> int:
        return int(os.environ["RANK"])

    def rows_of_text(self) -> np.ndarray:
        """int64 (N, T): the documents as [CLS] ids [SEP], end to end, cut wherever a row is full.

        The rest is dropped. So does `group_texts` of transformers' run_mlm.py.
        """
        tokens = np.load(Path(self.documents) / "tokens.npy")
        ends = np.cumsum(np.load(Path(self.documents) / "lengths.npy").astype(np.int64))
        marks = np.stack([ends - np.diff(ends, prepend=0), ends], axis=1).flatten()
        joined = np.insert(tokens.astype(np.int64), marks, np.tile([self.cls_id, self.sep_id], len(ends)))
        assert not (joined == self.pad_id).any(), "then not every position would be a token"
        rows = joined[: len(joined) // self.row_tokens * self.row_tokens].reshape(-1, self.row_tokens)
        assert len(rows) >= self.ranks * self.rows, f"the text has {len(rows)} rows, less than one step takes"
        return rows

    def say(self, seconds: float, loss: float, parameters: int, mask_rate: float, libraries: list[str]) -> None:
        """Print the line. seconds: of the steps after the first `warm_steps`."""
        if self.rank:
            return
        tokens = (self.steps - self.warm_steps) * self.ranks * self.rows * self.row_tokens
        said: dict[str, Any] = {
            "tokens_per_second": round(tokens / seconds, 1),
            "step_seconds": round(seconds / (self.steps - self.warm_steps), 4),
            "loss": round(loss, 4),
            "mask_rate": round(mask_rate, 4),
            "parameters": parameters,
            "steps": self.steps,
            "versions": {name: version(name) for name in ("torch", *libraries)},
        }
        print(json.dumps(said), flush=True)


class Clock:
    """Seconds of the steps after the first `warm_steps`, which allocate memory."""

    def __init__(self, task: Task) -> None:
        self.warm_steps, self.steps = task.warm_steps, task.steps
        self.at: dict[int, float] = {}

    def tick(self, step: int) -> None:
        """Call it when `step` steps are done."""
        if step in (self.warm_steps, self.steps):
            self.at[step] = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.at[self.steps] - self.at[self.warm_steps]
