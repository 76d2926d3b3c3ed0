"""Linear layers skip the zeros that they meet, where that is faster.

    linear(x)            -> thresher::sparse_linear(x)                 zeros of x: after relu, thresholds, top-k
    gate * linear(x)     -> thresher::gated_linear(x, gate)            zeros of the gate

The function stays what it is. The number of zeros is measured on calibration samples, or on the example where there are none; what
it saves is measured, too (``thresher.analysis.cost.break_even``). The kernels look at the zeros of every call; a density
that turns out larger costs little. Only constant, finite weights (0 times infinity is no 0) and static shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.cost.break_even import CACHED_BYTES, MAX_MEMORY_BOUND_ROWS, BreakEven, Layer
from thresher.analysis.cost.cost import constant_bytes
from thresher.analysis.slices.transfer.base import argument
from thresher.ir.nodes import module_path, shape_of
from thresher.ir.program import Program
from thresher.passes.sparsity._densities import Density, Site, densities, sites_of
from thresher.rewriting.contract import Context, Note, Pass, PassResult, SkippedZeros
from thresher.rewriting.registry import register_pass

aten, ops = torch.ops.aten, torch.ops.thresher
MAX_NONZERO = 0.95  # a value with fewer zeros is not looked at
MAX_SAMPLES = 8
GPU_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@register_pass
@dataclass(frozen=True)
class SkipZeros(Pass):
    """Skip the zeros that linear layers meet, where that is faster."""

    name: ClassVar[str] = "skip-zeros"
    target_ops: ClassVar[tuple] = (aten.linear.default,)

    def apply(self, program: Program, context: Context) -> PassResult:
        work = program.clone()
        sites = sites_of(work)
        if context.target.startswith("cuda"):  # there are kernels for a few rows, whose input is 0
            sites = [s for s in sites_of(work, GPU_TYPES) if s.kind == "input" and s.rows <= MAX_MEMORY_BOUND_ROWS]
        calibration = context.calibration
        samples = [list(work.probe)] if calibration is None else calibration.search_samples[:MAX_SAMPLES]
        with_zeros = (
            {s: d for s, d in densities(work, sites, samples).items() if d.nonzero < MAX_NONZERO} if sites else {}
        )
        cold = constant_bytes(work) > CACHED_BYTES
        timed = [TimedSite(s, d, context.break_even(_layer(s, cold))) for s, d in with_zeros.items()]
        notes, lines, rewritten = [], [], set()
        for candidate in sorted(timed, key=lambda j: -j.gain):  # of a layer that meets zeros twice those that save more
            chosen = candidate.times.worthwhile(candidate.density.listed) and candidate.site.linear not in rewritten
            lines.append(candidate.line(chosen))
            if chosen:
                rewritten.add(candidate.site.linear)
                notes.append(Note.at(candidate.site.linear, candidate.describe()))
                _rewrite(work, candidate.site)
        return PassResult(work.clean() if notes else program, notes, zeros=lines)


@dataclass(frozen=True)
class TimedSite:
    """A site, its zeros, and the time that it takes with and without them."""

    site: Site
    density: Density
    times: BreakEven

    @property
    def sparse(self) -> float:
        """The seconds that the layer takes when it skips its zeros."""
        return self.times.at(self.density.listed)

    @property
    def gain(self) -> float:
        """The seconds that skipping saves."""
        return self.times.dense - self.sparse

    def line(self, chosen: bool) -> SkippedZeros:
        """Return the line of the report."""
        d, t = self.density, self.times
        milliseconds = 1e3 * t.dense, 1e3 * self.sparse
        where = module_path(self.site.linear)
        return SkippedZeros(
            where, self.site.kind, d.nonzero, 1 - d.listed, *milliseconds, t.density, t.measured, chosen
        )

    def describe(self) -> str:
        """Return the sentence of the note."""
        zeros_of = "its input" if self.site.gate is None else "what its output is multiplied with"
        how = "measured" if self.times.measured else "estimated"
        d, t = self.density, self.times
        return (
            f"zeros of {zeros_of} are skipped: {100 * d.nonzero:.1f} % are not 0, {100 * (1 - d.listed):.0f} % of the "
            f"arithmetic is left out, {1e3 * self.sparse:.3f} ms instead of {1e3 * t.dense:.3f} ms ({how})"
        )


def _layer(site: Site, cold: bool) -> Layer:
    outputs, inputs = (int(d) for d in shape_of(site.linear.args[1]))
    return Layer(site.kind, site.rows, inputs, outputs, cold)


def _rewrite(program: Program, site: Site) -> None:
    node = site.linear
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")

    def insert(before: fx.Node, target: Any, *args: Any) -> fx.Node:
        return program.insert_call(before, target, args, like=node)

    if site.product is None:
        node.replace_all_uses_with(insert(node, ops.sparse_linear.default, x, weight, bias))
    else:
        product = site.product
        product.replace_all_uses_with(insert(product, ops.gated_linear.default, x, weight, bias, site.gate))
