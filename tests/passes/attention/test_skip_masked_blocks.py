"""Constant masks: what they forbid is skipped, exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import thresher
from helpers.masked_attention import SDPA, SPARSE, Masked, band, passed, qkv
from helpers.rewrites import check_rewrite


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


BEFORE = """\
program model {
  %q = input : f32[1, 2, 96, 4]
  %mask = constant "mask" : b8[96, 96]
  %y = aten.scaled_dot_product_attention.default(%q, %q, %q, %mask) : f32[1, 2, 96, 4]
  return [%y]
}
"""
AFTER = """\
program model {
  %q = input : f32[1, 2, 96, 4]
  %mask = constant "mask" : b8[96, 96]
  %y_blocks = constant "y_blocks" : i32[1, 1, 6, 2]
  %y_counts = constant "y_counts" : i32[1, 1, 6]
  %attention = thresher.sparse_attention.default(%q, %q, %q, %mask, %y_blocks, %y_counts, 16, 32, 0.5) : f32[1, 2, 96, 4]
  return [%attention]
}
"""


def test_before_and_after() -> None:
    check_rewrite("skip-masked-blocks", BEFORE, AFTER, constants={"mask": band(96, 96, 8)})
