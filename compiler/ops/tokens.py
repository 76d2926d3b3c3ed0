"""Fewer tokens: X' = M X, where M assigns every token to one of the slots that are left, or to none.

    thresher::reduce_tokens    x'_j = sum_{i -> j} size_i x_i / sum_{i -> j} size_i          M, from ``assign`` [B, N] and sizes [B, N]
    thresher::restore_tokens   x_i = x'_{assign_i}, 0 where it is -1                         the other way, for consumers of every token
    thresher::match_tokens     assign, the sizes of the slots, and for each token 1 if the slot is its own, else 0; from their similarity
    thresher::token_sides      who may be merged into whom

A *size* is the number of tokens of the input that a token stands for; padding has size 0, so it adds nothing to a mean, and the attention
after it, to whose scores log(size) is added, does not see it (proportional attention: ToMe, Bolya et al., 2023). The order of the tokens
is kept, and those that are protected keep their positions at the front.

*Sides*: 0 may go, 1 stays and may take in others, 2 stays as it is. ``match_tokens`` gives every token of side 0 its most similar one of
side 1, by ``similar`` [B, N, N], and merges (or, with ``drop``, removes) the ``count`` of them that are most similar, padding first.

    alternate   even and odd positions                                    (ToMe)
    lowest      the ``count`` tokens of least score against the rest    (DiffRate, Chen et al., 2023; Zero-TPrune, Wang et al., 2024)
    energy      the 2 ``count`` tokens of highest score, in turn        (PiToMe, Tran et al., 2024)

``every``: each so many-th token stays whatever its score (uniform coverage: FEATHER, Endo et al., 2024); 0: none does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thresher.ops.define import define

GOES, TAKES, STAYS = 0, 1, 2
FIRST, NEVER = 3e38, -3e38  # above and below all scores
KINDS = ("alternate", "lowest", "energy")


def _reduce(x: Tensor, size: Tensor, assign: Tensor, count: int) -> Tensor:
    weights = torch.where(assign >= 0, size, 0.0).to(x.dtype)
    slot = assign.clamp(min=0)
    total = x.new_zeros(x.shape[0], count).scatter_add(1, slot, weights)
    fraction = torch.where(assign >= 0, _slot_fractions(weights, total, assign, count), 0.0)
    index = slot.unsqueeze(-1).expand(-1, -1, x.shape[2])
    return x.new_zeros(x.shape[0], count, x.shape[2]).scatter_add(1, index, x * fraction.unsqueeze(-1))


def _slot_fractions(weights: Tensor, total: Tensor, assign: Tensor, count: int) -> Tensor:
    """Return size_i / sum of the slot; where all of a slot are padding, equal fractions."""
    here = (assign >= 0).to(weights.dtype)
    members = torch.zeros_like(total).scatter_add(1, assign.clamp(min=0), here).gather(1, assign.clamp(min=0))
    whole = total.gather(1, assign.clamp(min=0))
    return torch.where(whole > 0, weights / torch.where(whole > 0, whole, 1.0), 1.0 / members.clamp(min=1))


def _restore(x: Tensor, assign: Tensor, dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[0], shape[dim] = assign.shape
    index = assign.clamp(min=0).reshape(shape).expand(*x.shape[:dim], assign.shape[1], *x.shape[dim + 1 :])
    return torch.where(
        assign.reshape(shape) >= 0, x.gather(dim, index), torch.zeros((), dtype=x.dtype, device=x.device)
    )


def _match(similar: Tensor, size: Tensor, side: Tensor, count: int, drop: bool) -> tuple[Tensor, Tensor, Tensor]:
    best, partner = similar.masked_fill((side != TAKES).unsqueeze(1), NEVER).max(-1)
    score = torch.where(size > 0, best, FIRST).masked_fill(side != GOES, NEVER)  # padding first, whatever it is like
    going = rank(score) < count
    slot = (~going).long().cumsum(1) - 1
    assign = torch.where(going, -1 if drop else slot.gather(1, partner), slot)
    left = size.shape[1] - count
    sizes = size.new_zeros(size.shape[0], left).scatter_add(1, assign.clamp(min=0), torch.where(assign >= 0, size, 0.0))
    return assign, sizes, (~going).to(size.dtype)


def rank(scores: Tensor) -> Tensor:
    """Return the rank of each element in its row in falling order, from 0 on; of equal ones the first comes first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, ranks)


def _sides(scores: Tensor, size: Tensor, kind: str, count: int, protected: int, every: int) -> Tensor:
    if kind not in KINDS:
        raise ValueError(f"thresher::token_sides: unknown kind {kind!r}; one of {', '.join(KINDS)}")
    position = torch.arange(scores.shape[1], device=scores.device).expand_as(size)
    fixed = position < protected
    if every:
        fixed = fixed | ((position - protected) % every == 0)
    if kind == "alternate":
        side = (position - protected) % 2
    elif kind == "lowest":
        side = torch.where(rank(torch.where(size > 0, -scores, FIRST).masked_fill(fixed, NEVER)) < count, GOES, TAKES)
    else:
        first = rank(torch.where(size > 0, scores, FIRST).masked_fill(fixed, NEVER))
        side = torch.where(first < 2 * count, first % 2, STAYS)
    return side.masked_fill(fixed, TAKES).masked_fill(position < protected, STAYS)


define(
    "reduce_tokens", "(Tensor x, Tensor size, Tensor assign, int count) -> Tensor", _reduce,
    lambda x, size, assign, count: x.new_empty(x.shape[0], count, x.shape[2]),
)  # fmt: skip
define(
    "restore_tokens", "(Tensor x, Tensor assign, int dim) -> Tensor", _restore,
    lambda x, assign, dim: x.new_empty(*x.shape[:dim], assign.shape[1], *x.shape[dim + 1 :]),
)  # fmt: skip


def _fake_match(similar: Tensor, size: Tensor, side: Tensor, count: int, drop: bool) -> Any:
    left = size.new_empty(size.shape[0], size.shape[1] - count)
    return size.new_empty(size.shape, dtype=torch.int64), left, size.new_empty(size.shape)


define(
    "match_tokens",
    "(Tensor similar, Tensor size, Tensor side, int count, bool drop) -> (Tensor, Tensor, Tensor)",
    _match,
    _fake_match,
)
define(
    "token_sides", "(Tensor scores, Tensor size, str kind, int count, int protected, int every) -> Tensor", _sides,
    lambda scores, size, *how: size.new_empty(size.shape, dtype=torch.int64),
)  # fmt: skip
