"""Transfer rules of norms over channels: a constant channel may go, and the statistics keep counting it.

layer_norm and rms_norm over the last dimension, group_norm over groups of dimension 1, and their forms with channels already
gone (``thresher.ops.norms``). A channel goes where its input is one known number and its output is known or unread: then nothing
but the mean and the variance knows of it, and three numbers carry that on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

import thresher.ops.norms  # noqa: F401  (registers the operators)
from thresher.analysis.slices.facts import Known, known, sizes, slices
from thresher.analysis.slices.ties import Key, Tie, equal, ordered
from thresher.analysis.slices.transfer.base import Facts, TransferRule, argument, aten, evaluate, is_constant, mask_of
from thresher.ir.lineage import Restore, moved
from thresher.ir.nodes import dtype_of

ops = torch.ops.thresher


@dataclass(frozen=True)
class Parameters:
    """The parameters of a norm, whatever its spelling.

    Group g holds ``widths[g]`` of ``count`` channels; those that are gone add up to ``totals[g]``, their squares to ``squares[g]``.
    """

    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    widths: tuple[int, ...]
    count: int
    totals: tuple[float, ...]
    squares: tuple[float, ...]


class Norm(TransferRule):
    """The base of the rules of norms. The indices of dimension ``channel(node)`` are the channels."""

    supported = True

    def channel(self, node: fx.Node) -> int:
        """Return the dimension whose indices are the channels."""
        raise NotImplementedError

    def tie(self, node: fx.Node, a: Key, b: Key, size: int) -> Tie:
        """Return the tie of two dimensions of channels."""
        return equal(node, a, b, size)

    def parameters(self, node: fx.Node) -> Parameters | None:
        """Return the parameters of a call; None for a form that is not cut along its channels."""
        raise NotImplementedError

    def mixed(self, node: fx.Node) -> list[int]:
        """Return the dimensions that the statistics run over."""
        raise NotImplementedError

    def affine(self, node: fx.Node) -> list[fx.Node]:
        """Return the weight and the bias, those that there are."""
        parameters = self.parameters(node)
        return [n for n in (parameters.weight, parameters.bias) if n is not None] if parameters is not None else []

    def usable(self, node: fx.Node, facts: Facts) -> bool:
        """Return whether the call is cut along its channels: its form is known, and weight and bias are constants."""
        return self.parameters(node) is not None and all(is_constant(n, facts) for n in self.affine(node))

    def per_channel(self, node: fx.Node, values: Tensor) -> Tensor:
        """Return a vector of one number per channel, narrow."""
        shape = [1] * len(sizes(node))
        shape[self.channel(node)] = -1
        return values.reshape(shape)

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        """Return what is known: a channel of weight 0 is its bias, and the result is known where all that is normalised together is."""
        operand: fx.Node = node.args[0]
        if not self.usable(node, facts):
            return None
        p, count = self.parameters(node), sizes(node)[self.channel(node)]
        assert p is not None
        bias = facts[p.bias].value if p.bias is not None else torch.zeros(count, dtype=torch.float64)
        value = self.per_channel(node, bias.expand(count))
        mask = self.per_channel(node, facts[p.weight].zero().expand(count)) if p.weight is not None else None
        together = self.known_together(node, facts[operand].mask) if operand in facts else None
        if together is not None and bool(together.any()):
            content = facts[operand].value.expand(sizes(operand)).contiguous()
            result = evaluate(node, {operand: content} | {n: facts[n].value for n in self.affine(node)})
            value = torch.where(together, result, value)
            mask = together if mask is None else mask | together
        return known(mask, value) if mask is not None else None

    def known_together(self, node: fx.Node, mask: Tensor) -> Tensor:
        """Return where everything that enters the same statistics is known (narrow)."""
        for dim in self.mixed(node):
            mask = mask.all(dim, keepdim=True)
        return mask

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        result = super().backward(node, wanted, facts)
        for dim in self.mixed(node):
            wanted = wanted.any(dim, keepdim=True)
        result[node.args[0]] = wanted
        return result

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Tie the dimensions that are not normalised, and the channels to those of weight and bias."""
        operand: fx.Node = node.args[0]
        apart = [d for d in range(len(sizes(node))) if d not in self.mixed(node)]
        ties = [equal(node, (node, d), (operand, d), sizes(node)[d]) for d in apart]
        if self.usable(node, facts):
            channel = self.channel(node)
            count = sizes(node)[channel]
            ties.append(self.tie(node, (node, channel), (operand, channel), count))
            ties += [self.tie(node, (node, channel), (n, 0), count) for n in self.affine(node)]
        return ties

    def pins(self, node: fx.Node, facts: Facts) -> list[tuple[Key, Tensor]]:
        """Pin the channels that are not one number: only one number can be carried on."""
        operand: fx.Node = node.args[0]
        return [((operand, self.channel(node)), ~self.numbers(node, facts)[0])] if self.usable(node, facts) else []

    def numbers(self, node: fx.Node, facts: Facts) -> tuple[Tensor, Tensor]:
        """Return which channels of the input are one known number (bool), and the numbers (float64), both of shape [C]."""
        operand: fx.Node = node.args[0]
        channel, count = self.channel(node), sizes(node)[self.channel(node)]
        value = torch.zeros(count, dtype=torch.float64)
        if operand not in facts:
            return torch.zeros(count, dtype=torch.bool), value
        content = facts[operand].value
        whole = slices(mask_of(operand, facts), channel, count, every=True)
        first = content
        for dim in range(content.dim()):
            first = first.narrow(dim, 0, 1) if dim != channel else first
        whole = whole & slices(content == first, channel, count, every=True)
        return whole, first.reshape(-1).expand(count)

    def narrow(self, node: fx.Node, plan: Any) -> None:
        """Count what is cut in the parameters."""
        operand, channel = node.args[0], self.channel(node)
        p = self.parameters(node)
        if p is None or plan.full(operand, channel):
            return
        keep, (_, value) = plan.keep[(operand, channel)], self.numbers(node, plan.facts)
        gone = torch.where(keep, torch.zeros((), dtype=torch.float64), value)
        kept, totals, squares = ([float(t.sum()) for t in v.split(list(p.widths))] for v in (keep, gone, gone * gone))
        live = [g for g, width in enumerate(kept) if width]
        self.write(
            node,
            plan,
            Parameters(
                p.weight,
                p.bias,
                p.eps,
                tuple(int(kept[g]) for g in live),
                p.count,
                tuple(p.totals[g] + totals[g] for g in live),
                tuple(p.squares[g] + squares[g] for g in live),
            ),
        )

    def write(self, node: fx.Node, plan: Any, p: Parameters) -> None:
        """Write the call with the parameters ``p``."""
        raise NotImplementedError


class LayerNorm(Norm):
    """The rule of layer_norm and rms_norm; only those over the last dimension alone are cut along it.

    rms_norm needs no operator of its own: with k of N channels left, mean(x^2) over N is k/N times that over k, so the weight takes
    sqrt(N/k) and epsilon takes N/k and the squares of what is gone.
    """

    def channel(self, node: fx.Node) -> int:
        """Return the last dimension."""
        return len(sizes(node)) - 1

    def mixed(self, node: fx.Node) -> list[int]:
        rank = len(sizes(node))
        count = 1 if node.target is ops.layer_norm.default else len(node.args[1])
        return list(range(rank - count, rank))

    def parameters(self, node: fx.Node) -> Parameters | None:
        if len(self.mixed(node)) != 1 or not isinstance(node.meta["val"].shape[-1], int):
            return None
        width = sizes(node)[-1]
        if node.target is ops.layer_norm.default:
            _, weight, bias, eps, count, total, square = node.args
            return Parameters(weight, bias, eps, (width,), count, (total,), (square,))
        weight = argument(node, 2, "weight")
        if node.target is aten.rms_norm.default:
            return Parameters(weight, None, node.args[3], (width,), width, (0.0,), (0.0,))
        bias, eps = argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5)
        return Parameters(weight, bias, eps, (width,), width, (0.0,), (0.0,))

    def write(self, node: fx.Node, plan: Any, p: Parameters) -> None:
        node.kwargs = {}
        if node.target is not aten.rms_norm.default:
            node.target = ops.layer_norm.default
            node.args = (node.args[0], p.weight, p.bias, p.eps, p.count, p.totals[0], p.squares[0])
            return
        width, root = p.widths[0], math.sqrt(p.count / p.widths[0])
        old = plan.narrowed(p.weight).double() if p.weight is not None else torch.ones(width, dtype=torch.float64)
        name = str(p.weight.target) if p.weight is not None else f"{node.name}_weight"
        weight = plan.program.add_constant(old * root, name, dtype_of(node), like=node)
        if p.weight is not None:
            target, original = str(weight.target), plan.program.constants[name]
            plan.program.lineage.append(moved(name, name, original, partial(plan.cut, p.weight)))
            plan.program.lineage.append(Restore((target,), lambda values: {name: values[target] / root}))
        node.args = (node.args[0], [width], weight, (p.eps * p.count + p.squares[0]) / width)


class GroupNorm(Norm):
    """The rule of group_norm: x [N, C, ...], G groups of C/G channels; instance norm is the case G = C.

    Whole groups go without a trace.
    """

    def channel(self, node: fx.Node) -> int:
        """Return dimension 1."""
        return 1

    def mixed(self, node: fx.Node) -> list[int]:
        return list(range(1, len(sizes(node))))

    def tie(self, node: fx.Node, a: Key, b: Key, size: int) -> Tie:
        """Return a tie that keeps the order of channels, which says to which group each belongs."""
        return ordered(node, a, b, size)

    def parameters(self, node: fx.Node) -> Parameters | None:
        if not all(isinstance(d, int) for d in node.meta["val"].shape[1:]):
            return None
        if node.target is ops.group_norm.default:
            _, widths, weight, bias, eps, count, totals, squares = node.args
            return Parameters(weight, bias, eps, tuple(widths), count, tuple(totals), tuple(squares))
        groups, channels = node.args[1], sizes(node)[1]
        weight, bias, eps = argument(node, 2, "weight"), argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5)
        count, nothing = channels // groups, (0.0,) * groups
        return Parameters(weight, bias, eps, (count,) * groups, count, nothing, nothing)

    def known_together(self, node: fx.Node, mask: Tensor) -> Tensor:
        p = self.parameters(node)
        assert p is not None
        whole = slices(mask, 1, sizes(node)[1], every=True)
        return self.per_channel(node, torch.cat([part.all().expand(len(part)) for part in whole.split(list(p.widths))]))

    def write(self, node: fx.Node, plan: Any, p: Parameters) -> None:
        node.kwargs = {}
        if all(width == p.count for width in p.widths):
            node.args = (node.args[0], len(p.widths), p.weight, p.bias, p.eps)
            node.target = aten.group_norm.default
        else:
            node.target = ops.group_norm.default
            node.args = (
                node.args[0], list(p.widths), p.weight, p.bias, p.eps, p.count, list(p.totals), list(p.squares),
            )  # fmt: skip
