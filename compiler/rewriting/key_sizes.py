"""How much every key of an attention counts: exp of what a mask of keys, or an earlier token reduction, adds to its scores."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from thresher.analysis.attention.sites import AttentionSite
from thresher.ir.nodes import dtype_of, shape_of
from thresher.ir.program import Program, Role
from thresher.rewriting.calls import inserter

aten = torch.ops.aten


def sizes_of_mask(mask: Tensor | None, batch: int, tokens: int) -> Tensor:
    """Return the sizes [B, S] under a mask [B or 1, 1, 1, S], on values; 1 without one."""
    if mask is None:
        return torch.ones(batch, tokens)
    weight = mask.float() if mask.dtype is torch.bool else mask.float().exp()
    return weight[:, 0, 0].expand(batch, -1).contiguous()


def key_sizes(program: Program, site: AttentionSite, before: fx.Node) -> fx.Node:
    """Insert the sizes [B, S] of the keys of a site before ``before``; those of an earlier reduction are read as they are."""
    mask, (batch, _, _, tokens), dtype = site.mask, site.shape, dtype_of(site.k)
    if mask is None:
        return program.add_constant(
            torch.ones(batch, tokens, dtype=dtype), "token_sizes", like=before, role=Role.BUFFER
        )
    logarithm = mask.args[0] if mask.target is aten.reshape.default else mask
    if logarithm.target is aten.log.default and shape_of(logarithm) == (batch, tokens):
        return logarithm.args[0]
    call = inserter(program, before)
    boolean = dtype_of(mask) is torch.bool
    weight = call(aten._to_copy.default, mask, dtype=dtype) if boolean else call(aten.exp.default, mask)
    return call(aten.reshape.default, call(aten.expand.default, weight, [batch, 1, 1, tokens]), [batch, tokens])
