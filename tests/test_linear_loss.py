import pytest
import torch
import torch.nn.functional as F

from mlm_dist import linear_loss
from mlm_dist.linear_loss import linear_cross_entropy
from mlm_dist.masking import IGNORED_LABEL

VOCAB, ROWS_TOGETHER = 70, 8


def operands(rows: int, ignored: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (rows, VOCAB))
    bias = torch.randn(VOCAB, generator=generator).requires_grad_()
    labels = torch.randint(VOCAB, (rows,), generator=generator)
    labels[torch.randperm(rows, generator=generator)[:ignored]] = IGNORED_LABEL
    return x, weight, bias, labels


@pytest.mark.parametrize(
    ("rows", "ignored"),
    [(1, 0), (ROWS_TOGETHER, 5), (2 * ROWS_TOGETHER + 1, 10), (ROWS_TOGETHER + 9, ROWS_TOGETHER + 9), (0, 0)],
)
def test_loss_and_gradients_are_those_of_the_logits(monkeypatch, rows: int, ignored: int) -> None:
    monkeypatch.setattr(linear_loss, "LOGITS_TOGETHER", ROWS_TOGETHER * VOCAB)
    *leaves, labels = operands(rows, ignored)
    loss, correct = linear_cross_entropy(*leaves, labels, IGNORED_LABEL)
    logits = F.linear(*leaves)
    plain = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    assert correct == (logits.argmax(dim=1) == labels).sum()
    torch.testing.assert_close(loss, plain)
    found, expected = (torch.autograd.grad(3 * sum_, leaves, retain_graph=True) for sum_ in (loss, plain))
    torch.testing.assert_close(found, expected)
    again = torch.autograd.grad(3 * loss, leaves)
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True)), "a second backward pass"


def test_a_large_logit_overflows_nothing() -> None:
    x, weight = torch.tensor([[300.0], [300.0]]), torch.tensor([[1.0], [-1.0], [0.5]])
    x.requires_grad_()
    loss, correct = linear_cross_entropy(x, weight, torch.zeros(3), torch.tensor([0, 1]), IGNORED_LABEL)
    loss.backward()
    assert loss == 600 and correct == 1 and x.grad.isfinite().all()


def test_a_logit_that_is_not_a_number_shows() -> None:
    *leaves, labels = operands(4, 0)
    with torch.no_grad():
        leaves[0][2, 3] = torch.nan
    assert linear_cross_entropy(*leaves, labels, IGNORED_LABEL)[0].isnan()


def test_an_ignored_row_changes_nothing_whatever_it_is() -> None:
    *leaves, labels = operands(6, 2)
    expected = torch.autograd.grad(linear_cross_entropy(*leaves, labels, IGNORED_LABEL)[0], leaves)
    with torch.no_grad():
        leaves[0][labels == IGNORED_LABEL] = torch.nan
    loss, _ = linear_cross_entropy(*leaves, labels, IGNORED_LABEL)
    assert loss.isfinite()
    assert all(map(torch.equal, torch.autograd.grad(loss, leaves), expected))
