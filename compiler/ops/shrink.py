"""``thresher::shrink(x, t, kind)``: one operator for every spelling of thresholding.

    soft      sign(x) max(|x| - t, 0)                          the proximal map of t |x|_1       (Donoho, 1995)
    hard      x where |x| > t, else 0                                                            (Donoho & Johnstone, 1994)
    garrote   x - t^2 / x where |x| > t, else 0                                                  (Gao, 1998)
    firm      sign(x) t2 (|x| - t) / (t2 - t) where t < |x| <= t2, x beyond, 0 below              (Gao & Bruce, 1997)
    positive  max(x - t, 0)                                    one-sided soft threshold
    above     x where x > t, else 0                            one-sided hard threshold

``t`` broadcasts against ``x``: a number, one per channel, or computed in the graph; for ``soft``, ``garrote`` and ``firm`` it is not
negative. ``t2 > t`` is for ``firm`` alone.

``keep`` says what ``hard``, ``above`` and ``garrote`` keep, since their spellings differ at t, for NaN and infinities: ``gt`` and ``ge``
what is greater (or equal), and 0 for NaN; ``nle`` and ``nlt`` what is not less or equal (not less), NaN among it; ``xgt`` and ``xge`` are
products with the comparison, which make NaN of infinities that they drop. All other kinds keep NaN.

``thresher::group_shrink(x, t)``: z max(1 - t / |z|, 0), and 0 where z is, for the vectors z along the last dimension of x: complex numbers
as pairs, groups of coefficients. The proximal map of t |z|_2 (Yuan & Lin, 2006). The last dimension of t is 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thresher.ops.define import define

KINDS = ("soft", "hard", "garrote", "firm", "positive", "above")
KEEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nle": lambda x, t: ~(x <= t),
    "nlt": lambda x, t: ~(x < t),
    "gt": torch.gt,
    "ge": torch.ge,
    "xgt": torch.gt,
    "xge": torch.ge,
}


def _reference(x: Tensor, t: Tensor, kind: str, keep: str = "nle", t2: Tensor | None = None) -> Tensor:
    _check(kind, keep, t2)
    t, zero = t.to(x.dtype), torch.zeros((), dtype=x.dtype, device=x.device)
    if kind == "soft":
        return x - torch.maximum(torch.minimum(x, t), -t)
    if kind in ("hard", "above"):
        kept = KEEPS[keep](x.abs() if kind == "hard" else x, t)
        return x * kept if keep.startswith("x") else torch.where(kept, x, zero)
    if kind == "positive":
        return torch.relu(x - t)
    if kind == "garrote":
        kept = KEEPS[keep](x.abs(), t)
        return torch.where(kept, x - t * t / torch.where(kept, x, 1.0), zero)
    assert t2 is not None
    between = x.sign() * t2 * (x.abs() - t) / (t2 - t)
    return torch.where(x.abs() <= t, zero, torch.where(x.abs() <= t2, between, x))


def _check(kind: str, keep: str, t2: Tensor | None) -> None:
    if kind not in KINDS:
        raise ValueError(f"thresher::shrink: unknown kind {kind!r}; one of {', '.join(KINDS)}")
    if keep not in KEEPS:
        raise ValueError(f"thresher::shrink: unknown keep {keep!r}; one of {', '.join(KEEPS)}")
    if (t2 is None) == (kind == "firm"):
        raise ValueError("thresher::shrink: t2 is needed for kind 'firm', and for no other")


def _fake(x: Tensor, t: Tensor, kind: str, keep: str = "nle", t2: Tensor | None = None) -> Tensor:
    _check(kind, keep, t2)
    return x.new_empty(torch.broadcast_shapes(x.shape, t.shape))


define("shrink", "(Tensor x, Tensor t, str kind, str keep='nle', Tensor? t2=None) -> Tensor", _reference, _fake)


def _group(x: Tensor, t: Tensor) -> Tensor:
    size, t = torch.sqrt(x.square().sum(-1, keepdim=True)), t.to(x.dtype)
    gain = torch.relu(1 - t / torch.where(size == 0, 1.0, size))
    return torch.where(size == 0, torch.zeros((), dtype=x.dtype, device=x.device), x * gain)


define("group_shrink", "(Tensor x, Tensor t) -> Tensor", _group, lambda x, t: torch.empty_like(x))
