"""A small Llama-like decoder (Touvron et al., 2023): RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x`` [..., L, width] with the two halves of its last dimension rotated by the angles of ``cos`` and ``sin`` [L, width]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Block(nn.Module):
    """Attention with grouped queries and a gated feed-forward network, each preceded by its norm: [N, L, dim] -> [N, L, dim]."""

    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int):
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, dim // heads
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.q_proj = nn.Linear(dim, heads * self.width, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.o_proj = nn.Linear(heads * self.width, dim, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the causal attention of ``x`` [N, L, dim], before the residual addition."""
        batch, tokens, _ = x.shape
        q = rotate(self.q_proj(x).view(batch, tokens, self.heads, self.width).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(batch, tokens, self.kv_heads, self.width).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(batch, tokens, self.kv_heads, self.width).transpose(1, 2)
        groups = self.heads // self.kv_heads
        k, v = (
            t[:, :, None].expand(-1, -1, groups, -1, -1).reshape(batch, self.heads, tokens, self.width) for t in (k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    """Token ids [N, L] -> logits [N, L, vocabulary] (a prefill: no cache)."""

    def __init__(
        self,
        vocabulary: int = 1024,
        dim: int = 256,
        depth: int = 4,
        heads: int = 8,
        kv_heads: int = 2,
        hidden: int = 688,
    ):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, kv_heads, hidden) for _ in range(depth))
        self.norm, self.width = nn.RMSNorm(dim, eps=1e-5), dim // heads
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        position = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        frequency = 10000.0 ** (-torch.arange(0, self.width, 2, device=ids.device, dtype=torch.float32) / self.width)
        angle = torch.cat([position[:, None] * frequency] * 2, -1)
        x = self.embed(ids)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))
