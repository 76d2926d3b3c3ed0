"""``thresher::pyramid_lists``: selected groups of blocks as they are, all others as means.

Keys of a pyramid are [K, M K]: ``columns`` blocks of keys, and after them ``columns / factor`` blocks of means, one for each group of
``factor`` blocks. A row of lists that names groups becomes one over this pyramid,

    {factor g + 0 .. factor g + factor - 1 : g listed} + {columns + g : g not listed}

so that every key is seen exactly once, itself or in a mean (PSA, Li et al., 2025); without the second part for heads where ``means``
(bool [H]) is not set. ``blocks`` int32 [B, H, rows, most] ascending, and ``counts`` int32 [B, H, rows], as ``thresher::select_blocks``
makes them; results likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.ops.define import define
from thresher.ops.sparse_attention import block_mask

SCHEMA = "(Tensor blocks, Tensor counts, Tensor means, int factor, int columns) -> (Tensor, Tensor)"


def length(most: int, factor: int, columns: int) -> int:
    """Return the length of the longest list that can come out."""
    return min(most, columns // factor) * (factor - 1) + columns // factor


def _reference(blocks: Tensor, counts: Tensor, means: Tensor, factor: int, columns: int) -> tuple[Tensor, Tensor]:
    chosen = block_mask(blocks, counts, columns // factor)
    grid = torch.cat([chosen.repeat_interleave(factor, -1), ~chosen & means.reshape(-1, 1, 1)], -1)
    order = grid.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return order[..., : length(blocks.shape[-1], factor, columns)].int(), grid.sum(-1).int()


def _fake(blocks: Tensor, counts: Tensor, means: Tensor, factor: int, columns: int) -> tuple[Tensor, Tensor]:
    shape = (*counts.shape, length(blocks.shape[-1], factor, columns))
    return blocks.new_empty(shape), counts.new_empty(counts.shape)


define("pyramid_lists", SCHEMA, _reference, _fake)
