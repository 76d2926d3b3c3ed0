"""The errors that replacements of whole attentions make at their outputs, on samples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from thresher.analysis.attention.sites import AttentionSite, head_weights
from thresher.approximation.calibration import watch
from thresher.ir.program import Program

Values = dict[fx.Node, Any]


def attend(site: AttentionSite, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return the output [B, H, L, F] of dense attention on values, as the site computes it."""
    grouped = q.shape[1] != k.shape[1]
    causal = site.causal and mask is None
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, 0.0, causal, scale=site.scale, enable_gqa=grouped
    )


def site_errors(
    program: Program,
    sites: Sequence[AttentionSite],
    variants: Callable[[AttentionSite, Values], Mapping[Hashable, Tensor]],
    samples: Sequence[list[Any]],
) -> dict[fx.Node, dict[Hashable, float]]:
    """Return the squared relative error, after the projection, of each variant of each site.

    ``variants(site, values)`` computes their outputs [B, H, L, F] from the values of a run, which are those of the site and of all
    before it.
    """
    errors: dict[fx.Node, dict[Hashable, float]] = {s.node: {} for s in sites}
    norms = dict.fromkeys(errors, 0.0)
    values: Values = {}

    def see(site: AttentionSite, weights: Tensor, new_values: Values) -> None:
        values.update(new_values)
        output = new_values[site.node]
        norms[site.node] += _norm(output, weights)
        for name, replaced in variants(site, values).items():
            errors[site.node][name] = errors[site.node].get(name, 0.0) + _norm(replaced - output, weights)

    watch(program, samples, {s.node: partial(see, s, head_weights(program, s)) for s in sites})
    return {
        node: {name: e / max(norms[node], 1e-30) for name, e in of_site.items()} for node, of_site in errors.items()
    }


def _norm(output: Tensor, weights: Tensor) -> float:
    return float(torch.einsum("bhlf,hfg,bhlg->", output.double(), weights, output.double()))
