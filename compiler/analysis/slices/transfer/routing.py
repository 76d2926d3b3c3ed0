"""Transfer rules of routing: the choice of the k largest, and layers of which each row takes its expert's.

An index that is never among the k largest can go: its value is -inf, or 0 where all others are positive, and k others are left. The
numbers of those that stay change, so they are looked up in a table of the old ones; the experts that are left are looked up in a table of
their new places. So an expert goes that no route reaches, or whose layer is 0.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.slices.facts import Known, known, reduce_to, sizes, slices
from thresher.analysis.slices.ties import Key, Tie, equal, independent, ordered
from thresher.analysis.slices.transfer.base import Facts, TransferRule, argument, aten, is_constant, tensors
from thresher.analysis.slices.transfer.groups import POSITIVE, SAME_ELEMENTS, fewest_left
from thresher.ir.nodes import getitem_users, is_tensor

ops = torch.ops.thresher


class TopK(TransferRule):
    """The rule of ``aten.topk``: what is never among the k largest goes, and the indices of the rest are those from before."""

    supported = True

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Let the dimension be cut that the choice is made along."""
        x, dim = node.args[0], _dimension(node)
        return [independent(node, (x, dim), (x, dim), sizes(x)[dim])]

    def pins(self, node: fx.Node, facts: Facts) -> list[tuple[Key, Tensor]]:
        """Pin what may be chosen."""
        return [((node.args[0], _dimension(node)), choices(node, facts))]

    def refusal(self, node: fx.Node, facts: Facts) -> str:
        never = ~_possible(node, facts)
        if not bool(never.any()) or not bool(choices(node, facts).all()):
            return ""
        return (
            f"{int(never.sum())} of {never.numel()} indices that are never the largest kept: {node.args[1]} are chosen, and it is "
            "not sure that as many are left in every row"
        )

    def narrow(self, node: fx.Node, plan: Any) -> None:
        """Look the indices of what stays up in a table of the old ones."""
        x, dim = node.args[0], _dimension(node)
        if plan.full(x, dim):
            return
        if (chosen := getitem_users(node).get(1)) is not None:
            plan.look_up(chosen, plan.keep[(x, dim)].nonzero().reshape(-1))


def _dimension(node: fx.Node) -> int:
    return int(argument(node, 2, "dim", -1)) % len(sizes(node.args[0]))


def choices(node: fx.Node, facts: Facts) -> Tensor:
    """Return which indices ``topk`` may choose (bool); all of them where fewer than k are sure to be left in every row."""
    possible, k = _possible(node, facts), node.args[1]
    left = isinstance(k, int) and fewest_left(node.args[0], possible, facts) >= k
    return possible if left else torch.ones_like(possible)


def _possible(node: fx.Node, facts: Facts) -> Tensor:
    """Return which indices may be larger than the least that there is (smaller than the largest, where the smallest are chosen)."""
    x, dim, largest = node.args[0], _dimension(node), argument(node, 3, "largest", True)
    size = sizes(x)[dim]
    if x not in facts:
        return torch.ones(size, dtype=torch.bool)
    last = facts[x].mask & (facts[x].content == (-torch.inf if largest else torch.inf))
    if largest and positive_chain(x):
        last = last | facts[x].zero()
    return ~slices(last, dim, size, every=True)


def positive_chain(node: fx.Node) -> list[fx.Node]:
    """Return ``node`` and what its elements come from, down to an operator whose results are positive; empty where there is none."""
    chain = [node]
    while node.target in SAME_ELEMENTS or node.target is aten._to_copy.default:
        node = node.args[0]
        chain.append(node)
    return chain if node.target in POSITIVE else []


class ExpertLinear(TransferRule):
    """The rule of ``thresher::expert_linear``: x [..., I], experts [...], weight [E, O, I], bias [E, O].

    Of known inputs only zeros go, because each expert would need a bias of its own for others.
    """

    supported = True

    def constant(self, node: fx.Node, facts: Facts) -> bool:
        """Return whether weight and bias are constants."""
        bias = argument(node, 3, "bias")
        return is_constant(node.args[2], facts) and (bias is None or is_constant(bias, facts))

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        """An output is 0 that no expert has weights or a bias for."""
        if not self.constant(node, facts):
            return None
        x, bias = node.args[0], argument(node, 3, "bias")
        zero = ~_connected(facts[node.args[2]].content)[:, self.live(x, facts)].any(1)
        if bias is not None:
            zero &= ~(facts[bias].content != 0).any(0)
        return known(zero.reshape([1] * (len(sizes(node)) - 1) + [-1]), torch.zeros([], dtype=torch.float64))

    def live(self, x: fx.Node, facts: Facts) -> Tensor:
        """Return which inputs are not known to be 0."""
        size, last = sizes(x)[-1], len(sizes(x)) - 1
        return ~slices(facts[x].zero(), last, size, True) if x in facts else torch.ones(size, dtype=torch.bool)

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        result = super().backward(node, wanted, facts)
        x, experts, weight = node.args[:3]
        rows = wanted.any(-1, keepdim=True)
        result[experts] = reduce_to(rows.squeeze(-1), sizes(experts))
        if self.constant(node, facts):
            outputs = slices(wanted, wanted.dim() - 1, sizes(weight)[1], every=False)
            inputs = _connected(facts[weight].content)[outputs].any(0)
            result[x] = reduce_to(rows & inputs, sizes(x))
        return result

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Tie inputs and outputs to the weight and the bias, and the rows to those of x and of the experts."""
        if not self.constant(node, facts):
            return []
        (x, experts, weight), bias = node.args[:3], argument(node, 3, "bias")
        shape, last, (count, outputs, inputs) = sizes(node), len(sizes(node)) - 1, sizes(weight)
        ties = [
            equal(node, (x, len(sizes(x)) - 1), (weight, 2), inputs),
            equal(node, (node, last), (weight, 1), outputs),
        ]
        for operand, rank in ((x, len(sizes(x)) - 1), (experts, len(sizes(experts)))):
            rows = [(d, last - rank + d) for d in range(rank)]
            ties += [equal(node, (node, e), (operand, d), shape[e]) for d, e in rows if sizes(operand)[d] == shape[e]]
        if bias is None:
            return [*ties, independent(node, (weight, 0), (weight, 0), count)]
        return [*ties, ordered(node, (weight, 0), (bias, 0), count), equal(node, (node, last), (bias, 1), outputs)]

    def pins(self, node: fx.Node, facts: Facts) -> list[tuple[Key, Tensor]]:
        """Pin the experts that are needed, and known inputs other than 0."""
        if not self.constant(node, facts):
            return []
        x, last = node.args[0], len(sizes(node.args[0])) - 1
        pinned: list[tuple[Key, Tensor]] = [((node.args[2], 0), needed_experts(node, facts))]
        if x in facts:
            some = slices(facts[x].mask, last, sizes(x)[last], every=False)
            pinned.append(((x, last), some & self.live(x, facts)))
        return pinned

    def widths(self, node: fx.Node) -> list[tuple[str, Key]]:
        x, weight = node.args[0], node.args[2]
        last = len(sizes(x)) - 1
        return [("experts", (weight, 0)), ("inputs", (x, last)), ("outputs", (node, len(sizes(node)) - 1))]

    def refusal(self, node: fx.Node, facts: Facts) -> str:
        if not self.constant(node, facts) or taken_experts(node, facts) is not None:
            return ""
        zero = zero_experts(node, facts)
        if not bool(zero.any()):
            return ""
        return f"{int(zero.sum())} of {zero.numel()} experts without weights kept: it is not known which experts the rows take"

    def narrow(self, node: fx.Node, plan: Any) -> None:
        """Look the experts up in a table of their places; one that is gone has none, so its rows are 0."""
        weight = node.args[2]
        if plan.full(weight, 0):
            return
        keep = plan.keep[(weight, 0)]
        positions = torch.where(keep, keep.long().cumsum(0) - 1, -1)
        node.update_arg(1, plan.looked_up(node, node.args[1], positions))


def _connected(weight: Tensor) -> Tensor:
    """Return which inputs some expert has weights for, for each output: [O, I], expert by expert, because a mask of all is large."""
    joined = torch.zeros(weight.shape[1:], dtype=torch.bool)
    for one in weight:
        joined |= one != 0
    return joined


def needed_experts(node: fx.Node, facts: Facts) -> Tensor:
    """Return which experts some row may take for a result other than 0, one that is read; all where it is not known which rows take."""
    taken, count = taken_experts(node, facts), sizes(node.args[2])[0]
    if taken is None:
        return torch.ones(count, dtype=torch.bool)
    needed = torch.zeros(count, dtype=torch.bool).index_fill_(0, taken, True)
    return needed & ~zero_experts(node, facts) & ~unread_experts(node, facts)[0]


def taken_experts(node: fx.Node, facts: Facts) -> Tensor | None:
    """Return the experts that rows may take, ascending; None where that is not known, or where some of the numbers are no expert's."""
    taken = possible_numbers(node.args[1], facts)
    inside = taken is not None and bool(((taken >= 0) & (taken < sizes(node.args[2])[0])).all())
    return taken if inside else None


def possible_numbers(node: fx.Node, facts: Facts) -> Tensor | None:
    """Return all numbers that the elements of ``node`` may be, ascending; None where they are not known.

    They are known of constants, of what ``topk`` or ``argmax`` chooses, and of what is looked up in a constant table by such numbers.
    """
    if is_constant(node, facts):
        return facts[node].content.unique()
    if node.target in SAME_ELEMENTS:
        return possible_numbers(node.args[0], facts)
    if node.target is aten._to_copy.default and not node.meta["val"].is_floating_point():
        return possible_numbers(node.args[0], facts) if not node.args[0].meta["val"].is_floating_point() else None
    if node.target is operator.getitem and node.args[1] == 1 and node.args[0].target is aten.topk.default:
        return choices(node.args[0], facts).nonzero().reshape(-1)
    if node.target is aten.argmax.default and isinstance(dim := argument(node, 1, "dim"), int):
        return torch.arange(sizes(node.args[0])[dim])
    if node.target is aten.index.Tensor and len(node.args[1]) == 1 and is_constant(node.args[0], facts):
        table, at = facts[node.args[0]].content, possible_numbers(node.args[1][0], facts)
        inside = at is not None and table.dim() == 1 and bool(((at >= 0) & (at < len(table))).all())
        return table[at].unique() if inside else None
    return None


def zero_experts(node: fx.Node, facts: Facts) -> Tensor:
    """Return which experts of a call have neither weights nor a bias."""
    weight, bias = facts[node.args[2]].content, argument(node, 3, "bias")
    zero = torch.tensor([not bool(one.any()) for one in weight], dtype=torch.bool)
    return zero if bias is None else zero & ~(facts[bias].content != 0).any(1)


def unread_experts(node: fx.Node, facts: Facts) -> tuple[Tensor, list[fx.Node]]:
    """Return which experts have rows that only experts without weights read, the second layers of the same rows; and the values between,
    ``node`` first, of which these rows are not read either."""
    unread, between = torch.ones(sizes(node.args[2])[0], dtype=torch.bool), [node]
    for value in between:  # it grows
        for user in value.users:
            if user.target is ops.expert_linear.default and user.args[0] is value and _takes_the_same(user, node):
                alike = ExpertLinear().constant(user, facts) and len(unread) == sizes(user.args[2])[0]
                unread = unread & zero_experts(user, facts) if alike else unread & False
            elif not _row_by_row(user, value):
                return unread & False, []
            elif user not in between:
                between.append(user)
    return unread, between


def _takes_the_same(one: fx.Node, other: fx.Node) -> bool:
    """Return whether the rows of two calls take the same experts, in the same order, each row one of its own."""

    def origin(node: fx.Node) -> fx.Node:
        while node.target is aten.reshape.default:
            node = node.args[0]
        return node

    numbers = [math.prod(sizes(call.args[1])) for call in (one, other)]
    rows = [math.prod(sizes(value)[:-1]) for value in (one, one.args[0], other)]
    return origin(one.args[1]) is origin(other.args[1]) and len({*numbers, *rows}) == 1


def _row_by_row(user: fx.Node, value: fx.Node) -> bool:
    """Return whether each row of a call is made of the same row of ``value``, and of other values."""
    if not is_tensor(user) or not sizes(user) or not sizes(value):
        return False
    alike = sizes(user)[:-1] == sizes(value)[:-1]
    if torch.Tag.pointwise in getattr(user.target, "tags", ()):
        return alike
    if user.target is aten.slice.Tensor:
        return alike and argument(user, 1, "dim", 0) % len(sizes(value)) == len(sizes(value)) - 1
    return user.target is aten.reshape.default and sizes(user)[-1] == sizes(value)[-1] and tensors(user) == [value]
