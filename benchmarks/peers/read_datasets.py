"""Hugging Face datasets: Arrow on disk, memory mapped, read with `to_iterable_dataset`, in the ways it offers.

Packed as Hugging Face packs: by `trl.pack_dataset`, whose "bfd_split" is the packing of mlm_dist (best fit decreasing,
long documents in pieces, the pieces of a row numbered), on documents that have their [CLS] and [SEP] in the file.
"""

import logging
from collections.abc import Iterable, Iterator

import datasets
import numpy as np
import pyarrow
import torch
import trl
from measure import Task

# Of the ways, "table" is the fastest by far, and the one that leaves most to the user: it hands over Arrow's columns.
BATCH = 256
CLS, SEP, PAD = 2, 3, 0


def batches(tables: Iterable[pyarrow.Table], row_tokens: int, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The packed rows of Arrow tables -> ids (B, T) int32 and the numbers of the pieces (B, T) int16, 0 = padding."""
    waiting_ids, waiting_numbers = np.empty((0, row_tokens), np.int32), np.empty((0, row_tokens), np.int16)
    for table in tables:
        tokens, pieces = table["tokens"].combine_chunks(), table["seq_lengths"].combine_chunks()
        lengths, counts = np.diff(tokens.offsets.to_numpy()), np.diff(pieces.offsets.to_numpy())
        filled = np.arange(row_tokens) < lengths[:, None]
        ids = np.full(filled.shape, PAD, np.int32)
        ids[filled] = tokens.flatten().to_numpy()
        numbers = np.zeros(filled.shape, np.int16)
        in_row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + 1
        numbers[filled] = np.repeat(in_row, pieces.flatten().to_numpy())
        ids, numbers = np.concatenate([waiting_ids, ids]), np.concatenate([waiting_numbers, numbers])
        whole = len(ids) // rows * rows
        for first in range(0, whole, rows):
            yield torch.from_numpy(ids[first : first + rows]), torch.from_numpy(numbers[first : first + rows])
        waiting_ids, waiting_numbers = ids[whole:], numbers[whole:]
    yield torch.from_numpy(waiting_ids), torch.from_numpy(waiting_numbers)


def store(task: Task, documents: Iterable[np.ndarray], name: str) -> datasets.IterableDataset:
    """Documents as Arrow on disk, to be streamed."""
    features = datasets.Features({"tokens": datasets.List(datasets.Value("uint16"))})
    made = datasets.Dataset.from_generator(
        lambda: ({"tokens": tokens} for tokens in documents), features=features, cache_dir=str(task.scratch / "cache")
    )
    made.save_to_disk(task.scratch / name)
    return datasets.load_from_disk(str(task.scratch / name)).to_iterable_dataset()


def main() -> None:
    task = Task()
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    documents = task.documents()
    streamed = store(task, documents, "plain")
    as_numpy, as_arrow = streamed.with_format("numpy"), streamed.with_format("arrow")

    def by_batch() -> object:
        for batch in as_numpy.iter(batch_size=BATCH):
            yield from batch["tokens"]

    def by_table() -> object:
        for table in as_arrow.iter(batch_size=BATCH):
            for chunk in table["tokens"].chunks:
                yield chunk.flatten().to_numpy()

    def by_document() -> object:
        for sample in as_numpy:
            yield np.asarray(sample["tokens"])

    ways = {"a document at a time": by_document, "numpy batches": by_batch, "Arrow tables": by_table}
    for way, epoch in ways.items():
        task.run(f"datasets, {way}", "datasets", datasets.__version__, epoch)

    marked = store(task, [np.concatenate([[CLS], tokens, [SEP]]) for tokens in documents], "marked")
    packed = trl.pack_dataset(marked, seq_length=task.row_tokens, strategy="bfd_split").with_format("arrow")

    def by_row() -> Iterator[int]:
        yield -2 * len(documents)  # [CLS] and [SEP] are no tokens of the text
        for _, numbers in batches(packed.iter(batch_size=BATCH), task.row_tokens, task.rows):
            yield int(numbers.count_nonzero())

    task.run_packed("datasets and trl, packed", "trl", trl.__version__, by_row)


if __name__ == "__main__":
    main()
