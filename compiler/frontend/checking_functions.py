"""Functions of torch's that torch.export does not trace, because they look at values, in a form that it does.

What they return is a symbol (``torch.equal``), or they are operators of ours that stay whole and raise as torch's do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import thresher.ops  # noqa: F401  (registers the operators)

ops = torch.ops.thresher


class CheckingFunctions(TorchFunctionMode):
    """Calls the forms of this module while it is active."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return FORMS.get(func, func)(*args, **(kwargs or {}))


def _equal(a: Tensor, b: Tensor) -> Any:
    return a.shape == b.shape and (a == b).all().item()


def _allclose(a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Any:
    return torch.isclose(a, b, rtol, atol, equal_nan).all().item()


def _cov(x: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None) -> Tensor:
    if fweights is not None or aweights is not None or x.dim() > 2 or x.dtype is torch.bool:
        return ops.cov(x, correction, fweights, aweights)
    rows = x if x.dim() == 2 else x.reshape(1, -1)
    count = rows.shape[1]
    centred = rows - rows.sum(1, keepdim=True) / count
    return ((centred @ centred.mH) / torch.sym_max(count - correction, 0)).squeeze()


def _corrcoef(x: Tensor) -> Tensor:
    covariance = _cov(x)
    if covariance.dim() == 0:
        return covariance / covariance
    variance = covariance.diagonal()
    deviation = (variance.real if variance.is_complex() else variance).sqrt()
    result = covariance / deviation[:, None] / deviation
    if result.is_complex():
        return torch.complex(result.real.clip(-1, 1), result.imag.clip(-1, 1))
    return result.clip(-1, 1)


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    lengths = (v if isinstance(v, Tensor) else torch.tensor(v) for v in (input_lengths, target_lengths))
    return ops.ctc_loss(log_probs, targets, *lengths, blank, reduction, zero_infinity)


def _gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    var = var if isinstance(var, Tensor) else torch.full_like(input, var)
    return ops.gaussian_nll_loss(input, target, var, full, eps, reduction)


FORMS: dict[Any, Callable[..., Any]] = {
    torch.equal: _equal,
    Tensor.equal: _equal,
    torch.allclose: _allclose,
    Tensor.allclose: _allclose,
    torch.cov: _cov,
    Tensor.cov: _cov,
    torch.corrcoef: _corrcoef,
    Tensor.corrcoef: _corrcoef,
    F.ctc_loss: _ctc_loss,
    F.gaussian_nll_loss: _gaussian_nll_loss,
}
