"""The selection of blocks of keys: one loop over heads on the CPU in float32; in other types means, products and counted places."""

from __future__ import annotations

from typing import Any

from torch import fx
from tvm import relax, te, tirx

from thresher.backends.tvm.converters.attention import as_stored
from thresher.backends.tvm.converters.registry import ops, result_dtype, semantics, sizes
from thresher.backends.tvm.converters.tokens import axis
from thresher.backends.tvm.importer import Importer
from thresher.backends.tvm.kernels import select_blocks
from thresher.backends.tvm.kernels.building import LOW
from thresher.ops.sparse_attention import arguments


@semantics(ops.select_blocks.default)
def select(importer: Importer, node: fx.Node) -> Any:
    """Two values, which ``getitem`` takes apart."""
    q, k, keys, forced, keep, mass, block_q, block_k, scale, most, causal = arguments(node)
    if importer.machine is None:
        raise NotImplementedError(
            "blocks of keys are selected on the CPU only; use static patterns: sparse-attention{selected=false}"
        )
    if any(result_dtype(n) != "float32" for n in (q, k)):
        return _select_anywhere(importer, node)
    nodes = (q, k)
    values, (at_q, at_k) = as_stored(importer, nodes, [importer.value(n) for n in nodes], [sizes(n) for n in nodes])
    there = None if keys is None else tuple(sizes(keys))
    problem = select_blocks.Problem(at_q, at_k, there, block_q, block_k, scale, most, causal)
    function = importer.builder.add_func(select_blocks.kernel(problem, importer.cpu.lanes), "select_blocks")
    inputs = [*values, *([] if keys is None else [importer.value(keys)]), *map(importer.value, (forced, keep, mass))]
    kinds = [relax.TensorType(shape, dtype) for shape, dtype in select_blocks.outputs(problem)]
    return importer.emit(relax.call_tir(function, inputs, kinds))


def _select_anywhere(importer: Importer, node: fx.Node) -> Any:
    q, k, keys, *given, block_q, block_k, scale, most, causal = arguments(node)
    (batch, heads, rows, width), (_, groups, length, _) = sizes(q), sizes(k)
    lists, columns, group = -(-rows // block_q), -(-length // block_k), heads // groups
    shape = (batch, heads, lists, columns)

    def there(m: te.Tensor | None, b: Any, s: Any) -> Any:
        inside = s < length
        if m is None:
            return inside
        sample = b if int(m.shape[0]) > 1 else tirx.const(0, "int64")
        zero = tirx.const(0, "int64")
        return tirx.all(inside, m[sample, zero, zero, te.min(s, length - 1)])

    def taken(x: te.Tensor, y: te.Tensor, m: Any, forced: te.Tensor, keep: te.Tensor, mass: te.Tensor) -> te.Tensor:
        def f32(v: Any) -> Any:
            return tirx.const(v, "float32")

        s1, s2, s3, e = axis(block_q, "s"), axis(block_k, "s"), axis(block_k, "s"), axis(width, "e")

        def of_q(b: Any, h: Any, i: Any, c: Any) -> Any:
            row = i * block_q + s1
            value = tirx.Cast("float32", x[b, h, te.min(row, rows - 1), c])
            return te.sum(tirx.Select(row < rows, value, f32(0)), axis=s1)

        def of_k(b: Any, h: Any, j: Any, c: Any) -> Any:
            row = j * block_k + s2
            value = tirx.Cast("float32", y[b, h, te.min(row, length - 1), c])
            return te.sum(tirx.Select(there(m, b, row), value, f32(0)), axis=s2)

        total_q = te.compute((batch, heads, lists, width), of_q, name="total_q")
        total_k = te.compute((batch, groups, columns, width), of_k, name="total_k")
        count = te.compute(
            (batch, columns),
            lambda b, j: te.sum(tirx.Cast("float32", there(m, b, j * block_k + s3)), axis=s3),
            name="count",
        )
        product = te.compute(
            shape, lambda b, h, i, j: te.sum(total_q[b, h, i, e] * total_k[b, h // group, j, e], axis=e), name="product"
        )

        def score(b: Any, h: Any, i: Any, j: Any) -> Any:
            possible = count[b, j] > f32(0)
            if causal:
                possible = tirx.all(possible, j * block_k <= i * block_q + block_q - 1)
            own = tirx.Cast("float32", te.min((i + 1) * block_q, rows) - i * block_q)
            value = product[b, h, i, j] * f32(scale) / own / te.max(count[b, j], f32(1))
            return tirx.Select(possible, value, f32(LOW))

        scores = te.compute(shape, score, name="scores")
        a1, a2, a3, a4 = (axis(columns, "a") for _ in range(4))
        top = te.compute(shape[:3], lambda *i: te.max(scores[(*i, a1)], axis=a1), name="top")
        weights = te.compute(
            shape,
            lambda b, h, i, j: tirx.Select(
                scores[b, h, i, j] > f32(LOW), te.exp(scores[b, h, i, j] - top[b, h, i]), f32(0)
            ),
            name="weights",
        )
        whole = te.compute(shape[:3], lambda *i: te.sum(weights[(*i, a2)], axis=a2), name="whole")

        def place(b: Any, h: Any, i: Any, j: Any) -> Any:
            first = tirx.all(scores[b, h, i, j] > f32(LOW), forced[0, h, i, j])
            return tirx.Select(first, f32(-LOW), scores[b, h, i, j])

        order = te.compute(shape, place, name="order")

        def ahead(b: Any, h: Any, i: Any, j: Any, other: Any) -> Any:
            mine, its = order[b, h, i, j], order[b, h, i, other]
            return tirx.any(its > mine, tirx.all(its == mine, other < j))

        rank = te.compute(
            shape, lambda *i: te.sum(tirx.Cast("int64", ahead(i[0], i[1], i[2], i[3], a3)), axis=a3), name="rank"
        )
        before = te.compute(
            shape,
            lambda *i: te.sum(tirx.Select(ahead(i[0], i[1], i[2], i[3], a4), weights[(*i[:3], a4)], f32(0)), axis=a4),
            name="before",
        )

        def one(b: Any, h: Any, i: Any, j: Any) -> Any:
            enough = before[b, h, i, j] < tirx.Cast("float32", mass[h]) * whole[b, h, i]
            chosen = tirx.all(rank[b, h, i, j] < keep[h], enough)
            return tirx.Cast("int32", tirx.all(scores[b, h, i, j] > f32(LOW), tirx.any(forced[0, h, i, j], chosen)))

        return te.compute(shape, one, name="taken")

    def blocks(found: te.Tensor) -> te.Tensor:
        before, at = axis(columns, "a"), axis(columns, "a")
        slot = te.compute(
            shape,
            lambda b, h, i, j: te.sum(tirx.Select(before < j, found[b, h, i, before], 0), axis=before),
            name="slot",
        )

        def entry(b: Any, h: Any, i: Any, c: Any) -> Any:
            here = tirx.all(found[b, h, i, at] == 1, slot[b, h, i, at] == tirx.Cast("int32", c))
            return te.max(tirx.Select(here, tirx.Cast("int32", at), 0), axis=at)

        return te.compute((*shape[:3], most), entry, name="blocks")

    def counts(found: te.Tensor) -> te.Tensor:
        at = axis(columns, "a")
        total = te.compute(shape[:3], lambda *i: te.sum(found[(*i, at)], axis=at), name="total")
        return te.compute(shape[:3], lambda *i: te.min(total(*i), tirx.const(most, "int32")), name="counts")

    inputs = [importer.value(n) if n is not None else None for n in (q, k, keys, *given)]
    found = importer.emit_te("select_blocks", taken, *inputs)
    return importer.emit(
        relax.Tuple([importer.emit_te("blocks", blocks, found), importer.emit_te("counts", counts, found)])
    )
