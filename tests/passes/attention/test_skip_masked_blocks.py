"""Constant masks: what they forbid is skipped, exactly."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import EXACT_TOLERANCE, compare_programs, observe

aten = torch.ops.aten
SDPA, SPARSE = aten.scaled_dot_product_attention.default, torch.ops.thresher.sparse_attention.default


class Masked(nn.Module):
    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.mask)


def qkv(rows: int, keys: int, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, n, 8, generator=g) for n in (rows, keys, keys))  # type: ignore[return-value]


def passed(model: nn.Module, *inputs: Tensor) -> Program:
    program = capture(model, inputs)
    manager = PassManager([*pipelines.canonicalize, "skip-masked-blocks"], "each")
    result = manager.run(program)
    assert [r.failure for r in manager.records if r.status == "reverted"] == []
    assert not compare_programs(observe(program), result).exceeds(EXACT_TOLERANCE)
    return result


def band(rows: int, keys: int, width: int) -> Tensor:
    return (torch.arange(rows)[:, None] - torch.arange(keys)).abs() <= width


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("width", [1, 20, 40])
def test_a_band_is_skipped_around(width: int, additive: bool) -> None:
    mask = band(200, 200, width)
    program = passed(Masked(mask.float().log() if additive else mask), *qkv(200, 200))
    (node,) = program.calls(SPARSE)
    counts = program.constant(node.args[5])
    assert int(counts.max()) * node.args[7] < 2 * (width + node.args[6] + node.args[7])


def test_a_mask_of_whole_blocks_is_dropped() -> None:
    grid = torch.eye(4, dtype=torch.bool).repeat_interleave(32, 0).repeat_interleave(32, 1)
    (node,) = passed(Masked(grid), *qkv(128, 128)).calls(SPARSE)
    assert node.args[3] is None and node.args[6:8] == (32, 32)


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min])
def test_a_causal_mask_is_named(low: float) -> None:
    mask = torch.full((70, 70), low).triu(1)
    (node,) = passed(Masked(mask[None, None]), *qkv(70, 70)).calls(SDPA)
    assert node.kwargs["is_causal"] and "attn_mask" not in node.kwargs


@pytest.mark.parametrize(
    "mask",
    [
        torch.full((64, 64), -1.0).triu(1),  # a penalty forbids nothing
        torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) < 0.5,  # no whole block is free
        torch.full((64, 64), torch.finfo(torch.float32).min),  # every row is uniform
    ],
)
def test_what_forbids_no_block_stays(mask: Tensor) -> None:
    program = passed(Masked(mask), *qkv(64, 64))
    assert len(list(program.calls(SDPA))) == 1 and not list(program.calls(SPARSE))


def test_heads_have_their_own_blocks() -> None:
    mask = torch.stack([band(256, 256, 8), torch.ones(256, 256, dtype=torch.bool)])
    (node,) = (program := passed(Masked(mask), *qkv(256, 256))).calls(SPARSE)
    assert program.constant(node.args[5])[0, 0].sum() < program.constant(node.args[5])[0, 1].sum()


def test_compiled_with_a_band() -> None:
    compiled = thresher.compile(Masked(band(300, 300, 16)), qkv(300, 300))
    assert all(c.passed for c in compiled.report.checks)


def test_repeated_key_heads_are_shared() -> None:
    class Grouped(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (t[:, :, None].expand(1, 2, 3, 20, 8).reshape(1, 6, 20, 8) for t in (k, v))
            return F.scaled_dot_product_attention(q, k, v)

    q, (_, k, v) = qkv(20, 20, 6)[0], qkv(20, 20)
    (node,) = passed(Grouped(), q, k, v).calls(SDPA)
    assert node.kwargs["enable_gqa"] and node.args[1].op == "placeholder"
