import pytest
import torch

from mlm_dist import cpu_products
from mlm_dist.cpu_products import product, product_plus, weight_gradient


@pytest.fixture(params=[False, True], autouse=True)
def library(request, monkeypatch) -> None:
    monkeypatch.setattr(cpu_products, "BY_ONEDNN", request.param)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_products_are_those_of_float64(rows: int) -> None:
    x, weight, other, bias = torch.randn(rows, 24), torch.randn(40, 24), torch.randn(rows, 40), torch.randn(40)
    expected = x.double() @ weight.double().T
    for found, exact in (
        (product(x, weight), expected),
        (product(x, weight, bias), expected + bias),
        (product(x.T.contiguous().T, weight.T.contiguous().T), expected),
        (product_plus(x, weight, other), expected + other),
    ):
        assert found.dtype == torch.float32 and found.is_contiguous()
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 3, 64])
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 24), (24, 40), (24, 24)])
def test_gradients_of_weights_are_those_of_float64_whichever_side_is_longer(
    rows: int, outputs: int, inputs: int
) -> None:
    gradient, x = torch.randn(rows, outputs), torch.randn(rows, inputs)
    found = weight_gradient(gradient, x)
    assert found.dtype == torch.float32 and (found.is_contiguous() or found.T.is_contiguous())
    torch.testing.assert_close(found.double(), gradient.double().T @ x.double(), rtol=0, atol=1e-5)


def test_other_tensors_stay_what_they_were() -> None:
    tensors = torch.randn(4, 8), torch.randn(8, 8), torch.randn(4, 8)
    before = [tensor.clone() for tensor in tensors]
    x, weight, other = tensors
    product_plus(x, weight, other).zero_()
    weight_gradient(other, x).zero_()
    assert all(map(torch.equal, tensors, before))
