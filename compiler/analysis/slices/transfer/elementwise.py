"""Transfer rules of elementwise operators, four of which can decide a result without knowing every operand."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from thresher.analysis.slices.facts import Known, compress, known, reduce_to, sizes
from thresher.analysis.slices.ties import Tie, equal
from thresher.analysis.slices.transfer.base import Facts, TransferRule, evaluate, mask_of, nothing, tensors


class Elementwise(TransferRule):
    """The rule of operators whose result depends, element by element, on the elements at the same index of the (broadcast) operands."""

    supported = True

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        operands = tensors(node)
        if not any(n in facts for n in operands):
            return None
        values = {n: facts[n].value if n in facts else nothing(n) for n in operands}
        masks = [facts[n].mask if n in facts else torch.zeros([1] * len(sizes(n)), dtype=torch.bool) for n in operands]
        mask = masks[0]
        for other in masks[1:]:
            mask = mask & other
        rank = len(sizes(node))
        mask = mask.reshape([1] * (rank - mask.dim()) + list(mask.shape))
        zero = self.absorbed(node, facts)
        if zero is None and not bool(mask.any()):
            return None
        value = torch.zeros([1] * rank, dtype=torch.float64)
        if bool(mask.any()):
            value = evaluate(node, values)
        if zero is not None:
            value = torch.where(zero, torch.zeros((), dtype=value.dtype), value)
            mask = mask | zero
        return known(mask, value)

    def absorbed(self, node: fx.Node, facts: Facts) -> Tensor | None:
        """Return where the result is 0 for all values of the unknown operands (narrow); None for nowhere."""
        return None

    def relevant(self, node: fx.Node, operand: fx.Node, facts: Facts) -> Tensor | None:
        """Return where the result depends on ``operand`` at all (narrow); None for everywhere."""
        return None

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        result = {}
        for operand in tensors(node):
            relevant = self.relevant(node, operand, facts)
            result[operand] = reduce_to(wanted if relevant is None else wanted & relevant, sizes(operand))
        return result

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Tie each dimension of an operand that is not broadcast to that of the result."""
        out, ties = sizes(node), []
        for operand in tensors(node):
            shape = sizes(operand)
            shift = len(out) - len(shape)
            for dim, size in enumerate(shape):
                if size == out[dim + shift]:
                    ties.append(equal(node, (node, dim + shift), (operand, dim), size))
        return ties


class Filled(Elementwise):
    """The rule of zeros_like, full_like, zeros, full and others: the result is constant, and reads only the shape of its argument."""

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        value = evaluate(node, {n: torch.empty(sizes(n)) for n in tensors(node)})
        return known(torch.ones([1] * value.dim(), dtype=torch.bool), compress(value))

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        return {n: torch.zeros([1] * len(sizes(n)), dtype=torch.bool) for n in tensors(node)}


class Product(Elementwise):
    """The rule of ``a * b``: the result is 0 if either operand is."""

    def absorbed(self, node: fx.Node, facts: Facts) -> Tensor | None:
        zeros = [facts[n].zero() for n in tensors(node) if n in facts]
        if not zeros:
            return None
        zero = zeros[0] | zeros[1] if len(zeros) == 2 else zeros[0]
        return zero.reshape([1] * (len(sizes(node)) - zero.dim()) + list(zero.shape))

    def relevant(self, node: fx.Node, operand: fx.Node, facts: Facts) -> Tensor | None:
        others = [n for n in tensors(node) if n is not operand]
        return ~facts[others[0]].zero() if others and others[0] in facts else None


class Sum(Elementwise):
    """The rule of ``a + b``: the result is -inf if either operand is (an attention mask, a route that is closed)."""

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        fact = super().forward(node, facts)
        closed = None
        for n in tensors(node):
            if n in facts and bool((facts[n].content == -torch.inf).any()):
                infinite = facts[n].mask & (facts[n].content == -torch.inf)
                infinite = infinite.reshape([1] * (len(sizes(node)) - infinite.dim()) + list(infinite.shape))
                closed = infinite if closed is None else closed | infinite
        if closed is None or node.kwargs.get("alpha", 1) != 1:
            return fact
        mask, value = (torch.zeros_like(closed), torch.tensor(0.0)) if fact is None else (fact.mask, fact.value)
        return known(mask | closed, torch.where(closed, torch.tensor(-torch.inf, dtype=torch.float64), value.double()))


class Quotient(Elementwise):
    """The rule of ``a / b``: the result is 0 if the numerator is."""

    def absorbed(self, node: fx.Node, facts: Facts) -> Tensor | None:
        numerator = node.args[0]
        if numerator not in facts:
            return None
        zero = facts[numerator].zero()
        return zero.reshape([1] * (len(sizes(node)) - zero.dim()) + list(zero.shape))

    def relevant(self, node: fx.Node, operand: fx.Node, facts: Facts) -> Tensor | None:
        numerator = node.args[0]
        return ~facts[numerator].zero() if operand is not numerator and numerator in facts else None


class Where(Elementwise):
    """The rule of ``where(condition, a, b)``: a known condition picks the operand that matters; else both may have the same value."""

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        (decided, first), (mask_a, a), (mask_b, b) = (self._fact(n, node, facts) for n in node.args)
        mask = torch.where(decided, torch.where(first, mask_a, mask_b), mask_a & mask_b & (a == b))
        return known(mask, torch.where(decided & ~first, b, a))

    def _fact(self, operand: fx.Node, node: fx.Node, facts: Facts) -> tuple[Tensor, Tensor]:
        """Return mask and value of an operand, with as many dimensions as the result."""
        pair = mask_of(operand, facts), facts[operand].value if operand in facts else nothing(operand)
        mask, value = (t.reshape([1] * (len(sizes(node)) - t.dim()) + list(t.shape)) for t in pair)
        return mask, value

    def relevant(self, node: fx.Node, operand: fx.Node, facts: Facts) -> Tensor | None:
        condition, a, b = node.args
        if a is b or operand is condition or condition not in facts or not facts[condition].all():
            return None
        return facts[condition].value if operand is a else ~facts[condition].value
