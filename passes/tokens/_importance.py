"""Who is like whom, and who matters: similarities and scores of tokens from the queries and keys of an attention.

Written once, as calls: ``call(operator, *arguments)`` inserts a node into a graph, or computes at once on values (:func:`at_once`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from thresher.ir.nodes import shape_of
from thresher.passes.tokens._resize import NeedsAllTokens

aten = torch.ops.aten
#: How a kind of score is used (``thresher::token_sides``).
SIDES = {"merge": "alternate", "energy": "energy", "received": "lowest", "pagerank": "lowest"}
ROUNDS = 3  # of page rank
WITNESSES = 64  # queries whose attention counts
ENERGY_MARGIN = 0.5  # of a cosine, from which on tokens are alike

Call = Callable[..., Any]


def at_once(target: Any, *args: Any) -> Any:
    """Computes a call on values."""
    return target(*args)


def judge(call: Call, kind: str, q: Any, k: Any, size: Any, scale: float) -> tuple[Any, Any]:
    """Scores [B, N] and similarities [B, N, N] by the keys' mean over heads, for q and k [B, H, N, E] and sizes [B, N]."""
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
    """The attention that every token receives, the mean over heads and over WITNESSES queries from all along the sequence; for page rank
    over all queries, each weighted by what it receives itself."""
    batch, heads, tokens, _ = _shape(k)
    if _shape(q)[1] != heads:
        raise NeedsAllTokens("grouped heads")
    if kind == "received" and tokens > WITNESSES:
        q = call(aten.slice.Tensor, q, 2, 0, tokens, tokens // WITNESSES)
    scores = call(aten.matmul.default, call(aten.mul.Tensor, q, scale), call(aten.permute.default, k, [0, 1, 3, 2]))
    there = call(aten.log.default, call(aten.clamp.default, size, 1e-30))
    scores = call(aten.add.Tensor, scores, call(aten.reshape.default, there, [batch, 1, 1, tokens]))
    weights = call(aten.mean.dim, call(aten.softmax.int, scores, -1), [1])
    if kind == "received":
        return call(aten.mean.dim, weights, [1])
    rank = call(aten.reshape.default, size, [batch, 1, tokens])
    for _ in range(ROUNDS):
        rank = call(aten.matmul.default, rank, weights)
    return call(aten.reshape.default, rank, [batch, tokens])


def _shape(value: Any) -> tuple:
    return shape_of(value) if isinstance(value, fx.Node) else tuple(value.shape)
