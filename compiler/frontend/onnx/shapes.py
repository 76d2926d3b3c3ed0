"""ONNX operators that change the shape of a tensor, or make one of a shape, in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.frontend.onnx.dtypes import torch_dtype
from thresher.frontend.onnx.rules import Ints, Node, rule
from thresher.frontend.onnx.values import Unsupported, Value, constant, real_tensors


@rule("Shape", since=1)
def shape(x: Value, *, start: int = 0, end: int | None = None) -> Value:
    """Return the sizes of x."""
    return constant([int(s) for s in x.data.shape][start:end])


@rule("Size")
def size(x: Value) -> Value:
    """Return the number of elements of x."""
    return constant(math.prod(int(s) for s in x.data.shape))


@rule("Reshape", since=5, unsigned="native")
def reshape(x: Tensor, sizes: Ints, *, allowzero: int = 0) -> Tensor:
    """Return x in another shape, whose zeros stand for sizes of x."""
    if allowzero:
        return x.reshape(tuple(sizes))
    return x.reshape([x.shape[i] if s == 0 else s for i, s in enumerate(sizes)])


@rule("Flatten", unsigned="native")
def flatten(x: Tensor, *, axis: int) -> Tensor:
    """Return x as a matrix: the dimensions before an axis, and the others."""
    return matrix(x, axis)


def matrix(x: Tensor, axis: int) -> Tensor:
    """Return x as a matrix: the dimensions before an axis, and the others."""
    axis = axis % x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@rule("Squeeze", since=13, unsigned="native")
def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Return x without dimensions of size 1."""
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@rule("Squeeze", unsigned="native")
def squeeze_by_attribute(x: Tensor, *, axes: Sequence[int] | None = None) -> Tensor:
    """Return x without dimensions of size 1."""
    return squeeze(x, axes)


@rule("Unsqueeze", since=13, unsigned="native")
def unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    """Return x with new dimensions of size 1."""
    rank = x.dim() + len(axes)
    for d in sorted(d % rank for d in axes):
        x = x.unsqueeze(d)
    return x


@rule("Unsqueeze", unsigned="native")
def unsqueeze_by_attribute(x: Tensor, *, axes: Sequence[int]) -> Tensor:
    """Return x with new dimensions of size 1."""
    return unsqueeze(x, axes)


@rule("Transpose", unsigned="native")
def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Return x with its dimensions in another order, without one in the reverse order."""
    return x.permute(list(range(x.dim()))[::-1] if perm is None else list(perm))


@rule("Expand", unsigned="native")
def expand(x: Tensor, sizes: Ints) -> Tensor:
    """Return x broadcast in both directions: where the shape says 1, x stays as wide as it is."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(sizes)))


@rule("Tile", since=6)
def tile(x: Tensor, repeats: Ints) -> Tensor:
    """Return x side by side with itself."""
    return x.repeat(tuple(repeats))


@rule("Concat", since=4, unsigned="native")
def concat(*values: Tensor, axis: int) -> Tensor:
    """Return tensors side by side."""
    return torch.cat(values, axis)


@rule("Split", since=2)
def split_by_attribute(
    node: Node, x: Tensor, *, axis: int = 0, split: Sequence[int] | None = None, num_outputs: int | None = None
) -> Sequence[Tensor]:
    """Return x in parts along an axis: of the sizes stated, or of equal ones, of which the last may be smaller."""
    if split is not None:
        return x.split(list(split), axis)
    length, count = int(x.shape[axis]), num_outputs or node.outputs
    width = -(-length // count)
    return x.split([min(width, length - i * width) for i in range(count)], axis)


@rule("Split", since=13)
def split(
    node: Node, x: Tensor, sizes: Ints | None = None, *, axis: int, num_outputs: int | None = None
) -> Sequence[Tensor]:
    """Return x in parts along an axis: of the sizes stated, or of equal ones, of which the last may be smaller."""
    return split_by_attribute(node, x, axis=axis, split=sizes, num_outputs=num_outputs)


@rule("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Return blocks of channels as blocks of pixels."""
    if mode == "CRD":
        return F.pixel_shuffle(x, blocksize)
    n, c, h, w = x.shape
    y = x.reshape(n, blocksize, blocksize, c // blocksize**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


@rule("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Return blocks of pixels as blocks of channels."""
    if mode == "CRD":
        return F.pixel_unshuffle(x, blocksize)
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


@rule("ConstantOfShape", unsigned="native")
def constant_of_shape(sizes: Ints, *, value: Tensor | None = None) -> Tensor:
    """Return a tensor of one number, which is 0 without another."""
    if value is None:
        return torch.zeros(tuple(sizes))
    return value.reshape([1] * len(sizes)).expand(tuple(sizes))


@rule("Constant")
def constant_node(
    *,
    sparse_value: Tensor | None = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
) -> Value:
    """Return the number or the numbers of the node; a ``value`` is among the constants of the graph already."""
    if sparse_value is not None:
        return Value(sparse_value, constant=True)
    for number, dtype in (
        (value_float, torch.float32), (value_floats, torch.float32), (value_int, torch.int64), (value_ints, torch.int64)
    ):  # fmt: skip
        if number is not None:
            return constant(number, dtype)
    raise Unsupported("a constant of no number")


@rule("Range")
def range_(start: Value, limit: Value, step: Value, *, stash_type: int = 1) -> Value:
    """Return start, start + step, ... below the limit."""
    with real_tensors():
        first, last, width = (v.known(name) for v, name in ((start, "start"), (limit, "limit"), (step, "step")))
        dtype = first.dtype
        if not dtype.is_floating_point:
            return Value(torch.arange(int(first), int(last), int(width), dtype=dtype), constant=True)
        wide = torch_dtype(stash_type) if dtype.itemsize == 2 else dtype
        first, last, width = (v.to(wide) for v in (first, last, width))
        count = max(0, math.ceil((last - first) / width))
        return Value((first + torch.arange(count, dtype=wide) * width).to(dtype), constant=True)


@rule("EyeLike")
def eye_like(node: Node, x: Tensor, *, dtype: int | None = None, k: int) -> Tensor:
    """Return a matrix of the shape of x, of ones on the k-th diagonal."""
    rows, columns = x.shape
    ones = torch.ones(rows, columns)
    return (torch.triu(ones, k) - torch.triu(ones, k + 1)).to(x.dtype if dtype is None else torch_dtype(dtype))


@rule("Trilu")
def trilu(x: Tensor, k: Ints = (0,), *, upper: int) -> Tensor:
    """Return a triangle of x, zeros elsewhere."""
    return torch.triu(x, k[0]) if upper else torch.tril(x, k[0])
