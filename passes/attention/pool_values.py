"""The mean of neighbouring values instead of an attention: some heads do little more.

    out_l = sum_{s near l} size_s v_s / sum_{s near l} size_s          size: 1, or what a mask of keys lets through

(Pooling as token mixer: PoolFormer, Yu et al., 2022; PoNet, Tan et al., 2022. Those models are trained with it and add other terms,
PoolFormer - x, PoNet a global and a segment term; here only the mean stands in for a trained attention.) Queries and keys are not computed
any more. Near are runs of tokens, squares where the tokens can be those of a square image (those before it, as a class token, get the mean
of everything), or all. Refused: causal attention, masks by position, and grouped heads.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from thresher.analysis.attention.sites import SDPA, AttentionSite, attention_sites
from thresher.approximation.search import Candidate
from thresher.ir.nodes import shape_of
from thresher.ir.program import Program
from thresher.passes.attention._patterns import grid_of
from thresher.passes.attention._site_errors import Values, site_errors
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.calls import Call, at_once, inserter
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.key_sizes import key_sizes, sizes_of_mask
from thresher.rewriting.registry import register_pass

aten = torch.ops.aten
MAX_SAMPLES = 8


@dataclass(frozen=True)
class Window:
    """A window of ``size`` tokens (0: all), or of rows and columns of an image of ``side`` after ``prefix`` other tokens."""

    size: int
    side: int = 0
    prefix: int = 0

    def __str__(self) -> str:
        near = f"{self.size} x {self.size}" if self.side else f"{self.size}"
        return f"the mean of {near if self.size else 'all'} values"


@register_pass
@dataclass(frozen=True)
class PoolValues(ApproximatePass):
    """Replace attentions by means of neighbouring values, within the budget."""

    name: ClassVar[str] = "pool-values"
    target_ops: ClassVar[tuple] = (SDPA,)
    windows: tuple[int, ...] = (0, 3, 5, 9)  # tokens, or rows and columns, that are tried; 0: all tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        odd = all(w == 0 or (w > 0 and w % 2) for w in self.windows)
        self.require(odd, "windows", "odd numbers of tokens, or 0 for all of them")

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        all_sites, _ = attention_sites(program)
        reasons = {s.node: _unfit(s) for s in all_sites}
        refusals = [Note.at(n, f"no mean in its place: {reason}") for n, reason in reasons.items() if reason]
        sites = [s for s in all_sites if not reasons[s.node]]

        def variants(site: AttentionSite, values: Values) -> dict[Hashable, Tensor]:
            batch, _, _, keys = site.shape
            size = None if site.mask is None else sizes_of_mask(values[site.mask], batch, keys)
            v = values[site.v].float()
            return {w: mean_of_values(at_once, site, v, size, w) for w in windows_of(site, self.windows)}

        context.progress(f"{self.name}: {len(sites)} sites")
        errors = site_errors(program, sites, variants, context.calibration.search_samples[:MAX_SAMPLES])
        candidates = [
            Candidate(s.node.name, s.module, str(w), errors[s.node][w], 0.0, s.node.name, s.module, w)
            for s in sites
            for w in windows_of(s, self.windows)
        ]
        return self.with_savings(program, candidates, context.machine), refusals

    def edit(self, program: Program, candidate: Candidate) -> None:
        edit(program, candidate.node, candidate.payload)


def _unfit(site: AttentionSite) -> str:
    if site.causal:
        return "causal: it would look ahead"
    if site.masks_by_position:
        return "its mask differs from query to query, a mean would mix allowed and forbidden values"
    return "groups of query heads share its values" if shape_of(site.k)[1] != site.shape[1] else ""


def windows_of(site: AttentionSite, sizes: Sequence[int]) -> list[Window]:
    """Return the windows that a site can have: only the mean of everything where queries are other tokens than keys."""
    _, _, rows, keys = site.shape
    side, prefix = grid_of(keys) or (0, 0)
    near = [n for n in sizes if 0 < n < keys] if rows == keys else []
    windows = [Window(n, side, prefix) for n in near if n < side]
    if not prefix:
        windows += [Window(n) for n in near]
    return [*windows, *([Window(0)] if 0 in sizes else [])]


def mean_of_values(call: Call, site: AttentionSite, v: Any, size: Any, window: Window) -> Any:
    """Return the output [B, H, L, F] of a site, computed by ``call``, from its values and the sizes [B, S] of its keys or None."""
    (batch, heads, rows, keys), width = site.shape, shape_of(site.v)[3]
    if size is not None:
        size = call(aten.reshape.default, size, [batch, 1, keys, 1])
        v = call(aten.mul.Tensor, v, size)

    def over_all() -> Any:
        total = call(aten.sum.dim_IntList, v, [2], True)
        total_size = (
            keys if size is None else call(aten.clamp.default, call(aten.sum.dim_IntList, size, [2], True), 1e-30)
        )
        return call(aten.div.Tensor, total, total_size)

    if not window.size:
        return call(aten.expand.default, over_all(), [batch, heads, rows, width])
    means = _pooled(call, v, window, (batch, heads, keys, width))
    if size is not None:
        total_size = _pooled(call, size, window, (batch, 1, keys, 1))
        means = call(aten.div.Tensor, means, call(aten.clamp.default, total_size, 1e-30))
    if not window.prefix:
        return means
    first = call(aten.expand.default, over_all(), [batch, heads, window.prefix, width])
    return call(aten.cat.default, [first, means], 2)


def _pooled(call: Call, x: Any, window: Window, shape: tuple[int, int, int, int]) -> Any:
    """Return the means of [B, H, S, F] over windows of tokens, without those before the image."""
    batch, heads, keys, width = shape
    if window.prefix:
        x = call(aten.slice.Tensor, x, 2, window.prefix, keys)
    tokens, half = keys - window.prefix, window.size // 2
    size, pad = ([window.size] * 2, [half] * 2) if window.side else ([1, window.size], [0, half])
    plane = [window.side, window.side] if window.side else [1, tokens]
    x = call(aten.reshape.default, call(aten.permute.default, x, [0, 1, 3, 2]), [batch, heads * width, *plane])
    x = call(aten.avg_pool2d.default, x, size, [1, 1], pad, False, False)
    return call(aten.permute.default, call(aten.reshape.default, x, [batch, heads, width, tokens]), [0, 1, 3, 2])


def edit(program: Program, name: str, window: Window) -> None:
    """Replace the site ``name`` by a mean."""
    site = next(s for s in attention_sites(program)[0] if s.node.name == name)

    size = None if site.mask is None else key_sizes(program, site, site.node)
    site.node.replace_all_uses_with(mean_of_values(inserter(program, site.node), site, site.v, size, window))
