"""A constant factor after a layer moves into it: c (W x + b) = (c W) x + c b.

One factor, or one per channel of the layer's output (LayerScale: Touvron et al., 2021); so a scale before a threshold costs nothing, and
the threshold comes next to the product that it becomes part of. A positive factor after a threshold moves before it, where a layer can
take it:

    c shrink(x, t) = shrink(c x, c t)          c > 0

The factor and the weights must be constants, and nothing else may read the layer's result. Left as they are: factors of another shape,
transposed convolutions, factors whose result has another dtype than the layer, and those after a firm threshold or one with a computed t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.slices.operators import TABLE
from thresher.analysis.slices.transfer.base import argument
from thresher.analysis.slices.transfer.weighted import Convolution, Linear
from thresher.ir.lineage import Restore, Values
from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.ir.program import Program, Role
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.registry import register_pass

aten = torch.ops.aten
SHRINK = torch.ops.thresher.shrink.default


@register_pass
@dataclass(frozen=True)
class FoldScale(Pass):
    """Fold constant factors into the convolution or linear layer before them, through a threshold where one stands between."""

    name: ClassVar[str] = "fold-scale"
    keeps_copies: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("simplify",)
    target_ops: ClassVar[tuple] = (aten.mul.Tensor, aten.div.Tensor)

    def apply(self, program: Program, context: Context) -> PassResult:
        work, notes = program.clone(), []
        for node in list(work.calls(aten.mul.Tensor, aten.div.Tensor)):
            value, factor = _scaled(work, node)
            if value is None or factor is None or len(value.users) > 1:
                continue
            layer = value if value.target is not SHRINK else value.args[0]
            scale = _per_channel(layer, factor) if is_tensor(layer) else None
            if scale is None or not _takes(work, layer) or dtype_of(layer) != dtype_of(node):
                continue
            if layer is not value and not _through(work, node, value, factor):
                continue
            _into(work, layer, scale)
            if layer is value:
                node.replace_all_uses_with(value)
            notes.append(Note.at(node, f"its factor folded into {layer}"))
        return PassResult(work.clean().propagate(), notes) if notes else PassResult(program)


def _scaled(program: Program, node: fx.Node) -> tuple[fx.Node | None, Tensor | None]:
    """Return the value and the constant that it is multiplied with, float64."""
    a, b = node.args[:2]
    if node.target is aten.div.Tensor:
        divisor = _number(program, b)
        return (a, 1 / divisor) if divisor is not None and bool((divisor != 0).all()) and is_tensor(a) else (None, None)
    value, other = (a, b) if is_tensor(a) and program.constant(a) is None else (b, a)
    return (value, _number(program, other)) if is_tensor(value) else (None, None)


def _number(program: Program, value: Any) -> Tensor | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    constant = program.constant(value) if is_tensor(value) else None
    return constant.double() if constant is not None and constant.is_floating_point() else None


def _per_channel(layer: fx.Node, factor: Tensor) -> Tensor | None:
    """Return the factor [channels], if it is one number for each output channel of the layer, else None."""
    kind = TABLE.get(layer.target)
    if not isinstance(kind, (Convolution, Linear)):
        return None
    shape = shape_of(layer)
    channel = len(shape) - 1 if isinstance(kind, Linear) else 1
    channels = shape[channel]
    sizes = [1] * (len(shape) - factor.dim()) + list(factor.shape)
    if len(sizes) != len(shape) or any(size != 1 for d, size in enumerate(sizes) if d != channel):
        return None
    return factor.reshape(-1).expand(channels).clone() if sizes[channel] in (1, channels) else None


def _takes(program: Program, layer: fx.Node) -> bool:
    """Return whether the weight is its own and constant, and nothing else reads the result."""
    kind, bias = TABLE[layer.target], argument(layer, 2, "bias")
    known = program.constant(layer.args[1]) is not None and (bias is None or program.constant(bias) is not None)
    transposed = isinstance(kind, Convolution) and kind.transposed
    return known and not transposed and len(layer.users) == 1 and dtype_of(layer).is_floating_point


def _into(program: Program, layer: fx.Node, scale: Tensor) -> None:
    """Multiply the weight and the bias; the way back divides."""
    weight, bias = layer.args[1], argument(layer, 2, "bias")
    old = program.constants[weight.target]
    factor = scale.reshape(-1, *[1] * (old.dim() - 1))
    names, values, factors = [str(weight.target)], [old], [factor]
    if bias is not None:
        names, values, factors = (
            [*names, str(bias.target)],
            [*values, program.constants[bias.target]],
            [*factors, scale],
        )
    constants = [
        program.add_constant(v.double() * f, name, dtype_of(layer), like=layer)
        for v, f, name in zip(values, factors, names)
    ]

    def back(trained: Values) -> Values:
        return {
            name: torch.where(f != 0, trained[str(new.target)] / torch.where(f != 0, f, 1.0), v.double())
            for name, new, f, v in zip(names, constants, factors, values)
        }

    program.lineage.append(Restore(tuple(str(n.target) for n in constants), back))
    layer.args = (layer.args[0], *constants, *layer.args[1 + len(constants) :])
    layer.kwargs = {k: v for k, v in layer.kwargs.items() if k != "bias"}


def _through(program: Program, node: fx.Node, threshold: fx.Node, factor: Tensor) -> bool:
    """Let the threshold take a factor that follows it; returns whether it can."""
    x, t, kind, *rest = threshold.args
    limit = program.constant(t)
    if limit is None or kind == "firm" or not bool((factor > 0).all()):
        return False
    new = program.add_constant(
        limit.double() * factor, str(t.target), dtype_of(threshold), like=threshold, role=Role.BUFFER
    )
    threshold_after = program.insert_call(node, SHRINK, (x, new, kind, *rest), like=threshold)
    node.replace_all_uses_with(threshold_after)
    return True
