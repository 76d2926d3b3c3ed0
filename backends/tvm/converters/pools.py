"""Pools and resizes, with torch's rules for borders and rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx
from tvm import te, tirx

from thresher.analysis.rows.base import argument
from thresher.backends.tvm.converters.registry import (
    R,
    aten,
    cast,
    ops,
    result_dtype,
    semantics,
    sizes,
)
from thresher.backends.tvm.importer import Importer


@semantics(ops.max_pool2d_nhwc.default)
def max_pool2d_nhwc(importer: Importer, node: fx.Node) -> Any:
    x, kernel, stride, padding, dilation, _ = node.args
    return importer.emit_te(
        "max_pool",
        lambda t: _pool(t, [t.shape[0], *sizes(node, 1)], kernel, stride, padding, dilation, "max", None, True),
        importer.value(x),
    )


@semantics(ops.avg_pool2d_nhwc.default)
def avg_pool2d_nhwc(importer: Importer, node: fx.Node) -> Any:
    x, kernel, stride, padding, _, include, divisor = node.args
    return importer.emit_te(
        "avg_pool",
        lambda t: _pool(t, [t.shape[0], *sizes(node, 1)], kernel, stride, padding, (1, 1), "avg", divisor, include),
        importer.value(x),
    )


def _pool(
    x: te.Tensor,
    out: list[int],
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    kind: str,
    divisor: int | None,
    include: bool,
) -> te.Tensor:
    """Pools of [B, H, W, C] with torch's rules: ceil_mode windows end at the padded border, divisors as torch counts them."""
    height, width = int(x.shape[1]), int(x.shape[2])
    i, j = te.reduce_axis((0, kernel[0]), name="i"), te.reduce_axis((0, kernel[1]), name="j")
    empty = te.min_value(x.dtype) if kind == "max" else tirx.const(0, x.dtype)

    def at(b: Any, y: Any, z: Any, c: Any) -> Any:
        row, column = y * stride[0] - padding[0] + i * dilation[0], z * stride[1] - padding[1] + j * dilation[1]
        inside = [
            *_border(
                row, padding[0], _overhangs(out[1], stride[0], padding[0], kernel[0], dilation[0], height), height
            ),
            *_border(
                column, padding[1], _overhangs(out[2], stride[1], padding[1], kernel[1], dilation[1], width), width
            ),
        ]
        if not inside:
            return x[b, row, column, c]
        return tirx.if_then_else(
            te.all(*inside), x[b, te.max(te.min(row, height - 1), 0), te.max(te.min(column, width - 1), 0), c], empty
        )

    if kind == "max":
        return te.compute(out, lambda *p: te.max(at(*p), axis=[i, j]), name="max_pool")
    total = te.compute(out, lambda *p: te.sum(at(*p), axis=[i, j]), name="sum_pool")

    def mean(b: Any, y: Any, z: Any, c: Any) -> Any:
        if divisor:
            return total[b, y, z, c] / tirx.const(float(divisor), x.dtype)
        if (
            not any(padding)
            and (out[1] - 1) * stride[0] + kernel[0] <= height
            and (out[2] - 1) * stride[1] + kernel[1] <= width
        ):
            return total[b, y, z, c] * tirx.const(1.0 / (kernel[0] * kernel[1]), x.dtype)
        low = [y * stride[0] - padding[0], z * stride[1] - padding[1]]
        pads = padding if include else (0, 0)
        counts = []
        for start, k, size, pad in zip(low, kernel, (height, width), pads):
            counts.append(te.min(start + k, size + pad) - te.max(start, -pad))
        return total[b, y, z, c] / (counts[0] * counts[1]).astype(x.dtype)

    return te.compute(out, mean, name="avg_pool")


def _border(place: Any, before: int, after: bool, size: int) -> list[Any]:
    """The conditions that keep ``place`` inside, where it can leave at all."""
    return [place >= 0] * (before > 0) + [place < size] * after


def _overhangs(out: int, stride: int, padding: int, kernel: int, dilation: int, size: int) -> bool:
    return (out - 1) * stride - padding + (kernel - 1) * dilation >= size


@semantics(aten.upsample_nearest2d.vec)
def resize_nearest(importer: Importer, node: fx.Node) -> Any:
    """Pixel floor(place * in / out), in float32 as torch computes it."""
    ratios = _ratios(node, argument(node, 2, "scale_factors"))
    picks = [
        np.minimum((np.arange(out, dtype=np.float32) * ratio).astype(np.int64), size - 1) for out, size, ratio in ratios
    ]
    rows_, columns = (importer.weight(p, ("nearest", node, d)) for d, p in enumerate(picks))
    return importer.emit(R.take(importer.emit(R.take(importer.value(node.args[0]), rows_, axis=2)), columns, axis=3))


@semantics(aten.upsample_bilinear2d.vec)
def resize_bilinear(importer: Importer, node: fx.Node) -> Any:
    """Two neighbours per axis, weighted by distance; the tables are made here, in float32 as torch computes them."""
    corners = bool(node.args[2])
    value, dtype = importer.value(node.args[0]), result_dtype(node)
    for axis, (out, size, ratio) in enumerate(_ratios(node, argument(node, 3, "scale_factors"))):
        place = np.arange(out, dtype=np.float32)
        if corners:
            place = place * np.float32((size - 1) / (out - 1) if out > 1 else 0)
        else:
            place = np.maximum((place + np.float32(0.5)) * ratio - np.float32(0.5), 0)
        low = np.minimum(place.astype(np.int64), size - 1)
        part = (place - low).astype(np.float32).reshape([-1 if d == axis + 2 else 1 for d in range(4)])
        low_index = importer.weight(low, ("low", node, axis))
        high_index = importer.weight(np.minimum(low + 1, size - 1), ("high", node, axis))
        weight = cast(importer, importer.weight(part, ("part", node, axis)), dtype)
        near, far = (importer.emit(R.take(value, i, axis=axis + 2)) for i in (low_index, high_index))
        value = importer.emit(R.add(near, importer.emit(R.multiply(importer.emit(R.subtract(far, near)), weight))))
    return value


def _ratios(node: fx.Node, factors: Any) -> list[tuple[int, int, np.float32]]:
    """Per spatial axis: result size, argument size, argument pixels per result pixel."""
    before, after = sizes(node.args[0], 2), sizes(node, 2)
    given = factors or (None, None)
    return [
        (o, s, np.float32(1.0 / f) if f else np.float32(s) / np.float32(o)) for o, s, f in zip(after, before, given)
    ]
