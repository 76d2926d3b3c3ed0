"""The attentions of a program, as one kind of thing: what they read, what they allow, and where they stand in the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from thresher.analysis.slices.transfer.base import argument
from thresher.ir.nodes import is_tensor, module_path, shape_of
from thresher.ir.program import Program

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = (aten.softmax.int, aten._softmax.default)


@dataclass(frozen=True)
class AttentionSite:
    """A dense attention with static shapes: q [B, H, L, E], k [B, G, S, E], v [B, G, S, F], mask broadcast to [B, H, L, S].

    ``projection``: the weight of the linear layer after it, [C, H * F], if the heads go there side by side."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    causal: bool
    projection: fx.Node | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The sizes (B, H, L, S)."""
        b, h, rows, _ = shape_of(self.q)
        return b, h, rows, shape_of(self.k)[2]

    @property
    def module(self) -> str:
        """The dotted path of the module that the attention stands in."""
        return module_path(self.node)

    @property
    def masks_by_position(self) -> bool:
        """True if the mask is more than a row of keys, [B or 1, 1, 1, S], that all queries and heads share."""
        return self.mask is not None and (len(shape_of(self.mask)) != 4 or shape_of(self.mask)[1:3] != (1, 1))

    def __str__(self) -> str:
        batch, heads, rows, keys = self.shape
        shared = shape_of(self.k)[1]
        parts = [f"{heads} heads" + (f" over {shared} of keys" if shared != heads else ""), f"{rows} x {keys} tokens"]
        parts.append(
            "causal" if self.causal else "no mask" if self.mask is None else f"mask {list(shape_of(self.mask))}"
        )
        return ", ".join([*parts, *([f"batch {batch}"] if batch > 1 else [])])

    def flops(self) -> float:
        """Return the floating-point operations of both products."""
        b, h, rows, keys = self.shape
        return 2.0 * b * h * rows * keys * (shape_of(self.q)[3] + shape_of(self.v)[3])


def site_of(node: fx.Node) -> AttentionSite | str:
    """Return the site at an attention, or the reason why it has another form."""
    q, k, v = node.args[:3]
    if any(len(shape_of(n)) != 4 for n in (q, k, v)):
        return "queries, keys and values have not the four dimensions batch, heads, tokens, channels"
    if any(not isinstance(d, int) for n in (q, k, v) for d in shape_of(n)):
        return "its shapes are dynamic"
    if shape_of(q)[1] % shape_of(k)[1] or shape_of(q)[0] != shape_of(k)[0]:
        return "keys are broadcast over batch or heads"
    scale = argument(node, 6, "scale")
    scale = 1 / math.sqrt(shape_of(q)[3]) if scale is None else float(scale)
    causal = bool(argument(node, 5, "is_causal", False))
    return AttentionSite(node, q, k, v, argument(node, 3, "attn_mask"), scale, causal, _projection(node))


def attention_sites(program: Program) -> tuple[list[AttentionSite], dict[fx.Node, str]]:
    """Return all sites in order, and the other attentions, each with the reason why it has another form."""
    sites, others = [], {}
    for node in program.calls(SDPA):
        site = site_of(node)
        if isinstance(site, str):
            others[node] = site
        else:
            sites.append(site)
    return sites, others


def head_weights(program: Program, site: AttentionSite) -> Tensor:
    """Return the quadratic form by which a change of each head's output counts after the projection.

    It is W_h^T W_h per head, float64 [H, F, F]; identities where there is no projection.
    """
    heads, width = shape_of(site.node)[1], shape_of(site.node)[3]
    weight = program.constant(site.projection)
    if weight is None:
        return torch.eye(width, dtype=torch.float64).expand(heads, -1, -1)
    head_columns = weight.double().unflatten(1, (heads, width)).permute(1, 0, 2)
    return head_columns.mT @ head_columns


def _projection(node: fx.Node) -> fx.Node | None:
    """Return the weight after [B, H, L, F] -> permute -> [B, L, H, F] -> reshape -> [B, L, H F] -> linear, if that is how it goes on."""
    heads, width = shape_of(node)[1], shape_of(node)[3]
    swap = _only_user(node)
    if swap is None or swap.target is not aten.permute.default or [d % 4 for d in swap.args[1]] != [0, 2, 1, 3]:
        return None
    flat = _only_user(swap)
    linear = _only_user(flat) if flat is not None and flat.target is aten.reshape.default else None
    if linear is None or linear.target is not aten.linear.default or shape_of(linear.args[0])[-1] != heads * width:
        return None
    return linear.args[1]


def _only_user(node: fx.Node) -> fx.Node | None:
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if is_tensor(user) else None
