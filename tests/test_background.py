"""What is copied to the host is the same and shares nothing; a task that fails on one rank fails on all."""

import io
import threading
from collections import OrderedDict

import pytest
import torch
from ranks import on_ranks

from mlm_dist import world
from mlm_dist.background import Background, TaskError, copy_to_host


def tree() -> dict:
    """As an optimizer's state and a model's weights: views of one buffer, tied weights, an empty one, plain values."""
    flat = torch.arange(100.0)
    weights = OrderedDict(a=flat[:60].view(6, 10), b=flat[60:], tied=flat[:60].view(6, 10), column=flat[3::10])
    weights._metadata = {"version": 1}
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(5, dtype=torch.bfloat16)}}
    return {"module": weights, "groups": [{"lr": 0.1, "params": [0]}], "state": state, "none": torch.empty(0)}


def tensors(item: object) -> list[torch.Tensor]:
    if isinstance(item, torch.Tensor):
        return [item]
    values = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return [tensor for value in values for tensor in tensors(value)]


def saved(item: object) -> bytes:
    file = io.BytesIO()
    torch.save(item, file)
    return file.getvalue()


def test_a_copy_makes_the_same_file() -> None:
    item = tree()
    copy = copy_to_host(item)
    assert len(saved(copy)) == len(saved(item))
    assert copy["module"]._metadata == {"version": 1} and type(copy["module"]) is OrderedDict
    assert copy["groups"] == item["groups"]
    for one, other in zip(tensors(item), tensors(copy), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype and one.stride() == other.stride()


def test_a_copy_shares_nothing_with_what_was_copied() -> None:
    item, expected = tree(), tree()
    copy = copy_to_host(item)
    for tensor in tensors(item):
        tensor.fill_(-1)
    item["groups"][0]["lr"] = 5
    item["module"].clear()
    assert all(torch.equal(one, other) for one, other in zip(tensors(copy), tensors(expected), strict=True))
    assert copy["groups"] == expected["groups"]


def test_what_is_shared_stays_shared() -> None:
    weights = copy_to_host(tree())["module"]
    weights["tied"][0, 3] = -7
    assert weights["a"][0, 3] == weights["column"][0] == -7


def test_a_view_of_part_of_a_buffer_costs_what_torch_save_would_write() -> None:
    part = torch.arange(1000.0)[10:20]
    assert len(saved(copy_to_host(part))) == len(saved(part))


def tasks(beside: bool) -> list:
    """Two tasks: one that both ranks can do, one that rank 1 cannot; rank 0 is slower."""
    with world.join(60) as here:
        background, may_go_on = Background(here, beside), threading.Event()
        if not beside or here.rank:
            may_go_on.set()
        background.start(lambda: may_go_on.wait() and here.rank)
        seen = [background.finished()] if not here.rank else []
        may_go_on.set()
        seen += [background.collect(), background.finished(), background.failed()]

        def fail() -> None:
            if here.rank == 1:
                raise OSError(28, "No space left on device")

        background.start(fail)
        try:
            background.collect()
        except TaskError as error:
            seen.append(str(error))
        background.close()
        return [*seen, background.failed()]


@pytest.mark.parametrize("beside", [True, False])
def test_what_fails_on_one_rank_fails_on_all(beside: bool) -> None:
    said = "[Errno 28] No space left on device (rank 1)"
    assert on_ranks(2, tasks, beside) == [
        [not beside, [0, 1], True, False, said, False],
        [[0, 1], True, False, said, True],
    ]
