"""How each operator works on channels-last twins: one rule per operator, in the table ``RULES``.

A rule gives its node a twin (:meth:`Layout.emit`), or lets it read one, and returns whether it did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

import thresher.ops.channels_last  # noqa: F401  (registers the operators)
from thresher.analysis.slices.operators import TABLE
from thresher.analysis.slices.transfer.base import argument
from thresher.analysis.slices.transfer.elementwise import Elementwise
from thresher.ir.nodes import dtype_of, shape_of
from thresher.passes.specialize._twins import AXIS_IN_TWIN, Layout

aten, ops = torch.ops.aten, torch.ops.thresher
Rule = Callable[[Layout, fx.Node], bool]


def _image(value: fx.Node) -> bool:
    """Return whether it is a sequence, an image or a volume, with a batch and channels in front."""
    return len(shape_of(value)) in AXIS_IN_TWIN


def _batched(node: fx.Node) -> bool:
    """Return whether a convolution or pool reads a batch, not a single image: two dimensions more than its name says."""
    dimensions = next(int(letter) for letter in str(node.target) if letter.isdigit())
    return len(shape_of(node.args[0])) == dimensions + 2


def _sizes(value: Any, node: fx.Node, unit: int) -> list[int]:
    """Return a parameter per spatial dimension of the twin: one number stands for all; the height of a sequence gets ``unit``."""
    rank = len(shape_of(node))
    sizes = [value] if isinstance(value, int) else list(value)
    sizes = sizes * (rank - 2) if len(sizes) == 1 else sizes
    return [unit, *sizes] if rank == 3 else sizes


def _weights(layout: Layout, node: fx.Node) -> torch.Tensor | None:
    """Return the constant weight of a batched convolution whose bias is constant, too; else None."""
    bias = argument(node, 2, "bias")
    if not _batched(node) or (bias is not None and layout.program.constant(bias) is None):
        return None
    return layout.program.constant(node.args[1])


def _kernel(layout: Layout, node: fx.Node, weight: torch.Tensor) -> fx.Node:
    """Return the weight as that of an image; a sequence has kernels of height 1."""
    old: fx.Node = node.args[1]
    if weight.dim() > 3:
        return old
    return layout.program.add_constant(weight.unsqueeze(2), f"{old.target}_row", dtype_of(old), like=old)


def _conv(layout: Layout, node: fx.Node) -> bool:
    constant, bias = _weights(layout, node), argument(node, 2, "bias")
    if constant is None:
        return False
    stride, dilation = (_sizes(argument(node, i, k, 1), node, 1) for i, k in ((3, "stride"), (5, "dilation")))
    padding, value = argument(node, 4, "padding", 0), layout.twin(node.args[0])
    if isinstance(padding, str):
        kernel = _sizes(list(constant.shape[2:]), node, 1)
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel)]
        padding = [0] * len(total)
        if any(total):
            amounts = [0, 0, *(a for t in reversed(total) for a in (t // 2, t - t // 2))]
            value = layout.program.insert_call(node, aten.constant_pad_nd.default, (value, amounts), like=node)
    else:
        padding = _sizes(padding, node, 0)
    call = ops.conv3d_ndhwc.default if constant.dim() == 5 else ops.conv2d_nhwc.default
    weight = _kernel(layout, node, constant)
    return layout.emit(node, call, (value, weight, bias, stride, padding, dilation, argument(node, 6, "groups", 1)))


def _conv_transpose(layout: Layout, node: fx.Node) -> bool:
    constant, bias = _weights(layout, node), argument(node, 2, "bias")
    if constant is None:
        return False
    stride, padding, output_padding = (
        _sizes(argument(node, i, k, d), node, d)
        for i, k, d in ((3, "stride", 1), (4, "padding", 0), (5, "output_padding", 0))
    )
    groups, dilation = argument(node, 6, "groups", 1), _sizes(argument(node, 7, "dilation", 1), node, 1)
    value, weight = layout.twin(node.args[0]), _kernel(layout, node, constant)
    kernel = layout.program.constants[str(weight.target)]
    static = all(isinstance(d, int) for d in shape_of(node))
    one_tap = (
        stride == list(kernel.shape[2:]) and padding == output_padding == [0, 0] and dilation == [1, 1] and groups == 1
    )
    if static and one_tap:
        return _spread(layout, node, value, kernel, bias)
    call = ops.conv_transpose3d_ndhwc.default if constant.dim() == 5 else ops.conv_transpose2d_nhwc.default
    return layout.emit(node, call, (value, weight, bias, stride, padding, output_padding, groups, dilation))


def _spread(layout: Layout, node: fx.Node, value: fx.Node, weight: torch.Tensor, bias: fx.Node | None) -> bool:
    """Write a transposed convolution with stride = kernel, where every output pixel has one tap, as a linear layer per input pixel."""
    program, (inputs, outputs, kh, kw) = layout.program, weight.shape
    batch, height, width, _ = shape_of(value)
    matrix = program.add_constant(
        weight.permute(2, 3, 1, 0).reshape(-1, inputs), f"{node.name}_spread", dtype_of(node), like=node
    )
    args: tuple = (value, matrix)
    if bias is not None:
        args += (
            program.add_constant(
                program.constants[bias.target].repeat(kh * kw), f"{node.name}_spread_bias", dtype_of(node), like=node
            ),
        )
    y = program.insert_call(node, aten.linear.default, args, like=node)
    y = program.insert_call(node, aten.reshape.default, (y, [batch, height, width, kh, kw, outputs]), like=node)
    y = program.insert_call(node, aten.permute.default, (y, [0, 1, 3, 2, 4, 5]), like=node)
    return layout.emit(node, aten.reshape.default, (y, [batch, height * kh, width * kw, outputs]))


def _max_pool(layout: Layout, node: fx.Node) -> bool:
    if not _batched(node):
        return False
    kernel = _sizes(node.args[1], node, 1)
    stride = _sizes(argument(node, 2, "stride") or node.args[1], node, 1)
    padding, dilation = (
        _sizes(argument(node, 3, "padding", 0), node, 0),
        _sizes(argument(node, 4, "dilation", 1), node, 1),
    )
    call = ops.max_pool3d_ndhwc.default if len(kernel) == 3 else ops.max_pool2d_nhwc.default
    rest = (kernel, stride, padding, dilation, bool(argument(node, 5, "ceil_mode", False)))
    return layout.emit(node, call, (layout.twin(node.args[0]), *rest))


def _avg_pool(layout: Layout, node: fx.Node) -> bool:
    if not _batched(node):
        return False
    kernel = _sizes(node.args[1], node, 1)
    stride = _sizes(argument(node, 2, "stride") or node.args[1], node, 1)
    flags = (
        bool(argument(node, 4, "ceil_mode", False)),
        bool(argument(node, 5, "count_include_pad", True)),
        argument(node, 6, "divisor_override"),
    )
    padding = _sizes(argument(node, 3, "padding", 0), node, 0)
    return _averaged(layout, node, kernel, stride, padding, *flags)


def _averaged(layout: Layout, node: fx.Node, kernel: list[int], *rest: Any) -> bool:
    call = ops.avg_pool3d_ndhwc.default if len(kernel) == 3 else ops.avg_pool2d_nhwc.default
    return layout.emit(node, call, (layout.twin(node.args[0]), kernel, *rest))


def _adaptive_pool(layout: Layout, node: fx.Node) -> bool:
    """Write a pool to one pixel as a mean, to a divisor of the size as a plain pool; anything else stays."""
    x: fx.Node = node.args[0]
    if not _batched(node) or any(isinstance(d, torch.SymInt) for d in shape_of(x)[2:]):
        return False
    out, size = _sizes(node.args[1], node, 1), _sizes([int(d) for d in shape_of(x)[2:]], node, 1)
    if all(o == 1 for o in out):
        return layout.emit(node, aten.mean.dim, (layout.twin(x), list(range(1, len(out) + 1)), True))
    if any(not o or s % o for s, o in zip(size, out)):
        return False
    kernel = [s // o for s, o in zip(size, out)]
    return _averaged(layout, node, kernel, kernel, [0] * len(kernel), False, True, None)


def _resize(layout: Layout, node: fx.Node) -> bool:
    """Resize (nearest, bilinear) where the image is channels-last already."""
    x, size, *rest = node.args
    if x not in layout.last:
        return False
    call = ops.upsample_nearest2d_nhwc if node.target is aten.upsample_nearest2d.vec else ops.upsample_bilinear2d_nhwc
    return layout.emit(node, call.default, (layout.last[x], size, *rest))


def _elementwise(layout: Layout, node: fx.Node) -> bool:
    rank = len(shape_of(node))
    if not any(n in layout.last and len(shape_of(n)) == rank for n in node.all_input_nodes):
        return False
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda a: layout.operand(a, rank, node) if isinstance(a, fx.Node) else a
    )
    return layout.emit(node, node.target, args, {k: v for k, v in kwargs.items() if k != "memory_format"})


def _cat(layout: Layout, node: fx.Node) -> bool:
    values = node.args[0]
    if not all(_image(v) for v in values) or not any(v in layout.last for v in values):
        return False
    axis = _axis(node, argument(node, 1, "dim", 0))
    return layout.emit(node, node.target, ([layout.twin(v) for v in values], axis))


def _axis(value: fx.Node, dim: int) -> int:
    """Return the axis of the twin for a dimension of ``value``."""
    rank = len(shape_of(value))
    return AXIS_IN_TWIN[rank][dim % rank]


def _reduce(layout: Layout, node: fx.Node) -> bool:
    x, dims, keepdim = node.args[0], argument(node, 1, "dim"), bool(argument(node, 2, "keepdim", False))
    if x not in layout.last or dims is None:
        return False
    axes = sorted(_axis(x, d) for d in ([dims] if isinstance(dims, int) else dims))
    if keepdim:
        return layout.emit(node, node.target, (layout.last[x], axes, True), dict(node.kwargs))
    spatial = list(range(1, len(shape_of(layout.last[x])) - 1))
    if axes != (spatial if len(shape_of(x)) > 3 else [2]):
        return False
    new = layout.program.insert_call(node, node.target, (layout.last[x], spatial, False), dict(node.kwargs), like=node)
    node.replace_all_uses_with(new)
    return True


def _pad(layout: Layout, node: fx.Node) -> bool:
    x, amounts = node.args[0], list(node.args[1])
    if x not in layout.last:
        return False
    rank, twin = len(shape_of(x)), layout.last[x]
    amounts += [0] * (2 * rank - len(amounts))
    amounts_of = {_axis(x, rank - 1 - i): amounts[2 * i : 2 * i + 2] for i in range(rank)}
    axes = reversed(range(len(shape_of(twin))))
    moved = [a for axis in axes for a in amounts_of.get(axis, (0, 0))]
    return layout.emit(node, node.target, (twin, moved, *node.args[2:]))


def _slice(layout: Layout, node: fx.Node) -> bool:
    x = node.args[0]
    if x not in layout.last:
        return False
    axis = _axis(x, argument(node, 1, "dim", 0))
    return layout.emit(node, node.target, (layout.last[x], axis, *node.args[2:]), dict(node.kwargs))


def _index_select(layout: Layout, node: fx.Node) -> bool:
    x, dim, index = node.args
    if x not in layout.last:
        return False
    return layout.emit(node, node.target, (layout.last[x], _axis(x, dim), index))


def _reshape(layout: Layout, node: fx.Node) -> bool:
    """Read the twin as it is for [N, C, 1, 1] -> any shape, and for [N, C, H, W] -> [N, C, H W] -> (tokens) [N, H W, C]."""
    x = node.args[0]
    if x not in layout.last:
        return False
    program, shape, twin = layout.program, shape_of(x), layout.last[x]
    if all(d == 1 for d in shape[2:]):
        node.replace_all_uses_with(program.insert_call(node, aten.reshape.default, (twin, node.args[1]), like=node))
        return True
    tokens = [u for u in node.users if _swaps_tokens(u)]
    if len(shape_of(node)) != 3 or len(tokens) != len(node.users) or shape_of(node)[:2] != shape[:2]:
        return False
    size = [node.args[1][0], shape_of(node)[2], shape_of(node)[1]]
    if any(isinstance(d, torch.SymInt) for d in size):
        return False
    new = program.insert_call(node, aten.reshape.default, (twin, size), like=node)
    for user in tokens:
        user.replace_all_uses_with(new)
    return True


def _to_tokens(layout: Layout, node: fx.Node) -> bool:
    """Read the twin as it is for [N, C, L] -> (tokens) [N, L, C]."""
    x = node.args[0]
    if x not in layout.last or len(shape_of(x)) != 3 or not _swaps_tokens(node):
        return False
    new = layout.program.insert_call(node, aten.squeeze.dims, (layout.last[x], [1]), like=node)
    node.replace_all_uses_with(new)
    return True


def _swaps_tokens(node: fx.Node) -> bool:
    return node.target is aten.permute.default and [d % 3 for d in node.args[1]] == [0, 2, 1]


RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), _conv),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), _conv),
    **dict.fromkeys(
        (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), _conv_transpose
    ),
    **dict.fromkeys((aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default), _max_pool),
    **dict.fromkeys((aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default), _avg_pool),
    aten.adaptive_avg_pool1d.default: _adaptive_pool,
    **dict.fromkeys((aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default), _adaptive_pool),
    **dict.fromkeys((aten.adaptive_avg_pool3d.default, aten._adaptive_avg_pool3d.default), _adaptive_pool),
    **dict.fromkeys((aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec), _resize),
    aten.cat.default: _cat,
    aten.mean.dim: _reduce,
    aten.sum.dim_IntList: _reduce,
    aten.amax.default: _reduce,
    aten.constant_pad_nd.default: _pad,
    aten.slice.Tensor: _slice,
    aten.index_select.default: _index_select,
    aten.reshape.default: _reshape,
    aten.permute.default: _to_tokens,
}


def rewrite(layout: Layout, node: fx.Node) -> bool:
    """Give ``node`` a channels-last twin, or feed it from one, where its operator allows it."""
    elementwise = _elementwise if isinstance(TABLE.get(node.target), Elementwise) else None
    rule = RULES.get(node.target, elementwise)
    return rule is not None and rule(layout, node)
