"""Operators -> Relax, where TVM's stock converter is missing, silently wrong, or slower than a kernel of ours.

``SEMANTICS`` holds for every target; ``CPU_KERNELS`` come first on the CPU, for float32 and static shapes. Each converter is
``f(importer, node) -> expression`` and is checked against eager by the operator sweep (``tests/backends/test_operator_sweep.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import relax, te, tirx, topi

from thresher.analysis.operators import argument
from thresher.backends.tvm.importer import Importer, dtype_name
from thresher.backends.tvm.kernels import attention, depthwise, elementwise, gemm, rows
from thresher.program import dtype_of, is_tensor, shape_of

aten, ops = torch.ops.aten, torch.ops.thresher
R = relax.op
Converter = Callable[[Importer, fx.Node], Any]
SEMANTICS: dict[Any, Converter] = {}
CPU_KERNELS: dict[Any, Converter] = {}


def converter_of(node: fx.Node, importer: Importer) -> Converter | None:
    """Our converter for a call, or None where the stock one is right."""
    if importer.machine is not None and node.target in CPU_KERNELS and _fits_kernels(node):
        return CPU_KERNELS[node.target]
    return SEMANTICS.get(node.target)


def _fits_kernels(node: fx.Node) -> bool:
    values = [n for n in (node, *node.all_input_nodes) if is_tensor(n)]
    static = all(isinstance(d, int) for n in values for d in shape_of(n))
    return static and is_tensor(node) and dtype_of(node) is torch.float32 and all(d > 0 for d in shape_of(node))


def _register(table: dict[Any, Converter], *targets: Any) -> Callable[[Converter], Converter]:
    def add(converter: Converter) -> Converter:
        table.update(dict.fromkeys(targets, converter))
        return converter

    return add


def semantics(*targets: Any) -> Callable[[Converter], Converter]:
    return _register(SEMANTICS, *targets)


def cpu_kernel(*targets: Any) -> Callable[[Converter], Converter]:
    return _register(CPU_KERNELS, *targets)


def _sizes(node: Any) -> list[int]:
    return [int(d) for d in shape_of(node)]


def _result_dtype(node: fx.Node) -> str:
    return dtype_name(dtype_of(node))


def _cast(importer: Importer, value: Any, dtype: str) -> Any:
    """``value`` (an expression or a number) as an expression of ``dtype``."""
    if isinstance(value, (bool, int, float)):
        return relax.const(value, dtype)
    return value if str(value.ty.dtype) == dtype else importer.emit(R.astype(value, dtype))


# ---------------------------------------------------------------------- packed products


def _add_bias(importer: Importer, value: Any, bias: fx.Node | None) -> Any:
    return value if bias is None else importer.emit(R.add(value, importer.value(bias)))


@cpu_kernel(aten.linear.default)
def linear_kernel(importer: Importer, node: fx.Node) -> Any:
    """x [..., I], weight [O, I] -> [..., O], by the packed product."""
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    if not importer.is_constant(weight) or len(shape_of(x)) < 2:  # type: ignore[arg-type]
        return linear(importer, node)
    lead, (n, k) = _sizes(x)[:-1], _sizes(weight)
    tile = gemm.choose_tile(math.prod(lead), n, k, importer.machine)  # type: ignore[arg-type]
    packed = importer.weight(gemm.pack(importer.array(weight), tile), (weight, tile))  # type: ignore[arg-type]

    def compute(x: te.Tensor, w: te.Tensor) -> te.Tensor:
        return gemm.product(lambda m, i: x[(*gemm.unravel(m, lead), i)], w, (k,), lead, n, tile)

    return _add_bias(importer, importer.emit_te("linear", compute, importer.value(x), packed), bias)


def _padded(importer: Importer, x: Any, padding: list[int]) -> Any:
    """[B, H, W, C] with zeros around the image."""
    if not any(padding):
        return x
    return importer.emit_te("pad", lambda t: _pad(t, (0, padding[0], padding[1], 0), (0, padding[0], padding[1], 0), 0), x)


def _pad(x: te.Tensor, before: Sequence[int], after: Sequence[int], fill: float) -> te.Tensor:
    """``fill`` around ``x``."""
    padded = [d for d in range(len(x.shape)) if before[d] or after[d]]
    if not padded:
        return x

    def element(*i: Any) -> Any:
        place = [p - before[d] for d, p in enumerate(i)]
        inside = [place[d] >= 0 for d in padded if before[d]] + [place[d] < x.shape[d] for d in padded if after[d]]
        return tirx.if_then_else(te.all(*inside), x[tuple(place)], tirx.const(fill, x.dtype))

    return te.compute([s + b + a for s, b, a in zip(x.shape, before, after)], element, name="padded")


@cpu_kernel(ops.conv2d_nhwc.default)
def conv2d_kernel(importer: Importer, node: fx.Node) -> Any:
    """Channels-last convolution: depthwise by its own kernel, else as a packed product per group."""
    x, weight, bias, stride, padding, dilation, groups = node.args
    array, (batch, out_h, out_w, outputs) = importer.array(weight), _sizes(node)  # type: ignore[arg-type]
    image = _padded(importer, importer.value(x), padding)  # type: ignore[arg-type]
    if groups == _sizes(x)[3] and array.shape[1] == 1 and outputs == groups:
        w = importer.weight(np.ascontiguousarray(array[:, 0].transpose(1, 2, 0)), (weight, "depthwise"))

        def compute(image: te.Tensor, w: te.Tensor) -> te.Tensor:
            return depthwise.convolution(image, w, (out_h, out_w), stride, dilation)  # type: ignore[arg-type]

        return _add_bias(importer, importer.emit_te("depthwise", compute, image, w), bias)  # type: ignore[arg-type]
    parts = []
    per_in, per_out = array.shape[1], outputs // groups  # type: ignore[operator]
    for group in range(groups):  # type: ignore[arg-type]
        rows_of_group = array[group * per_out : (group + 1) * per_out]
        parts.append(_conv_group(importer, image, rows_of_group, (weight, group), group * per_in, (batch, out_h, out_w), stride, dilation))
    value = parts[0] if len(parts) == 1 else importer.emit(R.concat(parts, 3))
    return _add_bias(importer, value, bias)  # type: ignore[arg-type]


def _conv_group(importer: Importer, image: Any, array: np.ndarray, key: Any, first: int, out: tuple[int, int, int], stride: Any, dilation: Any) -> Any:
    outputs, inputs, kh, kw = array.shape
    tile = gemm.choose_tile(math.prod(out), outputs, inputs * kh * kw, importer.machine)  # type: ignore[arg-type]
    packed = importer.weight(gemm.pack(np.ascontiguousarray(array.transpose(0, 2, 3, 1)), tile), (key, tile))
    _, out_h, out_w = out

    def compute(image: te.Tensor, w: te.Tensor) -> te.Tensor:
        def read(m: Any, i: Any, j: Any, c: Any) -> Any:
            b, y, z = gemm.unravel(m, out)
            return image[b, y * stride[0] + i * dilation[0], z * stride[1] + j * dilation[1], first + c if first else c]

        return gemm.product(read, w, (kh, kw, inputs), out, outputs, tile)

    return importer.emit_te("conv2d", compute, image, packed)


@semantics(ops.conv_transpose2d_nhwc.default)
def conv_transpose2d(importer: Importer, node: fx.Node) -> Any:
    """As a convolution over the image with zeros between its pixels (weights flipped)."""
    x, weight, bias, stride, padding, extra, groups, dilation = node.args
    array = importer.array(weight)  # type: ignore[arg-type]  # [I, O/groups, kh, kw]
    inputs, per_out, kh, kw = array.shape
    flipped = array.reshape(groups, inputs // groups, per_out, kh, kw)[..., ::-1, ::-1]  # type: ignore[operator]
    before = [dilation[d] * (k - 1) - padding[d] for d, k in enumerate((kh, kw))]  # type: ignore[index]
    after = [b + extra[d] for d, b in enumerate(before)]  # type: ignore[index]

    def spread(t: te.Tensor) -> te.Tensor:
        wide = topi.nn.dilate(t, (1, stride[0], stride[1], 1))  # type: ignore[index]
        low, high = [max(b, 0) for b in before], [max(a, 0) for a in after]
        wide = _pad(wide, (0, *low, 0), (0, *high, 0), 0)
        if min(before + after) >= 0:
            return wide
        h, w = (int(wide.shape[d + 1]) for d in (0, 1))
        begin = [0, max(-before[0], 0), max(-before[1], 0), 0]
        end = [int(wide.shape[0]), h - max(-after[0], 0), w - max(-after[1], 0), int(wide.shape[3])]
        return topi.strided_slice(wide, begin, end)

    image = importer.emit_te("spread", spread, importer.value(x))
    batch, out_h, out_w, _ = _sizes(node)
    parts = []
    for group in range(groups):  # type: ignore[arg-type]
        kernel = np.ascontiguousarray(flipped[group].transpose(1, 0, 2, 3))
        if importer.machine is not None and str(array.dtype) == "float32":
            parts.append(_conv_group(importer, image, kernel, (weight, group), group * inputs // groups, (batch, out_h, out_w), (1, 1), dilation))  # type: ignore[operator]
        else:
            width = inputs // groups  # type: ignore[operator]
            part = importer.emit(R.strided_slice(image, [3], [group * width], [(group + 1) * width]))
            w = importer.weight(np.ascontiguousarray(kernel.transpose(0, 2, 3, 1)), (weight, group))
            parts.append(importer.emit(R.nn.conv2d(part, w, dilation=dilation, data_layout="NHWC", kernel_layout="OHWI")))
    value = parts[0] if len(parts) == 1 else importer.emit(R.concat(parts, 3))
    return _add_bias(importer, value, bias)  # type: ignore[arg-type]


@semantics(ops.conv2d_nhwc.default)
def conv2d_nhwc(importer: Importer, node: fx.Node) -> Any:
    x, weight, bias, stride, padding, dilation, groups = node.args
    w = importer.emit(R.permute_dims(importer.value(weight), [0, 2, 3, 1]))
    value = R.nn.conv2d(importer.value(x), w, stride, padding, dilation, groups, "NHWC", "OHWI", out_dtype=_accumulator(node))
    return _add_bias(importer, _cast(importer, importer.emit(value), _result_dtype(node)), bias)  # type: ignore[arg-type]


@semantics(ops.max_pool2d_nhwc.default)
def max_pool2d_nhwc(importer: Importer, node: fx.Node) -> Any:
    x, kernel, stride, padding, dilation, _ = node.args
    return importer.emit_te("max_pool", lambda t: _pool(t, _sizes(node), kernel, stride, padding, dilation, "max", None, True), importer.value(x))


@semantics(ops.avg_pool2d_nhwc.default)
def avg_pool2d_nhwc(importer: Importer, node: fx.Node) -> Any:
    x, kernel, stride, padding, _, include, divisor = node.args
    return importer.emit_te("avg_pool", lambda t: _pool(t, _sizes(node), kernel, stride, padding, (1, 1), "avg", divisor, include), importer.value(x))


def _pool(x: te.Tensor, out: list[int], kernel: Any, stride: Any, padding: Any, dilation: Any, kind: str, divisor: int | None, include: bool) -> te.Tensor:
    """Pools of [B, H, W, C] with torch's rules: ceil_mode windows end at the padded border, divisors as torch counts them."""
    height, width = int(x.shape[1]), int(x.shape[2])
    i, j = te.reduce_axis((0, kernel[0]), name="i"), te.reduce_axis((0, kernel[1]), name="j")
    empty = te.min_value(x.dtype) if kind == "max" else tirx.const(0, x.dtype)

    def at(b: Any, y: Any, z: Any, c: Any) -> Any:
        row, column = y * stride[0] - padding[0] + i * dilation[0], z * stride[1] - padding[1] + j * dilation[1]
        inside = [cond for need, cond in ((padding[0] > 0, row >= 0), (_overhangs(out[1], stride[0], padding[0], kernel[0], dilation[0], height), row < height),
                                          (padding[1] > 0, column >= 0), (_overhangs(out[2], stride[1], padding[1], kernel[1], dilation[1], width), column < width)) if need]  # fmt: skip
        if not inside:
            return x[b, row, column, c]
        return tirx.if_then_else(te.all(*inside), x[b, te.max(te.min(row, height - 1), 0), te.max(te.min(column, width - 1), 0), c], empty)

    if kind == "max":
        return te.compute(out, lambda *p: te.max(at(*p), axis=[i, j]), name="max_pool")
    total = te.compute(out, lambda *p: te.sum(at(*p), axis=[i, j]), name="sum_pool")

    def mean(b: Any, y: Any, z: Any, c: Any) -> Any:
        if divisor:
            return total[b, y, z, c] / tirx.const(float(divisor), x.dtype)
        if not any(padding) and (out[1] - 1) * stride[0] + kernel[0] <= height and (out[2] - 1) * stride[1] + kernel[1] <= width:
            return total[b, y, z, c] * tirx.const(1.0 / (kernel[0] * kernel[1]), x.dtype)
        low = [y * stride[0] - padding[0], z * stride[1] - padding[1]]
        pads = padding if include else (0, 0)
        counts = []
        for start, k, size, pad in zip(low, kernel, (height, width), pads):
            counts.append(te.min(start + k, size + pad) - te.max(start, -pad))
        return total[b, y, z, c] / (counts[0] * counts[1]).astype(x.dtype)

    return te.compute(out, mean, name="avg_pool")


def _overhangs(out: int, stride: int, padding: int, kernel: int, dilation: int, size: int) -> bool:
    return (out - 1) * stride - padding + (kernel - 1) * dilation >= size


# ---------------------------------------------------------------------- rows, attention, elementary functions


@cpu_kernel(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def softmax_kernel(importer: Importer, node: fx.Node) -> Any:
    x, dim = node.args[0], node.args[1] % len(shape_of(node))  # type: ignore[operator]
    log, rank = "log" in str(node.target), len(shape_of(node))
    value = _cast(importer, importer.value(x), "float32")
    order = [d for d in range(rank) if d != dim] + [dim]
    if dim != rank - 1:
        value = importer.emit(R.permute_dims(value, order))
    value = importer.emit_te("softmax", lambda t: rows.softmax(t, log), value)
    return value if dim == rank - 1 else importer.emit(R.permute_dims(value, [order.index(d) for d in range(rank)]))


@cpu_kernel(aten.layer_norm.default, aten.rms_norm.default)
def norm_kernel(importer: Importer, node: fx.Node) -> Any:
    """Norms over the last dimensions, which are merged into one."""
    centred = node.target is aten.layer_norm.default
    x, shape, weight = node.args[0], list(node.args[1]), argument(node, 2, "weight")  # type: ignore[arg-type]
    bias = argument(node, 3, "bias") if centred else None
    epsilon = argument(node, 4, "eps", 1e-5) if centred else argument(node, 3, "eps")
    epsilon = torch.finfo(torch.float32).eps if epsilon is None else epsilon
    size, whole = math.prod(shape), _sizes(node)
    value, w, b = (None if n is None else importer.value(n) for n in (x, weight, bias))
    if len(shape) > 1:
        value = importer.emit(R.reshape(value, (*whole[: -len(shape)], size)))
        w, b = (None if t is None else importer.emit(R.reshape(t, (size,))) for t in (w, b))
    value = importer.emit_te("norm", lambda x, w, b: rows.norm(x, w, b, epsilon, centred), value, w, b)
    return importer.emit(R.reshape(value, whole)) if len(shape) > 1 else value


@cpu_kernel(aten.scaled_dot_product_attention.default)
def attention_kernel(importer: Importer, node: fx.Node) -> Any:
    """Fused attention for three and four dimensions."""
    q, k, v = node.args[:3]
    mask, causal = argument(node, 3, "attn_mask"), bool(argument(node, 5, "is_causal", False))
    shapes = [_sizes(n) for n in (q, k, v)]
    rank = len(shapes[0])
    if rank not in (3, 4) or any(len(s) != rank for s in shapes) or any(s[:-3] != shapes[0][:-3] for s in shapes):
        return attention_composed(importer, node)
    if shapes[0][-3] % shapes[1][-3] or (rank == 3 and shapes[0][0] != shapes[1][0]):
        return attention_composed(importer, node)
    scale = argument(node, 6, "scale")
    scale = 1.0 / math.sqrt(shapes[0][-1]) if scale is None else float(scale)
    values = [importer.value(n) for n in (q, k, v)]
    if rank == 3:
        values = [importer.emit(R.reshape(t, (1, *s))) for t, s in zip(values, shapes)]
    m = None
    if mask is not None:
        m = importer.value(mask)
        m = importer.emit(R.reshape(m, [1] * (4 - len(shape_of(mask))) + _sizes(mask)))
        m = m if str(m.ty.dtype) == "bool" else _cast(importer, m, "float32")
    machine = importer.machine
    assert machine is not None
    out = importer.emit_te("attention", lambda q, k, v, m: attention.attention(q, k, v, m, scale, causal, machine), *values, m)
    return out if rank == 4 else importer.emit(R.reshape(out, _sizes(node)))


@semantics(aten.scaled_dot_product_attention.default)
def attention_composed(importer: Importer, node: fx.Node) -> Any:
    """softmax(scale q k^T + mask) v, with grouped heads, any rank, boolean or additive masks; softmax in float32."""
    q, k, v = (importer.value(n) for n in node.args[:3])
    mask, causal = argument(node, 3, "attn_mask"), bool(argument(node, 5, "is_causal", False))
    rank, shape = len(shape_of(node)), shape_of(node.args[0])  # type: ignore[arg-type]
    heads, kv_heads = (shape_of(n)[-3] if rank > 2 else 1 for n in node.args[:2])  # type: ignore[arg-type]
    if argument(node, 7, "enable_gqa", False) and heads != kv_heads:
        k, v = (importer.emit(R.repeat(t, heads // kv_heads, rank - 3)) for t in (k, v))
    scale = argument(node, 6, "scale")
    scale = 1.0 / math.sqrt(int(shape[-1])) if scale is None else float(scale)
    dtype = _result_dtype(node)
    order = [*range(rank - 2), rank - 1, rank - 2]
    wide = "float64" if dtype == "float64" else "float32"
    scores = importer.emit(R.matmul(q, importer.emit(R.permute_dims(k, order)), out_dtype=wide))
    scores = importer.emit(R.multiply(scores, relax.const(scale, wide)))
    low = relax.const(float(np.finfo(wide).min) / 2, wide)
    if mask is not None:
        m = importer.value(mask)
        if str(m.ty.dtype) == "bool":
            scores = importer.emit(R.where(m, scores, low))
        else:
            scores = importer.emit(R.add(scores, _cast(importer, m, wide)))
    if causal:
        length, keys = (int(shape_of(n)[-2]) for n in node.args[:2])  # type: ignore[arg-type]
        below = np.tril(np.ones((length, keys), bool))
        scores = importer.emit(R.where(importer.weight(below, ("causal", length, keys)), scores, low))
    weights = _cast(importer, importer.emit(R.nn.softmax(scores, -1)), dtype)
    return _cast(importer, importer.emit(R.matmul(weights, v, out_dtype=wide)), dtype)


def _elementary(function: Callable[[Any], Any]) -> Converter:
    def convert(importer: Importer, node: fx.Node) -> Any:
        value = _cast(importer, importer.value(node.args[0]), "float32")
        return importer.emit_te(str(node.target).split(".")[1], lambda t: te.compute(t.shape, lambda *i: function(t(*i)), name="T_elementary"), value)

    return convert


for _name, _function in elementwise.VECTORISED.items():
    CPU_KERNELS[getattr(aten, _name).default] = _elementary(_function)


@cpu_kernel(aten.gelu.default)
def gelu_kernel(importer: Importer, node: fx.Node) -> Any:
    tanh = argument(node, 1, "approximate", "none") == "tanh"
    return _elementary(elementwise.gelu_tanh if tanh else elementwise.gelu)(importer, node)


# ---------------------------------------------------------------------- semantics that the stock importer has wrong


def _accumulator(node: fx.Node) -> str:
    """Products of half types are summed in float32, everything else in its own type."""
    dtype = _result_dtype(node)
    return "float32" if dtype in ("float16", "bfloat16") else dtype


@semantics(aten.linear.default)
def linear(importer: Importer, node: fx.Node) -> Any:
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    w = importer.emit(R.permute_dims(importer.value(weight)))
    value = _cast(importer, importer.emit(R.matmul(importer.value(x), w, out_dtype=_accumulator(node))), _result_dtype(node))
    return _add_bias(importer, value, bias)


@semantics(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(importer: Importer, node: fx.Node) -> Any:
    a, b = (importer.value(n) for n in node.args[:2])
    return _cast(importer, importer.emit(R.matmul(a, b, out_dtype=_accumulator(node))), _result_dtype(node))


@semantics(aten.addmm.default, aten.baddbmm.default)
def addmm(importer: Importer, node: fx.Node) -> Any:
    bias, a, b = (importer.value(n) for n in node.args[:3])
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    dtype = _result_dtype(node)
    value = _cast(importer, importer.emit(R.matmul(a, b, out_dtype=_accumulator(node))), dtype)
    value = value if alpha == 1 else importer.emit(R.multiply(value, relax.const(alpha, dtype)))
    if beta == 0:
        return value
    return importer.emit(R.add(value, bias if beta == 1 else importer.emit(R.multiply(bias, relax.const(beta, dtype)))))


@semantics(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def convolution(importer: Importer, node: fx.Node) -> Any:
    rank = len(shape_of(node)) - 2
    call = {1: R.nn.conv1d, 2: R.nn.conv2d, 3: R.nn.conv3d}[rank]
    defaults = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    stride, padding, dilation = ([v] * rank if isinstance(v := argument(node, i, k, d), int) else list(v) for i, k, d in defaults)
    value = call(importer.value(node.args[0]), importer.value(node.args[1]), stride, padding, dilation, argument(node, 6, "groups", 1), out_dtype=_accumulator(node))
    value = _cast(importer, importer.emit(value), _result_dtype(node))
    bias = argument(node, 2, "bias")
    if bias is None:
        return value
    return importer.emit(R.add(value, importer.emit(R.reshape(importer.value(bias), [1, -1] + [1] * rank))))


def _arithmetic(operation: Callable) -> Converter:
    """add and sub with their ``alpha``; mixed dtypes are promoted as torch promotes them."""

    def convert(importer: Importer, node: fx.Node) -> Any:
        dtype = _result_dtype(node)
        a, b = (_cast(importer, importer.value(x), dtype) for x in node.args[:2])
        alpha = argument(node, 2, "alpha", 1)
        if alpha != 1:
            b = importer.emit(R.multiply(b, relax.const(alpha, dtype)))
        return importer.emit(operation(a, b))

    return convert


SEMANTICS[aten.add.Tensor] = SEMANTICS[aten.add.Scalar] = _arithmetic(R.add)
SEMANTICS[aten.sub.Tensor] = SEMANTICS[aten.sub.Scalar] = _arithmetic(R.subtract)
SEMANTICS[aten.mul.Tensor] = SEMANTICS[aten.mul.Scalar] = _arithmetic(lambda a, b: R.multiply(a, b))
SEMANTICS[aten.div.Tensor] = SEMANTICS[aten.div.Scalar] = _arithmetic(R.divide)  # int / int: the result dtype is floating


def _comparison(operation: Callable) -> Converter:
    def convert(importer: Importer, node: fx.Node) -> Any:
        values = [torch.empty(0, dtype=dtype_of(x)) if is_tensor(x) else x for x in node.args[:2]]  # type: ignore[arg-type]
        dtype = dtype_name(torch.result_type(*values))  # type: ignore[arg-type]
        return importer.emit(operation(*(_cast(importer, importer.value(x), dtype) for x in node.args[:2])))

    return convert


for _name, _operation in {"eq": R.equal, "ne": R.not_equal, "lt": R.less, "le": R.less_equal, "gt": R.greater, "ge": R.greater_equal}.items():
    SEMANTICS[getattr(aten, _name).Tensor] = SEMANTICS[getattr(aten, _name).Scalar] = _comparison(_operation)


@semantics(ops.shrink.default)
def shrink(importer: Importer, node: fx.Node) -> Any:
    x, t, kind = importer.value(node.args[0]), importer.value(node.args[1]), node.args[2]
    zero = relax.const(0, _result_dtype(node))
    emit = importer.emit
    if kind == "soft":
        return emit(R.subtract(x, emit(R.maximum(emit(R.minimum(x, t)), emit(R.negative(t))))))
    if kind == "positive":
        y = emit(R.subtract(x, t))
        return emit(R.where(emit(R.less(y, zero)), zero, y))
    size = emit(R.abs(x)) if kind == "hard" else x
    return emit(R.where(emit(R.greater(size, t)), x, zero))


def _clamped(importer: Importer, x: Any, low: float | None, high: float | None) -> Any:
    """By comparisons that a NaN passes through (max and min would swallow it)."""
    dtype = str(x.ty.dtype)

    def compute(t: te.Tensor) -> te.Tensor:
        def element(*i: Any) -> Any:
            value = t(*i)
            result = value
            if high is not None:
                result = tirx.Select(value > tirx.const(high, dtype), tirx.const(high, dtype), result)
            if low is not None:
                result = tirx.Select(value < tirx.const(low, dtype), tirx.const(low, dtype), result)
            return result if low is None or high is None or low <= high else tirx.const(high, dtype)

        return te.compute(t.shape, element, name="T_clamp")

    return importer.emit_te("clamp", compute, x)


@semantics(aten.relu.default)
def relu(importer: Importer, node: fx.Node) -> Any:
    return _clamped(importer, importer.value(node.args[0]), 0, None)


@semantics(aten.relu6.default)
def relu6(importer: Importer, node: fx.Node) -> Any:
    return _clamped(importer, importer.value(node.args[0]), 0, 6)


@semantics(aten.hardtanh.default)
def hardtanh(importer: Importer, node: fx.Node) -> Any:
    return _clamped(importer, importer.value(node.args[0]), argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0))


@semantics(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def clamp(importer: Importer, node: fx.Node) -> Any:
    value = _cast(importer, importer.value(node.args[0]), _result_dtype(node))
    if node.target is aten.clamp_max.default:
        return _clamped(importer, value, None, node.args[1])  # type: ignore[arg-type]
    return _clamped(importer, value, argument(node, 1, "min"), argument(node, 2, "max"))


@semantics(aten.elu.default)
def elu(importer: Importer, node: fx.Node) -> Any:
    alpha, scale, input_scale = (float(argument(node, i, k, 1)) for i, k in ((1, "alpha"), (2, "scale"), (3, "input_scale")))
    return _smooth(importer, node, lambda x, exp: tirx.Select(x > 0, x * _c(scale, x), _c(scale * alpha, x) * (exp(x * _c(input_scale, x)) - _c(1.0, x))))


@semantics(aten.selu.default)
def selu(importer: Importer, node: fx.Node) -> Any:
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return _smooth(importer, node, lambda x, exp: tirx.Select(x > 0, x * _c(scale, x), _c(scale * alpha, x) * (exp(x) - _c(1.0, x))))


@semantics(aten.celu.default)
def celu(importer: Importer, node: fx.Node) -> Any:
    alpha = float(argument(node, 1, "alpha", 1.0))
    return _smooth(importer, node, lambda x, exp: tirx.Select(x > 0, x, _c(alpha, x) * (exp(x * _c(1 / alpha, x)) - _c(1.0, x))))


@semantics(aten.softplus.default)
def softplus(importer: Importer, node: fx.Node) -> Any:
    beta, threshold = float(argument(node, 1, "beta", 1)), float(argument(node, 2, "threshold", 20))
    return _smooth(importer, node, lambda x, exp: tirx.Select(x * _c(beta, x) > _c(threshold, x), x, _log1p(exp(x * _c(beta, x))) * _c(1 / beta, x)))


def _log1p(e: Any) -> Any:
    """log(1 + e) for e >= 0."""
    return tirx.Select(e < _c(1e-4, e), e - e * e * _c(0.5, e), te.log(_c(1.0, e) + e))


@semantics(aten.mish.default)
def mish(importer: Importer, node: fx.Node) -> Any:
    def element(x: Any, exp: Callable) -> Any:
        e = exp(tirx.Select(x > _c(20.0, x), _c(20.0, x), x))
        n = e * (e + _c(2.0, x))
        return tirx.Select(x > _c(20.0, x), x, x * n / (n + _c(2.0, x)))

    return _smooth(importer, node, element)


@semantics(aten.hardswish.default)
def hardswish(importer: Importer, node: fx.Node) -> Any:
    return _smooth(importer, node, lambda x, exp: x * te.max(te.min(x + _c(3.0, x), _c(6.0, x)), _c(0.0, x)) * _c(1 / 6, x))


@semantics(aten.hardsigmoid.default)
def hardsigmoid(importer: Importer, node: fx.Node) -> Any:
    return _smooth(importer, node, lambda x, exp: te.max(te.min(x + _c(3.0, x), _c(6.0, x)), _c(0.0, x)) * _c(1 / 6, x))


@semantics(aten.leaky_relu.default)
def leaky_relu(importer: Importer, node: fx.Node) -> Any:
    slope = float(argument(node, 1, "negative_slope", 0.01))
    return _smooth(importer, node, lambda x, exp: tirx.Select(x > 0, x, x * _c(slope, x)))


@semantics(aten.threshold.default)
def threshold(importer: Importer, node: fx.Node) -> Any:
    limit, value = (float(v) for v in node.args[1:3])  # type: ignore[arg-type]
    return _smooth(importer, node, lambda x, exp: tirx.Select(x <= _c(limit, x), _c(value, x), x))


def _c(value: float, like: Any) -> Any:
    return tirx.const(value, like.ty.dtype if hasattr(like, "ty") else like.dtype)


def _smooth(importer: Importer, node: fx.Node, element: Callable[[Any, Callable], Any]) -> Any:
    """An elementwise function; ``exp`` is the vectorised one for float32 on the CPU."""
    value = importer.value(node.args[0])
    fast = importer.machine is not None and str(value.ty.dtype) == "float32"
    exp = elementwise.exp if fast else te.exp
    return importer.emit_te("elementwise", lambda t: te.compute(t.shape, lambda *i: element(t(*i), exp), name="T_elementwise"), value)


@semantics(aten.select.int)
def select(importer: Importer, node: fx.Node) -> Any:
    """One index of a dimension; negative ones count from the end."""
    x, dim, index = node.args
    dim = dim % len(shape_of(x))  # type: ignore[operator,arg-type]
    size = shape_of(x)[dim]  # type: ignore[arg-type]
    if isinstance(index, int) and index < 0:
        if not isinstance(size, int):
            raise NotImplementedError("a negative index into a dynamic dimension")
        index += size
    part = importer.emit(R.strided_slice(importer.value(x), [dim], [index], [index + 1]))  # type: ignore[operator]
    return importer.emit(R.squeeze(part, [dim]))


@semantics(aten.index.Tensor)
def index_tensor(importer: Importer, node: fx.Node) -> Any:
    """Advanced indexing with integer tensors on leading or adjacent dimensions; negative indices count from the end."""
    x, indices = node.args
    places = [d for d, i in enumerate(indices) if i is not None]  # type: ignore[arg-type]
    if any(dtype_of(indices[d]) is torch.bool for d in places) or places != list(range(places[0], places[-1] + 1)):  # type: ignore[index]
        raise NotImplementedError("indexing with boolean masks or with tensors on dimensions apart from each other")
    arrays = [importer.value(indices[d]) for d in places]  # type: ignore[index]
    first, rank = places[0], max(len(shape_of(indices[d])) for d in places)  # type: ignore[index]

    def compute(t: te.Tensor, *index: te.Tensor) -> te.Tensor:
        def element(*i: Any) -> Any:
            common = i[first : first + rank]
            picked = []
            for d, a in zip(places, index):
                own = common[rank - len(a.shape) :]
                at = a[tuple(tirx.const(0, "int64") if isinstance(s, tirx.IntImm) and int(s) == 1 else c for s, c in zip(a.shape, own))]
                picked.append(tirx.Select(at < 0, at + t.shape[d], at).astype("int64"))
            return t[(*i[:first], *picked, *i[first + rank :])]

        return te.compute([tirx.IntImm("int64", int(s)) for s in _sizes(node)], element, name="T_index")

    return importer.builder.emit_te(compute, importer.value(x), *arrays, primfunc_name_hint="index")


@semantics(aten.embedding.default)
def embedding(importer: Importer, node: fx.Node) -> Any:
    return importer.emit(R.take(importer.value(node.args[0]), importer.value(node.args[1]), axis=0))


@semantics(aten._to_copy.default, aten.to.dtype)
def to_copy(importer: Importer, node: fx.Node) -> Any:
    return _cast(importer, importer.value(node.args[0]), _result_dtype(node))


@semantics(aten.amax.default, aten.amin.default)
def extremum(importer: Importer, node: fx.Node) -> Any:
    dims, keepdim = argument(node, 1, "dim", []), bool(argument(node, 2, "keepdim", False))
    operation = R.max if node.target is aten.amax.default else R.min
    return importer.emit(operation(importer.value(node.args[0]), list(dims) or None, keepdim))


@semantics(aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default)
def total(importer: Importer, node: fx.Node) -> Any:
    dims = argument(node, 1, "dim") if node.target in (aten.mean.dim, aten.sum.dim_IntList) else None
    keepdim = bool(argument(node, 2, "keepdim", False)) if dims is not None or len(node.args) > 2 else False
    dtype = _result_dtype(node)
    value = _cast(importer, importer.value(node.args[0]), dtype)
    dims = [dims] if isinstance(dims, int) else (list(dims) if dims else None)
    wide = _cast(importer, value, "float32") if dtype in ("float16", "bfloat16") else value
    operation = R.mean if "mean" in str(node.target) else R.sum
    return _cast(importer, importer.emit(operation(wide, dims, keepdim)), dtype)


@semantics(aten.cumsum.default)
def cumsum(importer: Importer, node: fx.Node) -> Any:
    dtype = _result_dtype(node)
    return importer.emit(R.cumsum(_cast(importer, importer.value(node.args[0]), dtype), node.args[1], dtype))


@semantics(aten.full_like.default, aten.zeros_like.default, aten.ones_like.default)
def full_like(importer: Importer, node: fx.Node) -> Any:
    fill = {aten.zeros_like.default: 0, aten.ones_like.default: 1}.get(node.target, node.args[1] if len(node.args) > 1 else 0)  # type: ignore[arg-type]
    return importer.emit(R.full_like(_cast(importer, importer.value(node.args[0]), _result_dtype(node)), relax.const(fill, _result_dtype(node))))


@semantics(aten.constant_pad_nd.default)
def constant_pad(importer: Importer, node: fx.Node) -> Any:
    """Negative amounts crop."""
    x, amounts, fill = node.args[0], list(node.args[1]), argument(node, 2, "value", 0) or 0  # type: ignore[arg-type]
    rank = len(shape_of(node))
    pairs = [(0, 0)] * (rank - len(amounts) // 2) + [(amounts[i], amounts[i + 1]) for i in range(len(amounts) - 2, -1, -2)]

    def compute(t: te.Tensor) -> te.Tensor:
        if any(min(p) < 0 for p in pairs):
            t = topi.strided_slice(t, [max(-a, 0) for a, _ in pairs], [int(s) - max(-b, 0) for s, (_, b) in zip(t.shape, pairs)])
        return _pad(t, [max(a, 0) for a, _ in pairs], [max(b, 0) for _, b in pairs], fill)

    return importer.emit_te("pad", compute, importer.value(x))


@semantics(aten.min.dim, aten.max.dim)
def extremum_with_place(importer: Importer, node: fx.Node) -> Any:
    """(values, indices); the index is that of the first extremum."""
    x, dim, keepdim = importer.value(node.args[0]), node.args[1], bool(argument(node, 2, "keepdim", False))
    value, place = (R.min, R.argmin) if node.target is aten.min.dim else (R.max, R.argmax)
    return importer.emit(value(x, [dim], keepdim)), importer.emit(place(x, dim, keepdim))


@semantics(aten.prod.dim_int)
def product_over(importer: Importer, node: fx.Node) -> Any:
    value = _cast(importer, importer.value(node.args[0]), _result_dtype(node))
    return importer.emit(R.prod(value, [node.args[1]], bool(argument(node, 2, "keepdim", False))))


@semantics(aten.group_norm.default)
def group_norm(importer: Importer, node: fx.Node) -> Any:
    x, groups, channels = node.args[0], node.args[1], _sizes(node)[1]
    weight, bias, epsilon = argument(node, 2, "weight"), argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5)
    dtype = np.dtype(_result_dtype(node))
    w = importer.weight(np.ones(channels, dtype), ("ones", channels, dtype)) if weight is None else importer.value(weight)
    b = importer.weight(np.zeros(channels, dtype), ("zeros", channels, dtype)) if bias is None else importer.value(bias)
    return importer.emit(R.nn.group_norm(importer.value(x), w, b, groups, 1, list(range(2, len(_sizes(node)))), epsilon))


@semantics(aten.pixel_shuffle.default)
def pixel_shuffle(importer: Importer, node: fx.Node) -> Any:
    """[.., C r r, H, W] -> [.., C, H r, W r]."""
    r, (*lead, channels, height, width) = int(node.args[1]), _sizes(node.args[0])  # type: ignore[arg-type,call-overload]
    n = len(lead)
    value = importer.emit(R.reshape(importer.value(node.args[0]), (*lead, channels // (r * r), r, r, height, width)))
    return importer.emit(R.reshape(importer.emit(R.permute_dims(value, [*range(n), n, n + 3, n + 1, n + 4, n + 2])), _sizes(node)))


@semantics(aten.pixel_unshuffle.default)
def pixel_unshuffle(importer: Importer, node: fx.Node) -> Any:
    """[.., C, H r, W r] -> [.., C r r, H, W]."""
    r, (*lead, channels, height, width) = int(node.args[1]), _sizes(node.args[0])  # type: ignore[arg-type,call-overload]
    n = len(lead)
    value = importer.emit(R.reshape(importer.value(node.args[0]), (*lead, channels, height // r, r, width // r, r)))
    return importer.emit(R.reshape(importer.emit(R.permute_dims(value, [*range(n), n, n + 2, n + 4, n + 1, n + 3])), _sizes(node)))


@semantics(aten.upsample_nearest2d.vec)
def resize_nearest(importer: Importer, node: fx.Node) -> Any:
    """Pixel floor(place * in / out), in float32 as torch computes it."""
    ratios = _ratios(node, argument(node, 2, "scale_factors"))
    picks = [np.minimum((np.arange(out, dtype=np.float32) * ratio).astype(np.int64), size - 1) for out, size, ratio in ratios]
    rows_, columns = (importer.weight(p, ("nearest", node, d)) for d, p in enumerate(picks))
    return importer.emit(R.take(importer.emit(R.take(importer.value(node.args[0]), rows_, axis=2)), columns, axis=3))


@semantics(aten.upsample_bilinear2d.vec)
def resize_bilinear(importer: Importer, node: fx.Node) -> Any:
    """Two neighbours per axis, weighted by distance; the tables are made here, in float32 as torch computes them."""
    corners = bool(node.args[2])
    value, dtype = importer.value(node.args[0]), _result_dtype(node)
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
        weight = _cast(importer, importer.weight(part, ("part", node, axis)), dtype)
        near, far = (importer.emit(R.take(value, i, axis=axis + 2)) for i in (low_index, high_index))
        value = importer.emit(R.add(near, importer.emit(R.multiply(importer.emit(R.subtract(far, near)), weight))))
    return value


def _ratios(node: fx.Node, factors: Any) -> list[tuple[int, int, np.float32]]:
    """Per spatial axis: result size, argument size, argument pixels per result pixel."""
    before, after = _sizes(node.args[0])[2:], _sizes(node)[2:]
    given = factors or (None, None)
    return [(o, s, np.float32(1.0 / f) if f else np.float32(s) / np.float32(o)) for o, s, f in zip(after, before, given)]
