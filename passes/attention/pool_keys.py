"""Attention to means of neighbouring keys and values, instead of all of them.

    attention(q, k, v) ~ attention(q, M k, M v, mask + log sizes)        M: means of runs (or squares) of tokens

(Spatial reduction: PVT, Wang et al., 2021, with a learned reduction; averages: LITv2's Lo-Fi heads, Pan et al., 2022; Funnel, Dai et al.,
2020. Here plain means at inference, in a model that was trained without them.) Tokens at the front that are no part of an image stay. Where
keys and values come from a linear layer of their own, the mean is taken before it, which is the same and saves that part of the layer, too.
Tokens that a mask of keys forbids do not enter the means. Refused: causal attention and masks by position, whose means would mix what is
allowed with what is not, and keys that are few already.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from thresher.analysis.attention.sites import SDPA, AttentionSite, attention_sites
from thresher.approximation.search import Candidate
from thresher.ir.program import Program
from thresher.passes.attention._pooling import Pooling, means_of_keys, pooled_keys, poolings
from thresher.passes.attention._site_errors import Values, attend, site_errors
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.registry import register_pass

MAX_SAMPLES = 8


@register_pass
@dataclass(frozen=True)
class PoolKeys(ApproximatePass):
    """Attend to means of neighbouring keys and values, within the budget."""

    name: ClassVar[str] = "pool-keys"
    target_ops: ClassVar[tuple] = (SDPA,)
    factors: tuple[int, ...] = (2, 4, 8)  # keys of a mean, that are tried

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(all(f > 1 for f in self.factors), "factors", "numbers of keys from 2 on")

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        all_sites, others = attention_sites(program)
        reasons = {s.node: _unfit(s) for s in all_sites}
        refusals = [Note.at(node, reason) for node, reason in others.items()]
        refusals += [Note.at(n, f"its keys are not averaged: {reason}") for n, reason in reasons.items() if reason]
        sites = [s for s in all_sites if not reasons[s.node]]
        partitions = {s.node: {p.description: p for p in poolings(s.shape[3], self.factors)} for s in sites}

        def variants(site: AttentionSite, values: Values) -> dict[Hashable, Tensor]:
            return {choice: _pooled(site, values, p) for choice, p in partitions[site.node].items()}

        context.progress(f"{self.name}: {len(sites)} sites")
        errors = site_errors(program, sites, variants, context.calibration.search_samples[:MAX_SAMPLES])
        candidates = [
            Candidate(s.node.name, s.module, choice, errors[s.node][choice], 0.0, s.node.name, s.module, pooling)
            for s in sites
            for choice, pooling in partitions[s.node].items()
        ]
        return self.with_savings(program, candidates, context.machine), refusals

    def edit(self, program: Program, candidate: Candidate) -> None:
        edit(program, candidate.node, candidate.payload)


def _unfit(site: AttentionSite) -> str:
    if site.causal:
        return "causal: a mean would look ahead"
    if site.masks_by_position:
        return "its mask differs from query to query, a mean would mix allowed and forbidden keys"
    return "" if poolings(site.shape[3], (2, 4)) else f"{site.shape[3]} keys are few already"


def _pooled(site: AttentionSite, values: Values, pooling: Pooling) -> Tensor:
    """Return the site's output [B, H, L, F] over means, on values."""
    k, v, bias = means_of_keys(site, values, pooling)
    return attend(site, values[site.q], k, v, bias)


def edit(program: Program, name: str, pooling: Pooling) -> None:
    """Let the site ``name`` attend to means of its keys and values."""
    site = next(s for s in attention_sites(program)[0] if s.node.name == name)
    k, v, bias = pooled_keys(program, site, pooling)
    site.node.args = (site.q, k, v)
    kept = {n: a for n, a in site.node.kwargs.items() if n not in ("attn_mask", "scale")}
    site.node.kwargs = {**kept, "attn_mask": bias, "scale": site.scale}
    program.refresh(site.node)
