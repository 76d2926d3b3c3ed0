"""Example values of a tensor for which only shape and dtype are known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def random_example(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Return normal random numbers for a floating dtype, else values that are valid whatever the tensor is used for.

    Integers may be indices: they are 0. Booleans may be masks: they are True, which hides nothing.
    """
    if dtype.is_floating_point:
        return torch.randn(tuple(shape), generator=generator).to(dtype)
    return torch.ones(tuple(shape), dtype=dtype) if dtype is torch.bool else torch.zeros(tuple(shape), dtype=dtype)
