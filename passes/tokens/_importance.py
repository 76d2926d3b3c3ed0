"""Similarities and scores of tokens from the queries and keys of an attention, written once as calls (:mod:`thresher.rewriting.calls`).

    similar_ij = cos(k_i, k_j)                     k: the mean of the keys over heads             (ToMe, Bolya et al., 2023)
    energy_i = mean_j elu(similar_ij - 0.5)        high: like many others                         (PiToMe, Tran et al., 2024)
    received_j = mean of A_ij                      A: the attention weights, over heads, queries  (DiffRate, Chen et al., 2023)
    pagerank = s after s <- A^T s, three times     from the sizes of the tokens                   (Zero-TPrune, Wang et al., 2024)

Simplified: PiToMe's margin falls with the depth, here it is fixed; DiffRate ranks by the class token's row of A alone; Zero-TPrune weighs
heads by their variance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thresher.ir.nodes import shape_of
from thresher.passes.tokens._resize import NeedsAllTokens
from thresher.rewriting.calls import Call

aten = torch.ops.aten
#: The rule of ``thresher::token_sides`` that uses a kind of score.
SIDES = {"merge": "alternate", "energy": "energy", "received": "lowest", "pagerank": "lowest"}
PAGERANK_ROUNDS = 3
MAX_QUERIES = 64  # whose attention counts
ENERGY_MARGIN = 0.5  # of a cosine, from which on tokens are alike


def judge(call: Call, kind: str, q: Any, k: Any, size: Any, scale: float) -> tuple[Any, Any]:
    """Return scores [B, N] and similarities [B, N, N] for q and k [B, H, N, E] and sizes [B, N]."""
    metric = call(aten.mean.dim, k, [1])
    norm = call(aten.clamp.default, call(aten.linalg_vector_norm.default, metric, 2, [-1], True), 1e-12)
    unit = call(aten.div.Tensor, metric, norm)
    similar = call(aten.matmul.default, unit, call(aten.permute.default, unit, [0, 2, 1]))
    if kind == "merge":
        return size, similar
    if kind == "energy":
        near = call(aten.sub.Tensor, similar, ENERGY_MARGIN)
        return call(aten.mean.dim, call(aten.elu.default, near), [-1]), similar
    return _received(call, kind, q, k, size, scale), similar


def _received(call: Call, kind: str, q: Any, k: Any, size: Any, scale: float) -> Any:
    """Return the attention [B, N] that every token receives, the mean over heads and over MAX_QUERIES queries from all along the sequence;
    for page rank over all queries, each weighted by what it receives itself."""
    batch, heads, tokens, _ = _shape(k)
    if _shape(q)[1] != heads:
        raise NeedsAllTokens("groups of query heads share its keys")
    if kind == "received" and tokens > MAX_QUERIES:
        q = call(aten.slice.Tensor, q, 2, 0, tokens, tokens // MAX_QUERIES)
    scores = call(aten.matmul.default, call(aten.mul.Tensor, q, scale), call(aten.permute.default, k, [0, 1, 3, 2]))
    log_size = call(aten.log.default, call(aten.clamp.default, size, 1e-30))
    scores = call(aten.add.Tensor, scores, call(aten.reshape.default, log_size, [batch, 1, 1, tokens]))
    weights = call(aten.mean.dim, call(aten.softmax.int, scores, -1), [1])
    if kind == "received":
        return call(aten.mean.dim, weights, [1])
    rank = call(aten.reshape.default, size, [batch, 1, tokens])
    for _ in range(PAGERANK_ROUNDS):
        rank = call(aten.matmul.default, rank, weights)
    return call(aten.reshape.default, rank, [batch, tokens])


def _shape(value: Any) -> tuple:
    return shape_of(value) if isinstance(value, fx.Node) else tuple(value.shape)
