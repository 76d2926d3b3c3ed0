"""Evaluation-mode batch norm is an affine map per channel; it moves into a neighbouring weight.

    BN(z) = s z + h,   s = gamma / sqrt(var + eps),   h = beta - s mean

Backward (into the producer, always exact): ``s (W x + b) + h = (s W) x + (s b + h)``.
Forward (into the consumer): ``W (s x + h) + b = (W s) x + (b + W h)``, exact where no padding can show: linear, unpadded
convolutions, or h = 0. Where neither side can take it, it stays as one multiplication and one addition.

A producer takes it if the norm alone reads its result, consumers if all of them can; both need constant weights, and a linear layer an
input [N, C]. Refused: a norm whose statistics or affine parameters are computed. Raises ``ProgramError`` for a norm without running
statistics. (Ioffe & Szegedy, ICML 2015; folded: Jacob et al., CVPR 2018.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from thresher.analysis.slices.operators import TABLE
from thresher.analysis.slices.transfer.base import argument
from thresher.analysis.slices.transfer.weighted import Convolution, Linear
from thresher.errors import ProgramError
from thresher.ir.lineage import ROUNDING, Restore, Values
from thresher.ir.nodes import dtype_of, getitem_users, shape_of
from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.registry import register_pass

aten = torch.ops.aten
NORM = aten._native_batch_norm_legit_no_training.default


@register_pass
@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold evaluation-mode batch norm into the convolution or linear before it, else after it, else into mul and add."""

    name: ClassVar[str] = "fold-batch-norm"
    keeps_copies: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("evaluate-constants",)
    target_ops: ClassVar[tuple] = (NORM,)

    def apply(self, program: Program, context: Context) -> PassResult:
        work, notes, refusals = program.clone(), [], []
        for node in list(work.calls(NORM)):
            if any(n is not None and work.constant(n) is None for n in node.args[1:5]):
                refusals.append(Note.at(node, "the statistics or the affine parameters are computed, not constant"))
                continue
            if len(constants := _parameters(work, node)) != len(set(constants)):
                refusals.append(Note.at(node, "one parameter stands in two places"))
                continue
            notes.append(Note.at(node, _fold(work, node)))
        return PassResult(work.clean().propagate(), notes, refusals) if notes else PassResult(program, [], refusals)


def _parameters(program: Program, node: fx.Node) -> list[fx.Node]:
    """Return the constants of a batch norm, and of the call that it may be folded into."""
    calls = (node, node.args[0]) if isinstance(node.args[0], fx.Node) else (node,)
    return [a for call in calls for a in call.args if program.constant(a) is not None]


def _fold(program: Program, node: fx.Node) -> str:
    source, result = node.args[0], getitem_users(node)[0]
    scale, shift = _affine(program, node)
    if _into_producer(program, node, source, scale, shift):
        result.replace_all_uses_with(source)
        return f"folded into {source}"
    if consumers := _into_consumers(program, result, scale, shift):
        result.replace_all_uses_with(source)
        return f"folded forward into {', '.join(consumers)}"
    shape = [-1] + [1] * (len(shape_of(source)) - 2)
    value: fx.Node = source
    names = []
    for op, vector, label in ((aten.mul.Tensor, scale, "scale"), (aten.add.Tensor, shift, "shift")):
        constant = program.add_constant(vector.reshape(shape), f"{node.name}_{label}", dtype_of(source), like=node)
        value = program.insert_call(node, op, (value, constant), like=node)
        names.append(str(constant.target))
    _remember_affine(program, node, *names)
    result.replace_all_uses_with(value)
    return "written as one multiplication and one addition"


def _affine(program: Program, node: fx.Node) -> tuple[Tensor, Tensor]:
    gamma, beta, mean, var = (None if n is None else program.constants[n.target].double() for n in node.args[1:5])
    if mean is None or var is None:
        raise ProgramError(f"batch norm {node.name} has no running statistics")
    scale = torch.rsqrt(var + node.args[6])
    scale = scale * gamma if gamma is not None else scale
    shift = -scale * mean
    return scale, shift + beta if beta is not None else shift


def _remember_affine(program: Program, node: fx.Node, scale: str, shift: str) -> None:
    """Record the way back: gamma = s sqrt(var + eps), beta = h + s mean."""
    if node.args[1] is None or node.args[2] is None:
        return
    gamma, beta, mean, var = (str(n.target) for n in node.args[1:5])
    m, deviation = program.constants[mean].double(), (program.constants[var].double() + node.args[6]).sqrt()

    def back(values: Values) -> Values:
        return {
            gamma: values[scale].reshape(-1) * deviation,
            beta: values[shift].reshape(-1) + values[scale].reshape(-1) * m,
        }

    program.lineage.append(Restore((scale, shift), back))


def _divided(value: Tensor, factor: Tensor, original: Tensor) -> Tensor:
    """Return ``value / factor``, and the original where the factor is 0 and nothing of it is left in ``value``."""
    return torch.where(factor != 0, value / torch.where(factor != 0, factor, 1.0), original.double())


def _into_producer(program: Program, norm: fx.Node, source: fx.Node, scale: Tensor, shift: Tensor) -> bool:
    kind = TABLE.get(source.target) if isinstance(source, fx.Node) else None
    if not isinstance(kind, (Convolution, Linear)) or len(source.users) > 1:
        return False
    if isinstance(kind, Linear) and len(shape_of(source)) != 2:
        return False  # batch norm's channel is dimension 1, linear's the last
    weight, bias = program.constant(source.args[1]), program.constant(argument(source, 2, "bias"))
    if weight is None or not _has_own_bias(program, source):
        return False
    if isinstance(kind, Convolution) and kind.transposed:
        groups = kind.groups(source)
        per_output = scale.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[0], -1)
        factor = per_output.reshape(*per_output.shape, *[1] * (weight.dim() - 2))
    else:
        factor = scale.reshape(-1, *[1] * (weight.dim() - 1))
    name, offset = str(source.args[1].target), argument(source, 2, "bias") if bias is not None else norm.args[2]
    mean = program.constants[norm.args[3].target].double()
    names = set_weights(
        program, source, weight.double() * factor, scale * bias.double() + shift if bias is not None else shift
    )

    def back(values: Values) -> Values:
        """W = W' / s; the new bias is the layer's own, b = (b' - h) / s, or else the norm's, beta = b' + s mean."""
        w, b = values[names[0]], values[names[1]]
        rest = _divided(b - shift, scale, bias) if bias is not None else b + scale * mean
        return {name: _divided(w, factor, weight), str(offset.target): rest}

    if offset is not None:
        program.lineage.append(Restore(names, back))
    return True


def _into_consumers(program: Program, result: fx.Node, scale: Tensor, shift: Tensor) -> list[str]:
    """Fold forward when *every* user can take it; returns their names."""
    users = list(result.users)
    if not users or not all(_takes(program, user, result, shift) for user in users):
        return []
    for user in users:
        weight = program.constants[user.args[1].target].double()
        bias = program.constant(argument(user, 2, "bias"))
        factor = scale.reshape(1, -1, *[1] * (weight.dim() - 2))
        names = [str(user.args[1].target), None if bias is None else str(argument(user, 2, "bias").target)]
        offset = _offset(weight, shift)
        new_names = set_weights(program, user, weight * factor, offset + bias.double() if bias is not None else offset)
        program.lineage.append(_forward_restore(new_names, names, factor, weight, shift))
    return [user.name for user in users]


def _offset(weight: Tensor, shift: Tensor) -> Tensor:
    """Return W h, summed over the taps."""
    return (weight.flatten(2).sum(2) if weight.dim() > 2 else weight) @ shift


def _forward_restore(
    new_names: tuple[str, ...], names: list[str | None], factor: Tensor, original: Tensor, shift: Tensor
) -> Restore:
    """Return the way back: W = W' / s, b = b' - W h; a layer without bias has no room for another b' than W h."""
    name, bias = names

    def back(values: Values) -> Values:
        weight = _divided(values[new_names[0]], factor, original)
        offset = _offset(weight, shift)
        if bias is not None:
            return {str(name): weight, bias: values[new_names[1]] - offset}
        apart = (values[new_names[1]] - offset).abs().max() / offset.abs().max().clamp_min(1e-30)
        if apart > ROUNDING and bool(apart.isfinite()):  # infinite where unfolding asks what is computed from what
            raise ProgramError(
                f"{name} was trained with a bias that it does not have: give the layer a bias before folding"
            )
        return {str(name): weight}

    return Restore(new_names, back)


def _takes(program: Program, user: fx.Node, value: fx.Node, shift: Tensor) -> bool:
    kind = TABLE.get(user.target) if user.op == "call_function" else None
    if not isinstance(kind, (Convolution, Linear)) or user.args[0] is not value:
        return False
    if isinstance(kind, Linear):
        fits = len(shape_of(value)) == 2
    else:
        padding = argument(user, 4, "padding", 0)
        unpadded = padding != "same" and (
            padding == "valid" or not any([padding] if isinstance(padding, int) else padding)
        )
        fits = not kind.transposed and kind.groups(user) == 1 and (unpadded or not bool(shift.any()))
    return fits and program.constant(user.args[1]) is not None and _has_own_bias(program, user)


def _has_own_bias(program: Program, call: fx.Node) -> bool:
    """Return whether the bias of a layer, if it has one, is a constant with a number for each channel."""
    bias = argument(call, 2, "bias")
    return bias is None or (program.constant(bias) is not None and shape_of(bias) == shape_of(call)[1:2])


def set_weights(program: Program, node: fx.Node, weight: Tensor, bias: Tensor) -> tuple[str, str]:
    """Give a linear or a convolution its own new weight and bias (float64; declared in the node's dtype); returns their names."""
    dtype = dtype_of(node)
    old: fx.Node = node.args[1]
    new_weight = program.add_constant(weight, str(old.target), dtype, like=node)
    stem = str(old.target).removesuffix("weight") if str(old.target).endswith("weight") else f"{node.name}_"
    new_bias = program.add_constant(bias, f"{stem}bias", dtype, like=node)
    rest = tuple(node.args[3:]) if len(node.args) > 3 else ()
    node.args = (node.args[0], new_weight, new_bias, *rest)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}
    return str(new_weight.target), str(new_bias.target)
