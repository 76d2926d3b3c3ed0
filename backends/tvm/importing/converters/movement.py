"""Operators that move, pick, fill or convert elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from tvm import relax, te, tirx, topi

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.registry import (
    R,
    aten,
    cast,
    pad,
    result_dtype,
    semantics,
    sizes,
)
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.importing.inputs import variable
from thresher.backends.tvm.importing.values import is_eight_bit_float, is_empty, tensor_type
from thresher.ir.nodes import dtype_of, shape_of


@semantics(aten.select.int)
def select(importer: Importer, node: fx.Node) -> Any:
    """Return one index of a dimension; negative ones count from the end."""
    x, dim, index = node.args
    dim = dim % len(shape_of(x))
    size = shape_of(x)[dim]
    if isinstance(index, int) and index < 0:
        if not isinstance(size, int):
            raise NotImplementedError("a negative index into a dynamic dimension")
        index += size
    part = importer.emit(R.strided_slice(importer.value(x), [dim], [index], [index + 1]))
    return importer.emit(R.squeeze(part, [dim]))


@semantics(aten.slice.Tensor)
def slice_of_data(importer: Importer, node: fx.Node) -> Any:
    """Return a range of one dimension whose ends the data decide: as in Python, they are moved into the dimension."""
    x, dim = importer.value(node.args[0]), argument(node, 1, "dim", 0) % len(shape_of(node))
    if not any(map(importer.sizes.unknown, shape_of(node))):
        return importer.stock.convert_map["slice.Tensor"](node)
    size = importer.sizes.expression(shape_of(node.args[0])[dim])
    step = int(argument(node, 4, "step", 1))

    def inside(end: Any, default: Any) -> Any:
        end = tirx.Cast("int64", default if end is None else importer.value(end))
        end = tirx.Select(end < 0, end + size, end)
        return tirx.min(tirx.max(end, 0), size)

    first, last = inside(argument(node, 2, "start"), 0), inside(argument(node, 3, "end"), size)
    start = variable(importer.builder, first, f"{node.name}_start")
    length = tirx.max(tirx.floordiv(last - first + step - 1, step), 0)
    count = variable(importer.builder, length, f"{node.name}_size")

    def compute(t: te.Tensor, begin: Any, number: Any) -> te.Tensor:
        shape = [number if d == dim else s for d, s in enumerate(t.shape)]
        return te.compute(
            shape, lambda *i: t(*(begin + p * step if d == dim else p for d, p in enumerate(i))), name="T_slice"
        )

    return importer.builder.emit_te(compute, x, start, count, primfunc_name_hint="slice")


@semantics(aten.squeeze.dim, aten.squeeze.dims)
def squeeze(importer: Importer, node: fx.Node) -> Any:
    """Remove dimensions of size 1; a free one counts as larger, as in torch.export."""
    x, dims = node.args
    shape = shape_of(x)
    single = [d % len(shape) for d in ([dims] if isinstance(dims, int) else dims) if len(shape)]
    single = [d for d in single if isinstance(shape[d], int) and shape[d] == 1]
    return importer.emit(R.squeeze(importer.value(x), single)) if single else importer.value(x)


@semantics(aten.index.Tensor)
def index_tensor(importer: Importer, node: fx.Node) -> Any:
    """Index with integer tensors on leading or adjacent dimensions; negative indices count from the end."""
    x, indices = node.args
    places = [d for d, i in enumerate(indices) if i is not None]
    if any(dtype_of(indices[d]) is torch.bool for d in places) or places != list(range(places[0], places[-1] + 1)):
        raise NotImplementedError("indexing with boolean masks or with tensors on dimensions apart from each other")
    arrays = [importer.value(indices[d]) for d in places]
    first, rank = places[0], max(len(shape_of(indices[d])) for d in places)

    def compute(t: te.Tensor, *index: te.Tensor) -> te.Tensor:
        def element(*i: Any) -> Any:
            common = i[first : first + rank]
            picked = []
            for d, a in zip(places, index):
                position = common[rank - len(a.shape) :]
                at = a[
                    tuple(
                        tirx.const(0, "int64") if isinstance(s, tirx.IntImm) and int(s) == 1 else c
                        for s, c in zip(a.shape, position)
                    )
                ]
                picked.append(tirx.Select(at < 0, at + t.shape[d], at).astype("int64"))
            return t[(*i[:first], *picked, *i[first + rank :])]

        return te.compute([tirx.IntImm("int64", int(s)) for s in sizes(node)], element, name="T_index")

    return importer.builder.emit_te(compute, importer.value(x), *arrays, primfunc_name_hint="index")


@semantics(aten.embedding.default)
def embedding(importer: Importer, node: fx.Node) -> Any:
    """Look up rows. An index outside the table, where eager raises, reads its first or last row: never memory outside it."""
    return importer.emit(R.take(importer.value(node.args[0]), importer.value(node.args[1]), axis=0, mode="clip"))


@semantics(aten._local_scalar_dense.default)
def item(importer: Importer, node: fx.Node) -> Any:
    """Return the number in a tensor: a whole one as a size, which shapes may have, another as a tensor without dimensions."""
    value = importer.value(node.args[0])
    if not isinstance(node.meta["val"], torch.SymInt):
        kind = "bool" if isinstance(node.meta["val"], torch.SymBool) else "float64"
        return cast(importer, importer.emit(R.reshape(value, [])), kind)
    (symbol,) = importer.sizes.unknown(node.meta["val"])
    number = cast(importer, importer.emit(R.reshape(value, [1])), "int64")
    variable = importer.sizes.define(symbol)
    importer.builder.match_cast(importer.emit(R.tensor_to_shape(number)), relax.ShapeType([variable]))
    return importer.sizes.expression(node.meta["val"])


@semantics(aten._to_copy.default, aten.to.dtype)
def to_copy(importer: Importer, node: fx.Node) -> Any:
    """Convert to the dtype of the result."""
    if dtype_of(node) != dtype_of(node.args[0]) and any(
        is_eight_bit_float(n.meta["val"]) for n in (node, node.args[0])
    ):
        raise NotImplementedError("a conversion of floats of eight bits")
    return cast(importer, importer.value(node.args[0]), result_dtype(node))


@semantics(aten.full_like.default, aten.zeros_like.default, aten.ones_like.default)
def full_like(importer: Importer, node: fx.Node) -> Any:
    """Return a tensor of the argument's shape that is filled with a number."""
    fill = {aten.zeros_like.default: 0, aten.ones_like.default: 1}.get(
        node.target, node.args[1] if len(node.args) > 1 else 0
    )
    return importer.emit(
        R.full_like(
            cast(importer, importer.value(node.args[0]), result_dtype(node)), relax.const(fill, result_dtype(node))
        )
    )


@semantics(aten.constant_pad_nd.default)
def constant_pad(importer: Importer, node: fx.Node) -> Any:
    """Pad with a number; negative amounts crop."""
    x, amounts, fill = node.args[0], list(node.args[1]), argument(node, 2, "value", 0) or 0
    if x in importer.as_user or not any(amounts):
        return importer.value(x)
    if not all(isinstance(amount, int) for amount in amounts):
        return _pad_by_sizes(importer, node, amounts, fill)
    rank = len(shape_of(node))
    pairs = [(0, 0)] * (rank - len(amounts) // 2) + [
        (amounts[i], amounts[i + 1]) for i in range(len(amounts) - 2, -1, -2)
    ]

    def compute(t: te.Tensor) -> te.Tensor:
        if any(min(p) < 0 for p in pairs):
            t = topi.strided_slice(
                t, [max(-a, 0) for a, _ in pairs], [int(s) - max(-b, 0) for s, (_, b) in zip(t.shape, pairs)]
            )
        return pad(t, [max(a, 0) for a, _ in pairs], [max(b, 0) for _, b in pairs], fill)

    return importer.emit_te("pad", compute, importer.value(x))


def _pad_by_sizes(importer: Importer, node: fx.Node, amounts: Sequence[Any], fill: float) -> Any:
    """Pad by amounts that are computed from sizes, of which a negative one crops."""
    builder, rank = importer.builder, len(shape_of(node))
    before = {rank - 1 - i: importer.value(amount) for i, amount in enumerate(amounts[::2])}
    before = {d: a if isinstance(a, int) else variable(builder, a, f"{node.name}_{d}") for d, a in before.items()}
    shape = [importer.sizes.expression(size) for size in shape_of(node)]
    ends = [s if isinstance(s, int) else variable(builder, s, f"{node.name}_size_{d}") for d, s in enumerate(shape)]
    free = [value for value in (*before.values(), *ends) if not isinstance(value, int)]

    def compute(t: te.Tensor, *numbers: Any) -> te.Tensor:
        of = dict(zip(free, numbers))
        first = [of.get(before.get(d, 0), before.get(d, 0)) for d in range(rank)]

        def element(*i: Any) -> Any:
            at = [p - a for p, a in zip(i, first)]
            inside = [c for d in before for c in (at[d] >= 0, at[d] < t.shape[d])]
            return tirx.if_then_else(tirx.all(*inside), t(*at), tirx.const(fill, t.dtype))

        return te.compute([of.get(e, e) for e in ends], element, name="T_pad")

    result = builder.emit_te(compute, importer.value(node.args[0]), *free, primfunc_name_hint="pad")
    return (
        result
        if all(isinstance(s, int) for s in shape)
        else builder.match_cast(result, tensor_type(node.meta["val"], importer.sizes))
    )


@semantics(aten.pixel_shuffle.default)
def pixel_shuffle(importer: Importer, node: fx.Node) -> Any:
    """Rearrange [.., C r r, H, W] to [.., C, H r, W r]."""
    r, (*lead, channels, height, width) = int(node.args[1]), sizes(node.args[0])
    n = len(lead)
    value = importer.emit(R.reshape(importer.value(node.args[0]), (*lead, channels // (r * r), r, r, height, width)))
    return importer.emit(
        R.reshape(importer.emit(R.permute_dims(value, [*range(n), n, n + 3, n + 1, n + 4, n + 2])), sizes(node))
    )


@semantics(aten.pixel_unshuffle.default)
def pixel_unshuffle(importer: Importer, node: fx.Node) -> Any:
    """Rearrange [.., C, H r, W r] to [.., C r r, H, W]."""
    r, (*lead, channels, height, width) = int(node.args[1]), sizes(node.args[0])
    n = len(lead)
    value = importer.emit(R.reshape(importer.value(node.args[0]), (*lead, channels, height // r, r, width // r, r)))
    return importer.emit(
        R.reshape(importer.emit(R.permute_dims(value, [*range(n), n, n + 2, n + 4, n + 1, n + 3])), sizes(node))
    )


@semantics(aten.cat.default)
def concatenate(importer: Importer, node: fx.Node) -> Any:
    """Concatenate along a dimension in the dtype of the result; tensors without elements add nothing."""
    parts = [n for n in node.args[0] if not is_empty(n.meta["val"])]
    values = [cast(importer, importer.value(n), result_dtype(node)) for n in parts]
    return importer.emit(R.concat(values, argument(node, 1, "dim", 0))) if len(values) > 1 else values[0]


@semantics(aten.as_strided.default, aten.as_strided_copy.default)
def as_strided(importer: Importer, node: fx.Node) -> Any:
    """Return the elements of contiguous memory at an offset plus the index times the strides."""
    x, shape, strides = node.args[:3]
    offset = argument(node, 3, "storage_offset", None) or 0
    if not x.meta["val"].is_contiguous():
        raise NotImplementedError("a tensor that is not contiguous")
    strides = [int(s) for s in strides]

    def compute(t: te.Tensor) -> te.Tensor:
        def element(*i: Any) -> Any:
            return t[sum((at * s for at, s in zip(i, strides)), tirx.const(offset, "int64"))]

        return te.compute([int(s) for s in shape], element, name="T_as_strided")

    return importer.emit_te("as_strided", compute, importer.emit(R.reshape(importer.value(x), [-1])))


@semantics(aten.unfold.default)
def unfold(importer: Importer, node: fx.Node) -> Any:
    """Return the windows of one dimension; the elements of a window are a last dimension."""
    x, dim, size, step = node.args
    if not shape_of(x):
        raise NotImplementedError("a number")
    dim %= len(shape_of(x))

    def compute(t: te.Tensor) -> te.Tensor:
        count = tirx.floordiv(t.shape[dim] - size, step) + 1
        shape = [*t.shape[:dim], count, *t.shape[dim + 1 :], size]
        return te.compute(shape, lambda *i: t(*i[:dim], i[dim] * step + i[-1], *i[dim + 1 : -1]), name="T_unfold")

    return importer.emit_te("unfold", compute, importer.value(x))
