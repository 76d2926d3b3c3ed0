"""Linear layers that skip zeros: of their input, or of what their output is multiplied with.

    thresher::sparse_linear(x, W, b)         x W^T + b,              summed over the j with x_j != 0 only
    thresher::gated_linear(x, W, b, gate)    gate * (x W^T + b),     computed where gate is not 0 only, else 0

x [..., K], W [N, K], b [N] or None, gate [..., N]. Both are what the dense layers are as long as the weights are finite: then what is
skipped adds 0. The saving is memory: a column of W that meets a zero, or a row whose output is multiplied by one, is not read.
(Deja Vu, Liu et al., 2023; CATS, Lee et al., 2024; TEAL, Liu et al., 2024.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.ops.define import define


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b: the value of a layer that skips zeros is that of the dense one."""
    return F.linear(x, weight, bias)


def _gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    return torch.where(gate == 0, torch.zeros((), dtype=x.dtype, device=x.device), gate * F.linear(x, weight, bias))


def _fake(x: Tensor, weight: Tensor, *others: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


define("sparse_linear", "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", dense_linear, _fake)
define("gated_linear", "(Tensor x, Tensor weight, Tensor? bias, Tensor gate) -> Tensor", _gated_linear, _fake)
