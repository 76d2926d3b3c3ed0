"""A layer takes over the attention weights of the layer before it: they are often alike.

    softmax(c q_{l+1} k_{l+1}^T) v_{l+1}  ~  softmax(c q_l k_l^T) v_{l+1}

(Shared Attention, Liao & Vargas, 2024.) The queries and keys of layer l + 1 are not computed. The weights are: they are never stored, and
from q_l and k_l they come at the price of an attention kernel, which the layer pays anyway.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from thresher.analysis.attention.sites import SDPA, AttentionSite, attention_sites
from thresher.analysis.cost.cost import seconds
from thresher.approximation.search import Candidate
from thresher.ir.nodes import shape_of
from thresher.ir.program import Program
from thresher.passes.attention._site_errors import Values, attend, site_errors
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.registry import register_pass

SAMPLES = 8


@register_pass
@dataclass(frozen=True)
class ShareAttention(ApproximatePass):
    """Take the queries and keys of the layer before, within the budget."""

    name: ClassVar[str] = "share-attention"
    target_ops: ClassVar[tuple] = (SDPA,)

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        found, _ = attention_sites(program)
        before = {b.node: a for a, b in itertools.pairwise(found) if _alike(a, b)}
        refusals = [
            Note.at(s.node, "the attention before it has another form") for s in found[1:] if s.node not in before
        ]

        def variants(site: AttentionSite, values: Values) -> dict[Hashable, Tensor]:
            other = before.get(site.node)
            if other is None:
                return {}
            mask = None if site.mask is None else values[site.mask]
            return {"shared": attend(site, values[other.q], values[other.k], values[site.v], mask)}

        errors = site_errors(program, found, variants, context.calibration.search_samples[:SAMPLES])
        base, made = seconds(program, context.machine), []
        for site in (s for s in found if s.node in before):
            other, where = before[site.node], (site.node.name, site.module)
            trial = self.build(program, [Candidate("", "", "", 0.0, 0.0, site.node.name, payload=other.node.name)])
            words, error = f"the attention weights of {other.module}", errors[site.node]["shared"]
            made.append(
                Candidate(
                    site.node.name,
                    site.module,
                    words,
                    error,
                    base - seconds(trial, context.machine),
                    *where,
                    other.node.name,
                )
            )
        return made, refusals

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
