"""Attention under a constant mask, and the program after the passes that know masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import EXACT_TOLERANCE, compare_programs, observe

SDPA, SPARSE = torch.ops.aten.scaled_dot_product_attention.default, torch.ops.thresher.sparse_attention.default


class Masked(nn.Module):
    """Attention under one mask."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.mask)


def qkv(rows: int, keys: int, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of one sample, eight channels a head."""
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, n, 8, generator=g) for n in (rows, keys, keys))  # type: ignore[return-value]


def passed(model: nn.Module, *inputs: Tensor) -> Program:
    """Return the program after canonicalisation and skip-masked-blocks, proven equal in float64."""
    program = capture(model, inputs)
    manager = PassManager([*pipelines.canonicalize, "skip-masked-blocks"], "each")
    result = manager.run(program)
    assert [r.failure for r in manager.records if r.status == "reverted"] == []
    assert not compare_programs(observe(program), result).exceeds(EXACT_TOLERANCE)
    return result


def band(rows: int, keys: int, width: int) -> Tensor:
    """Return the boolean mask of the keys at most ``width`` away."""
    return (torch.arange(rows)[:, None] - torch.arange(keys)).abs() <= width
