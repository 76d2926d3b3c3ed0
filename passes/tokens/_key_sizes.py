"""How much every key counts: the size of tokens that a mask of keys, or an earlier reduction, gives them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from thresher.analysis.attention.sites import AttentionSite
from thresher.ir.nodes import dtype_of, shape_of
from thresher.ir.program import Program, Role

aten = torch.ops.aten


def sizes_of_mask(mask: Tensor | None, batch: int, tokens: int) -> Tensor:
    """[B, S], on values: exp of what a mask [B or 1, 1, 1, S] adds to the scores; 1 without one."""
    if mask is None:
        return torch.ones(batch, tokens)
    weight = mask.float() if mask.dtype is torch.bool else mask.float().exp()
    return weight[:, 0, 0].expand(batch, -1).contiguous()


def key_sizes(program: Program, site: AttentionSite, before: fx.Node) -> fx.Node:
    """The same in the graph, inserted before ``before``."""
    mask, (batch, _, _, tokens), dtype = site.mask, site.shape, dtype_of(site.k)

    def call(target: object, *args: object, **kwargs: object) -> fx.Node:
        return program.insert_call(before, target, args, kwargs, before)

    if mask is None:
        return program.add_constant(
            torch.ones(batch, tokens, dtype=dtype), "token_sizes", like=before, role=Role.BUFFER
        )
    made = mask.args[0] if mask.target is aten.reshape.default else mask
    if made.target is aten.log.default and shape_of(made) == (batch, tokens):
        return made.args[0]
    boolean = dtype_of(mask) is torch.bool
    weight = call(aten._to_copy.default, mask, dtype=dtype) if boolean else call(aten.exp.default, mask)
    return call(aten.reshape.default, call(aten.expand.default, weight, [batch, 1, 1, tokens]), [batch, tokens])
