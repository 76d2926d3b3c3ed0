"""Linear layers and 1 x 1 convolutions keep and multiply only what pruning left of their weights, where that is faster.

    linear(x, W)                   ->  thresher::pruned_linear(x, W, layout)
    conv2d_nhwc(x, W [N, K, 1, 1]) ->  the same, of every pixel (Elsen et al., Fast Sparse ConvNets, 2020); with a stride, of those it takes

The pruned structure is seen from the values: blocks, N:M, or scattered zeros. The layout of the weight
(``thresher.ops.pruned_linear``) is decided by what was measured for its shape and the density that is left in each; where dense is faster
it stays dense, and the report says so. Zero channels are not meant: ``fold-channels`` has taken them out. GPUs have no kernel for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.cost.break_even import CACHED_BYTES, PANEL_OUTPUTS, PRUNED_DENSITIES, RUN_INPUTS, Kind, Layer
from thresher.analysis.cost.cost import constant_bytes
from thresher.analysis.slices.transfer.base import argument
from thresher.ir.nodes import dtype_of, module_path, shape_of
from thresher.ir.program import Program
from thresher.passes.sparsity._linear_layers import layers_of_constants
from thresher.rewriting.contract import Context, Note, Pass, PassResult, SkippedZeros
from thresher.rewriting.registry import register_pass

aten, ops = torch.ops.aten, torch.ops.thresher
BLOCKS = ((32, 32), (16, 16), (32, 1), (1, 32), (16, 1), (1, 16), (8, 8), (4, 4))
GROUPS = (4, 8, 16)  # M of N:M
MIN_FRACTION = 0.98  # of the zeros, that lie in whole blocks or groups


@register_pass
@dataclass(frozen=True)
class SkipPrunedWeights(Pass):
    """Keep only what is not 0 of pruned weights, where that is faster."""

    name: ClassVar[str] = "skip-pruned-weights"
    target_ops: ClassVar[tuple] = (aten.linear.default, ops.conv2d_nhwc.default)

    def apply(self, program: Program, context: Context) -> PassResult:
        if context.target.startswith("cuda"):
            return PassResult(program, [], [Note("", "", "GPUs have no kernel for pruned weights: they stay dense")])
        work, cold = program.clone(), constant_bytes(program) > CACHED_BYTES
        notes, lines = [], []
        for node in pruned_layers(work):
            weight = work.constants[node.args[1].target].flatten(1)
            layouts = stored(weight, _rows(node))
            if not layouts:
                continue
            line, layout = best(node, weight, layouts, context, cold)
            lines.append(line)
            if line.chosen:
                node.replace_all_uses_with(_rewritten(work, node, layout))
                notes.append(Note.at(node, _sparse(line, pattern_of(weight), layout)))
        refusals = [Note("", line.module, _dense(line)) for line in lines if not line.chosen]
        return PassResult(work.clean() if notes else program, notes, refusals, zeros=lines)


def _sparse(line: SkippedZeros, pattern: str, layout: str) -> str:
    return (
        f"{100 * (1 - line.nonzero):.0f} % of the weight are 0 ({pattern}), kept by {layout}: "
        f"{line.sparse:.3f} ms instead of {line.dense:.3f} ms ({'measured' if line.measured else 'estimated'})"
    )


def _dense(line: SkippedZeros) -> str:
    return f"{100 * (1 - line.nonzero):.0f} % of the weight are 0: dense is faster, {line.dense:.3f} ms instead of {line.sparse:.3f} ms"


def pruned_layers(program: Program) -> list[fx.Node]:
    """Linear layers and 1 x 1 convolutions of constant, finite weights, with static shapes."""
    convolutions = [n for n in program.calls(ops.conv2d_nhwc.default) if _pointwise(program, n)]
    return [*layers_of_constants(program), *convolutions]


def _pointwise(program: Program, node: fx.Node) -> bool:
    x, weight, _, _, padding, _, groups = node.args
    constant = program.constants[weight.target]
    static = all(isinstance(d, int) for d in (*shape_of(node), *shape_of(x)))
    one = tuple(constant.shape[2:]) == (1, 1) and not any(padding) and groups == 1
    return static and one and dtype_of(node) is torch.float32 and bool(torch.isfinite(constant).all())


def _rewritten(program: Program, node: fx.Node, layout: str) -> fx.Node:
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    if node.target is ops.conv2d_nhwc.default:
        for dim, step in enumerate(node.args[3], 1):
            if step > 1:
                size = shape_of(x)[dim]
                x = program.insert_call(node, aten.slice.Tensor, (x, dim, 0, size, step), like=node)
        matrix = program.constants[weight.target].flatten(1)
        weight = program.add_constant(matrix, f"{weight.target}_matrix", dtype_of(weight), like=weight)
    return program.insert_call(node, ops.pruned_linear.default, (x, weight, bias, layout), like=node)


def _rows(node: fx.Node) -> int:
    return math.prod(int(d) for d in shape_of(node)[:-1])


def best(
    node: fx.Node, weight: Tensor, layouts: Mapping[Kind, float], context: Context, cold: bool
) -> tuple[SkippedZeros, str]:
    """Return the times of the fastest of ``layouts`` (with the fraction that each keeps) for a weight [N, K], and its name."""
    outputs, inputs = weight.shape
    options = []
    for layout, density in layouts.items():
        times = context.break_even(Layer(layout, _rows(node), inputs, outputs, cold))
        options.append((times.at(density), density, layout, times))
    seconds, density, layout, times = min(options, key=lambda t: t[0])
    nonzero, faster = float((weight != 0).double().mean()), times.worthwhile(density)
    line = SkippedZeros(
        module_path(node), f"weight ({pattern_of(weight)})", nonzero, 1 - density, 1e3 * times.dense, 1e3 * seconds,
        times.density, times.measured, faster,
    )  # fmt: skip
    return line, layout


def stored(weight: Tensor, rows: int) -> dict[Kind, float]:
    """Return the fraction of a weight that each layout keeps, where that is not nearly all."""
    kept: dict[Kind, float] = {"rows": _blocks(weight, 1, 1), "panels": _blocks(weight, PANEL_OUTPUTS, 1)}
    kept |= {"runs": _blocks(weight, 1, RUN_INPUTS)} if rows == 1 else {}
    return {layout: density for layout, density in kept.items() if density <= PRUNED_DENSITIES[-1]}


def _blocks(weight: Tensor, high: int, wide: int) -> float:
    """Return the fraction of the blocks of a weight that are not 0; the last ones may be smaller."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight != 0, (0, -k % wide, 0, -n % high))
    return float(padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).any(3).any(1).double().mean())


def pattern_of(weight: Tensor) -> str:
    """Describe the zeros of a weight: the largest blocks that hold nearly all of them, N:M along the inputs, or scattered."""
    zeros = float((weight == 0).double().mean())
    for high, wide in BLOCKS:
        if (
            weight.shape[0] % high == 0
            and weight.shape[1] % wide == 0
            and 1 - _blocks(weight, high, wide) >= MIN_FRACTION * zeros
        ):
            return f"blocks of {high} x {wide}"
    for group in GROUPS:
        if weight.shape[1] % group == 0:
            counts = (weight != 0).unflatten(1, (-1, group)).sum(2)
            largest = int(counts.max())
            if (
                largest <= group // 2 and float(counts.double().mean()) >= MIN_FRACTION * largest
            ):  # chance is not so regular
                return f"{largest}:{group}"
    return "scattered"
