"""``thresher::select_blocks``: which blocks of keys a block of queries should look at, from their means.

    score[i, j] = c (mean of q in block i) . (mean of k in block j)

Listed for row i of head h are the blocks of ``forced``, and after them those of the highest scores, until ``keep[h]`` are listed or those
listed have ``mass[h]`` of softmax_j(score), at most ``most``. (Means as proxies: MInference, Jiang et al., 2024; cumulative mass:
SpargeAttn, Zhang et al., 2025; top-k of means: VMoBA, BiFormer.) The result are lists for ``thresher::sparse_attention``, ascending.

q [B, H, L, E], k [B, G, S, E]; forced, bool [1, H, query blocks, key blocks]; keep, int64 [H]; mass, float [H], from 1 on: not used;
``keys`` (bool, [B, 1, 1, S]) says which keys there are: others do not enter the means, and a block without any is not listed.

Hierarchical: with ``groups`` (int64 [H]) only blocks of the ``groups[h]`` best runs of ``group`` blocks are looked at, by the same score of
the means of whole runs; forced blocks besides (coarse to fine: LLSA, Zhou et al., 2025; QuadTree attention, Tang et al., 2022).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from thresher.ops.define import define

SCHEMA = (
    "(Tensor q, Tensor k, Tensor? keys, Tensor forced, Tensor keep, Tensor mass, int block_q, int block_k, float scale, "
    "int most, bool causal=False, Tensor? groups=None, int group=1) -> (Tensor, Tensor)"
)


def block_means(x: Tensor, block: int, valid: Tensor | None = None) -> Tensor:
    """Return the mean of each block of rows: x [B, H, L, E] -> [B, H, blocks, E]; only ``valid`` rows (bool [B, 1, L]) count."""
    there = torch.ones_like(x[..., :1]) if valid is None else valid.unsqueeze(-1).to(x.dtype).expand_as(x[..., :1])
    pad = (0, 0, 0, -x.shape[2] % block)
    total = torch.nn.functional.pad(x * there, pad).unflatten(2, (-1, block)).sum(3)
    return total / torch.nn.functional.pad(there, pad).unflatten(2, (-1, block)).sum(3).clamp(min=1)


def block_scores(
    q: Tensor, k: Tensor, keys: Tensor | None, block_q: int, block_k: int, scale: float, causal: bool
) -> Tensor:
    """Return the scores of blocks, [B, H, query blocks, key blocks]; -inf where a block may not be listed."""
    valid = None if keys is None else keys[:, 0]
    means = block_means(k, block_k, valid).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (block_means(q, block_q) * scale) @ means.mT
    if valid is not None:
        some = torch.nn.functional.pad(valid, (0, -valid.shape[-1] % block_k)).unflatten(-1, (-1, block_k)).any(-1)
        scores = scores.masked_fill(~some.unsqueeze(2), -math.inf)
    if causal:
        rows, columns = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
        scores = scores.masked_fill(columns * block_k > rows.unsqueeze(1) * block_q + block_q - 1, -math.inf)
    return scores


def listed(scores: Tensor, forced: Tensor, keep: Tensor, mass: Tensor) -> Tensor:
    """Return which blocks are listed, bool [B, H, query blocks, key blocks]."""
    possible = scores > -math.inf
    weights = torch.where(possible, scores, -1e30).softmax(-1)
    ranked = torch.where(forced & possible, math.inf, scores).argsort(dim=-1, descending=True, stable=True)
    before = weights.gather(-1, ranked).cumsum(-1) - weights.gather(-1, ranked)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    taken = (rank < keep.reshape(-1, 1, 1)) & (before < mass.reshape(-1, 1, 1))
    return (torch.zeros_like(possible).scatter(-1, ranked, taken) | forced) & possible


def in_best_groups(coarse: Tensor, groups: Tensor, group: int, columns: int) -> Tensor:
    """Return which blocks are in the best groups, bool [B, H, query blocks, columns]; ``coarse``: [B, H, query blocks, all groups]."""
    order = coarse.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(coarse.shape[-1], device=coarse.device)
    best = torch.zeros_like(coarse, dtype=torch.bool)
    best = best.scatter(-1, order, (rank < groups.reshape(-1, 1, 1)).expand_as(best))
    return best.repeat_interleave(group, -1)[..., :columns]


def _reference(
    q: Tensor, k: Tensor, keys: Tensor | None, forced: Tensor, keep: Tensor, mass: Tensor, block_q: int, block_k: int,
    scale: float, most: int, causal: bool = False, groups: Tensor | None = None, group: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scores = block_scores(q, k, keys, block_q, block_k, scale, causal)
    if groups is not None:
        coarse = block_scores(q, k, keys, block_q, block_k * group, scale, causal)
        scores = scores.masked_fill(~(in_best_groups(coarse, groups, group, scores.shape[-1]) | forced), -math.inf)
    grid = listed(scores, forced, keep, mass)
    counts = grid.sum(-1).clamp(max=most)
    blocks = grid.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    return blocks.int(), counts.int()


def _fake(q: Tensor, k: Tensor, keys: Any, forced: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    most = how[5]
    shape = (q.shape[0], *forced.shape[1:3])
    return q.new_empty(*shape, most, dtype=torch.int32), q.new_empty(shape, dtype=torch.int32)


define("select_blocks", SCHEMA, _reference, _fake)
