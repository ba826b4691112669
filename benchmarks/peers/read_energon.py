"""Megatron Energon on WebDataset tars with a document a sample, undecoded, in order, without a shuffle buffer."""

import megatron.energon
import numpy as np
from measure import Task, write_tars
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_val_dataset,
    stateless,
)
from megatron.energon.flavors import BaseWebdatasetFactory

DATASET = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"


@edataclass
class Document(Sample):
    tokens: np.ndarray


class Encoder(DefaultTaskEncoder):
    """Bytes to tokens, and samples end to end: the rows are cut from them afterwards."""

    decoder = None

    def __init__(self, dtype: np.dtype) -> None:
        super().__init__()

        @stateless
        def cook(sample: dict) -> Document:
            return Document(**basic_sample_keys(sample), tokens=np.frombuffer(sample["bin"], dtype))

        self.cookers = [Cooker(cook)]

    def batch(self, samples: list[Document]) -> np.ndarray:
        return np.concatenate([sample.tokens for sample in samples])

    def encode_batch(self, batch: np.ndarray) -> np.ndarray:
        return batch


def main() -> None:
    task = Task()
    documents = task.documents()
    folder = task.scratch / "tars"
    names = [url.rsplit("/", 1)[1] for url in write_tars(documents, folder)]
    BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_ratio=[("val", 1.0)], shuffle_seed=None, workers=1)
    (folder / ".nv-meta" / "dataset.yaml").write_text(DATASET)
    # the held-out reader, since it ends after an epoch: the training reader adds a shuffle to the same path
    dataset = get_val_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=64,
        task_encoder=Encoder(documents[0].dtype),
    )
    loader = get_savable_loader(dataset)

    def epoch() -> object:
        for batch in loader:
            yield np.asarray(batch)

    task.run("megatron-energon", "megatron-energon", megatron.energon.__version__, epoch)


if __name__ == "__main__":
    main()
