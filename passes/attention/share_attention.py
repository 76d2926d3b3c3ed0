"""A layer takes over the attention weights of the layer before it: they are often alike.

    softmax(c q_{l+1} k_{l+1}^T) v_{l+1}  ~  softmax(c q_l k_l^T) v_{l+1}

(Shared Attention, Liao & Vargas, 2024; there with fine-tuning, here without.) The queries and keys of layer l + 1 are not computed. The
weights are: they are never stored, and from q_l and k_l they come at the price of an attention kernel, which the layer pays anyway.
Refused: neighbouring attentions of other shapes, masks or scales.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from thresher.analysis.attention.sites import SDPA, AttentionSite, attention_sites
from thresher.approximation.search import Candidate
from thresher.ir.nodes import shape_of
from thresher.ir.program import Program
from thresher.passes.attention._site_errors import Values, attend, site_errors
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.registry import register_pass

MAX_SAMPLES = 8


@register_pass
@dataclass(frozen=True)
class ShareAttention(ApproximatePass):
    """Take the queries and keys of the layer before, within the budget."""

    name: ClassVar[str] = "share-attention"
    target_ops: ClassVar[tuple] = (SDPA,)

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        sites, _ = attention_sites(program)
        before = {b.node: a for a, b in itertools.pairwise(sites) if _alike(a, b)}
        refusals = [
            Note.at(s.node, "the attention before it has other shapes, another mask or another scale")
            for s in sites[1:]
            if s.node not in before
        ]

        def variants(site: AttentionSite, values: Values) -> dict[Hashable, Tensor]:
            other = before.get(site.node)
            if other is None:
                return {}
            mask = None if site.mask is None else values[site.mask]
            return {"shared": attend(site, values[other.q], values[other.k], values[site.v], mask)}

        errors = site_errors(program, sites, variants, context.calibration.search_samples[:MAX_SAMPLES])
        candidates = []
        for site in (s for s in sites if s.node in before):
            name, error, other = site.node.name, errors[site.node]["shared"], before[site.node]
            choice = f"the attention weights of {other.module}"
            candidates.append(Candidate(name, site.module, choice, error, 0.0, name, site.module, other.node.name))
        return self.with_savings(program, candidates, context.machine), refusals

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        work = program.clone()
        nodes = {n.name: n for n in work.calls(SDPA)}
        shared = {c.node: c.payload for c in chosen}
        for node in nodes.values():  # in order: a chain of layers shares with its first
            if node.name in shared:
                node.args = (*nodes[shared[node.name]].args[:2], *node.args[2:])
        return work.clean()


def _alike(a: AttentionSite, b: AttentionSite) -> bool:
    def form(site: AttentionSite) -> tuple[tuple, tuple, fx.Node | None, float, bool]:
        return shape_of(site.q), shape_of(site.k), site.mask, site.scale, site.causal

    return form(a) == form(b)
