from collections.abc import Iterator

import pytest
import torch

from mlm_dist import cpu_products
from mlm_dist.cpu_products import keeps_fp32, use_faster_library

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def precision_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_products_are_those_of_float64_by_either_library(library: None, rows: int) -> None:
    x, weight, bias = torch.randn(rows, 24), torch.randn(40, 24), torch.randn(40)
    expected = x.double() @ weight.double().T
    for found, exact in (
        (x @ weight.T, expected),
        (torch.addmm(bias, x, weight.T), expected + bias),
        (x.T.contiguous().T @ weight.T.contiguous(), expected),
        (torch.bmm(x.expand(2, -1, -1), weight.T.expand(2, -1, -1))[1], expected),
        (torch.zeros(rows, 40).addmm_(x, weight.T), expected),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


def test_it_is_the_processor_that_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_amd in (False, True):
        monkeypatch.setattr(cpu_products, "is_amd_with_avx512", lambda is_amd=is_amd: is_amd)
        chosen = use_faster_library(CPU)
        assert chosen <= is_amd and keeps_fp32()
        assert torch.get_float32_matmul_precision() == ("medium" if chosen else "highest")


def test_a_processor_that_would_round_keeps_the_other_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "is_amd_with_avx512", lambda: True)
    with torch.autocast("cpu", torch.bfloat16):  # products are rounded here
        assert not keeps_fp32() and not use_faster_library(CPU)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_gpu_and_a_choice_of_ones_own_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "is_amd_with_avx512", lambda: True)
    assert not use_faster_library(torch.device("cuda")) and torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision("high")
    assert not use_faster_library(CPU) and torch.get_float32_matmul_precision() == "high"
