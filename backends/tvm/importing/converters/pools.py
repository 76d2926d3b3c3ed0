"""Pools and resizes, with torch's rules for borders and rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx
from tvm import te, tirx

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.registry import (
    R,
    aten,
    cast,
    ops,
    result_dtype,
    semantics,
    sizes,
)
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.kernels.extrema import extremum, limit
from thresher.ir.nodes import dtype_of


@semantics(ops.max_pool2d_nhwc.default, ops.max_pool3d_ndhwc.default)
def max_pool(importer: Importer, node: fx.Node) -> Any:
    """Compute a channels-last maximum over windows; pixels outside the image do not count."""
    x, kernel, stride, padding, dilation, _ = node.args

    def compute(t: te.Tensor) -> te.Tensor:
        out = [t.shape[0], *sizes(node, 1)]
        at, taps = _window(t, out, kernel, stride, padding, dilation, limit(t.dtype, largest=True))
        return te.compute(out, lambda *p: extremum(True)(at(*p), axis=taps), name="max_pool")

    return importer.emit_te("max_pool", compute, importer.value(x))


@semantics(ops.avg_pool2d_nhwc.default, ops.avg_pool3d_ndhwc.default)
def avg_pool(importer: Importer, node: fx.Node) -> Any:
    """Compute means over windows with torch's divisors, also of windows that leave the image or, with ceil_mode, the padding."""
    x, kernel, stride, padding, _, include, divisor = node.args
    if not dtype_of(node).is_floating_point:
        raise NotImplementedError("means of whole numbers")

    def compute(t: te.Tensor) -> te.Tensor:
        out, spatial = [t.shape[0], *sizes(node, 1)], [int(d) for d in t.shape[1:-1]]
        at, taps = _window(t, out, kernel, stride, padding, [1] * len(kernel), tirx.const(0, t.dtype))
        total = te.compute(out, lambda *p: te.sum(at(*p), axis=taps), name="sum_pool")
        inside = not any(padding) and all(
            (o - 1) * s + k <= size for o, s, k, size in zip(out[1:-1], stride, kernel, spatial)
        )

        def mean(*p: Any) -> Any:
            if divisor:
                return total[p] / tirx.const(float(divisor), t.dtype)
            if inside:
                return total[p] * tirx.const(1.0 / math.prod(kernel), t.dtype)
            count: Any = 1
            for position, s, k, size, pad in zip(p[1:-1], stride, kernel, spatial, padding):
                start, margin = position * s - pad, pad if include else 0
                count = count * (te.min(start + k, size + margin) - te.max(start, -margin))
            return total[p] / count.astype(t.dtype)

        return te.compute(out, mean, name="avg_pool")

    return importer.emit_te("avg_pool", compute, importer.value(x))


def _window(
    x: te.Tensor, out: list[Any], kernel: Any, stride: Any, padding: Any, dilation: Any, empty: Any
) -> tuple[Callable[..., Any], list[Any]]:
    """Return how a pool reads x [B, *spatial, C] at (batch, *pixel, channel), ``empty`` outside, and the axes of its taps.

    A window larger than the image goes over the pixels of the image instead of its own.
    """
    spatial = [int(d) for d in x.shape[1:-1]]
    larger = [k > size and d == 1 for k, d, size in zip(kernel, dilation, spatial)]
    counts = [size if all_pixels else k for all_pixels, size, k in zip(larger, spatial, kernel)]
    taps = [te.reduce_axis((0, n), name=f"k{d}") for d, n in enumerate(counts)]

    def at(b: Any, *rest: Any) -> Any:
        *position, c = rest
        read, inside = [], []
        for i, (p, s, pad, t, d, size) in enumerate(zip(position, stride, padding, taps, dilation, spatial)):
            start, o, k = p * s - pad, out[1:-1][i], kernel[i]
            if larger[i]:
                read.append(t)
                inside += [t >= start] * ((o - 1) * s > pad) + [t < start + k] * (k - pad < size)
            else:
                read.append(start + t * d)
                inside += _border(read[-1], pad, _overhangs(o, s, pad, k, d, size), size)
        if not inside:
            return x[(b, *read, c)]
        clamped = [te.max(te.min(r, size - 1), 0) for r, size in zip(read, spatial)]
        return tirx.if_then_else(te.all(*inside), x[(b, *clamped, c)], empty)

    return at, taps


def _border(position: Any, before: int, after: bool, size: int) -> list[Any]:
    """Return the conditions that keep an index inside, where it can leave at all."""
    return [position >= 0] * (before > 0) + [position < size] * after


def _overhangs(out: int, stride: int, padding: int, kernel: int, dilation: int, size: int) -> bool:
    return (out - 1) * stride - padding + (kernel - 1) * dilation >= size


@semantics(aten.upsample_nearest2d.vec, ops.upsample_nearest2d_nhwc.default)
def resize_nearest(importer: Importer, node: fx.Node) -> Any:
    """Read the pixel floor(index * in / out), in float32 as torch computes it."""
    first = _first_spatial(node)
    ratios = _ratios(node, argument(node, 2, "scale_factors"))
    picks = [
        np.minimum((np.arange(out, dtype=np.float32) * ratio).astype(np.int64), size - 1) for out, size, ratio in ratios
    ]
    rows_, columns = (importer.weight(p, ("nearest", node, d)) for d, p in enumerate(picks))
    value = importer.emit(R.take(importer.value(node.args[0]), rows_, axis=first))
    return importer.emit(R.take(value, columns, axis=first + 1))


@semantics(aten.upsample_bilinear2d.vec, ops.upsample_bilinear2d_nhwc.default)
def resize_bilinear(importer: Importer, node: fx.Node) -> Any:
    """Weight two neighbours per axis by distance; the tables are made here, in float32 as torch computes them."""
    corners, first = bool(node.args[2]), _first_spatial(node)
    value, dtype = importer.value(node.args[0]), result_dtype(node)
    for axis, (out, size, ratio) in enumerate(_ratios(node, argument(node, 3, "scale_factors"))):
        position = np.arange(out, dtype=np.float32)
        if corners:
            position = position * np.float32((size - 1) / (out - 1) if out > 1 else 0)
        else:
            position = np.maximum((position + np.float32(0.5)) * ratio - np.float32(0.5), 0)
        low = np.minimum(position.astype(np.int64), size - 1)
        part = (position - low).astype(np.float32).reshape([-1 if d == axis + first else 1 for d in range(4)])
        low_index = importer.weight(low, ("low", node, axis))
        high_index = importer.weight(np.minimum(low + 1, size - 1), ("high", node, axis))
        weight = cast(importer, importer.weight(part, ("part", node, axis)), dtype)
        near, far = (importer.emit(R.take(value, i, axis=axis + first)) for i in (low_index, high_index))
        value = importer.emit(R.add(near, importer.emit(R.multiply(importer.emit(R.subtract(far, near)), weight))))
    return value


def _first_spatial(node: fx.Node) -> int:
    """Return the axis of the image's height."""
    return 1 if node.target in (ops.upsample_nearest2d_nhwc.default, ops.upsample_bilinear2d_nhwc.default) else 2


def _ratios(node: fx.Node, factors: Any) -> list[tuple[int, int, np.float32]]:
    """Return per spatial axis: result size, argument size, argument pixels per result pixel."""
    first = _first_spatial(node)
    before, after = (sizes(n, first)[:2] for n in (node.args[0], node))
    scales = factors or (None, None)
    return [
        (o, s, np.float32(1.0 / f) if f else np.float32(s) / np.float32(o)) for o, s, f in zip(after, before, scales)
    ]
