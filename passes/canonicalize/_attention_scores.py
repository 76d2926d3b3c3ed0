"""From the softmax of an attention back to the product of queries and keys, through every way of scaling and masking in between.

    scores = cap * tanh((c q k^T + bias) / cap), masked         each part optional, in any order that means this

Read backward from the softmax: adding a tensor is a bias; ``where`` with a number is a mask; factors are a scale
(of the biases added before them, too); reshapes must leave every score where it is, but may regroup batch and heads. Everything else, and
scores that something besides the softmax reads, raises :class:`NotAttention` with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.ir.program import Program

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)
LAYOUTS = (
    aten.reshape.default, aten.view.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.expand.default,
)  # fmt: skip
CONVERSIONS = (aten._to_copy.default, aten.to.dtype)
MAX_MASKED_SCORE = -1e4  # a number that no score reaches: what is set to it or less is masked


class NotAttention(Exception):
    """Raised with the sentence that says why a chain is no attention site."""


@dataclass(frozen=True)
class Bias:
    """A summand of the scores: ``node`` (a tensor), or ``low`` where the boolean ``node`` is False; ``shape``: that of the scores there."""

    node: fx.Node
    shape: tuple
    scale: float = 1.0
    low: float | None = None
    inverted: bool = False  # masked where True


@dataclass
class Scores:
    """Everything between the product and the softmax: scale, biases, factors per head, cap."""

    product: fx.Node
    scale: float
    biases: list[Bias] = field(default_factory=list)
    factors: list[fx.Node] = field(default_factory=list)  # tensors with one number per head
    softcap: float | None = None


def scores_before(program: Program, softmax: fx.Node) -> Scores:
    """Return the scores that ``softmax`` reads; raises :class:`NotAttention`."""
    scores = _Walk(program).run(softmax.args[0])
    if layout(scores.product, softmax.args[0]) != "kept":
        raise NotAttention("the scores change places between the product and the softmax")
    return scores


def layout(source: fx.Node, target: fx.Node) -> str:
    """Return the order in which the elements of ``source`` lie in ``target``, which only layout operators made from it.

    ``kept`` (the last two dimensions the same), ``transposed`` (the last two exchanged) or ``mixed``; others count as the identity.
    """
    path, node = [], target
    while node is not source:
        path.append(node)
        node = node if not node.all_input_nodes else _main(node, source)
    view = torch.empty(shape_of(source), device="meta")
    try:
        for node in reversed(path):
            if node.target in (aten.reshape.default, aten.view.default):
                view = view.view(shape_of(node))
            elif node.target in LAYOUTS:
                view = node.target(view, *node.args[1:])
            if view.shape != shape_of(node):
                return "mixed"
    except RuntimeError:
        return "mixed"
    rows, columns = shape_of(source)[-2:]
    if view.is_contiguous() and view.shape[-2:] == (rows, columns):
        return "kept"
    if view.mT.is_contiguous() and view.shape[-2:] == (columns, rows):
        return "transposed"
    return "mixed"


def _main(node: fx.Node, source: fx.Node) -> fx.Node:
    """Return the argument of ``node`` that comes from ``source``."""
    return next(a for a in node.all_input_nodes if a is source or _reaches(a, source))


def _reaches(node: fx.Node, source: fx.Node) -> bool:
    seen, stack = set(), [node]
    while stack:
        top = stack.pop()
        if top is source:
            return True
        if top not in seen and top > source:
            seen.add(top)
            stack += top.all_input_nodes
    return False


class _Walk:
    def __init__(self, program: Program):
        self.program = program

    def run(self, node: Any, scale: float = 1.0) -> Scores:
        """The scores that end in ``node``, ``scale`` times."""
        if not is_tensor(node) or node.op != "call_function":
            raise NotAttention("the scores are not a scaled product of queries and keys")
        if len(node.users) > 1:
            raise NotAttention(f"{node.name}: the scores are used besides the softmax")
        if node.target in PRODUCTS:
            return Scores(node, scale)
        if node.target in LAYOUTS or (node.target in CONVERSIONS and _widens(node)):
            return self.run(node.args[0], scale)
        if node.target is aten.add.Tensor and "alpha" not in node.kwargs:
            return self.sum(node, scale)
        if node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            return self.factor(node, scale)
        if node.target in (aten.where.self, aten.where.ScalarOther):
            return self.masked(node, scale)
        raise NotAttention(f"the scores are not a scaled product of queries and keys: {node.target} is between")

    def sum(self, node: fx.Node, scale: float) -> Scores:
        left, right = node.args[:2]
        try:
            scores, bias = self.run(left, scale), right
        except NotAttention:
            scores, bias = self.run(right, scale), left
        if not is_tensor(bias):
            return scores  # the same number for every key does not change the softmax
        return self.biased(scores, Bias(bias, shape_of(node), scale))

    def biased(self, scores: Scores, bias: Bias) -> Scores:
        if not shape_of(bias.node) or bias.shape[-2:] != shape_of(scores.product)[-2:]:
            raise NotAttention(f"{bias.node.name}: the bias is not added to rows of scores")
        return replace(scores, biases=[*scores.biases, bias])

    def factor(self, node: fx.Node, scale: float) -> Scores:
        x, by = node.args[:2]
        value = self.number(by)
        if value is None:
            return self.scaled_by_tensor(node, scale)
        inverse = node.target in (aten.div.Tensor, aten.div.Scalar)
        if not inverse and is_tensor(x) and x.target is aten.tanh.default and len(x.users) == 1:
            return self.capped(x, value, scale)
        return self.run(x, scale / value if inverse else scale * value)

    def scaled_by_tensor(self, node: fx.Node, scale: float) -> Scores:
        """One factor per head, which goes to the queries."""
        x, by = node.args[:2]
        if node.target is not aten.mul.Tensor or not is_tensor(by) or not is_tensor(x):
            raise NotAttention("the scores are scaled by a tensor")
        if shape_of(by)[-2:] != (1, 1):
            x, by = by, x
        if shape_of(by)[-2:] != (1, 1) or len(shape_of(by)) > len(shape_of(x)):
            raise NotAttention("the scores are scaled by a tensor that is not one number per head")
        scores = self.run(x, scale)
        if scores.biases or scores.softcap or shape_of(scores.product) != shape_of(node):
            raise NotAttention("biased scores are scaled by a tensor")
        return replace(scores, factors=[*scores.factors, by])

    def capped(self, tanh: fx.Node, cap: float, scale: float) -> Scores:
        """cap * tanh(x / cap)"""
        scores = self.run(tanh.args[0], cap)
        if scale != 1.0 or cap <= 0 or scores.softcap or scores.biases:
            raise NotAttention("the scores are capped, and not after the scale and before the mask")
        return replace(scores, softcap=cap)

    def masked(self, node: fx.Node, scale: float) -> Scores:
        condition, x, other = node.args
        inverted = self.number(x) is not None
        if inverted:
            x, other = other, x
        low = self.number(other)
        if low is None or low > MAX_MASKED_SCORE:
            raise NotAttention(f"{node.name}: scores are replaced by something that is not a large negative number")
        if scale <= 0:
            raise NotAttention(f"{node.name}: masked scores are multiplied by a number that is not positive")
        return self.biased(self.run(x, scale), Bias(condition, shape_of(node), 1.0, low, inverted))

    def number(self, value: Any) -> float | None:
        """A literal or a constant of one element."""
        constant = self.program.constant(value)
        if constant is not None and constant.numel() == 1:
            return float(constant)
        return float(value) if isinstance(value, (int, float)) else None


def _widens(node: fx.Node) -> bool:
    return (
        dtype_of(node).is_floating_point
        and dtype_of(node.args[0]).is_floating_point
        and dtype_of(node).itemsize >= dtype_of(node.args[0]).itemsize
    )
