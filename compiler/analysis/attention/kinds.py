"""Cheaper kinds of attention that a model was trained with: named, and lowered by the same kernels as they are.

windows        batch and windows are one dimension of the site              (Swin; HiLo's Hi-Fi heads; CSWin's stripes)
pooled keys    keys come from fewer tokens than queries, by a pool or a strided convolution    (PVT; HiLo's Lo-Fi heads)
pooling        pool(x) - x, or pool(x), in the place of an attention        (PoolFormer)
channels       queries and keys are channels, tokens are summed over        (XCiT)
"""

from __future__ import annotations

import torch
from torch import fx

from thresher.analysis.attention.sites import AttentionSite
from thresher.ir.nodes import is_tensor, shape_of
from thresher.ir.program import Program

aten = torch.ops.aten
POOLS = (
    aten.avg_pool2d.default,
    aten.avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool1d.default,
    aten.mean.dim,
)
MAX_STEPS = 24  # operators between the keys and what pools them
STRIDED = (aten.conv2d.default, aten.conv1d.default)
PASSED_THROUGH = (
    aten.permute.default, aten.reshape.default, aten.transpose.int, aten.linear.default, aten.layer_norm.default, aten.slice.Tensor,
    aten.select.int, aten.squeeze.dims, aten.squeeze.dim, aten.unsqueeze.default, aten.gelu.default, aten.group_norm.default,
    aten.batch_norm.default, aten.cat.default,
)  # fmt: skip


def kind_of(program: Program, site: AttentionSite) -> str:
    """Return the kind of attention that the model has at a site; empty for the plain one."""
    batch, _, rows, keys = site.shape
    first_size = next((shape_of(n)[0] for n in program.placeholders if is_tensor(n) and shape_of(n)), batch)
    pooling = _pooled_by(site.k) if keys < rows else ""
    if pooling:
        return f"pooled keys (by {pooling})"
    if isinstance(first_size, int) and first_size and batch > first_size and batch % first_size == 0:
        return f"{batch // first_size} windows"
    return "channels" if keys == rows == _channels(site) else ""


def find_pooling_mixers(program: Program) -> list[fx.Node]:
    """Return the averages of neighbouring tokens less the token itself, which PoolFormer has instead of attention (Yu et al. 2022)."""
    return [
        node
        for node in program.calls(aten.sub.Tensor)
        if is_tensor(node.args[0])
        and node.args[0].target is aten.avg_pool2d.default
        and node.args[0].args[0] is node.args[1]
    ]


def _pooled_by(node: fx.Node) -> str:
    """Return the operator that made the tokens fewer, going back from the keys; empty where none is found."""
    for _ in range(MAX_STEPS):
        if node.target in POOLS:
            return node.target.__name__.partition(".")[0]
        if node.target in STRIDED:
            stride = node.args[3] if len(node.args) > 3 else [1]
            return "a strided convolution" if max(stride) > 1 else ""
        if node.target not in PASSED_THROUGH:
            return ""
        node = node.args[0][-1] if node.target is aten.cat.default else node.args[0]
    return ""


def _channels(site: AttentionSite) -> int:
    """Return the channels of a head, if it is channels that attend, else -1: then they are few, and the sum is over tokens."""
    rows, summed = site.shape[2], shape_of(site.q)[3]
    return rows if summed > 2 * rows else -1
