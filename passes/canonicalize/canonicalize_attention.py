"""Every spelling of attention becomes one site: ``aten.scaled_dot_product_attention``.

    softmax(c * (q @ k^T) + bias) @ v        masked, scaled before or after the product, in float32 between half types, or by einsum

matmul or bmm (capture takes baddbmm and ``masked_fill`` apart); masks added, or ``where``; heads and batch regrouped in between; tokens or
channels first (then the weights come second in the last product, transposed). Capped scores (``cap * tanh(scores / cap)``) become
``thresher::sparse_attention`` over all blocks, because ATen's operator has no cap. (Vaswani et al., 2017.)

The softmax must be over the keys, the scores and the weights read by nothing else, and queries, keys and values of one type. Refused, each
with its reason: scores of several heads that are mixed (talking heads: Shazeer et al., 2020); queries, keys and values that are broadcast
against each other; scores scaled by a tensor that is not one number per head, or replaced by something else than a large negative number;
a cap that does not stand after the scale and before the mask; heads that are regrouped while a size of the batch is dynamic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from thresher.analysis.slices.transfer.base import argument
from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.ir.program import Program, Role
from thresher.ops.sparse_attention import DENSE_BLOCKS
from thresher.passes.canonicalize._attention_scores import (
    CONVERSIONS,
    LAYOUTS,
    PRODUCTS,
    Bias,
    NotAttention,
    Scores,
    layout,
    scores_before,
)
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.registry import register_pass

aten = torch.ops.aten
SOFTMAX = (aten.softmax.int, aten._softmax.default)
MIXING = (aten.linear.default, aten.conv2d.default)


@register_pass
@dataclass(frozen=True)
class CanonicalizeAttention(Pass):
    """Find matmul-softmax-matmul chains and write them as one attention site."""

    name: ClassVar[str] = "canonicalize-attention"
    requires: ClassVar[tuple[str, ...]] = ("simplify",)
    target_ops: ClassVar[tuple] = SOFTMAX

    def apply(self, program: Program, context: Context) -> PassResult:
        work, notes, refusals = program.clone(), [], []
        for node in list(work.calls(*SOFTMAX)):
            try:
                values = _values_product(node)
                if values is None:
                    continue
                scores = scores_before(work, node)
                _replace(work, node, scores, *values)
                notes.append(Note.at(node, "written as one attention site"))
            except NotAttention as reason:
                refusals.append(Note.at(node, str(reason)))
        return PassResult(work.clean().propagate(), notes, refusals) if notes else PassResult(program, [], refusals)


def _values_product(softmax: fx.Node) -> tuple[fx.Node, bool] | None:
    """Return the product of the weights with the values, and if they are its right side, transposed; None: this is no attention."""
    weights = softmax
    while True:
        products = [u for u in weights.users if u.target in PRODUCTS]
        if products:
            break
        following = [u for u in weights.users if u.target in (*LAYOUTS, *CONVERSIONS)]
        if not following:
            if any(u.target in MIXING and _leads_to_product(u) for u in weights.users):
                raise NotAttention("talking heads: the weights of several heads are mixed before they meet the values")
            return None
        if len(weights.users) > 1:
            raise NotAttention("the attention weights are used besides the product with the values")
        weights = following[0]
    if len(weights.users) > 1:
        raise NotAttention("the attention weights are used besides the product with the values")
    if argument(softmax, 1, "dim") % len(shape_of(softmax)) != len(shape_of(softmax)) - 1:
        raise NotAttention("the softmax is not over the keys")
    product = products[0]
    right = product.args[1] is weights
    if layout(softmax, weights) != ("transposed" if right else "kept"):
        raise NotAttention("the attention weights change places before the product with the values")
    return product, right


def _leads_to_product(node: fx.Node) -> bool:
    return any(
        u.target in PRODUCTS or (u.target in (*LAYOUTS, *CONVERSIONS) and _leads_to_product(u)) for u in node.users
    )


def _replace(program: Program, softmax: fx.Node, scores: Scores, product: fx.Node, right: bool) -> None:
    """Replace ``product`` by the site; all of it in the layout of the softmax, [batch, heads, L, S], or of three dimensions."""
    lead, dtype = list(shape_of(softmax)[:-2]), dtype_of(product)
    if len(lead) > 2 and all(isinstance(d, int) for d in lead):  # batch and windows
        lead = [math.prod(lead[:-1]), lead[-1]]
    q, k = scores.product.args
    v = product.args[0] if right else product.args[1]
    if not all(is_tensor(n) for n in (q, k, v)) or any(dtype_of(n) != dtype for n in (q, k, v)):
        raise NotAttention("queries, keys and values are not of one type")
    if any(isinstance(d, torch.SymInt) for d in lead) and len({len(shape_of(n)) for n in (q, k, v, softmax)}) > 1:
        raise NotAttention("batch and heads are regrouped, and dynamic")
    edit = _Edit(program, product)
    for factor in scores.factors:
        q = edit(aten.mul.Tensor, q, factor)
    q, k = edit.regrouped(q, lead), edit.regrouped(edit.transposed(k), lead)
    mask = edit.mask(scores.biases, lead, dtype)
    v = edit.regrouped(edit.transposed(v) if right else v, lead)
    if scores.softcap:
        new = edit.capped(q, k, v, mask, scores)
    else:
        kwargs: dict[str, Any] = {"scale": scores.scale} | ({} if mask is None else {"attn_mask": mask})
        new = program.insert_call(product, aten.scaled_dot_product_attention.default, (q, k, v), kwargs)
    result = edit.regrouped(edit.transposed(new) if right else new, list(shape_of(product)[:-2]))
    if shape_of(result) != shape_of(product):
        raise NotAttention("queries, keys and values are broadcast against each other")
    product.replace_all_uses_with(result)


class _Edit:
    """An editor that inserts calls before ``before``."""

    def __init__(self, program: Program, before: fx.Node):
        self.program, self.before = program, before

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.program.insert_call(self.before, target, args, kwargs)

    def regrouped(self, node: fx.Node, lead: list) -> fx.Node:
        """``node`` with the dimensions before the last two as ``lead``."""
        if list(shape_of(node)[:-2]) == lead:
            return node
        try:
            return self(aten.reshape.default, node, [*lead, *shape_of(node)[-2:]])
        except RuntimeError as error:
            raise NotAttention("queries, keys and values are broadcast against each other") from error

    def transposed(self, node: fx.Node) -> fx.Node:
        """``node`` with its last two dimensions exchanged: what it was made from, where it is such a transpose itself."""
        rank = len(shape_of(node))
        order = [*range(rank - 2), rank - 1, rank - 2]
        if node.target is aten.permute.default:
            dims = [d % rank for d in node.args[1]]
            dims[-1], dims[-2] = dims[-2], dims[-1]
            return node.args[0] if dims == [*range(rank)] else self(aten.permute.default, node.args[0], dims)
        return self(aten.permute.default, node, order)

    def mask(self, biases: list[Bias], lead: list, dtype: torch.dtype) -> fx.Node | None:
        """All biases and masks as one tensor that broadcasts to [lead ..., L, S]; boolean if they only forbid."""
        if len(biases) == 1 and biases[0].low == -float("inf"):
            return self.bias_layout(self.allowed(biases[0]), biases[0].shape, lead)
        total = None
        for bias in biases:
            value = self.bias_layout(self.added(bias, dtype), bias.shape, lead)
            total = value if total is None else self(aten.add.Tensor, total, value)
        return total

    def allowed(self, bias: Bias) -> fx.Node:
        return self(aten.logical_not.default, bias.node) if bias.inverted else bias.node

    def added(self, bias: Bias, dtype: torch.dtype) -> fx.Node:
        if bias.low is not None:
            # a masked score is replaced, not added to: the least number takes in whatever it is added to, so that rows with all
            # scores masked stay uniform
            low = -float("inf") if bias.low == -float("inf") else torch.finfo(dtype).min
            zero, lowest = (
                self.program.add_constant(
                    torch.tensor(v, dtype=dtype), f"{bias.node.name}_{name}", like=self.before, role=Role.BUFFER
                )
                for name, v in (("allowed", 0.0), ("masked", low))
            )
            chosen = (lowest, zero) if bias.inverted else (zero, lowest)
            return self(aten.where.self, bias.node, *chosen)
        node = bias.node if bias.scale == 1 else self(aten.mul.Tensor, bias.node, bias.scale)
        return node if dtype_of(node) == dtype else self(aten._to_copy.default, node, dtype=dtype)

    def bias_layout(self, node: fx.Node, shape: tuple, lead: list) -> fx.Node:
        """A bias of scores that were [shape], for scores that are [lead ..., L, S]."""
        if list(shape[:-2]) == lead:
            return node
        last = [1, 1, *shape_of(node)][-2:]
        wide = self(aten.expand.default, node, [*shape[:-2], *last])
        return self(aten.reshape.default, wide, [*lead, *last])

    def capped(self, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None, scores: Scores) -> fx.Node:
        if len(shape_of(q)) != 4:
            raise NotAttention("capped scores of another rank than [batch, heads, queries, keys]")
        return self(
            torch.ops.thresher.sparse_attention.default,
            q,
            k,
            v,
            mask,
            None,
            None,
            *DENSE_BLOCKS,
            scores.scale,
            False,
            scores.softcap,
        )
