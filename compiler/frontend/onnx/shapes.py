"""ONNX operators that move elements and compute none, in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.frontend.onnx.rules import RULES, Node, Unsupported, rule


@rule("Reshape")
def reshape(node: Node, x: Any, shape: Any) -> Tensor:
    """Return x in a shape whose zeros stand for sizes of x."""
    x, sizes = node.tensor(x), node.numbers("shape", shape)
    assert sizes is not None
    if not node.get("allowzero", 0):
        sizes = [x.shape[i] if s == 0 else s for i, s in enumerate(sizes)]
    return x.reshape(sizes)


def _rows(x: Tensor, axis: int) -> Tensor:
    axis = axis % x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _expanded(x: Tensor, shape: list[int]) -> Tensor:
    """Return x broadcast in both directions: where the shape says 1, x stays as wide as it is."""
    return x.expand(torch.broadcast_shapes(x.shape, shape))


@rule("Squeeze")
def squeeze(node: Node, x: Tensor, axes: Any = None) -> Tensor:
    """Return x without dimensions of size 1."""
    dims = node.numbers("axes", axes)
    return x.squeeze() if dims is None else x.squeeze(tuple(dims))


@rule("Unsqueeze")
def unsqueeze(node: Node, x: Any, axes: Any = None) -> Tensor:
    """Return x with new dimensions of size 1."""
    x, dims = node.tensor(x), node.numbers("axes", axes) or []
    rank = x.dim() + len(dims)
    for d in sorted(d % rank for d in dims):
        x = x.unsqueeze(d)
    return x


@rule("Slice")
def slice_(node: Node, x: Any, *bounds: Any) -> Tensor:
    """Return x[starts:ends:steps] along the axes; negative steps pick by index."""
    x = node.tensor(x)
    values = [*bounds, *[None] * 4]
    starts, ends = (node.numbers(k, v) or [] for k, v in zip(("starts", "ends"), values))
    axes = node.numbers("axes", values[2]) or list(range(len(starts)))
    for start, end, axis, step in zip(starts, ends, axes, node.numbers("steps", values[3]) or [1] * len(starts)):
        if step > 0:
            axis_slice: list[Any] = [slice(None)] * x.dim()
            axis_slice[axis] = slice(start, end, step)
            x = x[tuple(axis_slice)]
        else:
            indices = list(range(int(x.shape[axis])))[start : None if end < -int(x.shape[axis]) else end : step]
            x = x.index_select(axis, torch.tensor(indices))
    return x


@rule("Split")
def split(node: Node, x: Tensor, sizes: Any = None) -> Sequence[Tensor]:
    """Return x in parts along an axis, equal ones where no sizes are stated."""
    axis = node.get("axis", 0)
    lengths = node.numbers("split", sizes)
    if lengths is None:
        width = -(-int(x.shape[axis]) // node.outputs)
        return x.split(width, axis)
    return x.split(lengths, axis)


@rule("Gather")
def gather(node: Node, x: Any, indices: Any) -> Tensor:
    """Return the elements of x at indices along an axis; rows of a matrix as an embedding."""
    x, axis = node.tensor(x), node.get("axis", 0)
    if isinstance(indices, np.ndarray) and indices.ndim == 0:
        return x.select(axis, int(indices))
    index = node.tensor(indices).long()
    index = torch.where(index < 0, index + x.shape[axis], index)
    axis = axis % x.dim()
    if axis == 0 and x.dim() == 2 and x.is_floating_point():
        return F.embedding(index, x)
    return x.index_select(axis, index.reshape(-1)).reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


@rule("ScatterElements")
def scatter_elements(node: Node, x: Any, indices: Any, updates: Any) -> Tensor:
    """Return x with ``updates`` written at indices along an axis."""
    if node.get("reduction", "none") != "none":
        raise Unsupported(f"the reduction {node.get('reduction')}")
    x, index, axis = node.tensor(x), node.tensor(indices).long(), node.get("axis", 0)
    return x.scatter(axis, torch.where(index < 0, index + x.shape[axis], index), node.tensor(updates))


@rule("Pad")
def pad(node: Node, x: Any, pads: Any = None, fill: Any = None, axes: Any = None) -> Tensor:
    """Return x padded with a constant, its reflection, its edge or its other end."""
    x, amounts = node.tensor(x), node.numbers("pads", pads) or []
    over = node.numbers("axes", axes) or list(range(x.dim()))
    value = node.get("value", 0.0) if fill is None else float(node.static(fill, "value"))
    around = [0] * (2 * x.dim())
    for i, axis in enumerate(over):
        index = 2 * (x.dim() - 1 - axis % x.dim())
        around[index : index + 2] = amounts[i], amounts[i + len(over)]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        node.get("mode", "constant")
    ]
    if mode == "constant":
        return F.pad(x, around, value=value)
    while len(around) > 2 and around[-2:] == [0, 0]:
        around = around[:-2]
    lead = x.dim() - len(around) // 2  # torch pads the last ones of two to five dimensions
    flat = x.reshape(1, -1, *x.shape[lead:])
    padded = F.pad(flat, around, mode=mode)
    return padded.reshape(*x.shape[:lead], *padded.shape[2:])


@rule("ConstantOfShape")
def constant_of_shape(node: Node, shape: Any) -> Tensor:
    """Refuse: with a constant shape it is evaluated beforehand."""
    raise Unsupported("its shape depends on values")


@rule("Range", "Mod")
def on_values(node: Node, *values: Any) -> Tensor:
    """Refuse: with constant inputs these are evaluated beforehand."""
    raise Unsupported("its numbers depend on values, not on shapes")


@rule("DepthToSpace")
def depth_to_space(node: Node, x: Tensor) -> Tensor:
    """Return blocks of channels as blocks of pixels."""
    size = node.get("blocksize")
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, size)
    n, c, h, w = x.shape
    y = x.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // size**2, h * size, w * size)


RULES |= {
    "Shape": lambda n, x: np.array(x.shape[n.get("start", 0):n.get("end")]),
    "Size": lambda n, x: np.array(math.prod(x.shape)), "Transpose": lambda n, x: x.permute(n.get("perm") or list(range(x.dim()))[::-1]),
    "Concat": lambda n, *v: torch.cat([n.tensor(x) for x in v], n.get("axis")), "Flatten": lambda n, x: _rows(x, n.get("axis", 1)),
    "GatherElements": lambda n, x, i: torch.gather(n.tensor(x), n.get("axis", 0), n.tensor(i).long()),
    "Expand": lambda n, x, s: _expanded(n.tensor(x), n.numbers("shape", s)), "Tile": lambda n, x, r: x.repeat(n.numbers("repeats", r)),
}  # fmt: skip
