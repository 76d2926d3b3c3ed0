"""Transfer rules of operators with a constant weight: linear layers, convolutions and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from thresher.analysis.slices.facts import Known, compress, known, sizes, slices, take
from thresher.analysis.slices.ties import Key, Tie, balanced, equal
from thresher.analysis.slices.transfer.base import Facts, TransferRule, argument, concrete, is_constant, mask_of
from thresher.ir.nodes import shape_of


class Weighted(TransferRule):
    """The base of linear and the convolutions: ``out[o] = bias[o] + sum_i weight[o, i] * x[i]`` with a constant weight.

    A row of the weight that is zero wherever its input is unknown makes the output channel known; a column that is zero for all
    wanted rows makes the input channel unread; a known input channel that is cut leaves a term, which goes into the bias, or, where padding
    shows (the term differs at the border), into a bias map that is added after the operator. Where a free size decides where the border is,
    the map is computed when the model runs: by the same operator on one channel of ones.
    """

    supported = True

    def narrow(self, node: fx.Node, plan: Any) -> None:
        """Add what the known inputs that are cut contributed."""
        term = self.left_behind(node, plan)
        if term is None:
            return
        channel = self.channel(node)
        narrow = all(size == 1 for d, size in enumerate(term.shape) if d != channel)
        if self.border_is_free(node):
            plan.add_border(node, self.of_ones(node, plan))
        elif narrow:
            plan.add_to_bias(node, term.reshape(-1))
        else:
            plan.add_after(node, term)

    def border_is_free(self, node: fx.Node) -> bool:
        """Return whether the term differs at a border whose place a free size decides."""
        return False

    def of_ones(self, node: fx.Node, plan: Any) -> Tensor:
        """Return the weight with which this operator makes the term of one channel of ones, where :meth:`border_is_free`."""
        raise NotImplementedError

    def widths(self, node: fx.Node) -> list[tuple[str, Key]]:
        channel = self.channel(node)
        return [("inputs", (node.args[0], channel)), ("outputs", (node, channel))]

    def channel(self, node: fx.Node) -> int:
        """Return the dimension whose indices are the channels."""
        raise NotImplementedError

    def left_behind(self, node: fx.Node, plan: Any) -> Tensor | None:
        """Return the (narrow) sum that the known inputs that are cut contributed to the kept outputs; None where it is 0."""
        gone = self.cut_away(node, plan)
        if gone is None:
            return None
        term = self.apply(node, gone, plan.facts[node.args[1]].content, plan.keep[(node, self.channel(node))])
        for dim in range(term.dim()):
            if term.shape[dim] > 1 and not plan.full(node, dim):
                term = term.index_select(dim, plan.keep[(node, dim)].nonzero().reshape(-1))
        return term if bool(term.any()) else None

    def cut_away(self, node: fx.Node, plan: Any) -> Tensor | None:
        """Return the content of the known inputs that are cut (narrow, 0 at all others); None where all of it is 0."""
        operand: fx.Node = node.args[0]
        fact, channel = plan.facts.get(operand), self.channel(node)
        if fact is None or plan.full(operand, channel):
            return None
        shape = [1] * len(sizes(operand))
        shape[channel] = -1
        gone = torch.where(
            fact.mask & ~plan.keep[(operand, channel)].reshape(shape), fact.value, torch.zeros((), dtype=torch.float64)
        )
        return gone if bool(gone.any()) else None

    def apply(self, node: fx.Node, x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        """Return the operator without its bias on a narrow float64 input: narrow, and right for the output channels in ``rows``."""
        raise NotImplementedError


def _nonzero_along(x: Tensor, dim: int) -> Tensor:
    """Return the indices of ``dim`` at which some element is not 0."""
    return slices(x != 0, dim, x.shape[dim], every=False).nonzero().reshape(-1)


class Linear(Weighted):
    """The rule of ``aten.linear``: x [..., I], weight [O, I], bias [O]."""

    def channel(self, node: fx.Node) -> int:
        """Return the last dimension."""
        return len(sizes(node)) - 1

    def apply(self, node: fx.Node, x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        x = x.expand(*x.shape[:-1], weight.shape[1])
        columns, kept = _nonzero_along(x, x.dim() - 1), rows.nonzero().reshape(-1)
        term = torch.zeros(*x.shape[:-1], weight.shape[0], dtype=torch.float64)
        term[..., kept] = x[..., columns] @ take(weight, {0: kept, 1: columns}).double().T
        return compress(term)

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        if not is_constant(weight, facts) or (bias is not None and not is_constant(bias, facts)):
            return None
        w = facts[weight].content
        mask = ~_reached(~mask_of(x, facts), facts[weight].connections.rows_from, w.shape[1])
        if not bool(mask.any()):
            return None
        value = torch.zeros([1] * mask.dim(), dtype=torch.float64)
        if x in facts and bool(facts[x].content.any()):
            value = self.apply(node, facts[x].value, w, slices(mask, mask.dim() - 1, w.shape[0], every=False))
        if bias is not None:
            value = value + facts[bias].value
        return known(mask, value)

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        result = super().backward(node, wanted, facts)
        x, weight = node.args[:2]
        if is_constant(weight, facts):
            result[x] = compress(_reached(wanted, facts[weight].connections.columns_from, sizes(weight)[0]))
        return result

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Tie inputs and outputs to the weight and the bias, and every other dimension of x to the result."""
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        if not is_constant(weight, facts) or (bias is not None and not is_constant(bias, facts)):
            return []
        last, (rows, columns) = self.channel(node), sizes(weight)
        ties = [equal(node, (node, d), (x, d), sizes(node)[d]) for d in range(last)]
        ties += [equal(node, (x, last), (weight, 1), columns), equal(node, (node, last), (weight, 0), rows)]
        if bias is not None:
            ties.append(equal(node, (node, last), (bias, 0), rows))
        return ties


def _reached(sources: Tensor, across: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Apply ``across`` to every row of a narrow fact whose last dimension has ``size`` indices.

    ``across`` turns a vector of connections into a vector of what they reach. Equal rows are computed once.
    """
    rows = sources.expand(*sources.shape[:-1], size).reshape(-1, size)
    if len(rows) > 1:  # few are different: the class token, and the rest
        packed = np.packbits(rows.numpy(), axis=1)
        _, first, which = np.unique(packed.view(f"V{packed.shape[1]}"), return_index=True, return_inverse=True)
        patterns = torch.stack([across(rows[i].contiguous()) for i in first.tolist()])
        return patterns[torch.from_numpy(which.reshape(-1))].reshape(*sources.shape[:-1], -1)
    return across(rows[0].contiguous()).reshape(*sources.shape[:-1], -1)


class Convolution(Weighted):
    """The rule of convolutions: 1-d to 3-d, strided, dilated, grouped, depthwise, and transposed.

    weight: [O, I/groups, *k]; transposed: [I, O/groups, *k]. Whole groups go, and the same number of channels of every other group,
    at whatever positions: the weight is packed anew.
    """

    def __init__(self, dims: int, transposed: bool = False):
        self.rank, self.transposed = dims + 2, transposed

    def channel(self, node: fx.Node) -> int:
        """Return dimension 1."""
        return 1

    def groups(self, node: fx.Node) -> int:
        """Return the number of groups."""
        return argument(node, 6, "groups", 1)

    def usable(self, node: fx.Node, facts: Facts) -> bool:
        """Return whether the input has a batch dimension, and weight and bias are constants."""
        constants = [node.args[1], argument(node, 2, "bias")]
        batched = len(sizes(node.args[0])) == self.rank
        return batched and all(n is None or is_constant(n, facts) for n in constants)

    def by_group(self, weight: Tensor, groups: int) -> Tensor:
        """Return the weight as [groups, outputs per group, inputs per group, *k]."""
        weight = weight.reshape(groups, -1, *weight.shape[1:])
        return weight.transpose(1, 2) if self.transposed else weight

    def connections(self, node: fx.Node, facts: Facts) -> Tensor:
        """Return whether any tap of the weight is nonzero, bool [groups, O/groups, I/groups]."""
        used = facts[node.args[1]].connections
        bits = torch.from_numpy(np.unpackbits(used.bits, axis=1, count=used.columns).astype(bool))
        return self.by_group(bits, self.groups(node))

    def apply(self, node: fx.Node, x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        operand: fx.Node = node.args[0]
        x = x.expand(x.shape[0], sizes(operand)[1], *x.shape[2:])
        spatial, kept = sizes(operand)[2:], None
        if self.groups(node) == 1:  # only what is not zero takes part
            channels, kept = _nonzero_along(x, 1), rows.nonzero().reshape(-1)
            x, (i, o) = x[:, channels], (0, 1) if self.transposed else (1, 0)
            weight = weight.index_select(i, channels).index_select(o, kept)
            if not self.transposed and x.shape[2:].numel() == 1 and not self.padded(node):
                return self.spread(x.flatten(1) @ weight.flatten(2).sum(2).double().T, kept, rows.numel())
        x = x.expand(*x.shape[:2], *spatial)
        args = [x, weight.double(), None, *concrete(tuple(node.args[3:]))]
        term = node.target(*args, **{k: concrete(v) for k, v in node.kwargs.items() if k != "bias"})
        return compress(term if kept is None else self.spread(term, kept, rows.numel()))

    def spread(self, term: Tensor, kept: Tensor, count: int) -> Tensor:
        """Return ``term`` of the kept channels, with zeros for the others, as a value of this operator."""
        whole = torch.zeros(term.shape[0], count, *term.shape[2:], dtype=term.dtype).index_copy_(1, kept, term)
        return whole.reshape([*whole.shape, *[1] * (self.rank - whole.dim())])

    def padded(self, node: fx.Node) -> bool:
        """Return whether the input is padded."""
        padding = argument(node, 4, "padding", 0)
        return padding != "valid" and (padding == "same" or any([padding] if isinstance(padding, int) else padding))

    def border_is_free(self, node: fx.Node) -> bool:
        free = any(isinstance(d, torch.SymInt) for d in shape_of(node.args[0])[2:])
        return free and (self.padded(node) or self.transposed)

    def of_ones(self, node: fx.Node, plan: Any) -> Tensor:
        """Return sum_i weight[o, i] c_i for the inputs i that are cut and their content c_i: [O, 1, *k], transposed [1, O, *k]."""
        gone, weight = self.cut_away(node, plan), plan.facts[node.args[1]].content.double()
        assert gone is not None  # some of it was left behind
        i, o = (0, 1) if self.transposed else (1, 0)
        shape = [1] * weight.dim()
        shape[i] = -1
        total = (weight * gone.expand(1, weight.shape[i], *gone.shape[2:]).reshape(shape)).sum(i, keepdim=True)
        return total.index_select(o, plan.keep[(node, 1)].nonzero().reshape(-1))

    def pins(self, node: fx.Node, facts: Facts) -> list[tuple[Key, Tensor]]:
        """Keep known inputs whose term at a free border is none of one channel of ones: of groups, or with content that differs."""
        x = node.args[0]
        if not self.usable(node, facts) or x not in facts or not self.border_is_free(node):
            return []
        content = torch.where(facts[x].mask, facts[x].value, torch.zeros((), dtype=torch.float64))
        if self.groups(node) == 1 and content.shape[0] == 1 and content.shape[2:].numel() == 1:
            return []
        return [((x, 1), slices(content != 0, 1, sizes(x)[1], every=False))]

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        if not self.usable(node, facts):
            return None
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        used = self.connections(node, facts)
        constant = slices(mask_of(x, facts), 1, sizes(x)[1], every=True).reshape(used.shape[0], 1, -1)
        mask = ~(used & ~constant).any(2).reshape(-1)
        if not bool(mask.any()):
            return None
        shape = [1, -1] + [1] * (self.rank - 2)
        value = torch.zeros([1] * self.rank, dtype=torch.float64)
        if x in facts and bool(facts[x].content.any()):
            value = self.apply(node, facts[x].value, facts[weight].content, mask)
        if bias is not None:
            value = value + facts[bias].value.reshape(shape)
        return known(mask.reshape(shape), value)

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        result = super().backward(node, wanted, facts)
        if self.usable(node, facts):
            used = self.connections(node, facts)
            rows = slices(wanted, 1, sizes(node)[1], every=False).reshape(used.shape[0], -1, 1)
            channels = (used & rows).any(1).reshape([1, -1] + [1] * (self.rank - 2))
            result[node.args[0]] = channels & wanted.flatten(1).any(1).reshape([-1] + [1] * (self.rank - 1))
        return result

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Tie the channels to the weight and the bias; those of a grouped convolution are balanced between groups."""
        if not self.usable(node, facts):
            return []
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        groups, inputs, outputs = self.groups(node), sizes(x)[1], sizes(node)[1]
        ties = [equal(node, (node, 1), (bias, 0), outputs)] if bias is not None else []
        if groups > 1:
            parts = (groups, inputs // groups), (groups, outputs // groups)
            return [*ties, balanced(node, (x, 1), (node, 1), *parts)]
        i, o = (0, 1) if self.transposed else (1, 0)
        return [*ties, equal(node, (x, 1), (weight, i), inputs), equal(node, (node, 1), (weight, o), outputs)]

    def narrow(self, node: fx.Node, plan: Any) -> None:
        """Add what the known inputs that are cut contributed, and lay out the weight of a grouped convolution anew."""
        super().narrow(node, plan)  # first: it still needs the old number of groups
        groups = self.groups(node)
        if groups > 1 and not (plan.full(node.args[0], 1) and plan.full(node, 1)):
            self.repack(node, plan, groups)

    def repack(self, node: fx.Node, plan: Any, groups: int) -> None:
        """Give the call a weight with the kept channels of every kept group, and the new number of groups."""
        inputs, outputs = (plan.keep[key].reshape(groups, -1) for key in ((node.args[0], 1), (node, 1)))
        live = inputs.any(1).nonzero().reshape(-1)
        rows, columns = (k[live].nonzero()[:, 1].reshape(len(live), -1) for k in (outputs, inputs))

        def pack(weight: Tensor) -> Tensor:
            weight = self.by_group(weight, groups)
            weight = weight[live[:, None, None], rows[:, :, None], columns[:, None, :]]
            return (weight.transpose(1, 2) if self.transposed else weight).flatten(0, 1)

        plan.replace_constant(node, 1, pack)
        node.update_arg(6, len(live)) if len(node.args) > 6 else node.update_kwarg("groups", len(live))


class Embedding(TransferRule):
    """The rule of embedding: weight [V, D], indices [...] -> [..., D]. The vocabulary stays, the width can go."""

    supported = True

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        weight = node.args[0]
        if not is_constant(weight, facts):
            return None
        table = facts[weight].content
        same = (table == table[:1]).all(0)
        shape = [1] * (len(sizes(node)) - 1) + [-1]
        return known(same.reshape(shape), table[0].double().reshape(shape))

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        return super().backward(node, wanted, facts) | {node.args[1]: wanted.any(-1)}

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Tie the width of the result to that of the table."""
        last = len(sizes(node)) - 1
        return [equal(node, (node, last), (node.args[0], 1), sizes(node)[last])]


class Bilinear(TransferRule):
    """The rule of ``aten.bilinear``: x1 [..., I], x2 [..., J], weight [O, I, J], bias [O]. Of known input channels only zeros go."""

    supported = True

    def parts(self, node: fx.Node, facts: Facts) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None] | None:
        """Return both inputs, the weight and the bias; None where the parameters are not constant, or the inputs are one value."""
        x1, x2, weight = node.args[:3]
        bias = argument(node, 3, "bias")
        usable = is_constant(weight, facts) and (bias is None or is_constant(bias, facts)) and x1 is not x2
        return (x1, x2, weight, bias) if usable else None

    def live(self, x: fx.Node, facts: Facts) -> Tensor:
        """Return which channels are not known to be 0."""
        size, last = sizes(x)[-1], len(sizes(x)) - 1
        return ~slices(facts[x].zero(), last, size, True) if x in facts else torch.ones(size, dtype=torch.bool)

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        parts = self.parts(node, facts)
        if parts is None:
            return None
        x1, x2, weight, bias = parts
        used = (facts[weight].content != 0) & self.live(x1, facts)[:, None] & self.live(x2, facts)
        shape = [1] * (len(sizes(node)) - 1) + [-1]
        value = facts[bias].value if bias is not None else torch.zeros(1, dtype=torch.float64)
        return known(~used.flatten(1).any(1).reshape(shape), value.reshape(shape))

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        result, parts = super().backward(node, wanted, facts), self.parts(node, facts)
        if parts is not None:
            x1, x2, weight, _ = parts
            rows = slices(wanted, wanted.dim() - 1, sizes(weight)[0], every=False)
            used = (facts[weight].content != 0)[rows].any(0)
            shape = [1] * (wanted.dim() - 1) + [-1]
            result[x1] = (used & self.live(x2, facts)).any(1).reshape(shape)
            result[x2] = (used & self.live(x1, facts)[:, None]).any(0).reshape(shape)
        return result

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Tie inputs and outputs to the weight and the bias, and every other dimension of the inputs to the result."""
        parts = self.parts(node, facts)
        if parts is None:
            return []
        x1, x2, weight, bias = parts
        last, (rows, left, right) = len(sizes(node)) - 1, sizes(weight)
        ties = [equal(node, (x1, last), (weight, 1), left), equal(node, (x2, last), (weight, 2), right)]
        ties += [equal(node, (node, last), (weight, 0), rows)]
        ties += [equal(node, (node, d), (x, d), sizes(node)[d]) for x in (x1, x2) for d in range(last)]
        return ties + ([equal(node, (node, last), (bias, 0), rows)] if bias is not None else [])

    def pins(self, node: fx.Node, facts: Facts) -> list[tuple[Key, Tensor]]:
        """Pin known channels that are not 0: cut, each would leave a linear layer in the other input."""
        parts = self.parts(node, facts)
        if parts is None:
            return []
        pinned: list[tuple[Key, Tensor]] = []
        for x in parts[:2]:
            size, last = sizes(x)[-1], len(sizes(x)) - 1
            pinned.append(((x, last), slices(mask_of(x, facts), last, size, every=False) & self.live(x, facts)))
        return pinned
