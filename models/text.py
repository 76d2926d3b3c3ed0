"""A small model of text (Bengio et al., 2003, with residual layers): the next character from the ones before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Pre-norm, residual: x + W_2 relu(W_1 x), or gated, x + W_2 (silu(W_g x) * W_1 x)."""

    def __init__(self, width: int, hidden: int, gated: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gate = nn.Linear(width, hidden) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        hidden = F.relu(self.up(y)) if self.gate is None else F.silu(self.gate(y)) * self.up(y)
        return x + self.down(hidden)


class CharacterModel(nn.Module):
    """Character numbers [N, context] -> logits of the next one, [N, characters]. One character at a time is decoded with N = 1."""

    def __init__(
        self,
        characters: int = 96,
        context: int = 16,
        width: int = 512,
        hidden: int = 2048,
        depth: int = 3,
        gated: bool = False,
    ):
        super().__init__()
        self.embed = nn.Embedding(characters, width // context)
        self.layers = nn.Sequential(*(FeedForward(width, hidden, gated) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(text).flatten(1))))


def numbered(text: str) -> Tensor:
    """Printable ASCII as 1 to 95, everything else as 0."""
    codes = torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long() - 31
    return torch.where((codes > 0) & (codes < 96), codes, 0)
