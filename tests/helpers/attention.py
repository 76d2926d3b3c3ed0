"""Small attention models, and inputs whose neighbouring tokens are equal."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.analysis.cost.cost import machine_model
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager

SLOW = replace(machine_model("cpu"), flops=1e8, launch=0.0)  # on which even small products are worth saving


class Layers(nn.Module):
    """Attention layers with projections of their own or one for all three, a residual, and a mask of keys."""

    def __init__(self, count: int = 2, fused: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.fused = fused
        self.maps = nn.ModuleList(nn.ModuleList(nn.Linear(16, 16) for _ in range(4)) for _ in range(count))
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        mask = None if there is None else there[:, None, None]
        for q, k, v, out in self.maps:  # type: ignore[misc]
            parts = self.qkv(x).chunk(3, -1) if self.fused else (q(x), k(x), v(x))
            heads = (t.reshape(*x.shape[:2], 2, 8).transpose(1, 2) for t in parts)
            x = x + out(F.scaled_dot_product_attention(*heads, mask).transpose(1, 2).reshape(x.shape))
        return x


def sequences(count: int, tokens: int = 64, repeated: int = 1) -> list[Tensor]:
    """Each token ``repeated`` times in a row."""
    x = torch.randn(count, 1, tokens // repeated, 16, generator=torch.Generator().manual_seed(0))
    return list(x.repeat_interleave(repeated, 2))


def canonical(model: nn.Module, *inputs: Tensor) -> Program:
    """Return the program after the exact passes."""
    return PassManager(pipelines.exact).run(capture(model.eval(), inputs))
