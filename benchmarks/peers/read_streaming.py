"""MosaicML Streaming: MDS shards, a document a sample, local, in order."""

import streaming
from measure import Task


def main() -> None:
    task = Task()
    documents = task.documents()
    columns = {"tokens": f"ndarray:{documents[0].dtype}"}
    with streaming.MDSWriter(out=str(task.scratch / "mds"), columns=columns) as writer:
        for tokens in documents:
            writer.write({"tokens": tokens})
    stored = streaming.StreamingDataset(local=str(task.scratch / "mds"), shuffle=False, batch_size=task.rows)

    def by_iterator() -> object:
        for sample in stored:
            yield sample["tokens"]

    def by_index() -> object:
        for index in range(len(documents)):
            yield stored[index]["tokens"]

    version = streaming.__version__
    task.run("mosaicml-streaming, iterated", "mosaicml-streaming", version, by_iterator)
    task.run("mosaicml-streaming, by index", "mosaicml-streaming", version, by_index)


if __name__ == "__main__":
    main()
