"""Linear layers, convolutions and embeddings: operators with a constant weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from thresher.analysis.facts import Known, compress, known, sizes, slices
from thresher.analysis.rows.base import Facts, Row, argument, concrete, is_constant, mask_of
from thresher.analysis.ties import Tie, equal, split


class Weighted(Row):
    """What linear and the convolutions share: ``out[o] = bias[o] + sum_i weight[o, i] * x[i]`` with a constant weight.

    A row of the weight that is zero wherever its input is unknown makes the output channel known; a column that is zero for all
    wanted rows makes the input channel unread; a known input channel that is cut leaves a term behind, which goes into the
    bias, or, where padding shows (the term differs at the border), into a bias map that is added after the operator.
    """

    supported = True

    def shrink(self, node: fx.Node, plan: Any) -> None:
        term = self.left_behind(node, plan)
        if term is None:
            return
        channel = self.channel(node)
        narrow = all(size == 1 for d, size in enumerate(term.shape) if d != channel)
        if narrow:
            plan.add_to_bias(node, term.reshape(-1))
        else:
            plan.add_after(node, term)

    def channel(self, node: fx.Node) -> int:
        raise NotImplementedError

    def left_behind(self, node: fx.Node, plan: Any) -> Tensor | None:
        """The (narrow) sum of what the cut, known input channels contributed to the kept outputs; None where it is 0."""
        operand: fx.Node = node.args[0]
        fact, channel = plan.facts.get(operand), self.channel(node)
        if fact is None or plan.full(operand, channel):
            return None
        shape = [1] * len(sizes(operand))
        shape[channel] = -1
        gone = torch.where(
            fact.mask & ~plan.keep[(operand, channel)].reshape(shape), fact.value, torch.zeros((), dtype=torch.float64)
        )
        if not bool(gone.any()):
            return None
        term = self.apply(node, gone, plan.facts[node.args[1]].value)
        for dim in range(term.dim()):
            if term.shape[dim] > 1 and not plan.full(node, dim):
                term = term.index_select(dim, plan.keep[(node, dim)].nonzero().reshape(-1))
        return term if bool(term.any()) else None

    def apply(self, node: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
        """The operator without its bias on a narrow input; the narrow result."""
        raise NotImplementedError


class Linear(Weighted):
    """``aten.linear``: x [..., I], weight [O, I], bias [O]."""

    def channel(self, node: fx.Node) -> int:
        return len(sizes(node)) - 1

    def apply(self, node: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
        return compress(x.expand(*x.shape[:-1], weight.shape[1]) @ weight.T)

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        if not is_constant(weight, facts) or (bias is not None and not is_constant(bias, facts)):
            return None
        w = facts[weight].value
        used = (w != 0).double()
        unknown = (~mask_of(x, facts)).double().expand(*mask_of(x, facts).shape[:-1], w.shape[1])
        mask = (unknown @ used.T) == 0
        if not bool(mask.any()):
            return None
        value = torch.zeros_like(mask, dtype=torch.float64)
        if x in facts and bool(facts[x].value.any()):
            value = self.apply(node, facts[x].value, w)
        if bias is not None:
            value = value + facts[bias].value
        return known(mask, value)

    def read(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        result = super().read(node, wanted, facts)
        x, weight = node.args[:2]
        if is_constant(weight, facts):
            w = facts[weight].value
            result[x] = compress((wanted.double().expand(*wanted.shape[:-1], w.shape[0]) @ (w != 0).double()) > 0)
        return result

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        if not is_constant(weight, facts) or (bias is not None and not is_constant(bias, facts)):
            return []
        last, (rows, columns) = self.channel(node), sizes(weight)
        found = [equal(node, (node, d), (x, d), sizes(node)[d]) for d in range(last)]
        found += [equal(node, (x, last), (weight, 1), columns), equal(node, (node, last), (weight, 0), rows)]
        if bias is not None:
            found.append(equal(node, (node, last), (bias, 0), rows))
        return found


class Convolution(Weighted):
    """1-d to 3-d, strided, dilated, grouped, depthwise, and transposed.

    weight: [O, I/groups, *k]; transposed: [I, O/groups, *k]. Whole groups go, and equal positions within all groups.
    """

    def __init__(self, dims: int, transposed: bool = False):
        self.rank, self.transposed = dims + 2, transposed

    def channel(self, node: fx.Node) -> int:
        return 1

    def groups(self, node: fx.Node) -> int:
        return argument(node, 6, "groups", 1)

    def usable(self, node: fx.Node, facts: Facts) -> bool:
        constants = [node.args[1], argument(node, 2, "bias")]
        batched = len(sizes(node.args[0])) == self.rank
        return batched and all(n is None or is_constant(n, facts) for n in constants)

    def connections(self, node: fx.Node, facts: Facts) -> Tensor:
        """[groups, O/groups, I/groups]: whether any tap of the weight is nonzero."""
        weight, groups = facts[node.args[1]].value, self.groups(node)
        used = (weight != 0).flatten(2).any(2)
        if self.transposed:
            return used.reshape(groups, -1, used.shape[1]).transpose(1, 2)
        return used.reshape(groups, -1, used.shape[1])

    def apply(self, node: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
        operand: fx.Node = node.args[0]
        shape = (1, *sizes(operand)[1:])
        args = [x.expand(shape), weight, None, *concrete(tuple(node.args[3:]))]
        return compress(node.target(*args, **{k: concrete(v) for k, v in node.kwargs.items() if k != "bias"}))

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        if not self.usable(node, facts):
            return None
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        used = self.connections(node, facts)
        count = sizes(x)[1]
        constant = slices(mask_of(x, facts), 1, count, every=True).reshape(used.shape[0], 1, -1)
        mask = ~(used & ~constant).any(2).reshape(-1)
        if not bool(mask.any()):
            return None
        shape = [1, -1] + [1] * (self.rank - 2)
        value = torch.zeros(mask.numel(), dtype=torch.float64).reshape(shape)
        if x in facts and bool(facts[x].value.any()):
            value = self.apply(node, facts[x].value, facts[weight].value)
        if bias is not None:
            value = value + facts[bias].value.reshape(shape)
        return known(mask.reshape(shape), value)

    def read(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        result = super().read(node, wanted, facts)
        if self.usable(node, facts):
            used = self.connections(node, facts)
            rows = slices(wanted, 1, sizes(node)[1], every=False).reshape(used.shape[0], -1, 1)
            result[node.args[0]] = (used & rows).any(1).reshape([1, -1] + [1] * (self.rank - 2))
        return result

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        if not self.usable(node, facts):
            return []
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        groups, inputs, outputs = self.groups(node), sizes(x)[1], sizes(node)[1]
        g, i, o = (node, "group"), (node, "input"), (node, "output")
        ins, outs = (groups, inputs // groups), (groups, outputs // groups)
        found = [split(node, (x, 1), (g, i), ins), split(node, (node, 1), (g, o), outs)]
        if self.transposed:
            found += [split(node, (weight, 0), (g, i), ins), equal(node, (weight, 1), o, outs[1])]
        else:
            found += [split(node, (weight, 0), (g, o), outs), equal(node, (weight, 1), i, ins[1])]
        if bias is not None:
            found.append(split(node, (bias, 0), (g, o), outs))
        return found

    def shrink(self, node: fx.Node, plan: Any) -> None:
        super().shrink(node, plan)  # first: it still needs the old number of groups
        groups = plan.count(node, "group")
        if self.groups(node) != groups:
            node.update_arg(6, groups) if len(node.args) > 6 else node.update_kwarg("groups", groups)


class Embedding(Row):
    """weight [V, D], indices [...] -> [..., D]: the vocabulary stays, the width can go."""

    supported = True

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        weight = node.args[0]
        if not is_constant(weight, facts):
            return None
        table = facts[weight].value
        same = (table == table[:1]).all(0)
        shape = [1] * (len(sizes(node)) - 1) + [-1]
        return known(same.reshape(shape), table[0].reshape(shape))

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        last = len(sizes(node)) - 1
        return [equal(node, (node, last), (node.args[0], 1), sizes(node)[last])]
