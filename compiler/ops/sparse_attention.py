"""``thresher::sparse_attention``: attention over lists of key blocks.

    out[l] = sum_{s in allowed(l)} softmax_s(cap(c q_l k_s) + mask_ls) v_s          cap(x) = softcap tanh(x / softcap), x without one

Queries are cut into blocks of ``block_q``, keys into blocks of ``block_k`` (the last ones may be shorter). ``blocks[b, h, i, :counts[b, h,
i]]`` are the key blocks that query block i of head h looks at; dimensions 0 and 1 of both are 1 where all samples or heads do the same. The
lists may be constants (a static pattern) or come from ``thresher::select_blocks``; without them every block is looked at. What is not in
a list is not read and not multiplied by the kernels.

``skip``: a block is left out of the sum if its weights turn out small: if exp(score - top) < exp(-skip) for all its scores, where top is
the largest score of the row in this block and those before it in the list (SpargeAttn's second stage, Zhang et al., 2025). What is lost
is at most n exp(-skip) of a row's sum for n keys that are left out, so the output moves by at most 2 n exp(-skip) max |v|.

A row without any allowed key is 0. (Lists of blocks: FlexAttention's BlockMask, Dong et al., 2024.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from thresher.ops.define import define

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? blocks, Tensor? counts, int block_q, int block_k, float scale, "
    "bool causal=False, float? softcap=None, float? skip=None) -> Tensor"
)
DENSE_BLOCKS = (64, 64)  # block_q and block_k where there are no lists


def block_mask(blocks: Tensor, counts: Tensor, columns: int) -> Tensor:
    """Return lists of key blocks [.., rows, longest] with their lengths [.., rows] as a mask, bool [.., rows, columns]."""
    listed = torch.arange(blocks.shape[-1], device=blocks.device) < counts.unsqueeze(-1)
    index = torch.where(listed, blocks.long(), columns)
    grid = torch.zeros(*blocks.shape[:-1], columns + 1, dtype=torch.bool, device=blocks.device)
    return grid.scatter(-1, index, True)[..., :columns]


def block_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the True columns of a mask, bool [.., rows, columns], as ascending lists with their lengths.

    The lists are int32 [.., rows, longest], their lengths int32 [.., rows].
    """
    counts = mask.sum(-1)
    most = max(1, int(counts.max()))
    return mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most].int(), counts.int()


def arguments(node: fx.Node) -> list[Any]:
    """Return the twelve arguments of a call, with defaults."""
    names = [a.name for a in node.target._schema.arguments]
    defaults = [a.default_value for a in node.target._schema.arguments]
    values = [*node.args, *defaults[len(node.args) :]]
    return [node.kwargs.get(name, value) for name, value in zip(names, values)]


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    blocks: Tensor | None,
    counts: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    causal: bool = False,
    softcap: float | None = None,
    skip: float | None = None,
) -> Tensor:
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = masked_scores(q, k, mask, scale, causal, softcap)
    if blocks is not None and counts is not None:
        grid = block_mask(blocks, counts, -(-k.shape[2] // block_k))
        scores = scores.masked_fill(~_spread(grid, block_q, block_k, *scores.shape[2:]), -math.inf)
    if skip is not None:
        dropped = _spread(negligible(scores, block_q, block_k, skip), block_q, block_k, *scores.shape[2:])
        scores = scores.masked_fill(dropped, -math.inf)
    top = scores.amax(-1, keepdim=True).detach()
    weights = torch.exp(scores - torch.where(top > -math.inf, top, 0.0))
    total = weights.sum(-1, keepdim=True)
    return (weights / torch.where(total > 0, total, 1.0)) @ v


def masked_scores(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool, softcap: float | None
) -> Tensor:
    """Return the scores [B, H, L, S], -inf where masked; queries and keys have as many heads."""
    scores = (q * scale) @ k.mT
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    if causal:
        below = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~below, -math.inf)
    return scores


def _spread(grid: Tensor, block_q: int, block_k: int, rows: int, keys: int) -> Tensor:
    """Return a grid [.., query blocks, key blocks] as [.., queries, keys]."""
    return grid.repeat_interleave(block_q, -2)[..., :rows, :].repeat_interleave(block_k, -1)[..., :keys]


def negligible(scores: Tensor, block_q: int, block_k: int, skip: float) -> Tensor:
    """Return which blocks have only scores more than ``skip`` under the row's top so far, bool [.., query blocks, key blocks]."""
    pad = (0, -scores.shape[-1] % block_k, 0, -scores.shape[-2] % block_q)
    padded = torch.nn.functional.pad(scores.detach(), pad, value=-math.inf)
    tops = padded.unflatten(-1, (-1, block_k)).amax(-1)
    under = tops - tops.cummax(-1).values  # NaN where a row has seen nothing yet
    return under.nan_to_num(nan=-math.inf).unflatten(-2, (-1, block_q)).amax(-2) < -skip


def _fake(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


define("sparse_attention", SCHEMA, _reference, _fake)
