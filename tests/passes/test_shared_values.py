"""Values that are read often: a constant, or an input, is reached in 2 ** 40 ways, and a pass looks at each call once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from helpers.canonical import canonical
from helpers.modules import Function
from thresher.passes import pipelines


def squash(value: Tensor) -> Tensor:
    return torch.relu(value) - torch.sigmoid(value)


def mask(value: Tensor) -> Tensor:
    return value * (1 - value) + value.abs() * 0.5


def threshold(value: Tensor) -> Tensor:
    return torch.where(value.abs() > 0.1, value, 0.0) + torch.softmax(value, -1)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("step", [squash, mask, threshold])
def test_the_exact_passes_end(step: Callable[[Tensor], Tensor]) -> None:
    def forward(x: Tensor, layer: nn.Linear) -> Tensor:
        weight = layer.weight
        for _ in range(40):
            x, weight = step(x), step(weight)
        return x @ weight

    canonical(Function(forward, nn.Linear(8, 8)), torch.randn(4, 8), passes=pipelines.exact)
