"""Transfer rules of products of two computed values, and of attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from thresher.analysis.slices.facts import Known, known, reduce_to, sizes, slices
from thresher.analysis.slices.ties import Key, Tie, equal, split
from thresher.analysis.slices.transfer.base import Facts, TransferRule, argument, mask_of
from thresher.ir.nodes import is_tensor


def zero_pairs(a: fx.Node, dim_a: int, b: fx.Node, dim_b: int, facts: Facts) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each index that ``a`` and ``b`` are contracted over: a is known 0, b is known 0, both are known.

    Each is a boolean vector; an index counts if it holds for its whole slice. ``dim_a`` and ``dim_b`` are negative.
    """
    at_a, at_b, size = len(sizes(a)) + dim_a, len(sizes(b)) + dim_b, sizes(a)[dim_a]
    none = torch.zeros(size, dtype=torch.bool)
    za = slices(facts[a].zero(), at_a, size, True) if a in facts else none
    zb = slices(facts[b].zero(), at_b, size, True) if b in facts else none
    return za, zb, slices(mask_of(a, facts), at_a, size, True) & slices(mask_of(b, facts), at_b, size, True)


class Matmul(TransferRule):
    """The rule of matmul and bmm of two computed values: a [..., M, K] @ b [..., K, N]."""

    supported = True

    def operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Return both operands; None for a form that is not cut (a vector, or operands of different rank)."""
        a, b = node.args[:2]
        if not is_tensor(a) or not is_tensor(b) or len(sizes(a)) != len(sizes(b)) or len(sizes(a)) < 2:
            return None
        return a, b

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        operands = self.operands(node)
        if operands is None:
            return None
        a, b = operands
        if (a in facts and facts[a].all() and not bool(facts[a].content.any())) or (
            b in facts and facts[b].all() and not bool(facts[b].content.any())
        ):
            return Known(
                torch.ones([1] * len(sizes(node)), dtype=torch.bool),
                torch.zeros([1] * len(sizes(node)), dtype=torch.float64),
            )
        rows = facts[a].zero().all(-1, keepdim=True) if a in facts else None
        columns = facts[b].zero().all(-2, keepdim=True) if b in facts else None
        if rows is None and columns is None:
            return None
        mask = rows if columns is None else columns if rows is None else rows | columns
        return known(mask, torch.zeros([1] * len(sizes(node)), dtype=torch.float64))

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        operands = self.operands(node)
        if operands is None:
            return super().backward(node, wanted, facts)
        a, b = operands
        za, zb, _ = zero_pairs(a, -1, b, -2, facts)
        read_a = wanted.any(-1, keepdim=True) & ~zb
        read_b = wanted.any(-2, keepdim=True) & ~za.reshape(-1, 1)
        return {a: reduce_to(read_a, sizes(a)), b: reduce_to(read_b, sizes(b))}

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Tie K of both operands, M and N to the result, and each batch dimension that is not broadcast."""
        operands = self.operands(node)
        if operands is None:
            return []
        a, b = operands
        rank, out = len(sizes(node)), sizes(node)
        result = [equal(node, (a, rank - 1), (b, rank - 2), sizes(a)[-1])]
        result += [
            equal(node, (node, rank - 2), (a, rank - 2), out[-2]),
            equal(node, (node, rank - 1), (b, rank - 1), out[-1]),
        ]
        for operand in (a, b):
            result += [
                equal(node, (node, d), (operand, d), out[d]) for d in range(rank - 2) if sizes(operand)[d] == out[d]
            ]
        return result

    def pins(self, node: fx.Node, facts: Facts) -> list[tuple[Key, Tensor]]:
        """Pin indices of K at which both are known and none is 0: what they contribute is not carried on."""
        operands = self.operands(node)
        if operands is None:
            return []
        a, b = operands
        za, zb, both = zero_pairs(a, -1, b, -2, facts)
        return [((a, len(sizes(a)) - 1), both & ~za & ~zb)]


class Attention(TransferRule):
    """The rule of scaled_dot_product_attention: q [.., H, L, E], k [.., H, S, E], v [.., H, S, F], mask [.., L, S] -> [.., H, L, F].

    A value channel that is the same constant for all keys comes out as that constant, because the weights of a row add to 1.
    A head whose output is known needs neither its queries nor its keys. All keys stay: also a known one has its weight in the sum.
    """

    supported = True

    def parts(self, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None]:
        """Return q, k, v and the mask, if there is one."""
        q, k, v = node.args[:3]
        return q, k, v, argument(node, 3, "attn_mask")

    def grouped(self, node: fx.Node) -> int:
        """Return the number of query heads per key head (1 unless enable_gqa)."""
        q, k = node.args[:2]
        return sizes(q)[-3] // sizes(k)[-3] if len(sizes(q)) > 2 and sizes(k)[-3] else 1

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        _, _, v, mask = self.parts(node)
        if v not in facts or (mask is not None and mask.meta["val"].dtype is torch.bool and mask not in facts):
            return None
        fact = facts[v]
        same = fact.mask.all(-2, keepdim=True) & (fact.value == fact.value.narrow(-2, 0, 1)).all(-2, keepdim=True)
        value = fact.value.narrow(-2, 0, 1)
        group = self.grouped(node)
        if group > 1:
            same, value = (t if t.shape[-3] == 1 else t.repeat_interleave(group, -3) for t in (same, value))
        return known(same, value)

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        q, k, v, mask = self.parts(node)
        za, zb, _ = zero_pairs(q, -1, k, -1, facts)
        row = wanted.any(-1, keepdim=True)
        heads = row.any(-2, keepdim=True)
        columns = wanted.any(-2, keepdim=True)
        group = self.grouped(node)
        kv_heads, kv_columns = (_merge_heads(t, group) for t in (heads, columns))
        read: dict[fx.Node, Tensor] = {}
        for operand, fact in ((q, row & ~zb), (k, kv_heads & ~za), (v, kv_columns), (mask, row)):
            if operand is not None:  # one value may have several roles
                fact = reduce_to(fact, sizes(operand))
                read[operand] = read[operand] | fact if operand in read else fact
        return read

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Tie the channels of q and k, those of v and the result, and what is left of heads, queries and batch. Keys are not cut."""
        q, k, v, mask = self.parts(node)
        rank, out, causal = len(sizes(node)), sizes(node), bool(argument(node, 5, "is_causal", False))
        ties = [
            equal(node, (q, rank - 1), (k, rank - 1), sizes(q)[-1]),
            equal(node, (node, rank - 1), (v, rank - 1), out[-1]),
        ]
        if not causal:
            ties.append(equal(node, (node, rank - 2), (q, rank - 2), out[-2]))
        for d in range(rank - 2):
            ties.append(equal(node, (node, d), (q, d), out[d]))
            group = self.grouped(node) if d == rank - 3 else 1
            for operand in (k, v):
                if group > 1:
                    ties.append(split(node, (node, d), ((operand, d), (node, "query")), (out[d] // group, group)))
                elif sizes(operand)[d] == out[d]:
                    ties.append(equal(node, (node, d), (operand, d), out[d]))
        if mask is not None and not causal:
            shift = rank - len(sizes(mask))
            for d, size in enumerate(sizes(mask)[:-1]):
                if size > 1 and size == out[d + shift]:
                    ties.append(equal(node, (node, d + shift), (mask, d), size))
        return ties

    def pins(self, node: fx.Node, facts: Facts) -> list[tuple[Key, Tensor]]:
        q, k, _, _ = self.parts(node)
        za, zb, both = zero_pairs(q, -1, k, -1, facts)
        return [((q, len(sizes(q)) - 1), both & ~za & ~zb)]

    def narrow(self, node: fx.Node, plan: Any) -> None:
        """Write down the scale, which is 1 / sqrt(E) by default, when channels of E go."""
        q = node.args[0]
        last = len(sizes(q)) - 1
        if argument(node, 6, "scale") is None and not plan.full(q, last):
            node.update_kwarg("scale", 1.0 / math.sqrt(sizes(q)[-1]))


def _merge_heads(fact: Tensor, group: int) -> Tensor:
    """Return facts of query heads as facts of the key heads they share."""
    if group == 1 or fact.shape[-3] == 1:
        return fact
    return fact.unflatten(-3, (-1, group)).any(-3)
