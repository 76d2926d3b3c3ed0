"""Each head looks at fewer blocks of keys: always the same ones, or those whose means promise the most.

    o_J = sum_{s in J} exp(c q k_s) v_s / sum_{s in J} exp(c q k_s)        J: the blocks that the head lists for a block of queries

Static patterns (``_patterns.py``) cost nothing at run time. Selected blocks (``thresher::select_blocks``) follow the input: a fixed number,
the highest by the scores of the blocks' means (MInference's block-sparse heads, Jiang et al., 2024), or those that promise a mass
(SpargeAttn's first stage, Zhang et al., 2025, here without the test of self-similarity and without INT8); where blocks are many, groups of
them are scored first. The pattern of a head is decided by what it does to the model's output on calibration samples; all heads of a layer
run in one kernel, each over its own list, and a head that loses too much keeps all of its keys. Refused: attentions of too few tokens for
blocks, and on GPUs other types than float16 and bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from thresher.analysis.attention.sites import SDPA, AttentionSite, attention_sites, head_weights
from thresher.approximation.calibration import watch
from thresher.approximation.search import Candidate
from thresher.ir.program import Program
from thresher.ops.select_blocks import in_best_groups, listed
from thresher.ops.sparse_attention import block_lists
from thresher.passes.attention._block_sizes import Blocks, blocks_of, cannot_skip
from thresher.passes.attention._head_errors import HeadErrors, Sample, each_head
from thresher.passes.attention._patterns import static_patterns
from thresher.passes.attention._selected_blocks import (
    BLOCKS_PER_GROUP,
    UNREACHABLE_MASS,
    constant,
    patterns_by_site,
    scores_of_blocks,
    select,
    selection_cost,
)
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.registry import register_pass

SELECTED_FRACTIONS = (0.125, 0.25, 0.375, 0.5, 0.75)  # of the key blocks
PROMISED_MASSES = (0.5, 0.7, 0.9, 0.97)  # of the weight that the means of blocks promise
MIN_BLOCKS_FOR_GROUPS = 64  # from which on groups of blocks are scored first
MAX_SAMPLES = 8


@dataclass(frozen=True)
class HeadPattern:
    """The blocks that one head looks at: those that it lists ``always``, and the most promising ones of the input.

    They are added until ``keep`` are listed or those listed promise ``mass`` of all (from 1 on: whatever they promise); only the ``groups``
    most promising groups count (0: all).
    """

    always: Tensor  # bool [query blocks, key blocks]
    keep: int = 0
    mass: float = UNREACHABLE_MASS
    groups: int = 0


@register_pass
@dataclass(frozen=True)
class SparseAttention(ApproximatePass):
    """Heads look at fewer blocks of keys, within the budget."""

    name: ClassVar[str] = "sparse-attention"
    target_ops: ClassVar[tuple] = (SDPA,)
    block: int = 0  # tokens of a block; 0: by the length
    static: bool = True  # try static patterns
    selected: bool = True  # try blocks that the input selects

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.block >= 0, "block", "a number of tokens, or 0 for one by the length")

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        all_sites, others = attention_sites(program)
        reasons = {s.node: cannot_skip(s, context.target) for s in all_sites}
        refusals = [Note.at(node, reason) for node, reason in others.items()]
        refusals += [Note.at(node, f"{reason}: stays dense") for node, reason in reasons.items() if reason]
        sites = [s for s in all_sites if not reasons[s.node]]
        blocks = {s.node: blocks_of(s, context.target, self.block) for s in sites}
        samples = context.calibration.search_samples[:MAX_SAMPLES]
        context.progress(f"{self.name}: attention mass of {len(sites)} sites")
        mass = _mass(program, sites, blocks, samples)
        choices = {s.node: self.choices(s, blocks[s.node], mass[s.node]) for s in sites}
        context.progress(f"{self.name}: errors of {sum(map(len, choices.values()))} patterns")
        errors = errors_of_heads(program, sites, blocks, choices, samples)
        candidates = []
        for s in sites:
            candidates += _of_site(s, blocks[s.node], choices[s.node], errors[s.node], mass[s.node], context)
        return candidates, refusals

    def choices(self, site: AttentionSite, blocks: Blocks, mass: Tensor) -> dict[str, list[HeadPattern]]:
        """Return for every name of a pattern the pattern of each head; ``mass`` is that of :func:`_mass`."""
        heads, rows, columns = mass.shape
        choices: dict[str, list[HeadPattern]] = {}
        if self.static:
            for name, grid in static_patterns(mass, *site.shape[2:], blocks.q, blocks.k).items():
                choices[name] = [HeadPattern(g) for g in grid.expand(heads, rows, columns)]
        if (
            self.selected and not site.masks_by_position
        ):  # else the means of blocks do not say what their keys may be looked at by
            none = torch.zeros(rows, columns, dtype=torch.bool)
            for keep in sorted({max(1, round(fraction * columns)) for fraction in SELECTED_FRACTIONS}):
                most_promising, groups = (
                    f"the {keep} most promising of {columns} blocks",
                    2 * -(-keep // BLOCKS_PER_GROUP),
                )
                if keep < columns:
                    choices[most_promising] = [HeadPattern(none, keep)] * heads
                if columns >= MIN_BLOCKS_FOR_GROUPS and groups * BLOCKS_PER_GROUP < columns:
                    in_groups = f"{most_promising}, in the {groups} most promising groups of {BLOCKS_PER_GROUP}"
                    choices[in_groups] = [HeadPattern(none, keep, groups=groups)] * heads
            for promise in PROMISED_MASSES:
                choices[f"blocks that promise {100 * promise:g} %"] = [HeadPattern(none, columns, promise)] * heads
        return choices

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        work = program.clone()
        sites = {s.node.name: s for s in attention_sites(work)[0]}
        for name, blocks, patterns in patterns_by_site(chosen):
            replace(work, sites[name], blocks, patterns)
        return work.clean()


def _of_site(
    site: AttentionSite,
    blocks: Blocks,
    choices: dict[str, list[HeadPattern]],
    measured: HeadErrors,
    mass: Tensor,
    context: Context,
) -> list[Candidate]:
    """Return the candidates of all heads of a site that save something."""
    errors, heads, name = measured.relative(), site.shape[1], site.node.name
    half = 0.5 if site.causal else 1.0
    possible = blocks.rows(site) * blocks.columns(site) * half
    dense = site.flops() / heads / context.machine.flops * half
    candidates = []
    for pattern, of_heads in choices.items():
        for h, choice in enumerate(of_heads):
            saved = dense * (1 - float(measured.listed[pattern][h]) / measured.outputs / possible)
            saved -= selection_cost(site, blocks, context, choice.groups) if choice.keep else 0.0
            if saved > 0:
                description, error = f"head {h}: {pattern}", float(errors[pattern][h])
                mask = None if choice.keep else choice.always
                where, payload = (name, site.module), (blocks, choice)
                candidates.append(
                    Candidate((name, h), site.module, description, error, saved, *where, payload, mass[h], mask)
                )
    return candidates


def replace(program: Program, site: AttentionSite, blocks: Blocks, choices: dict[int, HeadPattern]) -> None:
    """Write the site over the lists of its heads; heads without a pattern list everything."""
    rows, columns = blocks.rows(site), blocks.columns(site)
    everything = HeadPattern(torch.ones(rows, columns, dtype=torch.bool))
    of_heads = [choices.get(h, everything) for h in range(site.shape[1])]
    always = torch.stack([c.always for c in of_heads])[None]
    if any(c.keep for c in of_heads):
        keep, mass, groups = zip(*((c.keep, c.mass, c.groups) for c in of_heads))
        lists = select(program, site, blocks, always, keep, mass, groups)
    else:
        lists = [constant(program, site, t, name) for t, name in zip(block_lists(always), ("blocks", "counts"))]
    args = (site.q, site.k, site.v, site.mask, *lists, blocks.q, blocks.k, site.scale, site.causal)
    new = program.insert_call(site.node, torch.ops.thresher.sparse_attention.default, args, like=site.node)
    site.node.replace_all_uses_with(new)


def _mass(
    program: Program, sites: Sequence[AttentionSite], blocks: dict[fx.Node, Blocks], samples: Sequence[list[Any]]
) -> dict[fx.Node, Tensor]:
    """Return the mean attention mass of every block, [H, query blocks, key blocks]."""
    mass = {s.node: torch.zeros(s.shape[1], blocks[s.node].rows(s), blocks[s.node].columns(s)) for s in sites}

    def collect(site: AttentionSite, values: dict[fx.Node, Any]) -> None:
        def add(b: int, h: int, sample: Sample) -> None:
            mass[site.node][h] += sample.mass.mean(1) / (len(samples) * site.shape[0])

        each_head(site, values, blocks[site.node], add)

    watch(program, samples, {s.node: partial(collect, s) for s in sites})
    return mass


def errors_of_heads(
    program: Program, sites: Sequence[AttentionSite], blocks: dict[fx.Node, Blocks],
    choices: dict[fx.Node, dict[str, list[HeadPattern]]], samples: Sequence[list[Any]],
) -> dict[fx.Node, HeadErrors]:  # fmt: skip
    """Return the squared error of every pattern and head at its site, and the blocks that it lists."""
    errors = {s.node: HeadErrors(head_weights(program, s)) for s in sites}

    def collect(site: AttentionSite, values: dict[fx.Node, Any]) -> None:
        site_blocks, of_site = blocks[site.node], choices[site.node]
        errors[site.node].add_output(values[site.node].float())
        selecting = [c for of_heads in of_site.values() for c in of_heads if c.keep]
        scores = scores_of_blocks(site, values, site_blocks) if selecting else None
        group_scores = (
            scores_of_blocks(site, values, Blocks(site_blocks.q, site_blocks.k * BLOCKS_PER_GROUP))
            if any(c.groups for c in selecting)
            else None
        )

        def add(b: int, h: int, sample: Sample) -> None:
            grids = {name: _grid(of_heads[h], scores, group_scores, b, h) for name, of_heads in of_site.items()}
            errors[site.node].add(h, sample, grids)

        each_head(site, values, site_blocks, add)

    watch(program, samples, {s.node: partial(collect, s) for s in sites})
    return errors


def _grid(choice: HeadPattern, scores: Tensor | None, group_scores: Tensor | None, b: int, h: int) -> Tensor:
    if not choice.keep or scores is None:
        return choice.always
    own_scores = scores[b : b + 1, h : h + 1]
    if choice.groups and group_scores is not None:
        groups = torch.tensor([choice.groups])
        in_groups = in_best_groups(group_scores[b : b + 1, h : h + 1], groups, BLOCKS_PER_GROUP, own_scores.shape[-1])
        own_scores = own_scores.masked_fill(~(in_groups | choice.always), -torch.inf)
    keep, mass = torch.tensor([choice.keep]), torch.tensor([choice.mass])
    return listed(own_scores, choice.always[None, None], keep, mass)[0, 0]
