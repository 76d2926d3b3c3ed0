"""Linear layers keep and multiply only what pruning left of their weights, where that is faster.

    linear(x, W)  ->  thresher::pruned_linear(x, W, layout)

What pruned structure there is, is seen from the values: blocks, N:M, or scattered zeros. How the weight is kept
(``thresher.ops.pruned_linear``) is decided by what was measured for its shape and the density that is left in each layout; else it stays
dense, and the report says so. Zero channels are not meant: ``fold-channels`` has taken them out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from thresher.analysis.cost import constant_bytes
from thresher.analysis.rows.base import argument
from thresher.crossover import CACHED, RUN, WIDE, Kind, Layer
from thresher.pass_manager import Context, Note, Pass, PassResult, register_pass
from thresher.passes.sparsity.densities import Site, sites_of
from thresher.passes.sparsity.skip_zeros import Skipped
from thresher.program import Program, module_path

aten, ops = torch.ops.aten, torch.ops.thresher
LEAST = 0.3  # of a weight that is 0
BLOCKS = ((32, 32), (16, 16), (32, 1), (1, 32), (16, 1), (1, 16), (8, 8), (4, 4))
GROUPS = (4, 8, 16)  # M of N:M
NEARLY = 0.98  # of the zeros, that lie in whole blocks


@register_pass
@dataclass(frozen=True)
class SkipPrunedWeights(Pass):
    """Keep only what is not 0 of pruned weights, where that is faster."""

    name: ClassVar[str] = "skip-pruned-weights"
    target_ops: ClassVar[tuple] = (aten.linear.default,)

    def apply(self, program: Program, context: Context) -> PassResult:
        if context.target.startswith("cuda"):
            return PassResult(program, [], [Note("", "", "GPUs have no kernel for pruned weights")])
        work, cold = program.clone(), constant_bytes(program) > CACHED
        notes, lines = [], []
        for site in (s for s in sites_of(work) if s.kind == "input"):
            weight = work.constants[site.linear.args[1].target]
            zeros = float((weight == 0).double().mean())
            if zeros < LEAST:
                continue
            line, layout = best(site, weight, context, cold)
            lines.append(line)
            if line.chosen:
                node = site.linear
                args = (node.args[0], node.args[1], argument(node, 2, "bias"), layout)
                node.replace_all_uses_with(work.insert_call(node, ops.pruned_linear.default, args, like=node))
                how = "measured" if line.measured else "estimated"
                notes.append(
                    Note.at(
                        node,
                        f"{100 * zeros:.0f} % of the weight are 0 ({pattern_of(weight)}), kept by {layout}: "
                        f"{line.sparse:.3f} ms instead of {line.dense:.3f} ms ({how})",
                    )
                )
        context.zeros += map(asdict, lines)
        refusals = [Note("", line.module, _dense(line)) for line in lines if not line.chosen]
        return PassResult(work.clean(), notes, refusals) if notes else PassResult(program, [], refusals)


def _dense(line: Skipped) -> str:
    return f"{100 * (1 - line.nonzero):.0f} % of the weight are 0: dense is faster, {line.dense:.3f} ms instead of {line.sparse:.3f} ms"


def best(site: Site, weight: Tensor, context: Context, cold: bool) -> tuple[Skipped, str]:
    """The fastest layout for a weight, and whether it is faster than dense."""
    outputs, inputs = weight.shape
    tried = []
    for layout, density in stored(weight, site.rows).items():
        times = context.crossover(Layer(layout, site.rows, inputs, outputs, cold))
        tried.append((times.at(density), density, layout, times))
    seconds, density, layout, times = min(tried, key=lambda t: t[0])
    nonzero, faster = float((weight != 0).double().mean()), times.worth(density)
    line = Skipped(
        module_path(site.linear), f"weight ({pattern_of(weight)})", nonzero, 1 - density, 1e3 * times.dense, 1e3 * seconds,
        times.density, times.measured, faster,
    )  # fmt: skip
    return line, layout


def stored(weight: Tensor, rows: int) -> dict[Kind, float]:
    """The part of a weight that each layout keeps."""
    found: dict[Kind, float] = {"rows": _blocks(weight, 1, 1), "panels": _blocks(weight, WIDE, 1)}
    return found | ({"runs": _blocks(weight, 1, RUN)} if rows == 1 else {})


def _blocks(weight: Tensor, high: int, wide: int) -> float:
    """The part of the blocks of a weight that are not 0; the last ones may be smaller."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight != 0, (0, -k % wide, 0, -n % high))
    return float(padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).any(3).any(1).double().mean())


def pattern_of(weight: Tensor) -> str:
    """In words, from the values: the largest blocks that hold nearly all of the zeros, N:M along the inputs, or scattered."""
    zeros = float((weight == 0).double().mean())
    for high, wide in BLOCKS:
        if (
            weight.shape[0] % high == 0
            and weight.shape[1] % wide == 0
            and 1 - _blocks(weight, high, wide) >= NEARLY * zeros
        ):
            return f"blocks of {high} x {wide}"
    for group in GROUPS:
        if weight.shape[1] % group == 0:
            counts = (weight != 0).unflatten(1, (-1, group)).sum(2)
            most = int(counts.max())
            if most <= group // 2 and float(counts.double().mean()) >= NEARLY * most:  # chance is not so regular
                return f"{most}:{group}"
    return "scattered"
