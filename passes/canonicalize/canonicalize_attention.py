"""Every spelling of attention becomes one ``aten.scaled_dot_product_attention``.

    softmax(c * (q @ k^T) + mask) @ v        with the scale c before or after the product, times or divided, or absent

matmul or bmm, three or four dimensions, the mask added as a tensor. A scale on q or on k stays where it is and the site gets scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from thresher.analysis.rows.base import argument
from thresher.pass_manager import Context, Note, Pass, PassResult, register_pass
from thresher.program import Program, dtype_of, is_tensor, shape_of

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)
SOFTMAX = (aten.softmax.int, aten._softmax.default)


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
            site = _find(work, node)
            if isinstance(site, str):
                if site:
                    refusals.append(Note.at(node, site))
                continue
            _replace(work, site)
            notes.append(Note.at(node, "written as one attention site"))
        return PassResult(work.clean().propagate(), notes, refusals) if notes else PassResult(program, [], refusals)


@dataclass
class _Site:
    result: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float


def _find(program: Program, softmax: fx.Node) -> _Site | str:
    """The site around ``softmax``, "" if it is no attention at all, or a sentence saying why it was not taken."""
    products = [u for u in softmax.users if u.target in PRODUCTS and u.args[0] is softmax]
    if not products:
        return ""
    if len(softmax.users) > 1:
        return "the attention weights are used besides the product with the values"
    if argument(softmax, 1, "dim") % len(shape_of(softmax)) != len(shape_of(softmax)) - 1:
        return "the softmax is not over the keys"
    scores, mask, scale = softmax.args[0], None, 1.0
    if (
        isinstance(scores, fx.Node)
        and scores.target is aten.add.Tensor
        and len(scores.users) == 1
        and "alpha" not in scores.kwargs
    ):
        left, right = scores.args[:2]
        first = _peel(left)
        scores, mask = (left, right) if first is not None else (right, left)
    peeled = _peel(scores)
    if peeled is None:
        return "the scores are not a scaled product of queries and keys"
    product, scale = peeled
    key = _transposed(program, product.args[1])
    if key is None:
        return "the keys are not transposed in their last two dimensions"
    q, v = product.args[0], products[0].args[1]
    if not all(is_tensor(n) for n in (q, v)) or not len(shape_of(q)) == len(shape_of(key)) == len(shape_of(v)):
        return "queries, keys and values differ in rank"
    if mask is not None and (not is_tensor(mask) or dtype_of(mask) != dtype_of(q)):
        return "the mask is not a tensor of the queries' dtype"
    return _Site(products[0], q, key, v, mask, scale)


def _peel(node: Any) -> tuple[fx.Node, float] | None:
    """The product behind scalar factors, and their product."""
    scale = 1.0
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.target in PRODUCTS:
            return node, scale
        if node.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(node.args[1], (int, float)):
            scale *= node.args[1]
        elif (
            node.target in (aten.div.Tensor, aten.div.Scalar)
            and isinstance(node.args[1], (int, float))
            and "rounding_mode" not in node.kwargs
        ):
            scale /= node.args[1]
        else:
            return None
        node = node.args[0]
    return None


def _transposed(program: Program, node: Any) -> fx.Node | None:
    """What ``node`` is the transpose of, in the last two dimensions; made by a new permute where it is part of a longer one."""
    if not is_tensor(node) or program.constant(node) is not None:
        return None
    rank = len(shape_of(node))
    if node.target is aten.permute.default:
        order = [d % rank for d in node.args[1]]
        if order == [*range(rank - 2), rank - 1, rank - 2]:
            return node.args[0]
        order[-1], order[-2] = order[-2], order[-1]
        return program.insert_call(node, aten.permute.default, (node.args[0], order), like=node)
    if node.target is aten.transpose.int and {d % rank for d in node.args[1:3]} == {rank - 1, rank - 2}:
        return node.args[0]
    with_transpose = [*range(rank - 2), rank - 1, rank - 2]
    return program.insert_call(next(iter(node.users)), aten.permute.default, (node, with_transpose), like=node)


def _replace(program: Program, site: _Site) -> None:
    kwargs: dict[str, Any] = {"scale": site.scale}
    args: tuple = (site.q, site.k, site.v)
    if site.mask is not None:
        kwargs["attn_mask"] = site.mask
    with program.graph.inserting_before(site.result):
        new = program.graph.call_function(aten.scaled_dot_product_attention.default, args, kwargs)
    new.meta = {k: v for k, v in site.result.meta.items()}
    site.result.replace_all_uses_with(new)
