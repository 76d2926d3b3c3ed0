"""Convolutions and transposed convolutions by kernels of ours, for CPUs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import fx
from tvm import te, tirx

from thresher.backends.tvm.importing.converters.products import widen
from thresher.backends.tvm.importing.converters.registry import (
    R,
    add_bias,
    aten,
    cpu_kernel,
    ops,
    pad,
    sizes,
)
from thresher.backends.tvm.importing.converters.stock_convolutions import arguments_of, convolution
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.kernels.cpu import batched, depthwise, gemm, winograd
from thresher.ir.nodes import shape_of


def _padded(importer: Importer, x: Any, before: list[int], after: list[int], channels: int = 0) -> Any:
    """Return [B, *spatial, C] with zeros around the image, and ``channels`` of them after its own."""
    if not any((*before, *after, channels)):
        return x
    return importer.emit_te("pad", lambda t: pad(t, (0, *before, 0), (0, *after, channels), 0), x)


@cpu_kernel(ops.conv2d_nhwc.default, ops.conv3d_ndhwc.default)
def conv_kernel(importer: Importer, node: fx.Node) -> Any:
    """Compute a channels-last convolution: of groups with few outputs (depthwise) by its own kernel, 3x3 by Winograd's minimal filtering
    where that is estimated to be faster (Lavin & Gray, 2016), else as a packed product per group.
    """
    x, weight, bias, stride, padding, dilation, groups = node.args
    array, (*out, outputs) = importer.array(weight), sizes(node)
    if _has_small_groups(importer, node, array, outputs):
        window = depthwise.Window(stride, dilation, padding)
        return add_bias(importer, _conv_depthwise(importer, node, array, (weight, "depthwise"), window, out), bias)
    plan = importer.choose(node, lambda limit: _plans(importer, node, array, out, limit))
    if isinstance(plan, winograd.Plan):
        return add_bias(importer, _conv_winograd(importer, node, array, out, plan), bias)
    image, part = _padded(importer, importer.value(x), padding, padding), Group(weight, 0, out, stride, dilation)
    if groups > 1:
        return add_bias(importer, _conv_groups(importer, image, array, part, plan, groups), bias)
    plan, wide = widen(importer, node, plan)
    return add_bias(importer, _conv_group(importer, image, array, part, plan, wide), bias, wide)


def _plans(
    importer: Importer, node: fx.Node, array: np.ndarray, out: list[int], limit: int
) -> list[gemm.Plan | winograd.Plan]:
    """Return the plans of a convolution, the one estimated to be the fastest first."""
    *_, stride, _, dilation, groups = node.args
    outputs, inputs, *taps = array.shape
    machine = importer.cpu
    width = gemm.whole(outputs // groups, machine.lanes) if groups > 1 else 0
    direct = _plans_of_product(importer, out, (groups * width or outputs, inputs, *taps), limit, width)
    single = all(list(v) == [1, 1] for v in (stride, dilation))
    if importer.strict_rounding or taps != [3, 3] or groups != 1 or not single:
        return [*direct]
    filtering, faster = winograd.plans(lambda m: winograd.Tiling(m, *out), inputs, outputs, machine, limit)
    pairs = itertools.zip_longest(filtering, direct) if faster else itertools.zip_longest(direct, filtering)
    return [plan for pair in pairs for plan in pair if plan is not None][:limit]


def _plans_of_product(
    importer: Importer, out: Sequence[int], weight: Sequence[int], limit: int, part: int = 0
) -> list[gemm.Plan]:
    """Return the plans of a convolution as a product; ``weight`` is the shape [O, I, *taps], ``part`` as for :func:`gemm.plans`."""
    outputs, inputs, *taps = weight
    line = out[-1] if math.prod(taps) > 1 else 0
    return gemm.plans(math.prod(out), outputs, (*taps, inputs), importer.cpu, limit, line, part=part)


def _outputs_first(array: np.ndarray, groups: int) -> np.ndarray:
    """Return the weight of a transposed convolution, [groups * I, O, *taps], as that of an ordinary one, [groups * O, I, *taps]."""
    _, outputs, *taps = array.shape
    return array.reshape(groups, -1, outputs, *taps).swapaxes(1, 2).reshape(groups * outputs, -1, *taps)


def _has_small_groups(importer: Importer, node: fx.Node, array: np.ndarray, outputs: int) -> bool:
    """Return whether the kernel of small groups takes a convolution of two dimensions, transposed or not."""
    groups, inputs = int(node.args[6]), shape_of(node.args[0])[-1]
    few = outputs // groups < importer.cpu.lanes and inputs // groups <= depthwise.MOST_INPUTS
    return array.ndim == 4 and groups > 1 and few


def _conv_depthwise(
    importer: Importer, node: fx.Node, array: np.ndarray, key: Any, window: depthwise.Window, out: list[int]
) -> Any:
    """Compute a convolution of small groups; ``array`` is [O, I, KH, KW], ``key`` names it, ``out`` are the pixels, batch first."""
    machine, shape = importer.cpu, (*out, len(array))
    groups = shape_of(node.args[0])[-1] // array.shape[1]
    task = importer.choose(node, lambda limit: depthwise.tasks(out, array.shape, window, machine, limit))
    w = importer.weight(depthwise.pack(array, machine.lanes), key)

    def compute(image: te.Tensor, w: te.Tensor) -> te.Tensor:
        return depthwise.convolution(image, w, shape, groups, window, task)

    return importer.emit_te("depthwise", compute, importer.value(node.args[0]), w)


def _conv_winograd(importer: Importer, node: fx.Node, array: np.ndarray, out: list[int], plan: winograd.Plan) -> Any:
    weight, padding = node.args[1], node.args[4]
    x, tiling = importer.value(node.args[0]), winograd.Tiling(plan.m, *out)
    importer.rounds_more |= plan.m > 2
    outputs, inputs = array.shape[:2]
    full, channels = (gemm.whole(size, importer.cpu.lanes) for size in (outputs, inputs))
    image = _padded(
        importer, x, [0, 0], [0, 0], channels - inputs
    )  # to whole registers, once: each pixel is read several times
    need = [tiling.m * grid + 2 for grid in tiling.grid]
    after = [n - p - size for n, p, size in zip(need, padding, [int(x.ty.shape[d]) for d in (1, 2)])]
    tile = gemm.Tile(plan.product.rows, plan.product.vectors, importer.cpu.lanes)
    array = np.pad(array, ((0, full - outputs), (0, channels - inputs), (0, 0), (0, 0)))
    filters = winograd.transform_filters(array, tiling.m)
    packed = np.stack([gemm.pack(np.ascontiguousarray(f.T), tile) for f in filters])
    w = importer.weight(packed, (weight, tile, tiling.m))

    def spread(t: te.Tensor) -> te.Tensor:
        return winograd.transform_input(pad(t, (0, *padding, 0), (0, *after, 0), 0), tiling)

    def multiply(t: te.Tensor, w: te.Tensor) -> te.Tensor:
        return batched.product(lambda b, m, k: t[b, m, k], w, tiling.count, full, plan.product)

    products = importer.emit_te("winograd_multiply", multiply, importer.emit_te("winograd_in", spread, image), w)
    return importer.emit_te("winograd_out", lambda t: winograd.transform_output(t, tiling, outputs), products)


@dataclass(frozen=True)
class Group:
    """A group of a convolution: it reads the channels from ``first`` on and writes the output pixels ``out`` (batch first).

    The first tap of the first output reads the pixel ``origin`` (default: the image's first one). ``key`` names the group's weights.
    """

    key: Any
    first: int
    out: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    origin: Sequence[int] | None = None

    def pixel(self, image: te.Tensor, row: Any, k: Sequence[Any], first: Any) -> Any:
        """Return what the output pixel ``row`` reads at ``k``: (tap, ..., channel), the channels counted from ``first`` on."""
        b, *pixel = gemm.unravel(row, self.out)
        *tap, c = k
        origin = self.origin or [0] * len(tap)
        at = [o + p * s + t * d for o, p, t, s, d in zip(origin, pixel, tap, self.stride, self.dilation)]
        return image[(b, *at, first + c)]


def _conv_group(importer: Importer, image: Any, array: np.ndarray, group: Group, plan: gemm.Plan, wide: int = 0) -> Any:
    """Return one group as a product: rows are the output pixels, the sum goes over the taps and the input channels.

    ``array`` is [O, I, *taps]; ``wide`` as for :func:`gemm.product`.
    """
    outputs, inputs, *taps = array.shape
    tile = plan.tile(importer.cpu)
    packed = importer.weight(gemm.pack(np.ascontiguousarray(np.moveaxis(array, 1, -1)), tile), (group.key, tile))

    def compute(image: te.Tensor, w: te.Tensor) -> te.Tensor:
        def read(m: Any, *k: Any) -> Any:
            return group.pixel(image, m, k, group.first)

        return gemm.product(read, w, (*taps, inputs), group.out, outputs, plan, wide)

    return importer.emit_te("conv", compute, image, packed)


def _conv_groups(importer: Importer, image: Any, array: np.ndarray, first: Group, plan: gemm.Plan, groups: int) -> Any:
    """Return all groups as one product: the panels of the packed weight belong to one group each, and read its channels.

    ``array`` is [groups * O, I, *taps]. Outputs that do not fill the panels of a group are computed beside zeros, which are cut out
    afterwards.
    """
    inputs, *taps = array.shape[1:]
    width, tile = len(array) // groups, plan.tile(importer.cpu)
    full = gemm.whole(width, importer.cpu.lanes)
    each = array.reshape(groups, width, inputs, *taps)
    padded = np.pad(each, [(0, 0), (0, full - width), *[(0, 0)] * (1 + len(taps))]).reshape(-1, inputs, *taps)
    packed = importer.weight(gemm.pack(np.ascontiguousarray(np.moveaxis(padded, 1, -1)), tile), (first.key, tile))
    return _product_of_groups(importer, image, packed, list(array.shape), first, plan, groups)


def _product_of_groups(
    importer: Importer, image: Any, packed: Any, weight: Sequence[int], first: Group, plan: gemm.Plan, groups: int
) -> Any:
    """Emit the product of all groups; ``weight`` is the shape [groups * O, I, *taps] that was packed, each group to whole registers."""
    outputs, inputs, *taps = weight
    width = outputs // groups
    full = gemm.whole(width, importer.cpu.lanes)

    def compute(image: te.Tensor, w: te.Tensor) -> te.Tensor:
        def read(m: Any, group: Any, *k: Any) -> Any:
            return first.pixel(image, m, k, group * inputs)

        return gemm.product(read, w, (*taps, inputs), first.out, groups * full, plan, groups=groups)

    value = importer.emit_te("conv", compute, image, packed)
    if full == width:
        return value

    def without_zeros(t: te.Tensor) -> te.Tensor:
        return te.compute((*first.out, outputs), lambda *i: t[(*i[:-1], i[-1] // width * full + i[-1] % width)])

    return importer.emit_te("ungroup", without_zeros, value)


@cpu_kernel(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def conv_of_computed_weight(importer: Importer, node: fx.Node) -> Any:
    """Compute a convolution, channels first, whose weight is computed: it is packed when it is there, for the product of a constant one.

    Groups that are narrower than half a register, and images without a batch, are left to TVM.
    """
    x, weight, bias, stride, padding, dilation, groups = arguments_of(node)
    (batch, outputs, *spatial), shape, rank = sizes(node), sizes(weight), len(shape_of(node)) - 2
    width, lanes = outputs // groups, importer.cpu.lanes
    if importer.is_constant(weight) or len(shape_of(x)) != rank + 2 or 2 * width < lanes:
        return convolution(importer, node)
    out, full = [batch, *spatial], gemm.whole(width, lanes)
    padded = [groups * full, *shape[1:]]
    plan = importer.choose(node, lambda limit: _plans_of_product(importer, out, padded, limit, full))
    columns = plan.tile(importer.cpu).columns

    def pack(w: te.Tensor) -> te.Tensor:
        def element(*i: Any) -> Any:
            panel, *tap, c, lane = i
            group, output = tirx.floordiv(panel, full // columns), panel % (full // columns) * columns + lane
            value = w[(group * width + te.min(output, width - 1), c, *tap)]
            return value if full == width else tirx.Select(output < width, value, tirx.const(0, w.dtype))

        return te.compute((groups * full // columns, *shape[2:], shape[1], columns), element, name="pack")

    channels_last = importer.emit(R.permute_dims(importer.value(x), [0, *range(2, rank + 2), 1]))
    image = _padded(importer, channels_last, padding, padding)
    packed = importer.emit_te("pack", pack, importer.value(weight), opaque=True)
    first = Group(weight, 0, out, stride, dilation)
    value = add_bias(importer, _product_of_groups(importer, image, packed, shape, first, plan, groups), bias)
    return importer.emit(R.permute_dims(value, [0, rank + 1, *range(1, rank + 1)]))


@dataclass(frozen=True)
class Phase:
    """The outputs of a transposed convolution at one position modulo the stride, along one axis.

    Of their ``taps`` the first reads the input ``start`` pixels away and each further one ``step`` pixels more.
    """

    taps: list[int]
    start: int
    step: int

    @property
    def last(self) -> int:
        """The distance in pixels of the input that the last tap reads."""
        return self.start + (len(self.taps) - 1) * self.step


def phases_of(taps: int, stride: int, padding: int, dilation: int) -> list[Phase]:
    """Return the phases of a transposed convolution along one axis, one for each q < stride.

    out[stride j + q] = sum_t in[j + (q + padding - t dilation) / stride] w[t], over the taps t for which that is a whole number: for
    every q an ordinary convolution.
    """
    phases = []
    for q in range(stride):
        reads = sorted(
            ((q + padding - t * dilation) // stride, t)
            for t in range(taps)
            if (q + padding - t * dilation) % stride == 0
        )
        start = reads[0][0] if reads else 0
        step = reads[1][0] - start if len(reads) > 1 else 1
        phases.append(Phase([t for _, t in reads], start, step))
    return phases


@cpu_kernel(ops.conv_transpose2d_nhwc.default, ops.conv_transpose3d_ndhwc.default)
def conv_transpose_kernel(importer: Importer, node: fx.Node) -> Any:
    """Compute each position modulo the stride by an ordinary convolution with its taps, and put the results side by side."""
    x, weight, bias, stride, padding, _, groups, dilation = node.args
    array, (batch, *out, outputs) = importer.array(weight), sizes(node)
    per_in = array.shape[0] // groups
    axes = [phases_of(*numbers) for numbers in zip(array.shape[2:], stride, padding, dilation)]
    size = [-(-o // s) for o, s in zip(out, stride)]
    before = [max(0, *(-phase.start for phase in axis)) for axis in axes]
    after = [
        max(0, *(count - have + phase.last for phase in axis))
        for axis, count, have in zip(axes, size, shape_of(x)[1:-1])
    ]
    small = _has_small_groups(importer, node, array, outputs)
    image = None if small else _padded(importer, importer.value(x), before, after)
    parts, phases = [], []
    for offsets, position in zip(itertools.product(*map(range, stride)), itertools.product(*axes)):
        if not all(phase.taps for phase in position):
            continue  # more stride than taps: nothing gets here
        phases.append(offsets)
        section = array[np.ix_(*map(range, array.shape[:2]), *(phase.taps for phase in position))]
        origin = [phase.start + b for phase, b in zip(position, before)]
        steps = [phase.step for phase in position]
        if small:
            window = depthwise.Window([1, 1], steps, [-phase.start for phase in position])
            named = (weight, "depthwise", tuple(tuple(phase.taps) for phase in position))
            kernel = _outputs_first(section, groups)
            parts.append(_conv_depthwise(importer, node, kernel, named, window, [batch, *size]))
            continue
        of_groups = []
        for group in range(groups):
            kernel = np.ascontiguousarray(section[group * per_in : (group + 1) * per_in].swapaxes(0, 1))
            key = (weight, group, tuple(origin), tuple(tuple(phase.taps) for phase in position))
            part = Group(key, group * per_in, [batch, *size], [1] * len(size), steps, origin)
            plan = importer.choose(node, partial(_plans_of_product, importer, [batch, *size], kernel.shape))
            of_groups.append(_conv_group(importer, image, kernel, part, plan))
        parts.append(of_groups[0] if groups == 1 else importer.emit(R.concat(of_groups, len(size) + 1)))

    all_reached = len(parts) == math.prod(stride)

    def side_by_side(*tensors: te.Tensor) -> te.Tensor:
        def element(b: Any, *i: Any) -> Any:
            *pixel, c = i
            at = (b, *(p // s for p, s in zip(pixel, stride)), c)
            value = tensors[-1][at] if all_reached else tirx.const(0.0, "float32")
            for tensor, offsets in list(zip(tensors, phases))[: -1 if all_reached else None]:
                here = te.all(*(p % s == o for p, s, o in zip(pixel, stride, offsets)))
                value = tirx.if_then_else(here, tensor[at], value)
            return value

        return te.compute((batch, *out, outputs), element, name="side_by_side")

    value = parts[0] if math.prod(stride) == 1 else importer.emit_te("side_by_side", side_by_side, *parts)
    return add_bias(importer, value, bias)
