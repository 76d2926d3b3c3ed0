"""Means of neighbouring keys and values, on values and in the graph.

    K' = M K, V' = M V, bias = log sizes        M: means over runs (or squares) of tokens; sizes: the number of keys that a mean stands for

Tokens at the front that are no part of an image stay as they are. Keys that a mask forbids do not enter the means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.attention.sites import AttentionSite
from thresher.ir.nodes import dtype_of, shape_of
from thresher.ir.program import Program, Role
from thresher.passes.attention._patterns import grid_of
from thresher.rewriting.calls import Call, inserter
from thresher.rewriting.key_sizes import key_sizes, sizes_of_mask

aten, ops = torch.ops.aten, torch.ops.thresher
MIN_KEYS = 32  # after pooling


@dataclass(frozen=True)
class Pooling:
    """A partition of the keys: ``assign`` int64 [S], the mean that each goes to, the ``count`` of means, and a ``description``."""

    assign: Tensor
    count: int
    description: str


def poolings(keys: int, factors: Sequence[int]) -> list[Pooling]:
    """Return runs of neighbours, and squares where the tokens can be those of a square image, that leave at least MIN_KEYS keys."""
    partitions: list[Pooling] = []
    token = torch.arange(keys)
    grid = grid_of(keys)
    for factor in factors:
        root = math.isqrt(factor)
        if grid and root * root == factor:
            side, prefix = grid
            pixel, across = token - prefix, -(-side // root)
            square = pixel // side // root * across + pixel % side // root + prefix
            assign = torch.where(token < prefix, token, square)
            partitions.append(Pooling(assign, prefix + across * across, f"means of {root} x {root} keys"))
        prefix = grid[1] if grid else 0
        assign = torch.where(token < prefix, token, (token - prefix) // factor + prefix)
        partitions.append(Pooling(assign, prefix + -(-(keys - prefix) // factor), f"means of {factor} keys"))
    return [p for p in partitions if p.count >= MIN_KEYS]


def means_of_keys(site: AttentionSite, values: dict[fx.Node, Any], pooling: Pooling) -> tuple[Tensor, Tensor, Tensor]:
    """Return the means of keys and values [B, G, count, E], and the bias of their scores [B, 1, 1, count], on values."""
    size = sizes_of_mask(None if site.mask is None else values[site.mask], site.shape[0], site.shape[3])
    assign = pooling.assign.expand(site.shape[0], -1)
    k, v = (_means(values[n], size, assign, pooling.count) for n in (site.k, site.v))
    total = torch.zeros(size.shape[0], pooling.count).scatter_add(1, assign, size)
    return k, v, total.log()[:, None, None]


def _means(x: Tensor, size: Tensor, assign: Tensor, count: int) -> Tensor:
    flat = x.transpose(1, 2).flatten(2)
    return ops.reduce_tokens(flat, size, assign, count).unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def pooled_keys(program: Program, site: AttentionSite, pooling: Pooling) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Insert :func:`means_of_keys` before the site."""
    node, batch, name = site.node, site.shape[0], site.node.name
    call = inserter(program, node)

    size = key_sizes(program, site, node)
    members = pooling.assign.bincount(minlength=pooling.count).to(dtype_of(site.k))
    assign, counted, even = (
        program.add_constant(value.contiguous(), f"{name}_{label}", like=node, role=Role.BUFFER)
        for label, value in (
            ("means", pooling.assign.expand(batch, -1)),
            ("members", members.reshape(1, -1)),
            ("even", torch.ones(batch, site.shape[3], dtype=dtype_of(site.k))),
        )
    )
    mean_size = call(ops.reduce_tokens.default, call(aten.unsqueeze.default, size, 2), even, assign, pooling.count)
    total = call(aten.mul.Tensor, call(aten.squeeze.dim, mean_size, 2), counted)
    bias = call(aten.reshape.default, call(aten.log.default, total), [batch, 1, 1, pooling.count])
    means: dict[fx.Node, fx.Node] = {}

    def pooled(x: fx.Node) -> fx.Node:
        """Return the means [B, count, C] of x [B, S, C]."""
        if x not in means:
            means[x] = call(ops.reduce_tokens.default, x, size, assign, pooling.count)
        return means[x]

    k, v = (_before_or_after(call, n, pooled, pooling.count) for n in (site.k, site.v))
    return k, v, bias


def _before_or_after(call: Call, x: fx.Node, pooled: Call, count: int) -> fx.Node:
    """Return the means [B, G, count, E] of x [B, G, S, E]: taken before the linear layer that x comes from, if it has one of its own."""
    batch, heads, keys, width = shape_of(x)

    linear = _linear_of(x)
    if linear is not None:
        flat = call(linear.target, pooled(linear.args[0]), *linear.args[1:])
    else:
        flat = pooled(
            call(aten.reshape.default, call(aten.permute.default, x, [0, 2, 1, 3]), [batch, keys, heads * width])
        )
    return call(aten.permute.default, call(aten.reshape.default, flat, [batch, count, heads, width]), [0, 2, 1, 3])


def _linear_of(x: fx.Node) -> fx.Node | None:
    """Return the linear layer that nothing but ``x`` reads, through reshape and permute, or None."""
    if x.target is not aten.permute.default or [d % 4 for d in x.args[1]] != [0, 2, 1, 3]:
        return None
    heads = x.args[0]
    if heads.target is not aten.reshape.default or any(len(n.users) != 1 for n in (x, heads, heads.args[0])):
        return None
    linear, (batch, _, keys, _) = heads.args[0], shape_of(x)
    return linear if linear.target is aten.linear.default and shape_of(linear)[:-1] == (batch, keys) else None
