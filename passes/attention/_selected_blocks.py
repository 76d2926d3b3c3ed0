"""Blocks of keys that are selected by the input: in the graph, on values, and the cost of selecting them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from thresher.analysis.attention.sites import AttentionSite
from thresher.approximation.search import Candidate
from thresher.ir.nodes import dtype_of, shape_of
from thresher.ir.program import Program, Role
from thresher.ops.select_blocks import block_scores
from thresher.passes.attention._block_sizes import Blocks
from thresher.rewriting.contract import Context

BLOCKS_PER_GROUP = 8  # that are scored together, where they are many
CPU_KERNELS, GPU_KERNELS = 2, 12  # of a selection
SCALAR_SLOWDOWN = 8.0  # of comparisons one by one, beside a product
UNREACHABLE_MASS = 2.0  # no sum of weights is as large
MASKED_SCORE = -1e4  # what a mask adds to the score of a key that counts is above it


def scores_of_blocks(site: AttentionSite, values: dict[fx.Node, Any], blocks: Blocks) -> Tensor:
    """Return the scores of the blocks' means [B, H, query blocks, key blocks], from the values of a run."""
    keys = None if site.mask is None else values[site.mask]
    keys = keys if keys is None or keys.dtype is torch.bool else keys > MASKED_SCORE
    q, k = (values[n].float() for n in (site.q, site.k))
    return block_scores(q, k, keys, blocks.q, blocks.k, site.scale, site.causal)


def select(
    program: Program, site: AttentionSite, blocks: Blocks, always: Tensor, keep: Sequence[int],
    mass: Sequence[float] = (), groups: Sequence[int] = (),
) -> list[fx.Node]:  # fmt: skip
    """Insert ``thresher::select_blocks`` before the site; returns its two results, blocks and counts.

    Per head ``keep``, ``mass`` (none: by the number alone) and ``groups`` (0: all of them; none: without groups); ``always`` is boolean
    [1, H, query blocks, key blocks].
    """
    tensors = {
        "always": always,
        "keep": torch.tensor(keep),
        "mass": torch.tensor(mass or [UNREACHABLE_MASS] * len(keep)),
    }
    constants = [constant(program, site, t, name) for name, t in tensors.items()]
    max_count = max(int(always.sum(-1).max()), *keep)
    options: tuple[Any, ...] = (blocks.q, blocks.k, site.scale, max_count, site.causal)
    if any(groups):
        best_groups = torch.tensor([g or -(-blocks.columns(site) // BLOCKS_PER_GROUP) for g in groups])
        options = (*options, constant(program, site, best_groups, "groups"), BLOCKS_PER_GROUP)
    args = (site.q, site.k, _present(program, site), *constants, *options)
    call = program.insert_call(site.node, torch.ops.thresher.select_blocks.default, args, like=site.node)
    return [program.insert_call(site.node, operator.getitem, (call, i), like=site.node) for i in range(2)]


def _present(program: Program, site: AttentionSite) -> fx.Node | None:
    """Insert the boolean [B, 1, 1, S] of the keys that the mask of keys allows."""
    if site.mask is None or dtype_of(site.mask) is torch.bool:
        return site.mask
    return program.insert_call(site.node, torch.ops.aten.gt.Scalar, (site.mask, MASKED_SCORE), like=site.node)


def constant(program: Program, site: AttentionSite, value: Tensor, name: str) -> fx.Node:
    """Add a constant that belongs to a site and is not trained."""
    return program.add_constant(value.contiguous(), f"{site.node.name}_{name}", like=site.node, role=Role.BUFFER)


def selection_cost(site: AttentionSite, blocks: Blocks, context: Context, groups: int = 0) -> float:
    """Return seconds per head: queries and keys are read once, blocks scored by their means, and each block counts those before it."""
    machine, heads, columns = context.machine, site.shape[1], blocks.columns(site)
    scored, coarse = (
        (min(columns, groups * BLOCKS_PER_GROUP), -(-columns // BLOCKS_PER_GROUP)) if groups else (columns, 0)
    )
    operations = (scored + coarse) * 2.0 * shape_of(site.q)[3] + 3.0 * (scored * columns + coarse * coarse)
    operations *= SCALAR_SLOWDOWN * site.shape[0] * blocks.rows(site)
    bytes_read = sum(4.0 * n.meta["val"].numel() for n in (site.q, site.k)) / heads
    launches = GPU_KERNELS if context.target.startswith("cuda") else CPU_KERNELS
    return launches * machine.launch / heads + bytes_read / machine.bandwidth + operations / machine.flops


def patterns_by_site(chosen: Sequence[Candidate]) -> Iterator[tuple[str, Blocks, dict[int, Any]]]:
    """Yield per site its name, its blocks and the pattern of each head that has one, from candidates of ``key`` (site, head) and
    ``payload`` (blocks, pattern)."""
    for name in dict.fromkeys(c.node for c in chosen):
        of_site = [c for c in chosen if c.node == name]
        yield name, of_site[0].payload[0], {c.key[1]: c.payload[1] for c in of_site}  # type: ignore[index]
