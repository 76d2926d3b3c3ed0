"""Each head looks at fewer blocks of keys: always the same ones, or those whose means promise the most.

Static patterns (``patterns.py``) cost nothing at run time. Selected blocks (``thresher::select_blocks``) follow the input: a fixed number,
the highest by the scores of the blocks' means; where blocks are many, groups of them are asked first. What a head gets is decided by what
it does to the model's output on calibration samples; all heads of a layer run in one kernel, each over its own list, and a head that
loses too much keeps all of its keys.
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
    EVERYTHING,
    GROUP,
    constant,
    scores_of_blocks,
    select,
    selection_cost,
)
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.registry import register_pass

FRACTIONS = (0.125, 0.25, 0.375, 0.5, 0.75)  # of the key blocks, that are selected
MANY = 64  # blocks, from which on groups of them are asked first
PROMISES = (0.5, 0.7, 0.9, 0.97)  # of the weight that the means of blocks promise
SAMPLES = 8  # that the heads' errors are measured on


@dataclass(frozen=True)
class HeadPattern:
    """What one head looks at: blocks that it always lists, and besides, as the input has it, the most promising until ``keep`` are listed
    or those listed promise ``mass`` of all (from 1 on: whatever they promise), of the ``groups`` most promising groups (0: of all)."""

    always: Tensor  # bool [query blocks, key blocks]
    keep: int = 0
    mass: float = EVERYTHING
    groups: int = 0


@register_pass
@dataclass(frozen=True)
class SparseAttention(ApproximatePass):
    """Heads look at fewer blocks of keys, within the budget."""

    name: ClassVar[str] = "sparse-attention"
    target_ops: ClassVar[tuple] = (SDPA,)
    block: int = 0  # tokens of a block; 0: by the length
    static: bool = True
    selected: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.block >= 0, "block", "a number of tokens, or 0 for one by the length")

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        found, others = attention_sites(program)
        refusals = [Note.at(node, reason) for node, reason in others.items()]
        refusals += [
            Note.at(s.node, f"{reason}: stays dense") for s in found if (reason := cannot_skip(s, context.target))
        ]
        sites = [s for s in found if not cannot_skip(s, context.target)]
        blocks = {s.node: blocks_of(s, context.target, self.block) for s in sites}
        samples = context.calibration.search_samples[:SAMPLES]
        context.progress(f"{self.name}: attention mass of {len(sites)} sites")
        mass = _mass(program, sites, blocks, samples)
        choices = {s.node: self.choices(s, blocks[s.node], mass[s.node]) for s in sites}
        context.progress(f"{self.name}: errors of {sum(map(len, choices.values()))} patterns")
        errors = errors_of_heads(program, sites, blocks, choices, samples)
        made = [
            c
            for s in sites
            for c in self.of_site(s, blocks[s.node], choices[s.node], errors[s.node], mass[s.node], context)
        ]
        return made, refusals

    def choices(self, site: AttentionSite, blocks: Blocks, mass: Tensor) -> dict[str, list[HeadPattern]]:
        """Per name a choice for every head."""
        heads, rows, columns = mass.shape
        found: dict[str, list[HeadPattern]] = {}
        if self.static:
            for name, grid in static_patterns(mass, *site.shape[2:], blocks.q, blocks.k).items():
                found[name] = [HeadPattern(g) for g in grid.expand(heads, rows, columns)]
        if self.selected and not site.masks_by_position:  # else the means of blocks cannot be told
            nothing = torch.zeros(rows, columns, dtype=torch.bool)
            for keep in sorted({max(1, round(f * columns)) for f in FRACTIONS}):
                words, groups = f"the {keep} most promising of {columns} blocks", 2 * -(-keep // GROUP)
                if keep < columns:
                    found[words] = [HeadPattern(nothing, keep)] * heads
                if columns >= MANY and groups * GROUP < columns:
                    in_groups = f"{words}, in the {groups} most promising groups of {GROUP}"
                    found[in_groups] = [HeadPattern(nothing, keep, groups=groups)] * heads
            for promise in PROMISES:
                found[f"blocks that promise {100 * promise:g} %"] = [HeadPattern(nothing, columns, promise)] * heads
        return found

    def of_site(
        self,
        site: AttentionSite,
        blocks: Blocks,
        choices: dict[str, list[HeadPattern]],
        measured: HeadErrors,
        mass: Tensor,
        context: Context,
    ) -> list[Candidate]:
        errors, heads = measured.relative(), site.shape[1]
        possible = blocks.rows(site) * blocks.columns(site) * (0.5 if site.causal else 1.0)
        dense = site.flops() / heads / context.machine.flops * (0.5 if site.causal else 1.0)
        found = []
        for name, of_heads in choices.items():
            for h, choice in enumerate(of_heads):
                counted = float(measured.listed[name][h]) / measured.outputs
                saved = dense * (1 - counted / possible)
                saved -= selection_cost(site, blocks, context, choice.groups) if choice.keep else 0.0
                if saved > 0:
                    key, words, error = (site.node.name, h), f"head {h}: {name}", float(errors[name][h])
                    how, mask = (blocks, choice), None if choice.keep else choice.always
                    found.append(
                        Candidate(
                            key, site.module, words, error, saved, site.node.name, site.module, how, mass[h], mask
                        )
                    )
        return found

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        work = program.clone()
        sites = {s.node.name: s for s in attention_sites(work)[0]}
        for name in dict.fromkeys(c.node for c in chosen):
            own = [c for c in chosen if c.node == name]
            of_heads = {c.key[1]: c.payload[1] for c in own}  # type: ignore[index]
            replace(work, sites[name], own[0].payload[0], of_heads)
        return work.clean()


def replace(program: Program, site: AttentionSite, blocks: Blocks, choices: dict[int, HeadPattern]) -> None:
    """The site over the lists of its heads; heads without a choice list everything."""
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
    """The mean share of every block, [H, query blocks, key blocks]."""
    found = {s.node: torch.zeros(s.shape[1], blocks[s.node].rows(s), blocks[s.node].columns(s)) for s in sites}

    def collect(site: AttentionSite, values: dict[fx.Node, Any]) -> None:
        def add(b: int, h: int, sample: Sample) -> None:
            found[site.node][h] += sample.shares.mean(1) / (len(samples) * site.shape[0])

        each_head(site, values, blocks[site.node], add)

    watch(program, samples, {s.node: partial(collect, s) for s in sites})
    return found


def errors_of_heads(
    program: Program, sites: Sequence[AttentionSite], blocks: dict[fx.Node, Blocks],
    choices: dict[fx.Node, dict[str, list[HeadPattern]]], samples: Sequence[list[Any]],
) -> dict[fx.Node, HeadErrors]:  # fmt: skip
    """The squared error of every choice and head at its site, and how many blocks it lists on average."""
    found = {s.node: HeadErrors(head_weights(program, s)) for s in sites}

    def collect(site: AttentionSite, values: dict[fx.Node, Any]) -> None:
        cut, own = blocks[site.node], choices[site.node]
        found[site.node].add_output(values[site.node].float())
        asked = [c for of_heads in own.values() for c in of_heads if c.keep]
        scores = scores_of_blocks(site, values, cut) if asked else None
        coarse = scores_of_blocks(site, values, Blocks(cut.q, cut.k * GROUP)) if any(c.groups for c in asked) else None

        def add(b: int, h: int, sample: Sample) -> None:
            grids = {name: _grid(of_heads[h], scores, coarse, b, h) for name, of_heads in own.items()}
            found[site.node].add(h, sample, grids)

        each_head(site, values, cut, add)

    watch(program, samples, {s.node: partial(collect, s) for s in sites})
    return found


def _grid(choice: HeadPattern, scores: Tensor | None, coarse: Tensor | None, b: int, h: int) -> Tensor:
    if not choice.keep or scores is None:
        return choice.always
    own = scores[b : b + 1, h : h + 1]
    if choice.groups and coarse is not None:
        groups = torch.tensor([choice.groups])
        good = in_best_groups(coarse[b : b + 1, h : h + 1], groups, GROUP, own.shape[-1])
        own = own.masked_fill(~(good | choice.always), -torch.inf)
    keep, mass = torch.tensor([choice.keep]), torch.tensor([choice.mass])
    return listed(own, choice.always[None, None], keep, mass)[0, 0]
