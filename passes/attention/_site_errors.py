"""What a whole-site replacement does to the output of an attention, on samples."""

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
    """Dense attention on values, as the site does it."""
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
    """The squared relative error, behind the projection, of each variant of each site: ``variants(site, values)`` computes their outputs,
    [B, H, L, F], from the values of a run; those of all sites before it are among them."""
    errors: dict[fx.Node, dict[Hashable, float]] = {s.node: {} for s in sites}
    norms = dict.fromkeys(errors, 0.0)
    values: Values = {}

    def see(site: AttentionSite, weights: Tensor, found: Values) -> None:
        values.update(found)
        output = found[site.node]
        norms[site.node] += _norm(output, weights)
        for name, changed in variants(site, values).items():
            errors[site.node][name] = errors[site.node].get(name, 0.0) + _norm(changed - output, weights)

    watch(program, samples, {s.node: partial(see, s, head_weights(program, s)) for s in sites})
    return {node: {name: e / max(norms[node], 1e-30) for name, e in own.items()} for node, own in errors.items()}


def _norm(output: Tensor, weights: Tensor) -> float:
    return float(torch.einsum("bhlf,hfg,bhlg->", output.double(), weights, output.double()))
