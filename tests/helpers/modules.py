"""Small modules that tests are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Function(nn.Module):
    """A function, and the layers it is given, as a module."""

    def __init__(self, function: Callable, *layers: nn.Module):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs, *self.layers)
