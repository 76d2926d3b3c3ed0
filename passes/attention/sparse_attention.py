"""Each head looks at fewer blocks of keys: always the same ones, or those whose means promise the most.

Static patterns (``patterns.py``) cost nothing at run time. Selected blocks (``thresher::select_blocks``) follow the input: a fixed number,
the highest by the scores of the blocks' means. What a head gets is decided by what it does to the model's output on calibration samples;
all heads of a layer run in one kernel, each over its own list, and a head that loses too much keeps all of its keys.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from thresher.analysis.attention_sites import SDPA, AttentionSite, attention_sites, head_weights
from thresher.calibration import watch
from thresher.ops.select_blocks import block_scores, listed
from thresher.ops.sparse_attention import block_lists
from thresher.pass_manager import Context, Note, register_pass
from thresher.passes.attention.head_errors import Blocks, HeadErrors, Sample, each_head
from thresher.passes.attention.patterns import static_patterns
from thresher.program import Program, dtype_of
from thresher.selection import BoundedPass, Candidate

SHORTEST = 64  # queries and keys from which on blocks can be left out
FRACTIONS = (0.125, 0.25, 0.375, 0.5, 0.75)  # of the key blocks, that are selected
PROMISES = (0.5, 0.7, 0.9, 0.97)  # of the weight that the means of blocks promise
SAMPLES = 8  # that the heads' errors are measured on


@dataclass(frozen=True)
class Choice:
    """What one head looks at: blocks that it always lists, and besides, as the input has it, the most promising until ``keep`` are listed
    or those listed promise ``mass`` of all (from 1 on: whatever they promise)."""

    always: Tensor  # bool [query blocks, key blocks]
    keep: int = 0
    mass: float = 2.0


@register_pass
@dataclass(frozen=True)
class SparseAttention(BoundedPass):
    """Heads look at fewer blocks of keys, within the budget."""

    name: ClassVar[str] = "sparse-attention"
    target_ops: ClassVar[tuple] = (SDPA,)
    block: int = 0  # tokens of a block; 0: by the length
    static: bool = True
    selected: bool = True

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        found, others = attention_sites(program)
        refusals = [Note.at(node, reason) for node, reason in others.items()]
        refusals += [Note.at(s.node, f"{reason}: stays dense") for s in found if (reason := _too_small(s))]
        sites = [s for s in found if not _too_small(s)]
        blocks = {s.node: self.blocks(s, context.target) for s in sites}
        samples = context.calibration.choosing[:SAMPLES]
        context.progress(f"{self.name}: attention mass of {len(sites)} sites")
        mass = _mass(program, sites, blocks, samples)
        selects = self.selected and not context.target.startswith("cuda")  # GPUs have no kernel for the selection yet
        choices = {s.node: self.choices(s, blocks[s.node], mass[s.node], selects) for s in sites}
        context.progress(f"{self.name}: errors of {sum(map(len, choices.values()))} patterns")
        errors = errors_of_heads(program, sites, blocks, choices, samples)
        made = [
            c
            for s in sites
            for c in self.of_site(s, blocks[s.node], choices[s.node], errors[s.node], mass[s.node], context)
        ]
        return made, refusals

    def blocks(self, site: AttentionSite, target: str) -> Blocks:
        """GPUs take 64 queries at a time."""
        size = self.block or (32 if min(site.shape[2:]) <= 1024 and not target.startswith("cuda") else 64)
        return Blocks(size, size)

    def choices(self, site: AttentionSite, blocks: Blocks, mass: Tensor, selects: bool) -> dict[str, list[Choice]]:
        """Per name a choice for every head."""
        heads, rows, columns = mass.shape
        found: dict[str, list[Choice]] = {}
        if self.static:
            for name, grid in static_patterns(mass, *site.shape[2:], blocks.q, blocks.k).items():
                found[name] = [Choice(g) for g in grid.expand(heads, rows, columns)]
        if selects and not site.masks_by_place:  # else the means of blocks cannot be told
            nothing = torch.zeros(rows, columns, dtype=torch.bool)
            for keep in sorted({max(1, round(f * columns)) for f in FRACTIONS}):
                if keep < columns:
                    found[f"the {keep} most promising of {columns} blocks"] = [Choice(nothing, keep)] * heads
            for promise in PROMISES:
                found[f"blocks that promise {100 * promise:g} %"] = [Choice(nothing, columns, promise)] * heads
        return found

    def of_site(
        self,
        site: AttentionSite,
        blocks: Blocks,
        choices: dict[str, list[Choice]],
        measured: HeadErrors,
        mass: Tensor,
        context: Context,
    ) -> list[Candidate]:
        errors, heads = measured.relative(), site.shape[1]
        possible = blocks.rows(site) * blocks.columns(site) * (0.5 if site.causal else 1.0)
        dense = site.flops() / heads / context.machine.flops * (0.5 if site.causal else 1.0)
        moved = sum(4.0 * n.meta["val"].numel() for n in (site.q, site.k)) / heads
        selecting = 2 * context.machine.launch / heads + moved / context.machine.bandwidth
        found = []
        for name, of_heads in choices.items():
            for h, choice in enumerate(of_heads):
                counted = float(measured.listed[name][h]) / measured.outputs
                saved = dense * (1 - counted / possible) - (selecting if choice.keep else 0.0)
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


def replace(program: Program, site: AttentionSite, blocks: Blocks, choices: dict[int, Choice]) -> None:
    """The site over the lists of its heads; heads without a choice list everything."""
    rows, columns = blocks.rows(site), blocks.columns(site)
    everything = Choice(torch.ones(rows, columns, dtype=torch.bool))
    of_heads = [choices.get(h, everything) for h in range(site.shape[1])]
    always = torch.stack([c.always for c in of_heads])[None]
    if any(c.keep for c in of_heads):
        lists = _selected(program, site, blocks, of_heads, always)
    else:
        lists = [_constant(program, site, t, name) for t, name in zip(block_lists(always), ("blocks", "counts"))]
    args = (site.q, site.k, site.v, site.mask, *lists, blocks.q, blocks.k, site.scale, site.causal)
    new = program.insert_call(site.node, torch.ops.thresher.sparse_attention.default, args, like=site.node)
    site.node.replace_all_uses_with(new)


def _selected(
    program: Program, site: AttentionSite, blocks: Blocks, of_heads: Sequence[Choice], always: Tensor
) -> list[fx.Node]:
    keep, mass = torch.tensor([c.keep for c in of_heads]), torch.tensor([c.mass for c in of_heads])
    most = max(int(always.sum(-1).max()), int(keep.max()))
    constants = [_constant(program, site, t, name) for t, name in ((always, "always"), (keep, "keep"), (mass, "mass"))]
    keys = _present(program, site)
    how = (blocks.q, blocks.k, site.scale, most, site.causal)
    call = program.insert_call(
        site.node, torch.ops.thresher.select_blocks.default, (site.q, site.k, keys, *constants, *how), like=site.node
    )
    return [program.insert_call(site.node, operator.getitem, (call, i), like=site.node) for i in range(2)]


def _present(program: Program, site: AttentionSite) -> fx.Node | None:
    """Boolean [B, 1, 1, S]: the keys that the mask of keys allows."""
    if site.mask is None or dtype_of(site.mask) is torch.bool:
        return site.mask
    return program.insert_call(site.node, torch.ops.aten.gt.Scalar, (site.mask, -1e4), like=site.node)


def _constant(program: Program, site: AttentionSite, value: Tensor, name: str) -> fx.Node:
    return program.add_constant(value.contiguous(), f"{site.node.name}_{name}", like=site.node, fixed=True)


def _too_small(site: AttentionSite) -> str:
    _, _, rows, keys = site.shape
    return f"{rows} queries and {keys} keys are too few" if min(rows, keys) < SHORTEST else ""


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
    choices: dict[fx.Node, dict[str, list[Choice]]], samples: Sequence[list[Any]],
) -> dict[fx.Node, HeadErrors]:  # fmt: skip
    """The squared error of every choice and head at its site, and how many blocks it lists on average."""
    found = {s.node: HeadErrors(head_weights(program, s)) for s in sites}

    def collect(site: AttentionSite, values: dict[fx.Node, Any]) -> None:
        cut, own = blocks[site.node], choices[site.node]
        found[site.node].add_output(values[site.node].float())
        keeps = {c.keep for of_heads in own.values() for c in of_heads if c.keep}
        scores = _scores(site, values, cut) if keeps else None

        def add(b: int, h: int, sample: Sample) -> None:
            grids = {name: _grid(of_heads[h], scores, b, h) for name, of_heads in own.items()}
            found[site.node].add(h, sample, grids)

        each_head(site, values, cut, add)

    watch(program, samples, {s.node: partial(collect, s) for s in sites})
    return found


def _scores(site: AttentionSite, values: dict[fx.Node, Any], blocks: Blocks) -> Tensor:
    keys = None if site.mask is None else values[site.mask]
    keys = keys if keys is None or keys.dtype is torch.bool else keys > -1e4
    return block_scores(
        values[site.q].float(), values[site.k].float(), keys, blocks.q, blocks.k, site.scale, site.causal
    )


def _grid(choice: Choice, scores: Tensor | None, b: int, h: int) -> Tensor:
    if not choice.keep or scores is None:
        return choice.always
    keep, mass = torch.tensor([choice.keep]), torch.tensor([choice.mass])
    return listed(scores[b : b + 1, h : h + 1], choice.always[None, None], keep, mass)[0, 0]
