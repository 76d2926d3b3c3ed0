"""Unsigned integers of 16 to 64 bits, and 8-bit floating-point numbers, as types that torch computes with.

x of n bits  ->  a signed integer congruent to x mod 2^n            sums, products, bits, moves
x of 64 bits ->  x xor 2^63: as signed integers in the same order   comparisons, sorting
float8       ->  its bits as uint8                                  moves; ONNX has no arithmetic of them
"""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.frontend.onnx.rules import Unsigned

CARRIERS = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
LEAST = -(1 << 63)


def carried(x: Tensor, how: Unsigned) -> Tensor:
    """Return ``x`` in a type that torch computes with; any other tensor as it is."""
    if how == "native":
        return x
    if x.dtype in CARRIERS:
        whole = x.to(CARRIERS[x.dtype])
        return whole ^ LEAST if how == "order" and x.dtype == torch.uint64 else whole
    if x.dtype.is_floating_point and x.element_size() == 1:
        return x.view(torch.uint8)
    return x


def restored(x: Tensor, dtype: torch.dtype | None, how: Unsigned) -> Tensor:
    """Return a result that was computed of carried numbers in the type ``dtype`` that it has by the specification."""
    if dtype is None or x.dtype == dtype or how == "native":
        return x
    if dtype in CARRIERS:
        return (x ^ LEAST if how == "order" and dtype == torch.uint64 else x).to(dtype)
    if dtype.is_floating_point and dtype.itemsize == 1 and x.dtype == torch.uint8:
        return x.view(dtype)
    return x
