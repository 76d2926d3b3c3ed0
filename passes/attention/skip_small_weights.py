"""Blocks of keys whose weights turn out small are not multiplied with the values.

    exp(score - top) < exp(-skip) for all scores of a block  ->  the block adds nothing

The scores are computed, the exponentials and the product with the values are not: at best about half of an attention is saved. Which blocks
these are depends on the input, and what is lost is bounded: at most 2 n exp(-skip) max |v| (``thresher::sparse_attention``).
(SpargeAttn's second stage, Zhang et al., 2025; Adaptive Computation Pruning, Lin
et al., 2025.) Refused: too few tokens for blocks, and on GPUs other types than float16 and bfloat16.
"""

from __future__ import annotations

from collections.abc import Hashable
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
MAX_SAMPLES = 4
VALUES_FRACTION = 0.55  # of an attention's time: exponentials and the product with the values
TEST_FRACTION = 0.02  # of an attention's time: finding the largest score of every block


@register_pass
@dataclass(frozen=True)
class SkipSmallWeights(ApproximatePass):
    """Leave out blocks of small attention weights, within the budget."""

    name: ClassVar[str] = "skip-small-weights"
    target_ops: ClassVar[tuple] = (SDPA,)
    skips: tuple[float, ...] = (
        4.0,
        6.0,
        8.0,
        10.0,
        12.0,
    )  # weights under exp(-skip) are left out; those that are tried

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(all(s > 0 for s in self.skips), "skips", "positive numbers s, of weights under exp(-s)")

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        all_sites, _ = attention_sites(program)
        reasons = {s.node: cannot_skip(s, context.target) for s in all_sites}
        refusals = [Note.at(node, reason) for node, reason in reasons.items() if reason]
        sites = [s for s in all_sites if not reasons[s.node]]
        samples = context.calibration.search_samples[:MAX_SAMPLES]
        skipped: dict[fx.Node, dict[float, float]] = {s.node: dict.fromkeys(self.skips, 0.0) for s in sites}

        def variants(site: AttentionSite, values: Values) -> dict[Hashable, Tensor]:
            blocks = tiles_of(site, context.target)
            for skip, fraction in self.left_out(site, values, blocks).items():
                skipped[site.node][skip] += fraction / len(samples)
            return {skip: sparse_attention(*_arguments(site, blocks, skip, values)) for skip in self.skips}

        errors, candidates = site_errors(program, sites, variants, samples), []
        for site in sites:
            name, blocks = site.node.name, tiles_of(site, context.target)
            whole = site.flops() / context.machine.flops * (0.5 if site.causal else 1.0)
            for skip, fraction in skipped[site.node].items():
                choice = f"weights under exp(-{skip:g}) left out: {100 * fraction:.0f} % of the blocks"
                saved, error = whole * (VALUES_FRACTION * fraction - TEST_FRACTION), errors[site.node][skip]
                candidates.append(Candidate(name, site.module, choice, error, saved, name, site.module, (blocks, skip)))
        return candidates, refusals

    def left_out(self, site: AttentionSite, values: Values, blocks: Blocks) -> dict[float, float]:
        """Return the fraction of the blocks that each threshold leaves out; blocks that are masked altogether do not count."""
        q, k = (values[n].float() for n in (site.q, site.k))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        mask = None if site.mask is None else values[site.mask]
        scores = masked_scores(q, k, mask, site.scale, site.causal, None)
        masked = negligible(scores, blocks.q, blocks.k, 1e30)
        unmasked = max(1, int((~masked).sum()))
        return {
            skip: int((negligible(scores, blocks.q, blocks.k, skip) & ~masked).sum()) / unmasked for skip in self.skips
        }

    def edit(self, program: Program, candidate: Candidate) -> None:
        site = next(s for s in attention_sites(program)[0] if s.node.name == candidate.node)
        args = _arguments(site, *candidate.payload)
        site.node.replace_all_uses_with(program.insert_call(site.node, sparse_attention, args, like=site.node))


def _arguments(site: AttentionSite, blocks: Blocks, skip: float, values: Values | None = None) -> tuple:
    """Return the arguments of the operator, as nodes or as their values."""
    nodes = (site.q, site.k, site.v, site.mask)
    operands = nodes if values is None else tuple(None if n is None else values[n] for n in nodes)
    return (*operands, None, None, blocks.q, blocks.k, site.scale, site.causal, None, skip)
