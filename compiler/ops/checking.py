"""Functions of torch's that look at the values of what they get, to raise or to choose: whole, because no graph has their parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.ops.define import define


def _cov(x: Tensor, correction: int, fweights: Tensor | None, aweights: Tensor | None) -> Tensor:
    return torch.cov(x, correction=correction, fweights=fweights, aweights=aweights)


def _fake_cov(x: Tensor, correction: int, fweights: Tensor | None, aweights: Tensor | None) -> Tensor:
    real = x.dtype.is_floating_point or x.dtype.is_complex
    size = [x.shape[0]] * 2 if x.dim() == 2 and x.shape[0] != 1 else []
    return x.new_empty(size, dtype=x.dtype if real else torch.get_default_dtype())


def _ctc_loss(
    scores: Tensor, targets: Tensor, lengths: Tensor, target_lengths: Tensor, blank: int, reduction: str, zero: bool
) -> Tensor:
    return F.ctc_loss(scores, targets, lengths, target_lengths, blank, reduction, zero)


def _fake_ctc_loss(
    scores: Tensor, targets: Tensor, lengths: Tensor, target_lengths: Tensor, blank: int, reduction: str, zero: bool
) -> Tensor:
    return scores.new_empty(scores.shape[1:-1] if reduction == "none" else [])


def _gaussian_nll_loss(x: Tensor, target: Tensor, var: Tensor, full: bool, eps: float, reduction: str) -> Tensor:
    return F.gaussian_nll_loss(x, target, var, full, eps, reduction)


def _fake_gaussian_nll_loss(x: Tensor, target: Tensor, var: Tensor, full: bool, eps: float, reduction: str) -> Tensor:
    dtype = torch.result_type(torch.empty(0, dtype=torch.result_type(x, target), device=x.device), var)
    return x.new_empty(torch.broadcast_shapes(x.shape, target.shape) if reduction == "none" else [], dtype=dtype)


define("cov", "(Tensor x, int correction, Tensor? fweights, Tensor? aweights) -> Tensor", _cov, _fake_cov)
define(
    "ctc_loss",
    "(Tensor log_probs, Tensor targets, Tensor input_lengths, Tensor target_lengths, int blank, str reduction, "
    "bool zero_infinity) -> Tensor",
    _ctc_loss,
    _fake_ctc_loss,
)
define(
    "gaussian_nll_loss",
    "(Tensor input, Tensor target, Tensor var, bool full, float eps, str reduction) -> Tensor",
    _gaussian_nll_loss,
    _fake_gaussian_nll_loss,
)
