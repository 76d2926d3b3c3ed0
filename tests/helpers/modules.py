"""Small modules that tests are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Function(nn.Module):
    """A function, and the layers it is given, as a module."""

    def __init__(self, function: Callable, *layers: nn.Module):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs, *self.layers)


class Amplifier(nn.Module):
    """Layers each of which doubles a difference about twice, so that rounding grows with their number."""

    def __init__(self, depth: int = 16, width: int = 24, gain: float = 4.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = gain / width**0.5 * torch.randn(depth, width, width, generator=generator)
        self.weights = nn.ParameterList(weights.unbind())

    def amplified(self, y: Tensor) -> Tensor:
        """Apply the layers."""
        for weight in self.weights:
            y = self.bounded(y @ weight)
        return y

    def bounded(self, y: Tensor) -> Tensor:
        """Keep numbers small between two layers."""
        return torch.tanh(y)
