"""Blocks of scores that a constant mask forbids are not computed.

    attention(q, k, v, mask) = sparse_attention(q, k, v, mask, blocks)        blocks: those with an allowed score

A mask that is exactly causal becomes ``is_causal``, of which the kernels skip half by themselves. A mask that forbids nothing inside the
listed blocks is dropped. What an additive mask forbids: numbers from -1e30 on downwards, whose exponential is 0 beside any allowed score;
so rows without an allowed score (the softmax of which is uniform) keep all of their blocks. Static shapes only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from thresher.analysis.slices.transfer.base import argument
from thresher.ir.nodes import shape_of
from thresher.ir.program import Program, Role
from thresher.ops.sparse_attention import block_lists
from thresher.passes.attention._block_sizes import cover
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.pattern import aten
from thresher.rewriting.registry import register_pass

SDPA = aten.scaled_dot_product_attention.default
FORBIDDEN = -1e30
BLOCK_SIZES = ((64, 64), (32, 64), (32, 32), (16, 32), (16, 16))  # queries and keys, that are tried; on GPUs the first
BLOCK_START = 256  # scores that take as long as beginning with a block of 16 queries


@register_pass
@dataclass(frozen=True)
class SkipMaskedBlocks(Pass):
    """Compute only the blocks of scores that a constant mask allows."""

    name: ClassVar[str] = "skip-masked-blocks"
    target_ops: ClassVar[tuple] = (SDPA,)
    max_remaining_cost: float = 0.9  # at most this fraction of the dense cost may be left, else nothing is changed

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.max_remaining_cost >= 0, "max_remaining_cost", "a fraction of the dense cost, from 0 on")

    def apply(self, program: Program, context: Context) -> PassResult:
        work, notes = program.clone(), []
        for node in list(work.calls(SDPA)):
            mask = work.constant(argument(node, 3, "attn_mask"))
            if mask is None or argument(node, 5, "is_causal", False) or not _static(node):
                continue
            message = _name_causal(node, mask) or self.skip(work, node, mask, context.target)
            if message:
                notes.append(Note.at(node, message))
        return PassResult(work.clean(), notes) if notes else PassResult(program)

    def skip(self, program: Program, node: fx.Node, mask: Tensor, target: str) -> str:
        """Write ``node`` over the blocks that ``mask`` allows; returns what was done, or an empty string where it would not pay."""
        q, k, v = node.args[:3]
        if len(shape_of(node)) != 4:
            return ""
        allowed = needed(mask, shape_of(q)[2], shape_of(k)[2])
        sizes = BLOCK_SIZES[:1] if target.startswith("cuda") else BLOCK_SIZES
        (block_q, block_k), grid, cost = best_blocks(allowed, sizes)
        if cost > self.max_remaining_cost:
            return ""
        blocks, counts = (
            program.add_constant(t, f"{node.name}_{name}", like=node, role=Role.BUFFER)
            for name, t in zip(("blocks", "counts"), block_lists(grid))
        )
        unmasked = _forbids_nothing(
            mask.expand(*mask.shape[:-2], *shape_of(node)[2:3], shape_of(k)[2]), grid, block_q, block_k
        )
        scale = argument(node, 6, "scale")
        scale = 1.0 / math.sqrt(shape_of(q)[-1]) if scale is None else scale
        args = (q, k, v, None if unmasked else argument(node, 3, "attn_mask"), blocks, counts, block_q, block_k, scale)
        new = program.insert_call(node, torch.ops.thresher.sparse_attention.default, args, like=node)
        node.replace_all_uses_with(new)
        return f"blocks that the mask forbids are skipped: {100 * cost:.0f} % of the scores are left"


def _forbids_nothing(mask: Tensor, grid: Tensor, block_q: int, block_k: int) -> bool:
    """Return whether ``mask`` [.., L, S] leaves every score of the listed blocks as it is."""
    spread = grid.repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)
    listed = spread[..., : mask.shape[-2], : mask.shape[-1]]
    return bool((mask | ~listed).all()) if mask.dtype is torch.bool else not bool((listed & (mask != 0)).any())


def needed(mask: Tensor, rows: int, keys: int) -> Tensor:
    """Return the boolean [B or 1, H or 1, rows, keys] of the scores that change the result."""
    allowed = mask if mask.dtype is torch.bool else mask > FORBIDDEN
    allowed = allowed.reshape(*[1] * (4 - allowed.dim()), *allowed.shape)
    return (allowed | ~allowed.any(-1, keepdim=True)).expand(*allowed.shape[:2], rows, keys)


def best_blocks(
    allowed: Tensor, sizes: Sequence[tuple[int, int]] = BLOCK_SIZES
) -> tuple[tuple[int, int], Tensor, float]:
    """Return the block size that covers what is ``allowed`` at the least cost, its blocks, and that cost as a fraction of the dense one."""
    covers = []
    for block_q, block_k in sizes:
        grid = cover(allowed, block_q, block_k)
        scores = grid.sum().item() * (block_q * block_k + BLOCK_START * block_q // 16)
        covers.append(((block_q, block_k), grid, scores / allowed.numel()))
    return min(covers, key=lambda c: c[2])


def _static(node: fx.Node) -> bool:
    return all(isinstance(d, int) for n in (node, *node.args[:3]) for d in shape_of(n))


def _name_causal(node: fx.Node, mask: Tensor) -> str:
    rows, keys = shape_of(node)[-2], shape_of(node.args[1])[-2]
    if mask.shape[-2:] != (rows, keys):
        return ""
    below = torch.ones(rows, keys, dtype=torch.bool).tril()
    allowed = mask if mask.dtype is torch.bool else mask == 0
    forbidden = ~mask if mask.dtype is torch.bool else mask <= FORBIDDEN
    if not bool((torch.where(below, allowed, forbidden)).all()):
        return ""
    node.args = node.args[:3]
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "attn_mask"} | {"is_causal": True}
    return "the mask is causal: named so"
