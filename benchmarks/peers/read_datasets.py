"""Hugging Face datasets: Arrow on disk, memory mapped, read with `to_iterable_dataset`, in the ways it offers."""

import logging

import datasets
import numpy as np
from measure import Task

# Of the ways, "table" is the fastest by far, and the one that leaves most to the user: it hands over Arrow's columns.
BATCH = 256


def main() -> None:
    task = Task()
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    documents = task.documents()
    features = datasets.Features({"tokens": datasets.List(datasets.Value(str(documents[0].dtype)))})
    made = datasets.Dataset.from_generator(
        lambda: ({"tokens": tokens} for tokens in documents), features=features, cache_dir=str(task.scratch / "cache")
    )
    made.save_to_disk(task.scratch / "arrow")
    stored = datasets.load_from_disk(str(task.scratch / "arrow"))
    streamed = stored.to_iterable_dataset()
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


if __name__ == "__main__":
    main()
