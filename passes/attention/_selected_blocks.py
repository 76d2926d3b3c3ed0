"""Blocks of keys that are selected by the input: in the graph, on values, and what it costs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from thresher.analysis.attention.sites import AttentionSite
from thresher.ir.nodes import dtype_of, shape_of
from thresher.ir.program import Program, Role
from thresher.ops.select_blocks import block_scores
from thresher.passes.attention._block_sizes import Blocks
from thresher.rewriting.contract import Context

GROUP = 8  # blocks that are asked together, where they are many
KERNELS, KERNELS_ON_A_GPU = 2, 12  # of a selection
SLOWER = 8.0  # than a product: comparisons one by one
EVERYTHING = 2.0  # a mass that no sum of weights reaches
PRESENT = -1e4  # what a mask adds to the score of a key that counts is above it


def scores_of_blocks(site: AttentionSite, values: dict[fx.Node, Any], blocks: Blocks) -> Tensor:
    """[B, H, query blocks, key blocks], from the values of a run."""
    keys = None if site.mask is None else values[site.mask]
    keys = keys if keys is None or keys.dtype is torch.bool else keys > PRESENT
    q, k = (values[n].float() for n in (site.q, site.k))
    return block_scores(q, k, keys, blocks.q, blocks.k, site.scale, site.causal)


def select(
    program: Program, site: AttentionSite, blocks: Blocks, always: Tensor, keep: Sequence[int],
    mass: Sequence[float] = (), groups: Sequence[int] = (),
) -> list[fx.Node]:  # fmt: skip
    """``thresher::select_blocks`` before the site: blocks and counts. Per head ``keep``, ``mass`` (none: by the number alone) and
    ``groups`` (0: all of them; none: without groups); ``always`` bool [1, H, query blocks, key blocks]."""
    named = {"always": always, "keep": torch.tensor(keep), "mass": torch.tensor(mass or [EVERYTHING] * len(keep))}
    constants = [constant(program, site, t, name) for name, t in named.items()]
    most = max(int(always.sum(-1).max()), *keep)
    how: tuple[Any, ...] = (blocks.q, blocks.k, site.scale, most, site.causal)
    if any(groups):
        best = torch.tensor([g or -(-blocks.columns(site) // GROUP) for g in groups])
        how = (*how, constant(program, site, best, "groups"), GROUP)
    args = (site.q, site.k, _present(program, site), *constants, *how)
    call = program.insert_call(site.node, torch.ops.thresher.select_blocks.default, args, like=site.node)
    return [program.insert_call(site.node, operator.getitem, (call, i), like=site.node) for i in range(2)]


def _present(program: Program, site: AttentionSite) -> fx.Node | None:
    """Boolean [B, 1, 1, S]: the keys that the mask of keys allows."""
    if site.mask is None or dtype_of(site.mask) is torch.bool:
        return site.mask
    return program.insert_call(site.node, torch.ops.aten.gt.Scalar, (site.mask, PRESENT), like=site.node)


def constant(program: Program, site: AttentionSite, value: Tensor, name: str) -> fx.Node:
    """Numbers that belong to a site and are not trained."""
    return program.add_constant(value.contiguous(), f"{site.node.name}_{name}", like=site.node, role=Role.BUFFER)


def selection_cost(site: AttentionSite, blocks: Blocks, context: Context, groups: int = 0) -> float:
    """Seconds per head: queries and keys are read once, blocks scored by their means, and for each is counted how many go before it."""
    machine, heads, columns = context.machine, site.shape[1], blocks.columns(site)
    asked, coarse = (min(columns, groups * GROUP), -(-columns // GROUP)) if groups else (columns, 0)
    operations = (asked + coarse) * 2.0 * shape_of(site.q)[3] + 3.0 * (asked * columns + coarse * coarse)
    operations *= SLOWER * site.shape[0] * blocks.rows(site)
    read = sum(4.0 * n.meta["val"].numel() for n in (site.q, site.k)) / heads
    launches = KERNELS_ON_A_GPU if context.target.startswith("cuda") else KERNELS
    return launches * machine.launch / heads + read / machine.bandwidth + operations / machine.flops
