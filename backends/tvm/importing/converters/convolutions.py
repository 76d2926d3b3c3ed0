"""Convolutions and transposed convolutions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import fx
from tvm import te, tirx, topi

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.products import widen
from thresher.backends.tvm.importing.converters.registry import (
    R,
    accumulator,
    add_bias,
    aten,
    cast,
    cpu_kernel,
    ops,
    pad,
    result_dtype,
    semantics,
    sizes,
)
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

    def compute(image: te.Tensor, w: te.Tensor) -> te.Tensor:
        def read(m: Any, group: Any, *k: Any) -> Any:
            return first.pixel(image, m, k, group * inputs)

        return gemm.product(read, w, (*taps, inputs), first.out, groups * full, plan, groups=groups)

    value = importer.emit_te("conv", compute, image, packed)
    if full == width:
        return value

    def without_zeros(t: te.Tensor) -> te.Tensor:
        return te.compute((*first.out, len(array)), lambda *i: t[(*i[:-1], i[-1] // width * full + i[-1] % width)])

    return importer.emit_te("ungroup", without_zeros, value)


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


@semantics(ops.conv_transpose2d_nhwc.default, ops.conv_transpose3d_ndhwc.default)
def conv_transpose(importer: Importer, node: fx.Node) -> Any:
    """Compute a transposed convolution as a convolution over the image with zeros between its pixels (weights flipped)."""
    x, weight, bias, stride, padding, extra, groups, dilation = node.args
    array = importer.array(weight)
    inputs, per_out, *taps = array.shape
    rank, width = len(taps), inputs // groups
    flipped = np.flip(array.reshape(groups, width, per_out, *taps), axis=tuple(range(3, 3 + rank)))
    before = [dilation[d] * (k - 1) - padding[d] for d, k in enumerate(taps)]
    after = [b + extra[d] for d, b in enumerate(before)]

    def spread(t: te.Tensor) -> te.Tensor:
        wide = topi.nn.dilate(t, (1, *stride, 1))
        wide = pad(wide, (0, *(max(b, 0) for b in before), 0), (0, *(max(a, 0) for a in after), 0), 0)
        if min(before + after) >= 0:
            return wide
        shape = [int(d) for d in wide.shape]
        begin = [0, *(max(-b, 0) for b in before), 0]
        end = [shape[0], *(size - max(-a, 0) for size, a in zip(shape[1:], after)), shape[-1]]
        return topi.strided_slice(wide, begin, end)

    image = importer.emit_te("spread", spread, importer.value(x))
    parts = []
    for group in range(groups):
        kernel = np.ascontiguousarray(flipped[group].swapaxes(0, 1))
        section = importer.emit(R.strided_slice(image, [rank + 1], [group * width], [(group + 1) * width]))
        w = importer.weight(np.ascontiguousarray(np.moveaxis(kernel, 1, -1)), (weight, group))
        parts.append(importer.emit(_stock(rank)(section, w, dilation=dilation, **_layouts(rank))))
    value = parts[0] if len(parts) == 1 else importer.emit(R.concat(parts, rank + 1))
    return add_bias(importer, value, bias)


def _stock(rank: int) -> Any:
    """Return TVM's convolution of ``rank`` spatial dimensions."""
    return {1: R.nn.conv1d, 2: R.nn.conv2d, 3: R.nn.conv3d}[rank]


def _layouts(rank: int) -> dict[str, str]:
    """Return the layouts of channels-last images and weights."""
    return {2: {"data_layout": "NHWC", "kernel_layout": "OHWI"}, 3: {"data_layout": "NDHWC", "kernel_layout": "ODHWI"}}[
        rank
    ]


@semantics(ops.conv2d_nhwc.default, ops.conv3d_ndhwc.default)
def conv_last(importer: Importer, node: fx.Node) -> Any:
    """Compute a channels-last convolution by TVM's, on targets without a kernel of ours; half types are summed in float32."""
    x, weight, bias, stride, padding, dilation, groups = node.args
    rank = len(stride)
    w = importer.weight(np.ascontiguousarray(np.moveaxis(importer.array(weight), 1, -1)), (weight, "channels last"))
    call = _stock(rank)(
        importer.value(x), w, stride, padding, dilation, groups, **_layouts(rank), out_dtype=accumulator(node)
    )
    return add_bias(importer, cast(importer, importer.emit(call), result_dtype(node)), bias)


@semantics(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def convolution(importer: Importer, node: fx.Node) -> Any:
    """Compute a convolution with channels first by TVM's, with the dtype of torch's result; half types are summed in float32."""
    rank = len(shape_of(node)) - 2
    defaults = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    stride, padding, dilation = (
        [v] * rank if isinstance(v := argument(node, i, k, d), int) else list(v) for i, k, d in defaults
    )
    value = _stock(rank)(
        importer.value(node.args[0]),
        importer.value(node.args[1]),
        stride,
        padding,
        dilation,
        argument(node, 6, "groups", 1),
        out_dtype=accumulator(node),
    )
    value = cast(importer, importer.emit(value), result_dtype(node))
    bias = argument(node, 2, "bias")
    if bias is None:
        return value
    return importer.emit(R.add(value, importer.emit(R.reshape(importer.value(bias), [1, -1] + [1] * rank))))
