"""Near keys as they are, far ones as means: each head looks at blocks of keys and at blocks of means of keys.

    K' = [K, M K],  V' = [V, M V]        scores of means get log(how many they stand for)

A mean stands for ``factor`` keys, a block of means for a group of ``factor`` blocks. Per head one of

    pyramid      the blocks of the near groups, and the means of all others: every key is seen once         (PSA, Li et al., 2025)
    following    the blocks of those groups whose means promise most for the input, and the means of all others, likewise
    means only                                                                         (HiLo's Lo-Fi heads, Pan et al., 2022)
    window only  the blocks of the near groups                                         (HiLo's Hi-Fi heads)

All heads of a layer run in one kernel; who gets what is found as for ``sparse-attention``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from thresher.analysis.attention.sites import SDPA, AttentionSite, attention_sites, head_weights
from thresher.approximation.calibration import watch
from thresher.approximation.search import Candidate
from thresher.ir.nodes import dtype_of, shape_of
from thresher.ir.program import Program
from thresher.ops.select_blocks import listed
from thresher.ops.sparse_attention import block_lists
from thresher.passes.attention._block_sizes import Blocks, blocks_of, cannot_skip
from thresher.passes.attention._head_errors import HeadErrors, Sample, each_head
from thresher.passes.attention._selected_blocks import EVERYTHING, constant, scores_of_blocks, select, selection_cost
from thresher.passes.attention.pool_keys import Pooling, pooled_keys
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.registry import register_pass

aten, ops = torch.ops.aten, torch.ops.thresher
SAMPLES = 8
NEAR = (0, 1, 2)  # groups on each side
FOLLOWED = (1, 2, 4)  # groups that are selected by the input


@dataclass(frozen=True)
class PyramidPattern:
    """What one head looks at: the blocks of the groups that are ``near``, bool [query blocks, groups], and of the ``keep`` groups that
    promise most for the input; and, with ``means``, the means of all others."""

    near: Tensor
    means: bool = True
    keep: int = 0


@dataclass(frozen=True)
class Pyramid:
    """A site, how it is cut, and how many blocks make a group: as many as keys make a mean."""

    site: AttentionSite
    blocks: Blocks
    factor: int

    @property
    def rows(self) -> int:
        return self.blocks.rows(self.site)

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return self.blocks.columns(self.site)

    @property
    def groups(self) -> int:
        """Of blocks of keys; and blocks of means."""
        return -(-self.columns // self.factor)

    @property
    def in_groups(self) -> Blocks:
        return Blocks(self.blocks.q, self.blocks.k * self.factor)

    @property
    def pooling(self) -> Pooling:
        keys = self.site.shape[3]
        return Pooling(torch.arange(keys) // self.factor, -(-keys // self.factor), f"means of {self.factor} keys")

    def unfit(self, target: str) -> str:
        site = self.site
        if site.causal:
            return "causal: a mean would look ahead"
        if site.masks_by_position:
            return "a mask by places"
        if site.shape[3] % self.blocks.k:  # blocks of means follow whole blocks of keys
            return f"{site.shape[3]} keys are no whole blocks of {self.blocks.k}"
        few = site.shape[3] < 2 * self.factor * self.blocks.k
        return f"{site.shape[3]} keys are too few" if few else cannot_skip(site, target)

    def choices(self) -> dict[str, PyramidPattern]:
        """What a head may look at, by name."""
        site, group = self.site, self.in_groups.k
        middle = (torch.arange(self.rows) * self.blocks.q + self.blocks.q // 2) * site.shape[3] // site.shape[2]
        away = (middle[:, None] // group - torch.arange(self.groups)).abs()
        nothing = torch.zeros(self.rows, self.groups, dtype=torch.bool)
        found = {f"means of {self.factor} keys": PyramidPattern(nothing)}
        for r in (r for r in NEAR if 2 * r + 1 < self.groups):
            around = f"the {(2 * r + 1) * group} keys around"
            found[f"{around}, means of {self.factor} of the others"] = PyramidPattern(away <= r)
            found[around] = PyramidPattern(away <= r, means=False)
        if self.columns % self.factor == 0:
            for keep in (n for n in FOLLOWED if n < self.groups):
                words = f"the {keep * group} most promising keys, means of {self.factor} of the others"
                found[words] = PyramidPattern(nothing, keep=keep)
        return found

    def grid(self, choice: PyramidPattern, scores: Tensor | None = None) -> Tensor:
        """What one head sees, bool [query blocks, key blocks + mean blocks], for the scores [1, 1, query blocks, groups] of one input."""
        near = choice.near
        if choice.keep and scores is not None:
            near = listed(scores, near[None, None], torch.tensor([choice.keep]), torch.tensor([EVERYTHING]))[0, 0]
        return torch.cat([self.fine(near), ~near & choice.means], 1)

    def fine(self, near: Tensor) -> Tensor:
        """Groups as their blocks of keys."""
        return near.repeat_interleave(self.factor, 1)[:, : self.columns]


@register_pass
@dataclass(frozen=True)
class PyramidAttention(ApproximatePass):
    """Heads look at near keys, and at means of the others, within the budget."""

    name: ClassVar[str] = "pyramid-attention"
    target_ops: ClassVar[tuple] = (SDPA,)
    factor: int = 4
    block: int = 0  # keys of a block; 0: by the length

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.factor > 1, "factor", "a number of keys from 2 on")
        self.require(self.block >= 0, "block", "a number of keys, or 0 for one by the length")

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        all_sites = [self.pyramid(s, context.target) for s in attention_sites(program)[0]]
        reasons = {p.site.node: p.unfit(context.target) for p in all_sites}
        refusals = [Note.at(node, f"no means of its keys: {reason}") for node, reason in reasons.items() if reason]
        found = [p for p in all_sites if not reasons[p.site.node]]
        context.progress(f"{self.name}: {len(found)} sites")
        errors, mass = measure(program, found, context.calibration.search_samples[:SAMPLES])
        made = [c for p in found for c in of_site(p, errors[p.site.node], mass[p.site.node], context)]
        return made, refusals

    def pyramid(self, site: AttentionSite, target: str) -> Pyramid:
        return Pyramid(site, blocks_of(site, target, self.block), self.factor)

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        work = program.clone()
        sites = {s.node.name: s for s in attention_sites(work)[0]}
        for name in dict.fromkeys(c.node for c in chosen):
            own = [c for c in chosen if c.node == name]
            of_heads = {c.key[1]: c.payload[1] for c in own}  # type: ignore[index]
            replace(work, Pyramid(sites[name], own[0].payload[0], self.factor), of_heads)
        return work.clean()


def measure(
    program: Program, pyramids: Sequence[Pyramid], samples: Sequence[list[Any]]
) -> tuple[dict[fx.Node, HeadErrors], dict[fx.Node, Tensor]]:
    """The errors of every choice and head, and the mean mass of blocks of keys."""
    found = {p.site.node: HeadErrors(head_weights(program, p.site)) for p in pyramids}
    mass = {p.site.node: torch.zeros(p.site.shape[1], p.rows, p.columns) for p in pyramids}

    def collect(pyramid: Pyramid, values: dict[fx.Node, Any]) -> None:
        site, choices = pyramid.site, pyramid.choices()
        scores = scores_of_blocks(site, values, pyramid.in_groups)
        found[site.node].add_output(values[site.node].float())

        def add(b: int, h: int, sample: Sample) -> None:
            own = scores[b : b + 1, h : h + 1]
            found[site.node].add(h, sample, {words: pyramid.grid(c, own) for words, c in choices.items()})
            mass[site.node][h] += sample.shares[..., : pyramid.columns].mean(1) / (len(samples) * site.shape[0])

        each_head(site, values, pyramid.blocks, add, pyramid.pooling)

    watch(program, samples, {p.site.node: partial(collect, p) for p in pyramids})
    return found, mass


def of_site(pyramid: Pyramid, measured: HeadErrors, mass: Tensor, context: Context) -> list[Candidate]:
    """The candidates of all heads of a site."""
    site, machine, relative = pyramid.site, context.machine, measured.relative()
    heads, where = site.shape[1], (site.node.name, site.module)
    dense = site.flops() / heads / machine.flops
    moved = sum(8.0 * n.meta["val"].numel() for n in (site.k, site.v)) / machine.bandwidth / heads
    choosing = selection_cost(site, pyramid.in_groups, context)
    made = []
    for words, choice in pyramid.choices().items():
        for h in range(heads):
            seen = float(measured.listed[words][h]) / measured.outputs / (pyramid.rows * pyramid.columns)
            saved = dense * (1 - seen) - moved - (choosing if choice.keep else 0.0)
            fine = None if choice.keep else pyramid.fine(choice.near)
            named, how = f"head {h}: {words}", (pyramid.blocks, choice)
            error = float(relative[words][h])
            made.append(Candidate((site.node.name, h), site.module, named, error, saved, *where, how, mass[h], fine))
    return made


def replace(program: Program, pyramid: Pyramid, choices: dict[int, PyramidPattern]) -> None:
    """The site over its keys and their means; heads without a choice look at all keys."""
    site, blocks, node = pyramid.site, pyramid.blocks, pyramid.site.node
    everything = PyramidPattern(torch.ones(pyramid.rows, pyramid.groups, dtype=torch.bool), means=False)

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return program.insert_call(node, target, args, kwargs, node)

    k_means, v_means, bias = pooled_keys(program, site, pyramid.pooling)
    k, v = call(aten.cat.default, [site.k, k_means], 2), call(aten.cat.default, [site.v, v_means], 2)
    shape = [*shape_of(bias)[:3], site.shape[3]]
    if site.mask is None:
        mask = constant(program, site, torch.zeros(shape, dtype=dtype_of(site.k)), "unmasked")
    elif dtype_of(site.mask) is torch.bool:
        mask = call(aten.log.default, call(aten._to_copy.default, site.mask, dtype=dtype_of(site.k)))
    else:
        mask = site.mask
    mask = call(aten.cat.default, [call(aten.expand.default, mask, shape), bias], 3)
    lists = _lists(program, pyramid, [choices.get(h, everything) for h in range(site.shape[1])])
    args = (site.q, k, v, mask, *lists, blocks.q, blocks.k, site.scale)
    node.replace_all_uses_with(call(ops.sparse_attention.default, *args))


def _lists(program: Program, pyramid: Pyramid, of_heads: Sequence[PyramidPattern]) -> list[fx.Node]:
    """Blocks and counts over the pyramid; if one head follows the input, those of all come from a selection of groups, in which what is
    near is forced."""
    site = pyramid.site
    if not any(c.keep for c in of_heads):
        grid = torch.stack([pyramid.grid(c) for c in of_heads])[None]
        return [constant(program, site, t, n) for t, n in zip(block_lists(grid), ("blocks", "counts"))]
    always = torch.stack([c.near for c in of_heads])[None]
    selected = select(program, site, pyramid.in_groups, always, [c.keep for c in of_heads])
    means = constant(program, site, torch.tensor([c.means for c in of_heads]), "sees_means")
    args = (*selected, means, pyramid.factor, pyramid.columns)
    call = program.insert_call(site.node, ops.pyramid_lists.default, args, like=site.node)
    return [program.insert_call(site.node, operator.getitem, (call, i), like=site.node) for i in range(2)]
