"""The selection of blocks of keys: one loop over heads on the CPU in float32; elsewhere means, products and counted ranks.

Elsewhere there is one sum per kernel, and a value that is read at two indices goes in twice, as schedules for GPUs expect.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import fx
from tvm import relax, te, tirx

from thresher.backends.tvm.importing.converters.attention import as_stored
from thresher.backends.tvm.importing.converters.registry import R, axis, ops, result_dtype, semantics, sizes
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.kernels.building import MASKED_SCORE
from thresher.backends.tvm.kernels.cpu import select_blocks
from thresher.ops.pyramid_lists import length
from thresher.ops.sparse_attention import arguments


@semantics(ops.select_blocks.default)
def select(importer: Importer, node: fx.Node) -> Any:
    """Return the lists and their lengths as two values, which ``getitem`` separates."""
    q, k, keys, forced, keep, mass, block_q, block_k, scale, most, causal, groups, group = arguments(node)
    if importer.machine is None or any(result_dtype(n) != "float32" for n in (q, k)):
        return _Composed(importer, node).lists()
    nodes = (q, k)
    values, (at_q, at_k) = as_stored(importer, nodes, [importer.value(n) for n in nodes], [sizes(n) for n in nodes])
    there = None if keys is None else tuple(sizes(keys))
    group = 1 if groups is None else group
    problem = select_blocks.Problem(at_q, at_k, there, block_q, block_k, scale, most, causal, group)
    function = importer.builder.add_func(select_blocks.kernel(problem, importer.cpu.lanes), "select_blocks")
    args = [n for n in (keys, forced, keep, mass, groups if group > 1 else None) if n is not None]
    kinds = [relax.TensorType(shape, dtype) for shape, dtype in select_blocks.outputs(problem)]
    return importer.emit(relax.call_tir(function, [*values, *map(importer.value, args)], kinds))


@semantics(ops.pyramid_lists.default)
def pyramid_lists(importer: Importer, node: fx.Node) -> Any:
    """Return the lists and their lengths as two values; an entry is computed by counting, without a loop over the list."""
    factor, columns = node.args[3:]
    groups = columns // factor
    *lead, most = sizes(node.args[0])
    longest = length(most, factor, columns)

    def entries(chosen: te.Tensor, again: te.Tensor, counts: te.Tensor) -> te.Tensor:
        at = axis(most, "at")

        def one(*i: Any) -> Any:
            """Return blocks [..][c // factor] factor + c % factor, and after those the means of groups that are not listed."""
            row, c = i[:-1], i[-1]
            fine = counts[row] * factor
            selected = te.all(c < fine, at == c // factor)
            skipped = te.all(c >= fine, at < counts[row], again[(*row, at)] - at <= c - fine)
            value = chosen[(*row, at)] * factor + tirx.Cast("int32", c % factor)
            return te.sum(tirx.Select(selected, value, tirx.Cast("int32", skipped)), axis=at)

        return te.compute((*lead, longest), one, name="entries")

    def placed(listing: te.Tensor, counts: te.Tensor) -> te.Tensor:
        def one(*i: Any) -> Any:
            fine, c = counts[i[:-1]] * factor, tirx.Cast("int32", i[-1])
            mean = tirx.const(columns, "int32") + c - fine + listing[i]
            last = tirx.const(columns + groups - 1, "int32")
            return tirx.Select(c < fine, listing[i], te.min(mean, last))

        return te.compute((*lead, longest), one, name="placed")

    def lengths(counts: te.Tensor, means: te.Tensor) -> te.Tensor:
        def one(*i: Any) -> Any:
            others = tirx.Select(means[i[1]], groups - counts[i], tirx.const(0, "int32"))
            return counts[i] * factor + others

        return te.compute(lead, one, name="lengths")

    blocks, counts, means = (importer.value(n) for n in node.args[:3])
    listing = importer.emit_te("pyramid_entries", entries, blocks, blocks, counts)
    return importer.emit(
        relax.Tuple(
            [
                importer.emit_te("pyramid_blocks", placed, listing, counts),
                importer.emit_te("pyramid_counts", lengths, counts, means),
            ]
        )
    )


class _Composed:
    """``thresher::select_blocks`` from sums over blocks, products, and counted ranks."""

    def __init__(self, importer: Importer, node: fx.Node):
        self.importer = importer
        (self.q, self.k, self.keys, self.forced, self.keep, self.mass, self.block_q, self.block_k, self.scale, self.most,
         self.causal, self.groups, self.group) = arguments(node)  # fmt: skip
        self.batch, self.heads, self.rows, self.width = sizes(self.q)
        self.kv_heads, self.length = sizes(self.k)[1:3]
        self.lists_per_head, self.columns = -(-self.rows // self.block_q), -(-self.length // self.block_k)
        self.wide = "float64" if result_dtype(self.q) == "float64" else "float32"

    def number(self, value: float) -> Any:
        return tirx.const(value, self.wide)

    def lists(self) -> Any:
        scores = self.scores(self.block_k)
        if self.groups is not None:
            coarse = self.scores(self.block_k * self.group)
            scores = self.emit("in_groups", self.within, scores, self.rank(coarse), self.forced, self.groups)
        weights = self.importer.emit(R.nn.softmax(scores, -1))
        order = self.emit("order", self.forced_first, scores, self.forced, opaque=True)
        before = self.emit("before", self.weight_ahead, order, order, weights)
        taken = self.emit("taken", self.chosen, scores, self.rank(order), before, self.forced, self.keep, self.mass)
        slot = self.emit("slot", self.places, taken)
        blocks = self.emit("blocks", self.entries, taken, slot)
        counts = self.emit("counts", self.lengths, taken)
        return self.importer.emit(relax.Tuple([blocks, counts]))

    def emit(self, name: str, compute: Any, *args: Any, opaque: bool = False) -> Any:
        values = [self.importer.value(v) if isinstance(v, fx.Node) else v for v in args]
        return self.importer.emit_te(name, compute, *values, opaque=opaque)

    # ------------------------------------------------------------------ scores of blocks

    def scores(self, block_k: int) -> Any:
        """Return [B, H, lists, blocks], MASKED_SCORE where a block may not be listed."""
        of_q = self.emit("total_q", partial(self.total, self.block_q, self.rows), self.q, None)
        of_k = self.emit("total_k", partial(self.total, block_k, self.length), self.k, self.keys)
        if self.heads != self.kv_heads:
            of_k = self.importer.emit(R.repeat(of_k, self.heads // self.kv_heads, 1))
        count = self.emit("members", partial(self.members, block_k), self.keys)
        product = self.importer.emit(R.matmul(of_q, self.importer.emit(R.permute_dims(of_k, [0, 1, 3, 2]))))
        return self.emit("score", partial(self.score, block_k), product, count)

    def there(self, keys: te.Tensor | None, b: Any, s: Any) -> Any:
        inside = s < self.length
        if keys is None:
            return inside
        zero = tirx.const(0, "int64")
        sample = b if int(keys.shape[0]) > 1 else zero
        return tirx.all(inside, keys[sample, zero, zero, te.min(s, self.length - 1)])

    def total(self, block: int, length: int, x: te.Tensor, keys: te.Tensor | None) -> te.Tensor:
        s = axis(block, "s")

        def one(b: Any, h: Any, i: Any, c: Any) -> Any:
            row = i * block + s
            counts = row < length if keys is None else self.there(keys, b, row)
            value = tirx.Cast(self.wide, x[b, h, te.min(row, length - 1), c])
            return te.sum(tirx.Select(counts, value, self.number(0)), axis=s)

        batch, heads, _, width = (int(d) for d in x.shape)
        return te.compute((batch, heads, -(-length // block), width), one, name="total")

    def members(self, block: int, keys: te.Tensor | None) -> te.Tensor:
        """Return the number of keys in each block."""
        s, blocks = axis(block, "s"), -(-self.length // block)
        return te.compute(
            (self.batch, blocks),
            lambda b, j: te.sum(tirx.Cast(self.wide, self.there(keys, b, j * block + s)), axis=s),
            name="members",
        )

    def score(self, block_k: int, product: te.Tensor, count: te.Tensor) -> te.Tensor:
        def one(b: Any, h: Any, i: Any, j: Any) -> Any:
            possible = count[b, j] > self.number(0)
            if self.causal:
                possible = tirx.all(possible, j * block_k <= i * self.block_q + self.block_q - 1)
            rows = tirx.Cast(self.wide, te.min((i + 1) * self.block_q, self.rows) - i * self.block_q)
            value = product[b, h, i, j] * self.number(self.scale) / rows / te.max(count[b, j], self.number(1))
            return tirx.Select(possible, value, self.number(MASKED_SCORE))

        return te.compute(product.shape, one, name="score")

    # ------------------------------------------------------------------ who is taken

    @staticmethod
    def ahead(mine: te.Tensor, its: te.Tensor, row: Any, j: Any, other: Any) -> Any:
        """Return whether ``other`` comes before ``j``: a higher score, or the same and an earlier index."""
        one, two = mine[(*row, j)], its[(*row, other)]
        return tirx.any(two > one, tirx.all(two == one, other < j))

    def rank(self, values: Any) -> Any:
        def counted(mine: te.Tensor, its: te.Tensor) -> te.Tensor:
            other = axis(int(mine.shape[3]), "other")

            def one(*i: Any) -> Any:
                return te.sum(tirx.Cast("int64", self.ahead(mine, its, i[:3], i[3], other)), axis=other)

            return te.compute(mine.shape, one, name="rank")

        return self.emit("rank", counted, values, values)

    def within(self, scores: te.Tensor, rank: te.Tensor, forced: te.Tensor, groups: te.Tensor) -> te.Tensor:
        def one(b: Any, h: Any, i: Any, j: Any) -> Any:
            good = tirx.any(forced[0, h, i, j], rank[b, h, i, j // self.group] < groups[h])
            return tirx.Select(good, scores[b, h, i, j], self.number(MASKED_SCORE))

        return te.compute(scores.shape, one, name="within")

    def forced_first(self, scores: te.Tensor, forced: te.Tensor) -> te.Tensor:
        def one(b: Any, h: Any, i: Any, j: Any) -> Any:
            first = tirx.all(scores[b, h, i, j] > self.number(MASKED_SCORE), forced[0, h, i, j])
            return tirx.Select(first, self.number(-MASKED_SCORE), scores[b, h, i, j])

        return te.compute(scores.shape, one, name="order")

    def weight_ahead(self, mine: te.Tensor, its: te.Tensor, weights: te.Tensor) -> te.Tensor:
        other = axis(self.columns, "other")

        def one(*i: Any) -> Any:
            ahead = self.ahead(mine, its, i[:3], i[3], other)
            return te.sum(tirx.Select(ahead, weights[(*i[:3], other)], self.number(0)), axis=other)

        return te.compute(mine.shape, one, name="before")

    def chosen(
        self,
        scores: te.Tensor,
        rank: te.Tensor,
        before: te.Tensor,
        forced: te.Tensor,
        keep: te.Tensor,
        mass: te.Tensor,
    ) -> te.Tensor:
        def one(b: Any, h: Any, i: Any, j: Any) -> Any:
            enough = before[b, h, i, j] < tirx.Cast(self.wide, mass[h])
            good = tirx.any(forced[0, h, i, j], tirx.all(rank[b, h, i, j] < keep[h], enough))
            return tirx.Cast("int32", tirx.all(scores[b, h, i, j] > self.number(MASKED_SCORE), good))

        return te.compute(scores.shape, one, name="taken")

    # ------------------------------------------------------------------ as lists

    def places(self, taken: te.Tensor) -> te.Tensor:
        at, zero = axis(self.columns, "at"), tirx.const(0, "int32")

        def one(*i: Any) -> Any:
            return te.sum(tirx.Select(at < i[3], taken[(*i[:3], at)], zero), axis=at)

        return te.compute(taken.shape, one, name="slot")

    def entries(self, taken: te.Tensor, slot: te.Tensor) -> te.Tensor:
        at, zero = axis(self.columns, "at"), tirx.const(0, "int32")

        def one(*i: Any) -> Any:
            here = tirx.all(taken[(*i[:3], at)] == 1, slot[(*i[:3], at)] == tirx.Cast("int32", i[3]))
            return te.max(tirx.Select(here, tirx.Cast("int32", at), zero), axis=at)

        return te.compute((*taken.shape[:3], self.most), one, name="blocks")

    def lengths(self, taken: te.Tensor) -> Any:
        at = axis(self.columns, "at")
        total = te.compute(taken.shape[:3], lambda *i: te.sum(taken[(*i, at)], axis=at), name="total")
        return te.compute(taken.shape[:3], lambda *i: te.min(total(*i), tirx.const(self.most, "int32")), name="counts")
