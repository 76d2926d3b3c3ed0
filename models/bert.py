"""A BERT-like encoder (Devlin et al., 2018): post-norm, separate q/k/v, attention written out as matmul, softmax, matmul."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """Attention and a feed-forward network, each followed by its norm: hidden states [N, L, dim] and an additive mask -> the same shape."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.output, self.norm1 = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=1e-12)
        self.up, self.down, self.norm2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
        y = self.dropout(scores.softmax(-1)) @ v
        x = self.norm1(x + self.dropout(self.output(y.transpose(1, 2).flatten(2))))
        return self.norm2(x + self.dropout(self.down(nn.functional.gelu(self.up(x)))))


class BertEncoder(nn.Module):
    """Token ids [N, L] (and a mask [N, L] of ones and zeros) -> hidden states [N, L, dim] and a pooled vector [N, dim]."""

    def __init__(
        self,
        vocabulary: int = 30522,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        positions: int = 512,
    ):
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, dim), nn.Embedding(positions, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.layers = nn.ModuleList(Layer(dim, heads, hidden) for _ in range(depth))
        self.pooler = nn.Linear(dim, dim)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if mask is None:
            mask = torch.ones_like(ids)
        bias = (1.0 - mask[:, None, None, :].to(self.norm.weight.dtype)) * torch.finfo(torch.float32).min
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device)))
        for layer in self.layers:
            x = layer(x, bias)
        return x, torch.tanh(self.pooler(x[:, 0]))
