"""Remove what does nothing and give each remaining operation one spelling, exactly.

    x * 1 = x / 1 = x + 0 = x - 0 = x                              up to the sign of a zero
    clamp(x, 0) = maximum(x, 0) = threshold(x, 0, 0) = relu(x)     NaN passes through all of them
    x @ W = linear(x, W^T), addmm(b, x, W) = linear(x, W^T, b)     W a constant matrix, b a constant vector
    prelu(x, w) = where(x > 0, x, w x)                             w constant: one slope, or one per channel
    split(x)[i] = slice(x, start_i, end_i)                         chunk as well; unbind(x)[i] = select(x, i)
    topk(x, k).values[..., -1:] = thresher::kth_largest(x, k)      over the last dimension
    f(expand(x)) = expand(f(x))                                    f pointwise

* no-ops: dropout in evaluation, clone, detach, conversions to the same dtype, slices, expands and concatenations of one value;
* instance norm on its own statistics becomes group norm, channel shuffle two reshapes and a transposition;
* what is computed twice from the same values is computed once (common subexpressions: Cocke, 1970);
* an additive attention mask that is all 0, or a boolean one that is all True, is dropped; a mask is not expanded for attention.

A call is removed only if its result has the shape and the dtype of its argument. Random calls are never shared, and splits, shuffles and
expands over a dynamic size stay as they are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.slices.transfer.base import argument
from thresher.ir.lineage import moved
from thresher.ir.nodes import dtype_of, getitem_users, is_tensor, shape_of
from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.registry import register_pass

aten = torch.ops.aten
NO_OPS = {
    aten.clone.default, aten.detach.default, aten.alias.default, aten.dropout.default, aten.lift_fresh_copy.default,
    aten.contiguous.default,
}  # fmt: skip
CONVERSIONS = {aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device}
RESHAPES = {aten.reshape.default, aten.expand.default, aten.slice.Tensor, aten.permute.default}


@register_pass
@dataclass(frozen=True)
class Simplify(Pass):
    """Drop no-ops and unify spellings."""

    name: ClassVar[str] = "simplify"
    keeps_copies: ClassVar[bool] = True

    def apply(self, program: Program, context: Context) -> PassResult:
        work = program.clone()
        notes = share(work)  # before products with one matrix get one each
        for node in list(work.calls()):
            for rule in (
                drop_no_op,
                name_each_part,
                name_linear,
                name_relu,
                name_kth_largest,
                spell_out_prelu,
                name_instance_norm,
                spell_out_shuffle,
                drop_empty_mask,
                broadcast_late,
            ):
                message = rule(work, node)
                if message:
                    notes.append(Note.at(node, message))
                    break
        names = {n.name for n in program.graph.nodes}  # the others are of calls that a note above is about
        notes += [note for note in share(work) if note.node in names]  # once each has its one spelling
        return PassResult(work.clean(), notes) if notes else PassResult(program)


def drop_no_op(program: Program, node: fx.Node) -> str:
    """Remove a call that returns its first argument unchanged."""
    source = node.args[0] if node.args else None
    if node.target is aten.cat.default and len(node.args[0]) == 1:
        source = node.args[0][0]
    if node.target is aten.copy.default:  # what is written over does not matter
        source = node.args[1]
    if (
        not is_tensor(source)
        or not is_tensor(node)
        or shape_of(source) != shape_of(node)
        or dtype_of(source) != dtype_of(node)
    ):
        return ""
    same = (
        (node.target in NO_OPS and not (node.target is aten.dropout.default and node.args[2]))
        or node.target in CONVERSIONS
        or (node.target in RESHAPES and _keeps_order(node))
        or node.target in (aten.cat.default, aten.copy.default)
        or (node.target is aten.constant_pad_nd.default and not any(node.args[1]))
        or _neutral(program, node)
    )
    if not same:
        return ""
    node.replace_all_uses_with(source)
    return "does nothing: removed"


def share(program: Program) -> list[Note]:
    """Compute once what is computed twice; returns a note for each call that is removed."""
    return [Note.at(node, message) for node in list(program.clean().calls()) if (message := _the_same_before(node))]


def _the_same_before(node: fx.Node) -> str:
    """Let the users of ``node`` read an equal call before it."""
    inputs = node.all_input_nodes
    if not inputs or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return ""
    for other in inputs[0].users:
        if other.target is node.target and other < node and _arguments_text(other) == _arguments_text(node):
            node.replace_all_uses_with(other)
            return f"the same as {other.name}: computed once"
    return ""


def _arguments_text(node: fx.Node) -> str:
    """Return the arguments as text, in which 1, 1.0 and True differ, and 0.0 and -0.0."""
    return repr((node.args, node.kwargs))


def _keeps_order(node: fx.Node) -> bool:
    if node.target is aten.permute.default:
        return list(node.args[1]) == sorted(node.args[1])
    return argument(node, 4, "step", 1) == 1 if node.target is aten.slice.Tensor else True


def _neutral(program: Program, node: fx.Node) -> bool:
    neutral = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}.get(node.target)
    if neutral is None:
        return False
    other = program.constant(node.args[1])
    return bool((other == neutral).all()) if other is not None else node.args[1] == neutral


def name_each_part(program: Program, node: fx.Node) -> str:
    """Write ``getitem(split(x), i)`` as ``slice(x)``, and ``getitem(unbind(x), i)`` as ``select(x)``."""
    if node.target not in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int):
        return ""
    source = node.args[0]
    dim = (argument(node, 1 if node.target is aten.unbind.int else 2, "dim", 0)) % len(shape_of(source))
    if isinstance(shape_of(source)[dim], torch.SymInt):
        return ""
    parts = [v.shape[dim] if node.target is not aten.unbind.int else 1 for v in node.meta["val"]]
    if any(isinstance(size, torch.SymInt) for size in parts):  # values of tensors decide them
        return ""
    for index, item in getitem_users(node).items():
        start = sum(parts[:index])
        if node.target is aten.unbind.int:
            part = program.insert_call(item, aten.select.int, (source, dim, start), like=node)
        else:
            part = program.insert_call(item, aten.slice.Tensor, (source, dim, start, start + parts[index]), like=node)
        item.replace_all_uses_with(part)
        program.graph.erase_node(item)
    return f"{node.target} written as slices"


def name_relu(program: Program, node: fx.Node) -> str:
    """Write clamp, maximum and threshold at 0 as ``relu``: NaN passes through all of them."""

    def is_zero(value: object) -> bool:
        known = program.constant(value) if isinstance(value, fx.Node) else None
        return bool((known == 0).all()) if known is not None else value == 0 and not isinstance(value, (bool, fx.Node))

    x = node.args[0] if node.args else None
    if node.target in (aten.clamp.default, aten.clamp_min.default):
        same = is_zero(argument(node, 1, "min")) and argument(node, 2, "max") is None
    elif node.target is aten.maximum.default:
        x, other = node.args if is_tensor(node.args[1]) and is_zero(node.args[1]) else node.args[::-1]
        same = is_zero(other) and shape_of(x) == shape_of(node) and dtype_of(x) == dtype_of(node)
    else:
        same = node.target is aten.threshold.default and node.args[1] == node.args[2] == 0
    if not same or not dtype_of(node).is_floating_point:
        return ""
    node.replace_all_uses_with(program.insert_call(node, aten.relu.default, (x,), like=node))
    return "written as relu"


def name_kth_largest(program: Program, node: fx.Node) -> str:
    """Write the slice that reads only the last of the k largest as ``thresher::kth_largest``."""
    if (
        node.target is not aten.slice.Tensor
        or not is_tensor(node.args[0])
        or node.args[0].target is not operator.getitem
    ):
        return ""
    largest, index = node.args[0].args
    if largest.target is not aten.topk.default or index != 0 or not argument(largest, 3, "largest", True):
        return ""
    x, k = largest.args[:2]
    last = len(shape_of(x)) - 1
    start = argument(node, 2, "start")
    start = start + k if start is not None and start < 0 else start
    if argument(largest, 2, "dim", -1) % (last + 1) != last or node.args[1] % (last + 1) != last:
        return ""
    if start != k - 1 or shape_of(node)[last] != 1:  # an end before the start leaves nothing
        return ""
    node.replace_all_uses_with(program.insert_call(node, torch.ops.thresher.kth_largest.default, (x, k), like=node))
    return "the last of the largest: written as thresher::kth_largest"


def name_linear(program: Program, node: fx.Node) -> str:
    """Write a product with a constant matrix as a linear layer."""
    bias = None
    if node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args
    elif node.target in (aten.matmul.default, aten.mm.default, aten.bmm.default):
        x, weight = node.args
    else:
        return ""
    matrix = program.constant(weight)
    if matrix is not None and matrix.dim() == 3 and matrix.shape[0] == 1 and shape_of(x)[0] == 1:
        matrix = matrix[0]  # what einsum leaves
    if (
        matrix is None
        or matrix.dim() != 2
        or not is_tensor(x)
        or program.constant(x) is not None
        or len(shape_of(x)) < 2
    ):
        return ""
    if bias is not None and (
        program.constant(bias) is None or len(shape_of(bias)) != 1 or shape_of(bias)[0] != matrix.shape[1]
    ):
        return ""
    transposed = program.add_constant(matrix.t().contiguous(), f"{weight.target}_t", dtype_of(weight), like=node)
    program.lineage.append(
        moved(str(transposed.target), str(weight.target), program.constants[weight.target], _transpose)
    )
    new = program.insert_call(
        node, aten.linear.default, (x, transposed) if bias is None else (x, transposed, bias), like=node
    )
    node.replace_all_uses_with(new)
    return "a product with a constant matrix: written as linear"


def _transpose(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.reshape(matrix.shape[-2:]).t()


def spell_out_prelu(program: Program, node: fx.Node) -> str:
    """Write ``prelu(x, w)`` with one slope per channel (dimension 1) as ``where(x > 0, x, w x)``."""
    slope = program.constant(node.args[1]) if node.target is aten.prelu.default else None
    if slope is None:
        return ""
    x, rank = node.args[0], len(shape_of(node))
    shape = [-1] + [1] * (rank - 2) if rank > 1 else [-1] * rank
    w = program.add_constant(slope.reshape(shape), f"{node.args[1].target}_slope", dtype_of(node), like=node)
    program.lineage.append(moved(str(w.target), str(node.args[1].target), slope, lambda t: t))
    positive = program.insert_call(node, aten.gt.Scalar, (x, 0), like=node)
    below = program.insert_call(node, aten.mul.Tensor, (x, w), like=node)
    node.replace_all_uses_with(program.insert_call(node, aten.where.self, (positive, x, below), like=node))
    return "written as where(x > 0, x, w x)"


def name_instance_norm(program: Program, node: fx.Node) -> str:
    """Write instance norm on the statistics of its input as group norm with one channel a group."""
    if node.target is not aten.instance_norm.default or not node.args[5]:
        return ""
    x, weight, bias, *_ = node.args
    channels = shape_of(x)[1]
    new = program.insert_call(node, aten.group_norm.default, (x, channels, weight, bias, node.args[7]), like=node)
    node.replace_all_uses_with(new)
    return "written as group_norm"


def spell_out_shuffle(program: Program, node: fx.Node) -> str:
    """Write ``channel_shuffle(x, g)`` as a reshape into groups, a transposition and a reshape back."""
    if node.target is not aten.channel_shuffle.default:
        return ""
    x, groups = node.args
    batch, channels, *rest = shape_of(x)
    if any(isinstance(d, torch.SymInt) for d in (batch, channels, *rest)):
        return ""
    value = program.insert_call(node, aten.reshape.default, (x, [batch, groups, channels // groups, *rest]), like=node)
    order = [0, 2, 1, *range(3, len(rest) + 3)]
    value = program.insert_call(node, aten.permute.default, (value, order), like=node)
    node.replace_all_uses_with(
        program.insert_call(node, aten.reshape.default, (value, [batch, channels, *rest]), like=node)
    )
    return "written as reshape, permute, reshape"


def drop_empty_mask(program: Program, node: fx.Node) -> str:
    """Drop an attention mask that masks nothing."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return ""
    mask = program.constant(argument(node, 3, "attn_mask"))
    if mask is None or not (bool(mask.all()) if mask.dtype is torch.bool else not bool(mask.any())):
        return ""
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "attn_mask"}
    if len(node.args) > 3:
        node.update_arg(3, None)
    return "the attention mask masks nothing: dropped"


def broadcast_late(program: Program, node: fx.Node) -> str:
    """Write ``f(expand(x))`` as ``expand(f(x))`` for pointwise f; an attention mask broadcasts by itself."""
    wide = [n for n in node.all_input_nodes if n.target is aten.expand.default and _same_rank(n)]
    if not wide:
        return ""
    if node.target is aten.scaled_dot_product_attention.default:
        mask = argument(node, 3, "attn_mask")
        if mask not in wide or mask in node.args[:3]:
            return ""
        node.replace_input_with(mask, mask.args[0])
        return "the attention mask broadcasts by itself: not expanded"
    if not is_tensor(node) or not (torch.Tag.pointwise in node.target.tags or node.target in CONVERSIONS):
        return ""
    narrow = {n: n.args[0] if n in wide else n for n in node.all_input_nodes}
    if any(not is_tensor(n) for n in narrow):
        return ""
    shapes = [shape_of(n) for n in narrow.values()]
    if any(isinstance(d, torch.SymInt) for s in (*shapes, shape_of(node)) for d in s):
        return ""
    if torch.broadcast_shapes(*shapes) == shape_of(node):
        return ""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: narrow[n])
    small = program.insert_call(node, node.target, args, kwargs, like=node)
    node.replace_all_uses_with(program.insert_call(node, aten.expand.default, (small, list(shape_of(node))), like=node))
    return "computed before it is expanded"


def _same_rank(node: fx.Node) -> bool:
    return is_tensor(node.args[0]) and len(shape_of(node.args[0])) == len(shape_of(node))
