from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mlm_dist import encoder, gpu_attention
from mlm_dist.encoder import Encoder, EncoderConfig


class Elsewhere:
    """What `usable` looks at of a tensor on a GPU."""

    device = torch.device("cuda")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def test_the_kernels_are_for_half_precision_on_a_gpu_and_heads_they_take() -> None:
    assert not gpu_attention.usable(torch.zeros(1, dtype=torch.bfloat16), 64)
    assert not gpu_attention.usable(Elsewhere(torch.float32), 64)
    for dtype in (torch.float16, torch.bfloat16):
        for width, taken in ((8, True), (64, True), (96, True), (256, True), (4, False), (20, False), (264, False)):
            assert gpu_attention.usable(Elsewhere(dtype), width) == taken


def test_too_many_documents_are_told_on_the_host_with_a_bound_that_holds_them(monkeypatch) -> None:
    model = Encoder(EncoderConfig(layers=1, width=16, heads=2, mlp_width=16, max_documents=3), 64)
    segments = torch.tensor([[1, 2, 3, 4, 5, 6, 6, 0], [1, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.int16)
    assert model.problem_with(segments) is None  # a CPU has no such bound
    monkeypatch.setattr(gpu_attention, "usable", lambda x, head_width: True)
    assert model.problem_with(segments) == (
        "a micro-batch of 2 rows holds 8 documents, and model.encoder.max_documents = 3 allows 6; set it to 8"
    )
    assert model.problem_with(segments[:, 2:]) is None  # 6: on average
    gpu_attention.sequence_bounds(encoder.document_starts(segments[:, 2:]), 6)


def test_more_documents_than_the_static_bound_stop_the_program() -> None:
    starts = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="max_documents"):
        gpu_attention.sequence_bounds(starts, 7)


@pytest.mark.parametrize("half_window", [3, 100])
def test_variable_length_attention_reads_the_bounds_as_the_mask_does(monkeypatch, half_window: int) -> None:
    """The kernel needs CUDA; a plain loop over the sequences stands for it."""

    def loop(q, k, v, bounds_q, bounds_k, longest_q, longest_k, *, window_size):
        outs = [q[:0]]
        for begin, end in zip(bounds_q[:-1].tolist(), bounds_q[1:].tolist(), strict=True):
            assert end - begin <= longest_q
            near = window_size == (-1, -1) or (
                (torch.arange(end - begin)[:, None] - torch.arange(end - begin)).abs() <= window_size[0]
            )
            mask = torch.ones(end - begin, end - begin, dtype=torch.bool) & near
            q1, k1, v1 = (x[begin:end].transpose(0, 1) for x in (q, k, v))
            outs.append(F.scaled_dot_product_attention(q1, k1, v1, mask).transpose(0, 1))
        return torch.cat(outs)

    monkeypatch.setattr(gpu_attention, "varlen_attn", loop)
    q, k, v = torch.randn(3, 2, 20, 4, 8).unbind(0)
    segments = torch.tensor([[1] * 7 + [2] * 9 + [0] * 4, [1] * 20], dtype=torch.int16)
    bounds = gpu_attention.sequence_bounds(encoder.document_starts(segments), 10)
    mask = encoder.attention_mask(segments, 20, half_window, like=q)
    got = gpu_attention.attend(q, k, v, bounds, half_window)
    torch.testing.assert_close(got, encoder.attend_masked(q, k, v, mask))


def test_flash_attention_3_is_left_alone_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not gpu_attention.use_flash_attention_3(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert not gpu_attention.use_flash_attention_3(torch.device("cuda"))  # its package isn't installed


def test_flash_attention_3_that_does_not_load_is_said_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    assert not gpu_attention.use_flash_attention_3(torch.device("cuda"))
    assert "undefined symbol" in caplog.text
