"""Choose channels-last activations for the image part of the graph, once.

A value ``[N, C, H, W]`` is held as ``[N, H, W, C]`` from the first convolution or pool to the last operator that can work on it that way:
convolutions, pools, elementwise operators, concatenation, padding, reductions, and reshapes that flatten pixels to tokens.
Permutations stand only at the border of that region. Exact: an axis is renamed, nothing is computed differently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

import thresher.ops.channels_last  # noqa: F401  (registers the operators)
from thresher.analysis.operators import TABLE
from thresher.analysis.rows.base import argument
from thresher.analysis.rows.elementwise import Elementwise
from thresher.pass_manager import Context, Note, Pass, PassResult, register_pass
from thresher.program import Program, dtype_of, is_tensor, shape_of

aten, ops = torch.ops.aten, torch.ops.thresher
TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
PLACE = {0: 0, 1: 3, 2: 1, 3: 2}  # where an axis of NCHW stands in NHWC


@register_pass
@dataclass(frozen=True)
class ChannelsLast(Pass):
    """Run the image part of the graph on channels-last activations."""

    name: ClassVar[str] = "channels-last"

    def apply(self, program: Program, context: Context) -> PassResult:
        layout = _Layout(program.clone())
        notes = [Note.at(n, "on channels-last activations") for n in list(layout.program.calls()) if layout.rewrite(n)]
        if not notes:
            return PassResult(program)
        layout.back_to_first()
        return PassResult(layout.program.clean(), notes)


class _Layout:
    """``last[v]`` is the channels-last twin of a value ``[N, C, H, W]``."""

    def __init__(self, program: Program):
        self.program = program
        self.last: dict[fx.Node, fx.Node] = {}

    def rewrite(self, node: fx.Node) -> bool:
        """Give ``node`` a channels-last twin (or feed it from one) where its operator allows it."""
        rule = RULES.get(node.target)
        if rule is None and isinstance(TABLE.get(node.target), Elementwise):
            rule = _elementwise
        return bool(rule is not None and is_tensor(node) and rule(self, node))

    def emit(self, node: fx.Node, target: Any, args: tuple, kwargs: dict | None = None) -> bool:
        self.last[node] = self.program.insert_call(node, target, args, kwargs, like=node)
        return True

    def twin(self, value: fx.Node, before: fx.Node) -> fx.Node:
        """The channels-last twin of a rank-4 value, made by a permutation where it has none."""
        if value not in self.last:
            constant = self.program.constant(value)
            if constant is not None:
                name = f"{value.target}_nhwc"
                self.last[value] = self.program.add_constant(
                    constant.permute(TO_LAST).contiguous(), name, dtype_of(value), like=value
                )
            else:
                following = value.next if value.op == "call_function" else before
                if value.op == "placeholder":
                    following = next(n for n in self.program.graph.nodes if n.op not in ("placeholder", "get_attr"))
                self.last[value] = self.program.insert_call(
                    following, aten.permute.default, (value, TO_LAST), like=value
                )
        return self.last[value]

    def operand(self, value: Any, rank: int, before: fx.Node) -> Any:
        """An elementwise operand on the channels-last side: lower ranks are aligned to the right first."""
        if not is_tensor(value) or len(shape_of(value)) == 0:
            return value
        missing = rank - len(shape_of(value))
        if missing == 0:
            return self.twin(value, before)
        constant = self.program.constant(value)
        if constant is not None:
            widened = constant.reshape([1] * missing + list(constant.shape)).permute(TO_LAST).contiguous()
            return self.program.add_constant(widened, f"{value.target}_nhwc", dtype_of(value), like=value)
        shape = [1] * missing + list(shape_of(value))
        wide = self.program.insert_call(before, aten.reshape.default, (value, shape), like=value)
        return self.program.insert_call(before, aten.permute.default, (wide, TO_LAST), like=value)

    def back_to_first(self) -> None:
        """What still reads the old value gets a permutation of its twin."""
        for value, twin in self.last.items():
            if value.op != "call_function":
                continue
            readers = [u for u in value.users if u is not twin and u not in self.last]
            if not readers or (twin.target is aten.permute.default and twin.args[0] is value):
                continue
            back = self.program.insert_call(value, aten.permute.default, (twin, TO_FIRST), like=value)
            value.replace_all_uses_with(back, delete_user_cb=lambda user, made=back: user is not made)


Rule = Callable[[_Layout, fx.Node], bool]


def _rank4(value: Any) -> bool:
    return is_tensor(value) and len(shape_of(value)) == 4


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (2 if len(value) == 1 else 1)


def _conv(layout: _Layout, node: fx.Node) -> bool:
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    constant = layout.program.constant(weight)
    if not _rank4(x) or constant is None or (bias is not None and layout.program.constant(bias) is None):
        return False
    stride, dilation, groups = (
        _pair(argument(node, 3, "stride", 1)),
        _pair(argument(node, 5, "dilation", 1)),
        argument(node, 6, "groups", 1),
    )
    padding, value = argument(node, 4, "padding", 0), layout.twin(x, node)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, constant.shape[2:])]
        padding = [0, 0]
        if any(total):
            amounts = [0, 0, total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
            value = layout.program.insert_call(node, aten.constant_pad_nd.default, (value, amounts), like=node)
    return layout.emit(node, ops.conv2d_nhwc.default, (value, weight, bias, stride, _pair(padding), dilation, groups))


def _conv_transpose(layout: _Layout, node: fx.Node) -> bool:
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    constant = layout.program.constant(weight)
    if not _rank4(x) or constant is None or (bias is not None and layout.program.constant(bias) is None):
        return False
    stride, padding, extra = (
        _pair(argument(node, i, k, d)) for i, k, d in ((3, "stride", 1), (4, "padding", 0), (5, "output_padding", 0))
    )
    groups, dilation = argument(node, 6, "groups", 1), _pair(argument(node, 7, "dilation", 1))
    value = layout.twin(x, node)
    static = all(isinstance(d, int) for d in shape_of(node))
    if (
        static
        and stride == list(constant.shape[2:])
        and padding == extra == [0, 0]
        and dilation == [1, 1]
        and groups == 1
    ):
        return _spread(layout, node, value, constant, bias)
    return layout.emit(
        node, ops.conv_transpose2d_nhwc.default, (value, weight, bias, stride, padding, extra, groups, dilation)
    )


def _spread(layout: _Layout, node: fx.Node, value: fx.Node, weight: torch.Tensor, bias: fx.Node | None) -> bool:
    """Stride = kernel: every output pixel has one tap, so it is a linear layer per input pixel whose results are laid out as a square."""
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


def _max_pool(layout: _Layout, node: fx.Node) -> bool:
    if not _rank4(node.args[0]):
        return False
    kernel = _pair(node.args[1])
    stride = _pair(argument(node, 2, "stride") or kernel)
    rest = (
        _pair(argument(node, 3, "padding", 0)),
        _pair(argument(node, 4, "dilation", 1)),
        bool(argument(node, 5, "ceil_mode", False)),
    )
    return layout.emit(node, ops.max_pool2d_nhwc.default, (layout.twin(node.args[0], node), kernel, stride, *rest))


def _avg_pool(layout: _Layout, node: fx.Node) -> bool:
    if not _rank4(node.args[0]):
        return False
    kernel = _pair(node.args[1])
    stride = _pair(argument(node, 2, "stride") or kernel)
    flags = (
        bool(argument(node, 4, "ceil_mode", False)),
        bool(argument(node, 5, "count_include_pad", True)),
        argument(node, 6, "divisor_override"),
    )
    return layout.emit(
        node,
        ops.avg_pool2d_nhwc.default,
        (layout.twin(node.args[0], node), kernel, stride, _pair(argument(node, 3, "padding", 0)), *flags),
    )


def _adaptive_pool(layout: _Layout, node: fx.Node) -> bool:
    """To one pixel: a mean. To a divisor of the size: a plain pool. Anything else stays."""
    x: fx.Node = node.args[0]
    out = _pair(node.args[1])
    if not _rank4(x) or any(isinstance(d, torch.SymInt) for d in shape_of(x)[1:]):
        return False
    size = [int(d) for d in shape_of(x)[2:]]
    if out == [1, 1]:
        return layout.emit(node, aten.mean.dim, (layout.twin(x, node), [1, 2], True))
    if any(o is None or s % o for s, o in zip(size, out)):
        return False
    kernel = [s // o for s, o in zip(size, out)]
    return layout.emit(
        node, ops.avg_pool2d_nhwc.default, (layout.twin(x, node), kernel, kernel, [0, 0], False, True, None)
    )


def _elementwise(layout: _Layout, node: fx.Node) -> bool:
    if not _rank4(node) or not any(n in layout.last for n in node.all_input_nodes if _rank4(n)):
        return False
    if node.target in (aten.prelu.default,) or any(is_tensor(n) and len(shape_of(n)) > 4 for n in node.all_input_nodes):
        return False
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda a: layout.operand(a, 4, node) if isinstance(a, fx.Node) else a
    )
    return layout.emit(node, node.target, args, {k: v for k, v in kwargs.items() if k != "memory_format"})


def _cat(layout: _Layout, node: fx.Node) -> bool:
    values = node.args[0]
    if not all(_rank4(v) for v in values) or not any(v in layout.last for v in values):
        return False
    dim = argument(node, 1, "dim", 0) % 4
    return layout.emit(node, node.target, ([layout.twin(v, node) for v in values], PLACE[dim]))


def _reduce(layout: _Layout, node: fx.Node) -> bool:
    x, dims, keepdim = node.args[0], argument(node, 1, "dim"), bool(argument(node, 2, "keepdim", False))
    if x not in layout.last or dims is None:
        return False
    places = sorted(PLACE[d % 4] for d in ([dims] if isinstance(dims, int) else dims))
    if keepdim:
        return layout.emit(node, node.target, (layout.last[x], places, True), dict(node.kwargs))
    if places != [1, 2]:
        return False
    new = layout.program.insert_call(node, node.target, (layout.last[x], places, False), dict(node.kwargs), like=node)
    node.replace_all_uses_with(new)
    return True


def _pad(layout: _Layout, node: fx.Node) -> bool:
    x, amounts = node.args[0], list(node.args[1])
    if x not in layout.last:
        return False
    amounts += [0] * (8 - len(amounts))
    per_axis = {3 - i: amounts[2 * i : 2 * i + 2] for i in range(4)}
    moved = [a for place in (1, 3, 2, 0) for a in per_axis[place]]  # last axis first: C, W, H, N
    return layout.emit(node, node.target, (layout.last[x], moved, *node.args[2:]))


def _slice(layout: _Layout, node: fx.Node) -> bool:
    x = node.args[0]
    if x not in layout.last or not _rank4(x):
        return False
    return layout.emit(
        node, node.target, (layout.last[x], PLACE[argument(node, 1, "dim", 0) % 4], *node.args[2:]), dict(node.kwargs)
    )


def _index_select(layout: _Layout, node: fx.Node) -> bool:
    x, dim, index = node.args
    if x not in layout.last or not _rank4(x):
        return False
    return layout.emit(node, node.target, (layout.last[x], PLACE[dim % 4], index))


def _reshape(layout: _Layout, node: fx.Node) -> bool:
    """[N, C, 1, 1] -> [N, C] reads the twin as it is; [N, C, H, W] -> [N, C, H W] -> (tokens) [N, H W, C] too."""
    x = node.args[0]
    if x not in layout.last or not _rank4(x):
        return False
    program, shape, twin = layout.program, shape_of(x), layout.last[x]
    if shape[2] == shape[3] == 1 and len(shape_of(node)) == 2:
        node.replace_all_uses_with(program.insert_call(node, aten.reshape.default, (twin, node.args[1]), like=node))
        return True
    tokens = [u for u in node.users if _swaps_tokens(u)]
    if len(shape_of(node)) != 3 or len(tokens) != len(node.users) or shape_of(node)[1] != shape[1]:
        return False
    size = [node.args[1][0], shape_of(node)[2], shape_of(node)[1]]
    if any(isinstance(d, torch.SymInt) for d in size):
        return False
    new = program.insert_call(node, aten.reshape.default, (twin, size), like=node)
    for user in tokens:
        user.replace_all_uses_with(new)
    return True


def _swaps_tokens(node: fx.Node) -> bool:
    if node.target is aten.transpose.int:
        return {d % 3 for d in node.args[1:3]} == {1, 2}
    return node.target is aten.permute.default and [d % 3 for d in node.args[1]] == [0, 2, 1]


RULES: dict[Any, Rule] = {
    aten.conv2d.default: _conv,
    aten.conv2d.padding: _conv,
    aten.conv_transpose2d.input: _conv_transpose,
    aten.max_pool2d.default: _max_pool,
    aten.avg_pool2d.default: _avg_pool,
    aten.adaptive_avg_pool2d.default: _adaptive_pool,
    aten._adaptive_avg_pool2d.default: _adaptive_pool,
    aten.cat.default: _cat,
    aten.mean.dim: _reduce,
    aten.sum.dim_IntList: _reduce,
    aten.amax.default: _reduce,
    aten.constant_pad_nd.default: _pad,
    aten.slice.Tensor: _slice,
    aten.index_select.default: _index_select,
    aten.reshape.default: _reshape,
}
