"""Choose channels-last activations for the image part of the graph, once.

A value ``[N, C, H, W]`` is held as ``[N, H, W, C]`` from the first convolution or pool to the last operator that can work on it that way:
convolutions, pools, resizes, elementwise operators, concatenation, padding, reductions, and reshapes that flatten pixels to tokens.
A sequence ``[N, C, L]`` is an image of height 1, ``[N, 1, L, C]``; a volume ``[N, C, D, H, W]`` becomes ``[N, D, H, W, C]``.
Permutations stand only at the border of that region. Exact: an axis is renamed, nothing is computed differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

import thresher.ops.channels_last  # noqa: F401  (registers the operators)
from thresher.analysis.slices.operators import TABLE
from thresher.analysis.slices.transfer.base import argument
from thresher.analysis.slices.transfer.elementwise import Elementwise
from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.registry import register_pass

aten, ops = torch.ops.aten, torch.ops.thresher
#: By rank: where an axis of the channels-first value stands in its twin.
PLACE = {3: {0: 0, 1: 3, 2: 2}, 4: {0: 0, 1: 3, 2: 1, 3: 2}, 5: {0: 0, 1: 4, 2: 1, 3: 2, 4: 3}}


def to_last(rank: int) -> list[int]:
    """The permutation to channels-last."""
    return [0, *range(2, rank), 1]


def to_first(rank: int) -> list[int]:
    """The permutation back."""
    return [0, rank - 1, *range(1, rank - 1)]


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
    """``last[v]`` is the channels-last twin of a value; for those in ``computed`` it is the operator itself that yields it."""

    def __init__(self, program: Program):
        self.program = program
        self.last: dict[fx.Node, fx.Node] = {}
        self.computed: set[fx.Node] = set()

    def rewrite(self, node: fx.Node) -> bool:
        """Give ``node`` a channels-last twin (or feed it from one) where its operator allows it."""
        rule = RULES.get(node.target)
        if rule is None and isinstance(TABLE.get(node.target), Elementwise):
            rule = _elementwise
        return bool(rule is not None and is_tensor(node) and rule(self, node))

    def emit(self, node: fx.Node, target: Any, args: tuple, kwargs: dict | None = None) -> bool:
        self.last[node] = self.program.insert_call(node, target, args, kwargs, like=node)
        self.computed.add(node)
        return True

    def constant(self, value: torch.Tensor, rank: int, like: fx.Node) -> fx.Node:
        """A constant on the channels-last side; lower ranks are aligned to the right first."""
        value = value.reshape([1] * (rank - value.dim()) + list(value.shape)).permute(to_last(rank))
        value = value.unsqueeze(1) if rank == 3 else value
        return self.program.add_constant(value.contiguous(), f"{like.target}_last", dtype_of(like), like=like)

    def permuted(self, value: fx.Node, before: fx.Node) -> fx.Node:
        """The twin of a computed value, by a permutation; of a value that is a permutation of its twin already, that."""
        rank = len(shape_of(value))
        if value.target is aten.permute.default and [d % rank for d in value.args[1]] == to_first(rank):
            made = value.args[0]
        else:
            made = self.program.insert_call(before, aten.permute.default, (value, to_last(rank)), like=value)
        return self.program.insert_call(before, aten.unsqueeze.default, (made, 1), like=value) if rank == 3 else made

    def twin(self, value: fx.Node, before: fx.Node) -> fx.Node:
        """The channels-last twin of a value, made where it has none."""
        if value not in self.last:
            constant = self.program.constant(value)
            following = value.next if value.op == "call_function" else before
            if value.op == "placeholder":
                following = next(n for n in self.program.graph.nodes if n.op not in ("placeholder", "get_attr"))
            self.last[value] = (
                self.permuted(value, following) if constant is None else self.constant(constant, constant.dim(), value)
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
            return self.constant(constant, rank, value)
        shape = [1] * missing + list(shape_of(value))
        wide = self.program.insert_call(before, aten.reshape.default, (value, shape), like=value)
        return self.permuted(wide, before)

    def first(self, value: fx.Node, before: fx.Node) -> fx.Node:
        """``value`` from its twin, as it was."""
        twin, rank = self.last[value], len(shape_of(value))
        if rank == 3:
            twin = self.program.insert_call(before, aten.squeeze.dims, (twin, [1]), like=value)
        return self.program.insert_call(before, aten.permute.default, (twin, to_first(rank)), like=value)

    def back_to_first(self) -> None:
        """What still reads the old value gets a permutation of its twin."""
        for value in self.computed:
            if not all(user in self.computed for user in value.users):
                value.replace_all_uses_with(self.first(value, value))


Rule = Callable[[_Layout, fx.Node], bool]


def _image(value: Any) -> bool:
    """A sequence, an image or a volume with a batch and channels in front."""
    return is_tensor(value) and len(shape_of(value)) in PLACE


def _batched(node: fx.Node) -> bool:
    """Whether a convolution or pool reads a batch: as many dimensions as its name says, and two more. It takes single images, too."""
    found = re.search(r"(\d)d", str(node.target))
    return found is not None and is_tensor(node.args[0]) and len(shape_of(node.args[0])) == int(found[1]) + 2


def _sizes(value: Any, node: fx.Node, unit: int) -> list[int]:
    """A parameter per spatial dimension of the twin: one number stands for all; the height of a sequence gets ``unit``."""
    rank = len(shape_of(node))
    found = [value] if isinstance(value, int) else list(value)
    found = found * (rank - 2) if len(found) == 1 else found
    return [unit, *found] if rank == 3 else found


def _weights(layout: _Layout, node: fx.Node) -> torch.Tensor | None:
    """The constant weight of a convolution whose bias is constant, too."""
    bias = argument(node, 2, "bias")
    if not _batched(node) or (bias is not None and layout.program.constant(bias) is None):
        return None
    return layout.program.constant(node.args[1])


def _kernel(layout: _Layout, node: fx.Node, weight: torch.Tensor) -> fx.Node:
    """The weight as that of an image; a sequence has kernels of height 1."""
    old: fx.Node = node.args[1]
    if weight.dim() > 3:
        return old
    return layout.program.add_constant(weight.unsqueeze(2), f"{old.target}_row", dtype_of(old), like=old)


def _conv(layout: _Layout, node: fx.Node) -> bool:
    constant, bias = _weights(layout, node), argument(node, 2, "bias")
    if constant is None:
        return False
    stride, dilation = (_sizes(argument(node, i, k, 1), node, 1) for i, k in ((3, "stride"), (5, "dilation")))
    padding, value = argument(node, 4, "padding", 0), layout.twin(node.args[0], node)
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


def _conv_transpose(layout: _Layout, node: fx.Node) -> bool:
    constant, bias = _weights(layout, node), argument(node, 2, "bias")
    if constant is None:
        return False
    stride, padding, extra = (
        _sizes(argument(node, i, k, d), node, d)
        for i, k, d in ((3, "stride", 1), (4, "padding", 0), (5, "output_padding", 0))
    )
    groups, dilation = argument(node, 6, "groups", 1), _sizes(argument(node, 7, "dilation", 1), node, 1)
    value, weight = layout.twin(node.args[0], node), _kernel(layout, node, constant)
    kernel = layout.program.constants[str(weight.target)]
    static = all(isinstance(d, int) for d in shape_of(node)) and kernel.dim() == 4
    alone = stride == list(kernel.shape[2:]) and padding == extra == [0, 0] and dilation == [1, 1] and groups == 1
    if static and alone:
        return _spread(layout, node, value, kernel, bias)
    call = ops.conv_transpose3d_ndhwc.default if constant.dim() == 5 else ops.conv_transpose2d_nhwc.default
    return layout.emit(node, call, (value, weight, bias, stride, padding, extra, groups, dilation))


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
    return layout.emit(node, call, (layout.twin(node.args[0], node), *rest))


def _avg_pool(layout: _Layout, node: fx.Node) -> bool:
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


def _averaged(layout: _Layout, node: fx.Node, kernel: list[int], *rest: Any) -> bool:
    call = ops.avg_pool3d_ndhwc.default if len(kernel) == 3 else ops.avg_pool2d_nhwc.default
    return layout.emit(node, call, (layout.twin(node.args[0], node), kernel, *rest))


def _adaptive_pool(layout: _Layout, node: fx.Node) -> bool:
    """To one pixel: a mean. To a divisor of the size: a plain pool. Anything else stays."""
    x: fx.Node = node.args[0]
    if not _batched(node) or any(isinstance(d, torch.SymInt) for d in shape_of(x)[1:]):
        return False
    out, size = _sizes(node.args[1], node, 1), _sizes([int(d) for d in shape_of(x)[2:]], node, 1)
    if all(o == 1 for o in out):
        return layout.emit(node, aten.mean.dim, (layout.twin(x, node), list(range(1, len(out) + 1)), True))
    if any(not o or s % o for s, o in zip(size, out)):
        return False
    kernel = [s // o for s, o in zip(size, out)]
    return _averaged(layout, node, kernel, kernel, [0] * len(kernel), False, True, None)


def _resize(layout: _Layout, node: fx.Node) -> bool:
    """Nearest and bilinear, where the image is on channels-last already."""
    x, size, *rest = node.args
    if x not in layout.last or len(shape_of(x)) != 4:
        return False
    call = ops.upsample_nearest2d_nhwc if node.target is aten.upsample_nearest2d.vec else ops.upsample_bilinear2d_nhwc
    return layout.emit(node, call.default, (layout.last[x], size, *rest))


def _elementwise(layout: _Layout, node: fx.Node) -> bool:
    if not _image(node) or node.target is aten.prelu.default:
        return False
    rank = len(shape_of(node))
    if not any(n in layout.last for n in node.all_input_nodes if is_tensor(n) and len(shape_of(n)) == rank):
        return False
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda a: layout.operand(a, rank, node) if isinstance(a, fx.Node) else a
    )
    return layout.emit(node, node.target, args, {k: v for k, v in kwargs.items() if k != "memory_format"})


def _cat(layout: _Layout, node: fx.Node) -> bool:
    values = node.args[0]
    if not all(_image(v) for v in values) or not any(v in layout.last for v in values):
        return False
    place = _place(node, argument(node, 1, "dim", 0))
    return layout.emit(node, node.target, ([layout.twin(v, node) for v in values], place))


def _place(value: fx.Node, dim: int) -> int:
    """Where a dimension of ``value`` stands in its twin."""
    rank = len(shape_of(value))
    return PLACE[rank][dim % rank]


def _reduce(layout: _Layout, node: fx.Node) -> bool:
    x, dims, keepdim = node.args[0], argument(node, 1, "dim"), bool(argument(node, 2, "keepdim", False))
    if x not in layout.last or dims is None:
        return False
    places = sorted(_place(x, d) for d in ([dims] if isinstance(dims, int) else dims))
    if keepdim:
        return layout.emit(node, node.target, (layout.last[x], places, True), dict(node.kwargs))
    spatial = list(range(1, len(shape_of(layout.last[x])) - 1))
    if places != (spatial if len(shape_of(x)) > 3 else [2]):
        return False
    new = layout.program.insert_call(node, node.target, (layout.last[x], spatial, False), dict(node.kwargs), like=node)
    node.replace_all_uses_with(new)
    return True


def _pad(layout: _Layout, node: fx.Node) -> bool:
    x, amounts = node.args[0], list(node.args[1])
    if x not in layout.last:
        return False
    rank, twin = len(shape_of(x)), layout.last[x]
    amounts += [0] * (2 * rank - len(amounts))
    per_place = {_place(x, rank - 1 - i): amounts[2 * i : 2 * i + 2] for i in range(rank)}
    last_first = reversed(range(len(shape_of(twin))))
    moved = [a for place in last_first for a in per_place.get(place, (0, 0))]
    return layout.emit(node, node.target, (twin, moved, *node.args[2:]))


def _slice(layout: _Layout, node: fx.Node) -> bool:
    x = node.args[0]
    if x not in layout.last:
        return False
    place = _place(x, argument(node, 1, "dim", 0))
    return layout.emit(node, node.target, (layout.last[x], place, *node.args[2:]), dict(node.kwargs))


def _index_select(layout: _Layout, node: fx.Node) -> bool:
    x, dim, index = node.args
    if x not in layout.last:
        return False
    return layout.emit(node, node.target, (layout.last[x], _place(x, dim), index))


def _reshape(layout: _Layout, node: fx.Node) -> bool:
    """[N, C, 1, 1] -> [N, C] reads the twin as it is; [N, C, H, W] -> [N, C, H W] -> (tokens) [N, H W, C] too."""
    x = node.args[0]
    if x not in layout.last:
        return False
    program, shape, twin = layout.program, shape_of(x), layout.last[x]
    if all(d == 1 for d in shape[2:]) and len(shape_of(node)) == 2:
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


def _to_tokens(layout: _Layout, node: fx.Node) -> bool:
    """[N, C, L] -> (tokens) [N, L, C] reads the twin as it is."""
    x = node.args[0]
    if x not in layout.last or len(shape_of(x)) != 3 or not _swaps_tokens(node):
        return False
    new = layout.program.insert_call(node, aten.squeeze.dims, (layout.last[x], [1]), like=node)
    node.replace_all_uses_with(new)
    return True


def _swaps_tokens(node: fx.Node) -> bool:
    if node.target is aten.transpose.int:
        return {d % 3 for d in node.args[1:3]} == {1, 2}
    return node.target is aten.permute.default and [d % 3 for d in node.args[1]] == [0, 2, 1]


RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), _conv),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), _conv),
    **dict.fromkeys(
        (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), _conv_transpose
    ),
    **dict.fromkeys((aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default), _max_pool),
    **dict.fromkeys((aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default), _avg_pool),
    **dict.fromkeys((aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default), _adaptive_pool),
    **dict.fromkeys((aten._adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default), _adaptive_pool),
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
    aten.transpose.int: _to_tokens,
}
