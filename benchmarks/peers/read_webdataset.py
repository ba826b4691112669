"""webdataset's own pipeline, a document a sample, undecoded."""

import numpy as np
import webdataset as wds
from measure import Task, write_tars


def main() -> None:
    task = Task()
    documents = task.documents()
    dtype, urls = documents[0].dtype, write_tars(documents, task.scratch / "tars")
    pipeline = wds.WebDataset(urls, shardshuffle=False).map(lambda sample: np.frombuffer(sample["bin"], dtype))
    task.run("webdataset, a document a sample", "webdataset", wds.__version__, lambda: pipeline)


if __name__ == "__main__":
    main()
