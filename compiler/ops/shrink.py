"""``thresher::shrink(x, t, kind)``: one operator for every spelling of thresholding.

    soft      sign(x) * max(|x| - t, 0)          the proximal map of t |x|_1 (Donoho, 1995)
    hard      x where |x| > t, else 0            (Donoho & Johnstone, 1994)
    positive  max(x - t, 0)                      one-sided soft threshold
    above     x where x > t, else 0              one-sided hard threshold

``t`` is a tensor that broadcasts against ``x``: a scalar, one value per channel, or computed in the graph. NaN stays NaN for the
soft kinds; for the hard kinds a comparison with NaN is false, so NaN becomes 0, as in the ``where`` spelling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.ops.define import define

KINDS = ("soft", "hard", "positive", "above")


def _reference(x: Tensor, t: Tensor, kind: str) -> Tensor:
    t = t.to(x.dtype)
    if kind == "soft":
        return x - torch.maximum(torch.minimum(x, t), -t)
    if kind == "hard":
        return torch.where(x.abs() > t, x, torch.zeros((), dtype=x.dtype, device=x.device))
    if kind == "positive":
        return torch.relu(x - t)
    if kind == "above":
        return torch.where(x > t, x, torch.zeros((), dtype=x.dtype, device=x.device))
    raise ValueError(f"thresher::shrink: unknown kind {kind!r}; one of {', '.join(KINDS)}")


def _fake(x: Tensor, t: Tensor, kind: str) -> Tensor:
    if kind not in KINDS:
        raise ValueError(f"thresher::shrink: unknown kind {kind!r}; one of {', '.join(KINDS)}")
    return x.new_empty(torch.broadcast_shapes(x.shape, t.shape))


define("shrink", "(Tensor x, Tensor t, str kind) -> Tensor", _reference, _fake)
