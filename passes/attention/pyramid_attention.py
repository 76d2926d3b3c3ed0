"""Near keys as they are, far ones as means: each head looks at blocks of keys and at blocks of means of keys.

    K' = [K, M K],  V' = [V, M V]        scores of means get log(how many they stand for)

A mean stands for ``factor`` keys, a block of means for a group of ``factor`` blocks. Per head one of

    pyramid      the blocks of the near groups, and the means of all others: every key is seen once     (PSA, Li et al., 2025, two levels)
    following    the blocks of those groups whose means promise most for the input, and the means of all others, likewise
    means only                                                                         (HiLo's Lo-Fi heads, Pan et al., 2022)
    window only  the blocks of the near groups                                         (HiLo's Hi-Fi heads, in one dimension)

HiLo is trained so, here the heads of a trained attention are replaced. All heads of a layer run in one kernel; the pattern of a head is
decided as for ``sparse-attention``. Refused: causal attention and masks by position, keys that are no whole blocks or too few, and on
GPUs other types than float16 and bfloat16.
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
from thresher.passes.attention._pooling import Pooling, pooled_keys
from thresher.passes.attention._selected_blocks import (
    UNREACHABLE_MASS,
    constant,
    patterns_by_site,
    scores_of_blocks,
    select,
    selection_cost,
)
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.calls import inserter
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.registry import register_pass

aten, ops = torch.ops.aten, torch.ops.thresher
MAX_SAMPLES = 8
NEAR_GROUPS = (0, 1, 2)  # on each side
SELECTED_GROUPS = (1, 2, 4)  # by the input


@dataclass(frozen=True)
class PyramidPattern:
    """The blocks that one head looks at: those of the ``near`` groups, boolean [query blocks, groups], and of the ``keep`` groups that
    promise most for the input; with ``means`` also the means of all others."""

    near: Tensor
    means: bool = True
    keep: int = 0


@dataclass(frozen=True)
class Pyramid:
    """A site and how it is cut: ``factor`` blocks make a group, and as many keys a mean."""

    site: AttentionSite
    blocks: Blocks
    factor: int

    @property
    def rows(self) -> int:
        """The number of blocks of queries."""
        return self.blocks.rows(self.site)

    @property
    def columns(self) -> int:
        """The number of blocks of keys."""
        return self.blocks.columns(self.site)

    @property
    def groups(self) -> int:
        """The number of groups of blocks of keys; as many blocks of means there are."""
        return -(-self.columns // self.factor)

    @property
    def in_groups(self) -> Blocks:
        """The blocks of queries and groups of keys."""
        return Blocks(self.blocks.q, self.blocks.k * self.factor)

    @property
    def pooling(self) -> Pooling:
        """The means of its keys."""
        keys = self.site.shape[3]
        return Pooling(torch.arange(keys) // self.factor, -(-keys // self.factor), f"means of {self.factor} keys")

    def unfit(self, target: str) -> str:
        """Return why the site cannot have a pyramid, or an empty string."""
        site = self.site
        if site.causal:
            return "causal: a mean would look ahead"
        if site.masks_by_position:
            return "its mask differs from query to query, a mean would mix allowed and forbidden keys"
        if site.shape[3] % self.blocks.k:  # blocks of means follow whole blocks of keys
            return f"{site.shape[3]} keys are no whole blocks of {self.blocks.k}"
        few = site.shape[3] < 2 * self.factor * self.blocks.k
        return f"{site.shape[3]} keys are too few" if few else cannot_skip(site, target)

    def choices(self) -> dict[str, PyramidPattern]:
        """Return the patterns that a head may have, by name."""
        site, group = self.site, self.in_groups.k
        centre = (torch.arange(self.rows) * self.blocks.q + self.blocks.q // 2) * site.shape[3] // site.shape[2]
        away = (centre[:, None] // group - torch.arange(self.groups)).abs()
        nothing = torch.zeros(self.rows, self.groups, dtype=torch.bool)
        choices = {f"means of {self.factor} keys": PyramidPattern(nothing)}
        for groups in (groups for groups in NEAR_GROUPS if 2 * groups + 1 < self.groups):
            around = f"the {(2 * groups + 1) * group} keys around"
            choices[f"{around}, means of {self.factor} of the others"] = PyramidPattern(away <= groups)
            choices[around] = PyramidPattern(away <= groups, means=False)
        if self.columns % self.factor == 0:
            for keep in (n for n in SELECTED_GROUPS if n < self.groups):
                description = f"the {keep * group} most promising keys, means of {self.factor} of the others"
                choices[description] = PyramidPattern(nothing, keep=keep)
        return choices

    def grid(self, choice: PyramidPattern, scores: Tensor | None = None) -> Tensor:
        """Return the boolean [query blocks, key blocks + mean blocks] that one head sees, for scores [1, 1, query blocks, groups]."""
        near = choice.near
        if choice.keep and scores is not None:
            near = listed(scores, near[None, None], torch.tensor([choice.keep]), torch.tensor([UNREACHABLE_MASS]))[0, 0]
        return torch.cat([self.fine(near), ~near & choice.means], 1)

    def fine(self, near: Tensor) -> Tensor:
        """Return groups as their blocks of keys, boolean [query blocks, key blocks]."""
        return near.repeat_interleave(self.factor, 1)[:, : self.columns]


@register_pass
@dataclass(frozen=True)
class PyramidAttention(ApproximatePass):
    """Heads look at near keys, and at means of the others, within the budget."""

    name: ClassVar[str] = "pyramid-attention"
    target_ops: ClassVar[tuple] = (SDPA,)
    factor: int = 4  # keys of a mean
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
        pyramids = [p for p in all_sites if not reasons[p.site.node]]
        context.progress(f"{self.name}: {len(pyramids)} sites")
        errors, mass = measure(program, pyramids, context.calibration.search_samples[:MAX_SAMPLES])
        candidates = [c for p in pyramids for c in _of_site(p, errors[p.site.node], mass[p.site.node], context)]
        return candidates, refusals

    def pyramid(self, site: AttentionSite, target: str) -> Pyramid:
        """Return a site as this pass cuts it."""
        return Pyramid(site, blocks_of(site, target, self.block), self.factor)

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        work = program.clone()
        sites = {s.node.name: s for s in attention_sites(work)[0]}
        for name, blocks, patterns in patterns_by_site(chosen):
            replace(work, Pyramid(sites[name], blocks, self.factor), patterns)
        return work.clean()


def measure(
    program: Program, pyramids: Sequence[Pyramid], samples: Sequence[list[Any]]
) -> tuple[dict[fx.Node, HeadErrors], dict[fx.Node, Tensor]]:
    """Return the errors of every pattern and head, and the mean mass [H, query blocks, key blocks] of blocks of keys, by site."""
    errors = {p.site.node: HeadErrors(head_weights(program, p.site)) for p in pyramids}
    mass = {p.site.node: torch.zeros(p.site.shape[1], p.rows, p.columns) for p in pyramids}

    def collect(pyramid: Pyramid, values: dict[fx.Node, Any]) -> None:
        site, choices = pyramid.site, pyramid.choices()
        scores = scores_of_blocks(site, values, pyramid.in_groups)
        errors[site.node].add_output(values[site.node].float())

        def add(b: int, h: int, sample: Sample) -> None:
            head_scores = scores[b : b + 1, h : h + 1]
            errors[site.node].add(h, sample, {name: pyramid.grid(c, head_scores) for name, c in choices.items()})
            mass[site.node][h] += sample.mass[..., : pyramid.columns].mean(1) / (len(samples) * site.shape[0])

        each_head(site, values, pyramid.blocks, add, pyramid.pooling)

    watch(program, samples, {p.site.node: partial(collect, p) for p in pyramids})
    return errors, mass


def _of_site(pyramid: Pyramid, measured: HeadErrors, mass: Tensor, context: Context) -> list[Candidate]:
    """Return the candidates of all heads of a site."""
    site, machine, errors = pyramid.site, context.machine, measured.relative()
    heads, name = site.shape[1], site.node.name
    dense = site.flops() / heads / machine.flops
    moved = sum(8.0 * n.meta["val"].numel() for n in (site.k, site.v)) / machine.bandwidth / heads
    selecting = selection_cost(site, pyramid.in_groups, context)
    candidates = []
    for pattern, choice in pyramid.choices().items():
        for h in range(heads):
            seen = float(measured.listed[pattern][h]) / measured.outputs / (pyramid.rows * pyramid.columns)
            saved = dense * (1 - seen) - moved - (selecting if choice.keep else 0.0)
            fine = None if choice.keep else pyramid.fine(choice.near)
            description, error = f"head {h}: {pattern}", float(errors[pattern][h])
            where, payload = (name, site.module), (pyramid.blocks, choice)
            candidates.append(
                Candidate((name, h), site.module, description, error, saved, *where, payload, mass[h], fine)
            )
    return candidates


def replace(program: Program, pyramid: Pyramid, choices: dict[int, PyramidPattern]) -> None:
    """Write the site over its keys and their means; heads without a pattern look at all keys."""
    site, blocks, node = pyramid.site, pyramid.blocks, pyramid.site.node
    all_keys = PyramidPattern(torch.ones(pyramid.rows, pyramid.groups, dtype=torch.bool), means=False)
    call = inserter(program, node)
    k_means, v_means, bias = pooled_keys(program, site, pyramid.pooling)
    k, v = call(aten.cat.default, [site.k, k_means], 2), call(aten.cat.default, [site.v, v_means], 2)
    mask_shape = [*shape_of(bias)[:3], site.shape[3]]
    if site.mask is None:
        mask = constant(program, site, torch.zeros(mask_shape, dtype=dtype_of(site.k)), "unmasked")
    elif dtype_of(site.mask) is torch.bool:
        mask = call(aten.log.default, call(aten._to_copy.default, site.mask, dtype=dtype_of(site.k)))
    else:
        mask = site.mask
    mask = call(aten.cat.default, [call(aten.expand.default, mask, mask_shape), bias], 3)
    lists = _lists(program, pyramid, [choices.get(h, all_keys) for h in range(site.shape[1])])
    args = (site.q, k, v, mask, *lists, blocks.q, blocks.k, site.scale)
    node.replace_all_uses_with(call(ops.sparse_attention.default, *args))


def _lists(program: Program, pyramid: Pyramid, of_heads: Sequence[PyramidPattern]) -> list[fx.Node]:
    """Insert blocks and counts over the pyramid; if one head follows the input, those of all come from a selection of groups, in which what
    is near is forced."""
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
