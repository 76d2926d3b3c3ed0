"""``thresher::expert_linear(x, experts, W, b)``: linear layers of which each row takes the one that it is routed to.

    y[i] = W[experts[i]] x[i] + b[experts[i]]       0 where experts[i] is not in [0, E)

x [..., K], experts [...] integers, W [E, N, K], b [E, N] or None -> [..., N]; the leading dimensions of x and ``experts`` are broadcast
against each other, so a token that takes several experts is given once, as x [T, 1, K] with experts [T, k]. (Mixture of experts: Shazeer
et al., ICLR 2017; as one product over rows that are grouped by expert: MegaBlocks, Gale et al., MLSys 2023.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.ops.define import define


def _reference(x: Tensor, experts: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute one product for each expert that is taken, on all of its rows: no weight is copied."""
    shape = torch.broadcast_shapes(x.shape[:-1], experts.shape)
    rows = x.expand(*shape, x.shape[-1]).reshape(-1, x.shape[-1])
    taken = experts.expand(shape).reshape(-1)
    result = x.new_zeros(len(taken), weight.shape[1])
    for expert in taken.unique().tolist():
        if 0 <= expert < len(weight):
            chosen = (taken == expert).nonzero().reshape(-1)
            value = F.linear(rows[chosen], weight[expert], None if bias is None else bias[expert])
            result = result.index_copy(0, chosen, value)
    return result.reshape(*shape, weight.shape[1])


def _fake(x: Tensor, experts: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*torch.broadcast_shapes(x.shape[:-1], experts.shape), weight.shape[1])


define("expert_linear", "(Tensor x, Tensor experts, Tensor weight, Tensor? bias=None) -> Tensor", _reference, _fake)
