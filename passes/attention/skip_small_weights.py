"""Blocks of keys whose weights turn out small are not multiplied with the values.

    exp(score - top) < exp(-skip) for all scores of a block  ->  the block adds nothing

The scores are computed, the exponentials and the product with the values are not: at best about half of an attention is saved. Which blocks
these are depends on the input, and what is lost is bounded: at most 2 n exp(-skip) max |v| (``thresher::sparse_attention``).
(SpargeAttn's second stage, Zhang et al., 2025; Adaptive Computation Pruning, Lin et al., 2025.)
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from thresher.analysis.attention.sites import SDPA, AttentionSite, attention_sites
from thresher.approximation.search import Candidate
from thresher.ir.program import Program
from thresher.ops.sparse_attention import masked_scores, negligible
from thresher.passes.attention._block_sizes import Blocks, cannot_skip, tiles_of
from thresher.passes.attention._site_errors import Values, site_errors
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.registry import register_pass

sparse_attention = torch.ops.thresher.sparse_attention.default
SAMPLES = 4
PRODUCT = 0.55  # of an attention: exponentials and the product with the values
ASKING = 0.02  # of an attention: looking for the largest score of every block


@register_pass
@dataclass(frozen=True)
class SkipSmallWeights(ApproximatePass):
    """Leave out blocks of small attention weights, within the budget."""

    name: ClassVar[str] = "skip-small-weights"
    target_ops: ClassVar[tuple] = (SDPA,)
    skips: tuple[float, ...] = (4.0, 6.0, 8.0, 10.0, 12.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(all(s > 0 for s in self.skips), "skips", "positive numbers s, of weights under exp(-s)")

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        found, _ = attention_sites(program)
        refusals = [Note.at(s.node, reason) for s in found if (reason := cannot_skip(s, context.target))]
        sites = [s for s in found if not cannot_skip(s, context.target)]
        samples = context.calibration.search_samples[:SAMPLES]
        left_out: dict[fx.Node, dict[float, float]] = {s.node: dict.fromkeys(self.skips, 0.0) for s in sites}

        def variants(site: AttentionSite, values: Values) -> dict[Hashable, Tensor]:
            blocks = tiles_of(site, context.target)
            for skip, part in self.left_out(site, values, blocks).items():
                left_out[site.node][skip] += part / len(samples)
            return {skip: sparse_attention(*_arguments(site, blocks, skip, values)) for skip in self.skips}

        errors, made = site_errors(program, sites, variants, samples), []
        for site in sites:
            whole = site.flops() / context.machine.flops * (0.5 if site.causal else 1.0)
            for skip, part in left_out[site.node].items():
                words = f"weights under exp(-{skip:g}) left out: {100 * part:.0f} % of the blocks"
                saved, error = whole * (PRODUCT * part - ASKING), errors[site.node][skip]
                where = site.node.name, site.module
                how = tiles_of(site, context.target), skip
                made.append(Candidate(site.node.name, site.module, words, error, saved, *where, how))
        return made, refusals

    def left_out(self, site: AttentionSite, values: Values, blocks: Blocks) -> dict[float, float]:
        """The part of the blocks that every threshold leaves out, those that are masked altogether not counted."""
        q, k = (values[n].float() for n in (site.q, site.k))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        mask = None if site.mask is None else values[site.mask]
        scores = masked_scores(q, k, mask, site.scale, site.causal, None)
        masked = negligible(scores, blocks.q, blocks.k, 1e30)
        possible = max(1, int((~masked).sum()))
        return {t: int((negligible(scores, blocks.q, blocks.k, t) & ~masked).sum()) / possible for t in self.skips}

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        work = program.clone()
        sites = {s.node.name: s for s in attention_sites(work)[0]}
        for c in chosen:
            site = sites[c.node]
            new = work.insert_call(site.node, sparse_attention, _arguments(site, *c.payload), like=site.node)
            site.node.replace_all_uses_with(new)
        return work.clean()


def _arguments(site: AttentionSite, blocks: Blocks, skip: float, values: Values | None = None) -> tuple:
    """Of the operator, as nodes or by their values."""
    nodes = (site.q, site.k, site.v, site.mask)
    given = nodes if values is None else tuple(None if n is None else values[n] for n in nodes)
    return (*given, None, None, blocks.q, blocks.k, site.scale, site.causal, None, skip)
