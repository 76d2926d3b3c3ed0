"""An image as the columns of its windows, and back: ``unfold`` and ``fold`` of torch, which ATen calls im2col and col2im."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from tvm import te, tirx

from thresher.backends.tvm.importing.converters.registry import R, accumulator, aten, semantics, sizes
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.importing.values import tensor_type
from thresher.ir.nodes import dtype_of


@semantics(aten.im2col.default)
def im2col(importer: Importer, node: fx.Node) -> Any:
    """Return the windows of an image [.., C, H, W] as columns, [.., C KH KW, OH OW]; pixels outside are zero."""
    x, kernel, dilation, padding, stride = node.args
    channels, *size = sizes(x, -3)
    grid = grid_of(size, kernel, dilation, padding, stride)

    def compute(t: te.Tensor) -> te.Tensor:
        lead = len(t.shape) - 3

        def element(*index: Any) -> Any:
            *at, i, j, row, column = index
            axes = zip((row, column), (i, j), stride, dilation, padding)
            pixel = [p * s + tap * d - pad for p, tap, s, d, pad in axes]
            return _inside(t, at, pixel, size)

        return te.compute([*t.shape[:lead], channels, *kernel, *grid], element, name="im2col")

    columns = importer.emit_te("im2col", compute, importer.value(x))
    return importer.emit(R.reshape(columns, tensor_type(node.meta["val"], importer.sizes).shape))


@semantics(aten.col2im.default)
def col2im(importer: Importer, node: fx.Node) -> Any:
    """Return the image [.., C, H, W] whose pixels are the sums of what the columns [.., C KH KW, OH OW] have for them.

    A pixel asks the windows that it lies in; without dilation, only those.
    """
    x, size, kernel, dilation, padding, stride = node.args
    if dtype_of(node).is_complex:
        raise NotImplementedError("complex numbers")
    channels, grid, kind = sizes(node, -3)[0], grid_of(size, kernel, dilation, padding, stride), accumulator(node)
    near = [d == 1 for d in dilation]
    counts = [-(-k // s) if n else k for k, s, n in zip(kernel, stride, near)]

    def compute(t: te.Tensor) -> te.Tensor:
        taps = [te.reduce_axis((0, n), name=f"t{d}") for d, n in enumerate(counts)]

        def window(position: Any, tap: Any, d: int) -> tuple[Any, Any, list[Any]]:
            """Return the tap and the window at which the pixel ``position`` is read along one axis, and the conditions for it."""
            position = position + padding[d]
            if near[d]:
                tap = position % stride[d] + tap * stride[d]
                conditions = [tap < kernel[d]]
            else:
                conditions = [(position - tap * dilation[d]) % stride[d] == 0]
            at = tirx.floordiv(position - tap * dilation[d], stride[d])
            return tap, at, [*conditions, at >= 0, at < grid[d]]

        def element(*index: Any) -> Any:
            *at, channel, row, column = index
            i, place_y, inside_y = window(row, taps[0], 0)
            j, place_x, inside_x = window(column, taps[1], 1)
            tap = (channel * kernel[0] + i) * kernel[1] + j
            value = t[(*at, tap, place_y * grid[1] + place_x)].astype(kind)
            inside = tirx.all(*inside_y, *inside_x)
            return te.sum(tirx.if_then_else(inside, value, tirx.const(0, kind)), axis=taps)

        total = te.compute([*t.shape[:-2], channels, *size], element, name="col2im")
        return total if kind == t.dtype else te.compute(total.shape, lambda *i: total[i].astype(t.dtype), name="cast")

    return importer.emit_te("col2im", compute, importer.value(x))


def grid_of(size: Sequence[int], kernel: Any, dilation: Any, padding: Any, stride: Any) -> list[int]:
    """Return how many windows an image has along each axis."""
    axes = zip(size, kernel, dilation, padding, stride)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in axes]


def _inside(t: te.Tensor, at: Sequence[Any], pixel: Sequence[Any], size: Sequence[int]) -> Any:
    conditions = [c for p, n in zip(pixel, size) for c in (p >= 0, p < n)]
    return tirx.if_then_else(tirx.all(*conditions), t[(*at, *pixel)], tirx.const(0, t.dtype))
