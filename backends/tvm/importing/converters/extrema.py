"""Maxima, minima and their indices, and what is in order of size: sorts and the k largest. A NaN is larger than all other values.

TVM's own reductions, sorts and pools pass over a NaN, or put it anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from tvm import te, tirx

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.registry import R, aten, cast, semantics
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.importing.values import tensor_type
from thresher.backends.tvm.kernels.extrema import extremum, first_extremum
from thresher.ir.nodes import dtype_of, getitem_users, shape_of

prims = torch.ops.prims
LARGEST = {aten.amax.default, aten.max.default, aten.max.dim, aten.argmax.default, prims.amax.default}


def _shaped(importer: Importer, value: Any, node: Any) -> Any:
    """Return ``value`` in the shape of a result, which may keep dimensions of size 1."""
    return importer.emit(R.reshape(value, tensor_type(node, importer.sizes).shape))


def _reduced(importer: Importer, source: fx.Node, dims: Sequence[int], largest: bool, index: bool) -> Any:
    """Return the extrema over ``dims`` or, of one dimension, their indices; without these dimensions."""
    rank = len(shape_of(source))
    reduced = sorted(d % rank for d in dims) if dims else list(range(rank))

    def compute(t: te.Tensor) -> Any:
        axes = {d: te.reduce_axis((0, t.shape[d]), name=f"k{d}") for d in reduced}
        kept = [d for d in range(rank) if d not in axes]

        def at(i: Sequence[Any]) -> Any:
            position = iter(i)
            return t[tuple(axes[d] if d in axes else next(position) for d in range(rank))]

        shape = [t.shape[d] for d in kept]
        if not index:
            return te.compute(shape, lambda *i: extremum(largest)(at(i), axis=list(axes.values())), name="extremum")
        (axis,) = axes.values()
        reducer = first_extremum(largest)
        position, _ = te.compute(
            shape, lambda *i: reducer((tirx.Cast("int64", axis.var), at(i)), axis=axis), name="first_extremum"
        )
        return te.compute(shape, lambda *i: position(*i), name="index")

    if not rank:
        value = importer.value(source)
        return importer.emit(R.zeros([], "int64")) if index else value
    name = "index_of_extremum" if index else "extremum"
    result = importer.emit_te(name, compute, _comparable(importer, source))
    return result if index else cast(importer, result, str(dtype_of(source)).removeprefix("torch."))


def _comparable(importer: Importer, source: fx.Node) -> Any:
    """Return a value whose elements can be compared: TVM has no test for a NaN of bfloat16."""
    value = importer.value(source)
    return cast(importer, value, "float32") if dtype_of(source) is torch.bfloat16 else value


@semantics(
    aten.amax.default, aten.amin.default, aten.max.default, aten.min.default, prims.amax.default, prims.amin.default
)
def extreme(importer: Importer, node: fx.Node) -> Any:
    """Compute maxima or minima over dimensions, all of them where none is named."""
    dims = argument(node, 1, "dim", []) if node.target not in (aten.max.default, aten.min.default) else []
    if not shape_of(node.args[0]):
        return importer.value(node.args[0])  # of one number
    value = _reduced(importer, node.args[0], dims, node.target in LARGEST, index=False)
    return _shaped(importer, value, node.meta["val"])


@semantics(aten.max.dim, aten.min.dim)
def extreme_with_index(importer: Importer, node: fx.Node) -> Any:
    """Return (values, indices) of the extrema along a dimension; of equal ones the first."""
    source, dim = node.args[0], int(node.args[1])
    parts = [_reduced(importer, source, [dim], node.target in LARGEST, index) for index in (False, True)]
    return [_shaped(importer, part, value) for part, value in zip(parts, node.meta["val"])]


@semantics(aten.argmax.default, aten.argmin.default)
def index_of_extreme(importer: Importer, node: fx.Node) -> Any:
    """Return the index of the first extremum along a dimension, or in the flat tensor."""
    source, dim = node.args[0], argument(node, 1, "dim", None)
    largest = node.target in LARGEST
    if dim is not None:
        return _shaped(importer, _reduced(importer, source, [dim], largest, index=True), node.meta["val"])
    flat = importer.emit(R.reshape(_comparable(importer, source), [-1]))

    def compute(t: te.Tensor) -> Any:
        axis, reducer = te.reduce_axis((0, t.shape[0]), name="k"), first_extremum(largest)
        position, _ = te.compute(
            (1,), lambda _: reducer((tirx.Cast("int64", axis.var), t[axis]), axis=axis), name="first_extremum"
        )
        return te.compute((1,), lambda i: position[i], name="index")

    return _shaped(importer, importer.emit_te("index_of_extremum", compute, flat), node.meta["val"])


# ---------------------------------------------------------------------- order

#: Where most elements equal others, the order that a sort which is not stable gives them is part of what users see.
FEW_VALUES = (torch.bool, torch.uint8, torch.int8, torch.float16, torch.bfloat16)
#: The integer with as many bits, for each floating dtype that is sorted.
BITS = {torch.float32: "int32", torch.float64: "int64"}


def _keys(importer: Importer, source: fx.Node) -> Any:
    """Return numbers that are in the order of the elements and that a comparison tells apart: of floating ones the bits, as integers.

    The two zeros are one number, and every NaN is the largest.
    """
    value, dtype = importer.value(source), dtype_of(source)
    if not dtype.is_floating_point:
        return cast(importer, value, "int64")
    dtype = dtype if dtype is torch.float64 else torch.float32
    kind = BITS[dtype]

    def key(x: Any) -> Any:
        zero = tirx.const(0.0, x.ty.dtype)
        bits = tirx.reinterpret(kind, tirx.Select(x == zero, zero, x))
        most = te.max_value(kind)
        ordered = tirx.Select(bits < tirx.const(0, kind), tirx.bitwise_xor(bits, most), bits)
        return tirx.Select(tirx.isnan(x), most, ordered)

    wide = cast(importer, value, str(dtype).removeprefix("torch."))
    return importer.emit_te("order", lambda t: te.compute(t.shape, lambda *i: key(t(*i)), name="order"), wide)


def _picked(importer: Importer, source: fx.Node, indices: Any, dim: int) -> list[Any]:
    return [importer.emit(R.gather_elements(importer.value(source), indices, axis=dim)), indices]


@semantics(aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
def sort(importer: Importer, node: fx.Node) -> Any:
    """Return (values, indices) in ascending or descending order, or the indices alone; equal elements keep their order."""
    names = ["dim", "descending"]
    first = 1
    if node.target is aten.sort.stable:
        first = 2 if len(node.args) > 1 and (node.args[1] is None or isinstance(node.args[1], bool)) else 1
    dim, descending = (
        argument(node, first + i, name, default) for i, (name, default) in enumerate(zip(names, (-1, False)))
    )
    if not shape_of(node.args[0]):
        raise NotImplementedError("a tensor without dimensions")
    if node.target in (aten.sort.default, aten.argsort.default) and _shows_ties(importer, node, int(dim)):
        raise NotImplementedError("equal elements whose order torch's kernel decides (sort with stable=True)")
    indices = importer.emit(R.argsort(_keys(importer, node.args[0]), int(dim), bool(descending), dtype="int64"))
    only_indices = node.target in (aten.argsort.default, aten.argsort.stable)
    return indices if only_indices else _picked(importer, node.args[0], indices, int(dim))


def _shows_ties(importer: Importer, node: fx.Node, dim: int) -> bool:
    """Return whether the indices of a sort that is not stable show in which order it leaves equal elements.

    Elements of few values are often equal; of two random float32 about one in 2**23 is, which many elements meet. Where torch may not be
    called, its order is not to be had, and theirs is as good.
    """
    source = node.args[0]
    if dtype_of(source) in FEW_VALUES:
        return True
    indices = node.target is aten.argsort.default or 1 in getitem_users(node)
    shape = shape_of(source)
    if not (indices and importer.options.library) or dtype_of(source) is not torch.float32:
        return False
    return all(isinstance(d, int) for d in shape) and math.prod(shape) * int(shape[dim]) > 2**23


@semantics(aten.topk.default)
def topk(importer: Importer, node: fx.Node) -> Any:
    """Return (values, indices) of the k largest or smallest elements along a dimension, in their order."""
    source, k = node.args[:2]
    dim, largest = int(argument(node, 2, "dim", -1)), bool(argument(node, 3, "largest", True))
    if not dtype_of(source).is_floating_point:
        raise NotImplementedError("equal elements of which torch's kernel picks some")
    if not shape_of(source) or not isinstance(k, int):
        raise NotImplementedError("a tensor without dimensions, or a number k that is not known")
    indices = importer.emit(
        R.topk(_keys(importer, source), k=k, axis=dim, largest=largest, ret_type="indices", dtype="int64")
    )
    return _picked(importer, source, indices, dim)
