"""ONNX's Pad in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.frontend.onnx.rules import Ints, Number, rule
from thresher.frontend.onnx.values import Unsupported

KINDS = {"edge": "replicate", "reflect": "reflect", "wrap": "circular"}  # the names that torch has for them


@rule("Pad", since=11)
def pad(x: Tensor, pads: Ints, value: Number = None, axes: Ints | None = None, *, mode: str) -> Tensor:
    """Return x padded with a constant, its reflection, its edge or its other end; negative numbers cut."""
    over = [a % x.dim() for a in axes] if axes is not None else range(x.dim())
    around = {a: (pads[i], pads[i + len(over)]) for i, a in enumerate(over)}
    if mode == "constant":
        return _with_constant(x, [around.get(a, (0, 0)) for a in range(x.dim())], 0 if value is None else value)
    if mode not in KINDS:
        raise Unsupported(f"the mode {mode}")
    padded = {a: amounts for a, amounts in around.items() if any(amounts)}
    if not padded:
        return x
    first = min(padded)
    if x.dim() - first <= 3 and all(0 <= n < x.shape[a] for a, amounts in padded.items() for n in amounts):
        return _by_torch(x, first, [around.get(a, (0, 0)) for a in range(first, x.dim())], mode)
    for axis, (before, after) in padded.items():
        x = _by_index(x, axis, before, after, mode)
    return x


@rule("Pad", since=2)
def pad_by_attributes(x: Tensor, *, pads: Sequence[int], mode: str, value: float) -> Tensor:
    """Return x padded with a constant, its reflection or its edge; negative numbers cut."""
    return pad(x, pads, value, mode=mode)


def _with_constant(x: Tensor, around: Sequence[tuple[int, int]], value: float | Tensor) -> Tensor:
    amounts = [n for pair in reversed(around) for n in pair]
    if isinstance(value, Tensor):
        inside = F.pad(torch.ones_like(x, dtype=torch.bool), amounts)
        return torch.where(inside, F.pad(x, amounts), value)
    return F.pad(x, amounts, value=bool(value) if x.dtype == torch.bool else value)


def _by_torch(x: Tensor, first: int, around: Sequence[tuple[int, int]], mode: str) -> Tensor:
    """Return x padded in its dimensions from the ``first`` on, of which torch pads up to three."""
    flat = x.reshape(1, -1, *x.shape[first:])
    result = F.pad(flat, [n for pair in reversed(around) for n in pair], mode=KINDS[mode])
    return result.reshape(*x.shape[:first], *result.shape[2:])


def _by_index(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """Return x with positions outside of it read from inside, along one axis, however far they are."""
    size = int(x.shape[axis])
    positions = range(-before, size + after)
    if mode == "edge":
        index = [min(max(p, 0), size - 1) for p in positions]
    elif mode == "wrap":
        index = [p % size for p in positions]
    else:
        period = max(2 * (size - 1), 1)
        index = [min(p % period, period - p % period) for p in positions]
    return x.index_select(axis, torch.tensor(index))
