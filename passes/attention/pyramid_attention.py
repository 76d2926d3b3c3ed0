"""Near keys as they are, far ones as means: each head looks at blocks of keys and at blocks of means of keys.

    K' = [K, M K],  V' = [V, M V]        scores of means get log(how many they stand for)

A mean stands for ``factor`` keys, a block of means for a group of ``factor`` blocks: a list with the blocks of the near groups and the
means of all others sees every key exactly once (a pyramid of two levels: PSA, Li et al., 2025; LLSA, Zhou et al., 2025). A head may also
see means only (HiLo's Lo-Fi heads, Pan et al., 2022). All heads of a layer run in one kernel; who gets what is found as for
``sparse-attention``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from thresher.analysis.attention_sites import SDPA, AttentionSite, attention_sites, head_weights
from thresher.calibration import watch
from thresher.ops.sparse_attention import block_lists
from thresher.pass_manager import Context, Note, register_pass
from thresher.passes.attention.head_errors import Blocks, HeadErrors, Sample, each_head
from thresher.passes.attention.pool_keys import Pooling, pooled_keys
from thresher.program import Program, dtype_of, shape_of
from thresher.selection import BoundedPass, Candidate

aten = torch.ops.aten
SAMPLES = 8
NEAR = (0, 1, 2)  # groups on each side
Grids = dict[str, Tensor]


@register_pass
@dataclass(frozen=True)
class PyramidAttention(BoundedPass):
    """Heads look at near keys, and at means of the others, within the budget."""

    name: ClassVar[str] = "pyramid-attention"
    target_ops: ClassVar[tuple] = (SDPA,)
    factor: int = 4
    block: int = 0  # keys of a block; 0: by the length

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        found, _ = attention_sites(program)
        refusals = [Note.at(s.node, f"no means of its keys: {reason}") for s in found if (reason := self.unfit(s))]
        sites = [s for s in found if not self.unfit(s)]
        samples = context.calibration.choosing[:SAMPLES]
        context.progress(f"{self.name}: {len(sites)} sites")
        errors, mass = self.measure(program, sites, samples)
        made = []
        for site in sites:
            relative = errors[site.node].relative()
            heads, (rows, columns) = site.shape[1], self.cut(site)
            dense = site.flops() / heads / context.machine.flops
            moved = sum(8.0 * n.meta["val"].numel() for n in (site.k, site.v)) / context.machine.bandwidth / heads
            for words, grid in self.grids(site).items():
                for h in range(heads):
                    saved = dense * (1 - float(grid.sum()) / (rows * columns)) - moved
                    key, name = (site.node.name, h), f"head {h}: {words}"
                    error, where = float(relative[words][h]), (site.node.name, site.module)
                    made.append(
                        Candidate(
                            key, site.module, name, error, saved, *where, grid, mass[site.node][h], grid[:, :columns]
                        )
                    )
        return made, refusals

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        work = program.clone()
        sites = {s.node.name: s for s in attention_sites(work)[0]}
        for name in dict.fromkeys(c.node for c in chosen):
            of_heads = {c.key[1]: c.payload for c in chosen if c.node == name}  # type: ignore[index]
            self.replace(work, sites[name], of_heads)
        return work.clean()

    # ------------------------------------------------------------------ how a site is cut

    def blocks(self, site: AttentionSite) -> Blocks:
        size = self.block or (32 if min(site.shape[2:]) <= 1024 else 64)
        return Blocks(size, size)

    def cut(self, site: AttentionSite) -> tuple[int, int]:
        """Blocks of queries, and of keys."""
        blocks = self.blocks(site)
        return blocks.rows(site), blocks.columns(site)

    def pooling(self, site: AttentionSite) -> Pooling:
        """Means of runs of keys; blocks of keys are padded to whole ones, so that blocks of means follow them."""
        keys = site.shape[3]
        return Pooling(torch.arange(keys) // self.factor, -(-keys // self.factor), f"means of {self.factor} keys")

    def unfit(self, site: AttentionSite) -> str:
        if site.causal:
            return "causal: a mean would look ahead"
        if site.masks_by_place:
            return "a mask by places"
        blocks = self.blocks(site)
        if site.shape[3] % blocks.k:
            return f"{site.shape[3]} keys are no whole blocks of {blocks.k}"
        return "" if site.shape[3] >= 2 * self.factor * blocks.k else f"{site.shape[3]} keys are too few"

    def grids(self, site: AttentionSite) -> Grids:
        """By name, which blocks of keys and then of means a head looks at: [query blocks, key blocks + mean blocks]."""
        rows, columns = self.cut(site)
        blocks, groups = self.blocks(site), -(-columns // self.factor)
        middle = (torch.arange(rows) * blocks.q + blocks.q // 2) * site.shape[3] // site.shape[2]
        away = (middle[:, None] // (blocks.k * self.factor) - torch.arange(groups)).abs()
        nothing = torch.zeros(rows, columns, dtype=torch.bool)
        found = {f"means of {self.factor} keys": torch.cat([nothing, torch.ones(rows, groups, dtype=torch.bool)], 1)}
        for r in (r for r in NEAR if 2 * r + 1 < groups):
            near = away <= r
            fine = near.repeat_interleave(self.factor, 1)[:, :columns]
            reach = (2 * r + 1) * self.factor * blocks.k
            found[f"the {reach} keys around, means of {self.factor} of the others"] = torch.cat([fine, ~near], 1)
        return found

    # ------------------------------------------------------------------ measured, and rewritten

    def measure(
        self, program: Program, sites: Sequence[AttentionSite], samples: Sequence[list[Any]]
    ) -> tuple[dict[fx.Node, HeadErrors], dict[fx.Node, Tensor]]:
        """The errors of every grid and head, and the mean mass of blocks of keys."""
        found = {s.node: HeadErrors(head_weights(program, s)) for s in sites}
        mass = {s.node: torch.zeros(s.shape[1], *self.cut(s)) for s in sites}

        def collect(site: AttentionSite, values: dict[fx.Node, Any]) -> None:
            grids, (_, columns) = self.grids(site), self.cut(site)
            found[site.node].add_output(values[site.node].float())

            def add(b: int, h: int, sample: Sample) -> None:
                found[site.node].add(h, sample, grids)
                mass[site.node][h] += sample.shares[..., :columns].mean(1) / (len(samples) * site.shape[0])

            each_head(site, values, self.blocks(site), add, self.pooling(site))

        watch(program, samples, {s.node: partial(collect, s) for s in sites})
        return found, mass

    def replace(self, program: Program, site: AttentionSite, of_heads: dict[int, Tensor]) -> None:
        """The site over its keys and their means; heads without a choice look at all keys."""
        (rows, columns), blocks, node = self.cut(site), self.blocks(site), site.node
        groups = -(-columns // self.factor)
        everything = torch.cat([torch.ones(rows, columns), torch.zeros(rows, groups)], 1).bool()
        lists = block_lists(torch.stack([of_heads.get(h, everything) for h in range(site.shape[1])])[None])

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return program.insert_call(node, target, args, kwargs, node)

        k_means, v_means, bias = pooled_keys(program, site, self.pooling(site))
        k, v = call(aten.cat.default, [site.k, k_means], 2), call(aten.cat.default, [site.v, v_means], 2)
        shape = [*shape_of(bias)[:3], site.shape[3]]
        if site.mask is None:
            mask = program.add_constant(torch.zeros(shape), f"{node.name}_unmasked", like=node, fixed=True)
        elif dtype_of(site.mask) is torch.bool:
            mask = call(aten.log.default, call(aten._to_copy.default, site.mask, dtype=torch.float32))
        else:
            mask = site.mask
        mask = call(aten.cat.default, [call(aten.expand.default, mask, shape), bias], 3)
        named = [
            program.add_constant(t.contiguous(), f"{node.name}_{n}", like=node, fixed=True)
            for n, t in zip(("blocks", "counts"), lists)
        ]
        args = (site.q, k, v, mask, *named, blocks.q, blocks.k, site.scale)
        node.replace_all_uses_with(call(torch.ops.thresher.sparse_attention.default, *args))
