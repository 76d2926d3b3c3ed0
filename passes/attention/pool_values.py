"""The mean of neighbouring values instead of an attention: some heads do little more.

    out_l = sum_{s near l} size_s v_s / sum_{s near l} size_s          size: 1, or what a mask of keys lets through

(Pooling as token mixer: PoolFormer, Yu et al., 2022; PoNet, Tan et al., 2022.) Queries and keys are not computed any more. Near are runs of
tokens, squares where the tokens can be those of a square image (those before it, as a class token, get the mean of everything), or all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from thresher.analysis.attention.sites import SDPA, AttentionSite, attention_sites
from thresher.analysis.cost.cost import seconds
from thresher.approximation.search import Candidate
from thresher.ir.nodes import shape_of
from thresher.ir.program import Program
from thresher.passes.attention._patterns import grid_of
from thresher.passes.attention._site_errors import Values, site_errors
from thresher.passes.tokens._importance import at_once
from thresher.passes.tokens._key_sizes import key_sizes, sizes_of_mask
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.registry import register_pass

aten = torch.ops.aten
SAMPLES = 8


@dataclass(frozen=True)
class Window:
    """``size`` tokens, or rows and columns of an image of ``side``; 0: all tokens. ``prefix`` tokens stand before the image."""

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
    windows: tuple[int, ...] = (0, 3, 5, 9)

    def __post_init__(self) -> None:
        super().__post_init__()
        odd = all(w == 0 or (w > 0 and w % 2) for w in self.windows)
        self.require(odd, "windows", "odd numbers of tokens, or 0 for all of them")

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        found, _ = attention_sites(program)
        refusals = [Note.at(s.node, f"no mean in its place: {reason}") for s in found if (reason := _unfit(s))]
        sites = [s for s in found if not _unfit(s)]

        def variants(site: AttentionSite, values: Values) -> dict[Hashable, Tensor]:
            batch, _, _, keys = site.shape
            size = None if site.mask is None else sizes_of_mask(values[site.mask], batch, keys)
            v = values[site.v].float()
            return {w: mean_of_values(at_once, site, v, size, w) for w in windows_of(site, self.windows)}

        context.progress(f"{self.name}: {len(sites)} sites")
        errors = site_errors(program, sites, variants, context.calibration.search_samples[:SAMPLES])
        before, made = seconds(program, context.machine), []
        for site in sites:
            where = (site.node.name, site.module)
            for window in windows_of(site, self.windows):
                trial = program.clone()
                edit(trial, site.node.name, window)
                saved = before - seconds(trial.clean(), context.machine)
                error = errors[site.node][window]
                made.append(Candidate(site.node.name, site.module, str(window), error, saved, *where, window))
        return made, refusals

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        work = program.clone()
        for candidate in chosen:
            edit(work, candidate.node, candidate.payload)
        return work.clean()


def _unfit(site: AttentionSite) -> str:
    if site.causal:
        return "causal: it would look ahead"
    if site.masks_by_position:
        return "a mask by places"
    return "grouped heads" if shape_of(site.k)[1] != site.shape[1] else ""


def windows_of(site: AttentionSite, sizes: Sequence[int]) -> list[Window]:
    """Those that a site can have: only the mean of everything where queries are other tokens than keys."""
    _, _, rows, keys = site.shape
    side, prefix = grid_of(keys) or (0, 0)
    near = [n for n in sizes if 0 < n < keys] if rows == keys else []
    found = [Window(n, side, prefix) for n in near if n < side]
    if not prefix:
        found += [Window(n) for n in near]
    return [*found, *([Window(0)] if 0 in sizes else [])]


def mean_of_values(call: Callable[..., Any], site: AttentionSite, v: Any, size: Any, window: Window) -> Any:
    """The site's output [B, H, L, F], by ``call(operator, *arguments)``, from its values and the sizes [B, S] of the keys or None."""
    (batch, heads, rows, keys), width = site.shape, shape_of(site.v)[3]
    if size is not None:
        size = call(aten.reshape.default, size, [batch, 1, keys, 1])
        v = call(aten.mul.Tensor, v, size)

    def over_all() -> Any:
        total = call(aten.sum.dim_IntList, v, [2], True)
        there = keys if size is None else call(aten.clamp.default, call(aten.sum.dim_IntList, size, [2], True), 1e-30)
        return call(aten.div.Tensor, total, there)

    if not window.size:
        return call(aten.expand.default, over_all(), [batch, heads, rows, width])
    mixed = _pooled(call, v, window, (batch, heads, keys, width))
    if size is not None:
        there = _pooled(call, size, window, (batch, 1, keys, 1))
        mixed = call(aten.div.Tensor, mixed, call(aten.clamp.default, there, 1e-30))
    if not window.prefix:
        return mixed
    first = call(aten.expand.default, over_all(), [batch, heads, window.prefix, width])
    return call(aten.cat.default, [first, mixed], 2)


def _pooled(call: Callable[..., Any], x: Any, window: Window, shape: tuple[int, int, int, int]) -> Any:
    """Means of [B, H, S, F] over windows of tokens, without those before the image."""
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
    """A mean in the place of the site ``name``."""
    site = next(s for s in attention_sites(program)[0] if s.node.name == name)

    def call(target: Any, *args: Any) -> Any:
        return program.insert_call(site.node, target, args, like=site.node)

    size = None if site.mask is None else key_sizes(program, site, site.node)
    site.node.replace_all_uses_with(mean_of_values(call, site, site.v, size, window))
