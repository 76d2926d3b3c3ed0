"""Functions that look at values are captured in a form that torch.export traces, and raise as torch's do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import thresher
from helpers.modules import Function
from thresher.errors import CaptureError, OperatorError
from thresher.frontend.capture import capture

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(4, 6, generator=GENERATOR)
SCORES = torch.randn(8, 2, 5, generator=GENERATOR).log_softmax(-1)
TARGETS = torch.randint(1, 5, (2, 3), generator=GENERATOR)

FUNCTIONS: dict[str, tuple[Callable, tuple[Tensor, ...]]] = {
    "equal": (lambda a, b: (torch.equal(a, b), a.equal(a), torch.equal(a, b[1:])), (X, X + 1)),
    "allclose": (lambda a, b: (torch.allclose(a, b, atol=1e-3), a.allclose(b, rtol=1.0), a + b), (X, X + 1e-4)),
    "cov": (lambda x: (torch.cov(x), x.cov(correction=0), torch.cov(x[0]), torch.cov(x[0, 0])), (X,)),
    "cov of one observation": (lambda x: torch.cov(x[:, :1]), (X,)),
    "weighted cov": (lambda x, f, a: torch.cov(x, fweights=f, aweights=a), (X, torch.arange(6), torch.rand(6))),
    "whole cov": (lambda x, f: torch.cov(x[:1], fweights=f), (X.mul(9).long(), torch.arange(6))),
    "corrcoef": (lambda x: (torch.corrcoef(x), x[0].corrcoef()), (X,)),
    "complex corrcoef": (torch.corrcoef, (torch.complex(X, X.flip(0)),)),
    "ctc_loss": (
        lambda s, t: (F.ctc_loss(s, t, (8, 7), (3, 2)), F.ctc_loss(s, t, (8, 7), (3, 2), reduction="none")),
        (SCORES, TARGETS),
    ),
    "ctc_loss of one": (lambda s, t, n: F.ctc_loss(s[:, 0], t[0, :2], n, n // 3), (SCORES, TARGETS, torch.tensor([8]))),
    "gaussian_nll_loss": (
        lambda x, t: (F.gaussian_nll_loss(x, t, t * t), F.gaussian_nll_loss(x, t, t[:, :1] ** 2, reduction="none")),
        (X, X + 1),
    ),
    "gaussian_nll_loss of a number": (
        lambda x, t: F.gaussian_nll_loss(x, t, 0.5, full=True, reduction="sum"),
        (X, X + 1),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_forms_compute_the_same(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    model = thresher.compile(Function(function).eval(), inputs, target="cpu")
    others = tuple(x.flip(-1) * 1 if x.is_floating_point() else x for x in inputs)
    for values in (inputs, others):
        torch.testing.assert_close(model(*values), function(*values), equal_nan=True)


def test_a_truth_value_is_a_result() -> None:
    model = thresher.compile(Function(torch.equal).eval(), (X, X), target="cpu")
    assert model(X, X) is True and model(X, X + 1) is False


def test_the_check_is_not_dropped() -> None:
    loss = Function(F.gaussian_nll_loss).eval()
    model = thresher.compile(loss, (X, X, X.abs()), target="cpu")
    with pytest.raises(OperatorError, match=r"gaussian_nll_loss.*var has negative entry"):
        model(X, X, -X.abs())


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda x: torch.linalg.lstsq(x, x)[0],
            "the sizes of what aten.linalg_lstsq.default returns depend on the values",
        ),
        (lambda x: x if torch.equal(x, x) else -x, "aten.equal.default returns a number or a truth value"),
        (lambda x: -x if x.sum() > 0 else x, "it decides something by the values of tensors"),
        (lambda x: torch.combinations(x[0]), "a size that the values of tensors decide is not one of its results"),
        (
            lambda x: F.embedding_bag(x.long(), x, max_norm=x.sum().item()),
            r"it decides something by the values of tensors, in _no_grad_embedding_renorm_ of torch: torch.embedding_renorm_",
        ),
    ],
)
def test_what_is_decided_by_values_is_refused_with_the_reason(function: Callable, reason: str) -> None:
    with pytest.raises(CaptureError, match=rf"could not be exported at .*\n{reason}") as caught:
        capture(Function(function).eval(), (X,))
    assert "select with torch.where" in str(caught.value)
