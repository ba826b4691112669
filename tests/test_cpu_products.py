import pytest
import torch
from ranks import on_ranks

from mlm_dist import cpu_products, world
from mlm_dist.cpu_products import is_amd_with_avx512, keeps_fp32, use_faster_library

pytestmark = pytest.mark.usefixtures("usual_precision")


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


@pytest.mark.parametrize("is_amd", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
def test_it_is_the_processor_that_decides(monkeypatch: pytest.MonkeyPatch, is_amd: bool, keeps: bool) -> None:
    monkeypatch.setattr(cpu_products, "is_amd_with_avx512", lambda: is_amd)
    monkeypatch.setattr(cpu_products, "keeps_fp32", lambda: keeps)
    assert use_faster_library() == (is_amd and keeps)
    assert torch.get_float32_matmul_precision() == ("medium" if is_amd and keeps else "highest")


def test_rounded_products_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "is_amd_with_avx512", lambda: True)
    assert keeps_fp32()
    with torch.autocast("cpu", torch.bfloat16):
        assert not keeps_fp32() and not use_faster_library()
    assert torch.get_float32_matmul_precision() == "highest"


def test_ones_own_choice_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "is_amd_with_avx512", lambda: True)
    torch.set_float32_matmul_precision("high")
    assert not use_faster_library() and torch.get_float32_matmul_precision() == "high"


def precision_of_a_rank() -> str:
    with world.join(60):
        return torch.get_float32_matmul_precision()


def test_every_rank_on_a_cpu_multiplies_by_it() -> None:
    expected = "medium" if is_amd_with_avx512() else "highest"
    assert on_ranks(2, precision_of_a_rank) == [expected, expected]
