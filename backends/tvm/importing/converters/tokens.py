"""Token reduction: loops of ours on the CPU in float32; elsewhere sums over comparisons, which any target can do.

The rank of i is counted instead of sorted: the number of j that come before it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx
from tvm import relax, te, tirx

from thresher.backends.tvm.importing.converters.registry import (
    R,
    axis,
    cast,
    cpu_kernel,
    ops,
    result_dtype,
    semantics,
    sizes,
)
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.kernels.cpu import tokens
from thresher.ops.tokens import FIRST, GOES, NEVER, STAYS, TAKES

# ---------------------------------------------------------------------- on the CPU in float32


def _call(importer: Importer, name: str, function: tirx.PrimFunc, node: fx.Node, inputs: int, kinds: Any) -> Any:
    target = importer.builder.add_func(function, name)
    return importer.emit(relax.call_tir(target, [importer.value(n) for n in node.args[:inputs]], kinds))


@semantics(ops.match_tokens.default)
def match_tokens(importer: Importer, node: fx.Node) -> Any:
    """Return the assignment, the sizes and the own tokens as three values, which ``getitem`` separates."""
    *_, count, drop = node.args
    batch, n = sizes(node.args[1])
    if importer.machine is None or result_dtype(node.args[0]) != "float32" or result_dtype(node.args[1]) != "float32":
        return _match_anywhere(importer, node)
    kinds = [
        relax.TensorType((batch, n), "int64"),
        *(relax.TensorType(s, "float32") for s in ((batch, n - count), (batch, n))),
    ]
    return _call(importer, "match_tokens", tokens.match(batch, n, count, drop), node, 3, kinds)


@cpu_kernel(ops.reduce_tokens.default)
def reduce_tokens_kernel(importer: Importer, node: fx.Node) -> Any:
    """Compute the weighted means of tokens by slot, channels in registers."""
    batch, count, channels = sizes(node)
    function = tokens.reduce(batch, sizes(node.args[0])[1], channels, count, importer.cpu.lanes)
    return _call(importer, "reduce_tokens", function, node, 3, relax.TensorType((batch, count, channels), "float32"))


# ---------------------------------------------------------------------- anywhere


def counted(batch: int, n: int, condition: Callable[[Any, Any, Any], Any]) -> te.Tensor:
    """Return for every [b, i] the number of j for which ``condition(b, i, j)`` holds."""
    j = axis(n)
    return te.compute((batch, n), lambda b, i: te.sum(tirx.Cast("int64", condition(b, i, j)), axis=j), name="counted")


def rank(importer: Importer, values: Any) -> Any:
    """Return the index of each element of a row [B, N] in falling order. The values go in twice, and stay a kernel of their own:
    schedules for GPUs want one read of each.
    """

    def places(mine: te.Tensor, its: te.Tensor) -> te.Tensor:
        def before(b: Any, i: Any, j: Any) -> Any:
            return tirx.any(its[b, j] > mine[b, i], tirx.all(its[b, j] == mine[b, i], j < i))

        batch, n = (int(d) for d in mine.shape)
        return counted(batch, n, before)

    return importer.emit_te("rank", places, values, values)


def _match_anywhere(importer: Importer, node: fx.Node) -> Any:
    """Compute with one sum per kernel, as schedules for GPUs expect."""
    *_, count, drop = node.args
    batch, n = sizes(node.args[1])
    similar, size, side = map(importer.value, node.args[:3])

    def seen(x: te.Tensor, sides: te.Tensor, b: Any, i: Any, j: Any) -> Any:
        return tirx.Select(sides[b, j] == TAKES, x[b, i, j], tirx.const(NEVER, x.dtype))

    def best(x: te.Tensor, sides: te.Tensor) -> te.Tensor:
        j = axis(n)
        return te.compute((batch, n), lambda b, i: te.max(seen(x, sides, b, i, j), axis=j), name="best")

    def partner(x: te.Tensor, sides: te.Tensor, top: te.Tensor) -> te.Tensor:
        j, last = axis(n), tirx.const(n - 1, "int64")
        return te.compute(
            (batch, n),
            lambda b, i: te.min(tirx.Select(seen(x, sides, b, i, j) == top[b, i], j, last), axis=j),
            name="partner",
        )

    def worth(sizes: te.Tensor, sides: te.Tensor, top: te.Tensor) -> te.Tensor:
        def element(b: Any, i: Any) -> Any:
            first, never = (tirx.const(v, top.dtype) for v in (FIRST, NEVER))
            there = tirx.Select(sizes[b, i] > tirx.const(0, sizes.dtype), top[b, i], first)
            return tirx.Select(sides[b, i] == GOES, there, never)

        return te.compute((batch, n), element, name="worth")

    def slot(places: te.Tensor) -> te.Tensor:
        return counted(batch, n, lambda b, i, j: tirx.all(j < i, places[b, j] >= count))

    def assign(places: te.Tensor, slots: te.Tensor, partners: te.Tensor) -> te.Tensor:
        def element(b: Any, i: Any) -> Any:
            taken = tirx.const(-1, "int64") if drop else slots[b, partners[b, i]]
            return tirx.Select(places[b, i] < count, taken, slots[b, i])

        return te.compute((batch, n), element, name="assign")

    def summed(sizes: te.Tensor, result: te.Tensor) -> te.Tensor:
        i, zero = axis(n, "i"), tirx.const(0, sizes.dtype)
        return te.compute(
            (batch, n - count),
            lambda b, j: te.sum(tirx.Select(result[b, i] == j, sizes[b, i], zero), axis=i),
            name="sizes",
        )

    def keeps(places: te.Tensor) -> te.Tensor:
        dtype = result_dtype(node.args[1])
        return te.compute((batch, n), lambda b, i: tirx.Cast(dtype, places[b, i] >= count), name="own")

    emit = importer.emit_te
    top = emit("best", best, similar, side)
    partners = emit("partner", partner, similar, side, top)
    places = rank(importer, emit("worth", worth, size, side, top, opaque=True))
    result = emit("assign", assign, places, emit("slot", slot, places), partners)
    return importer.emit(relax.Tuple([result, emit("token_sizes", summed, size, result), emit("own", keeps, places)]))


@semantics(ops.token_sides.default)
def token_sides(importer: Importer, node: fx.Node) -> Any:
    """Return for every token whether it goes, takes or stays (``thresher.ops.tokens``)."""
    kind, count, protected, every = node.args[2:]
    batch, n = sizes(node)

    def fixed(i: Any) -> Any:
        uniform = tirx.floormod(i - protected, every) == 0 if every else tirx.const(False, "bool")
        return tirx.any(i < protected, uniform)

    def order(scores: te.Tensor, size: te.Tensor) -> te.Tensor:
        def element(b: Any, i: Any) -> Any:
            first, never = (tirx.const(v, scores.dtype) for v in (FIRST, NEVER))
            score = -scores[b, i] if kind == "lowest" else scores[b, i]
            there = tirx.Select(size[b, i] > tirx.const(0, size.dtype), score, first)
            return tirx.Select(fixed(i), never, there)

        return te.compute((batch, n), element, name="order")

    def side(places: te.Tensor | None) -> te.Tensor:
        goes, takes, stays = (tirx.const(v, "int64") for v in (GOES, TAKES, STAYS))

        def element(b: Any, i: Any) -> Any:
            if places is None:
                result = tirx.Cast("int64", tirx.floormod(i - protected, 2))
            elif kind == "lowest":
                result = tirx.Select(places[b, i] < count, goes, takes)
            else:
                result = tirx.Select(places[b, i] < 2 * count, tirx.floormod(places[b, i], 2), stays)
            return tirx.Select(i < protected, stays, tirx.Select(fixed(i), takes, result))

        return te.compute((batch, n), element, name="side")

    if kind == "alternate":
        return importer.emit_te("token_sides", side, None)
    scores, size = map(importer.value, node.args[:2])
    return importer.emit_te(
        "token_sides", side, rank(importer, importer.emit_te("order", order, scores, size, opaque=True))
    )


@semantics(ops.reduce_tokens.default)
def reduce_tokens(importer: Importer, node: fx.Node) -> Any:
    """Compute the weighted means as a product with the matrix of the assignment."""
    batch, count, _ = sizes(node)
    n = sizes(node.args[0])[1]

    def over(size: te.Tensor, assign: te.Tensor, sized: bool) -> te.Tensor:
        i, zero, one = axis(n, "i"), tirx.const(0, size.dtype), tirx.const(1, size.dtype)

        def total(b: Any, j: Any) -> Any:
            return te.sum(tirx.Select(assign[b, i] == j, size[b, i] if sized else one, zero), axis=i)

        return te.compute((batch, count), total, name="over")

    def matrix(size: te.Tensor, assign: te.Tensor, total: te.Tensor, members: te.Tensor) -> te.Tensor:
        zero, one = tirx.const(0, size.dtype), tirx.const(1, size.dtype)

        def share(b: Any, j: Any, i: Any) -> Any:
            fraction = tirx.Select(total[b, j] > zero, size[b, i] / total[b, j], one / members[b, j])
            return tirx.Select(assign[b, i] == j, fraction, zero)

        return te.compute((batch, count, n), share, name="matrix")

    x, size, assign = map(importer.value, node.args[:3])
    sums = [importer.emit_te("over", partial(over, sized=sized), size, assign) for sized in (True, False)]
    shares = cast(importer, importer.emit_te("matrix", matrix, size, assign, *sums), result_dtype(node))
    return importer.emit(R.matmul(shares, x))


@semantics(ops.restore_tokens.default)
def restore_tokens(importer: Importer, node: fx.Node) -> Any:
    """Gather along one dimension; tokens without a slot become 0."""
    dim, shape = node.args[2], sizes(node)

    def restored(x: te.Tensor, assign: te.Tensor) -> te.Tensor:
        def element(*i: Any) -> Any:
            slot = assign[i[0], i[dim]]
            index = (*i[:dim], te.max(slot, tirx.const(0, "int64")), *i[dim + 1 :])
            return tirx.Select(slot >= 0, x[index], tirx.const(0, x.dtype))

        return te.compute(shape, element, name="restored")

    return importer.emit_te("restore_tokens", restored, *map(importer.value, node.args[:2]))
