"""Blocks of scores that a constant mask forbids are not computed.

    attention(q, k, v, mask) = sparse_attention(q, k, v, mask, blocks)        blocks: those with an allowed score

A mask that is exactly causal becomes ``is_causal``, of which the kernels skip half by themselves. A mask that forbids nothing inside the
listed blocks is dropped. What an additive mask forbids: numbers from -1e30 on downwards, whose exponential is 0 beside any allowed score;
so rows without an allowed score (the softmax of which is uniform) keep all of their blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from thresher.analysis.slices.transfer.base import argument
from thresher.ir.nodes import shape_of
from thresher.ir.program import Program, Role
from thresher.ops.sparse_attention import block_lists
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.pattern import aten
from thresher.rewriting.registry import register_pass

SDPA = aten.scaled_dot_product_attention.default
FORBIDDEN = -1e30
SIZES = ((64, 64), (32, 64), (32, 32), (16, 32), (16, 16))  # of blocks, that are tried; on GPUs the first
BLOCK_COST = 256  # scores that take as long as beginning with a block


@register_pass
@dataclass(frozen=True)
class SkipMaskedBlocks(Pass):
    """Attention under a constant mask computes the blocks that the mask allows."""

    name: ClassVar[str] = "skip-masked-blocks"
    target_ops: ClassVar[tuple] = (SDPA,)
    max_remaining_cost: float = 0.9  # at most this part of the dense cost may be left, else nothing is changed

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
        q, k, v = node.args[:3]
        if len(shape_of(node)) != 4:
            return ""
        allowed = needed(mask, shape_of(q)[2], shape_of(k)[2])
        (block_q, block_k), grid, cost = best_blocks(allowed, SIZES[:1] if target.startswith("cuda") else SIZES)
        if cost > self.max_remaining_cost:
            return ""
        blocks, counts = (
            program.add_constant(t, f"{node.name}_{name}", like=node, role=Role.BUFFER)
            for name, t in zip(("blocks", "counts"), block_lists(grid))
        )
        inside = mask.expand(*mask.shape[:-2], *shape_of(node)[2:3], shape_of(k)[2])
        spread = grid.repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)
        listed = spread[..., : inside.shape[-2], : inside.shape[-1]]
        free = bool((inside | ~listed).all()) if mask.dtype is torch.bool else not bool((listed & (inside != 0)).any())
        scale = argument(node, 6, "scale")
        scale = 1.0 / math.sqrt(shape_of(q)[-1]) if scale is None else scale
        args: tuple[Any, ...] = (q, k, v, None if free else argument(node, 3, "attn_mask"), blocks, counts)
        new = program.insert_call(
            node, torch.ops.thresher.sparse_attention.default, (*args, block_q, block_k, scale), like=node
        )
        node.replace_all_uses_with(new)
        return f"blocks that the mask forbids are skipped: {100 * cost:.0f} % of the scores are left"


def needed(mask: Tensor, rows: int, keys: int) -> Tensor:
    """Boolean [B or 1, H or 1, rows, keys]: the scores that change the result."""
    allowed = mask if mask.dtype is torch.bool else mask > FORBIDDEN
    allowed = allowed.reshape(*[1] * (4 - allowed.dim()), *allowed.shape)
    return (allowed | ~allowed.any(-1, keepdim=True)).expand(*allowed.shape[:2], rows, keys)


def best_blocks(allowed: Tensor, sizes: Sequence[tuple[int, int]] = SIZES) -> tuple[tuple[int, int], Tensor, float]:
    """The size of blocks that covers what is ``allowed`` at the least cost, the blocks, and that cost beside the dense one."""
    found = []
    for block_q, block_k in sizes:
        grid = cover(allowed, block_q, block_k)
        work = grid.sum().item() * (block_q * block_k + BLOCK_COST * block_q // 16)
        found.append(((block_q, block_k), grid, work / allowed.numel()))
    return min(found, key=lambda f: f[2])


def cover(allowed: Tensor, block_q: int, block_k: int) -> Tensor:
    """Which blocks hold something that is allowed."""
    pad = (0, -allowed.shape[-1] % block_k, 0, -allowed.shape[-2] % block_q)
    padded = torch.nn.functional.pad(allowed, pad)
    return padded.unflatten(-1, (-1, block_k)).any(-1).unflatten(-2, (-1, block_q)).any(-2)


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
