"""Small activations become 0, and what they would have been multiplied with is not read.

A value x that linear layers read, or the gate g of g * (x W^T), is thresholded (``thresher::shrink``, hard) at

    number    t, one for all channels: a quantile of |x| on calibration samples   (CATS for gates, Lee et al., 2024; TEAL, Liu et al., 2024)
    channel   t_j = tau / w_j, where w_j is what channel j is multiplied with: the norm of a column of the weight, or the mean |x W^T|_j
              of a gated layer                                                           (CHESS, He et al., 2024; WINA, Chen et al., 2025)
    top-k     the k-th largest |x| of each row, computed at run time                     (k-winners: Ahmad & Scheinkman, 2019)

How many stay at each place is found under the budget, or everywhere alike with ``density``. ``skip-zeros`` makes the saving real.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.cost.break_even import CACHED_BYTES
from thresher.analysis.cost.cost import constant_bytes
from thresher.approximation.calibration import watch
from thresher.approximation.search import Candidate
from thresher.ir.nodes import dtype_of
from thresher.ir.program import Program
from thresher.passes.sparsity._densities import listed
from thresher.passes.sparsity._targets import Target, targets_of
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.options import names_in
from thresher.rewriting.registry import register_pass

aten, ops = torch.ops.aten, torch.ops.thresher
DENSITIES = (0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # what stays
KINDS = ("number", "channel", "top-k")
VALUES = ("gate", "input")
SAMPLES = 16
ELEMENTS = 1 << 20  # of a value, that quantiles are made of


@dataclass(frozen=True, eq=False)
class ThresholdRule:
    """A threshold, a number or one per channel; or how many stay."""

    kind: str
    density: float
    t: Tensor | None = None
    count: int = 0

    def __str__(self) -> str:
        stays = f"{100 * self.density:g} % stay"
        return {
            "number": stays,
            "channel": f"{stays}, a threshold per channel",
            "top-k": f"the {self.count} largest stay",
        }[self.kind]

    def of(self, x: Tensor) -> Tensor:
        """What is left of x."""
        if self.t is not None:
            return ops.shrink(x, self.t.to(x.dtype), "hard", "nle")
        return ops.shrink(x, ops.kth_largest(x.abs(), self.count), "hard", "nlt")


@register_pass
@dataclass(frozen=True)
class ThresholdActivations(ApproximatePass):
    """Let small activations be 0, within the budget."""

    name: ClassVar[str] = "threshold-activations"
    target_ops: ClassVar[tuple] = (aten.linear.default,)
    kinds: str = "number,channel"  # of thresholds, that are tried; joined by commas or plus signs
    where: str = "gate,input"  # which values get one
    density: float = 0.0  # the only one that is tried; 0: what the budget allows

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_names("kinds", KINDS)
        self.require_names("where", VALUES)
        self.require(0 <= self.density <= 1, "density", "a fraction of the elements, or 0 for what the budget allows")

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        kinds, places = names_in(self.kinds), names_in(self.where)
        targets = [t for t in targets_of(program) if t.kind in places]
        samples = context.calibration.search_samples[:SAMPLES]
        context.progress(f"{self.name}: thresholds of {len(targets)} activations")
        densities = (self.density,) if self.density else DENSITIES
        choices = thresholds(program, targets, samples, kinds, densities)
        context.progress(f"{self.name}: errors of {sum(map(len, choices.values()))} thresholds")
        found = effects(program, targets, choices, samples)
        cold, made, refusals = constant_bytes(program) > CACHED_BYTES, [], []
        for target in targets:
            times = [context.break_even(layer) for layer in target.layers(cold)]
            own = []
            for choice in choices[target]:
                error, dense = found[target][choice]
                saved = sum(t.dense - min(t.dense, t.at(dense)) for t in times)
                if saved > 0:
                    words, where = f"{target.kind}: {choice}", (target.value.name, target.module)
                    key = (target.value.name, target.kind)
                    own.append(Candidate(key, target.module, words, error, saved, *where, (target.kind, choice)))
            made += own
            if not own:
                refusals.append(Note.at(target.value, "zeros here would save nothing: too many rows share a list"))
        return made, refusals

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        work = program.clone()
        targets = {(t.value.name, t.kind): t for t in targets_of(work)}
        for candidate in chosen:
            kind, choice = candidate.payload
            insert(work, targets[candidate.node, kind], choice)
        return work.clean()


def insert(program: Program, target: Target, choice: ThresholdRule) -> None:
    """The threshold before the readers of a value."""
    value, place = target.value, min(target.readers)

    def call(op: Any, *args: Any) -> fx.Node:
        return program.insert_call(place, op, args, like=place)

    if choice.t is not None:
        limit = program.add_constant(choice.t.double(), f"{value.name}_t", dtype_of(value), like=place)
        new = call(ops.shrink.default, value, limit, "hard", "nle")
    else:
        kth = call(ops.kth_largest.default, call(aten.abs.default, value), choice.count)
        new = call(ops.shrink.default, value, kth, "hard", "nlt")
    for reader in target.readers:
        reader.replace_input_with(value, new)


# ---------------------------------------------------------------------- measured


def thresholds(
    program: Program,
    targets: Sequence[Target],
    samples: Sequence[list[Any]],
    kinds: Sequence[str],
    densities: Sequence[float],
) -> dict[Target, list[ThresholdRule]]:
    """The choices for each target: quantiles over the samples."""
    seen: dict[Target, list[Tensor]] = {t: [] for t in targets}
    scales: dict[Target, list[Tensor]] = {t: [] for t in targets}

    def collect(target: Target, values: dict[fx.Node, Any]) -> None:
        rows = values[target.value].float().abs().flatten(0, -2)
        seen[target].append(rows[:: max(1, rows.numel() * len(samples) // ELEMENTS)])
        if target.other is not None:
            scales[target].append(values[target.other].float().abs().flatten(0, -2).mean(0))

    watch(program, samples, _readers(targets, collect))
    return {t: list(_choices(program, t, torch.cat(seen[t]), scales[t], kinds, densities)) for t in targets}


def _choices(
    program: Program,
    target: Target,
    rows: Tensor,
    scales: list[Tensor],
    kinds: Sequence[str],
    densities: Sequence[float],
) -> list[ThresholdRule]:
    found = []
    for density in densities:
        if "number" in kinds:
            found.append(ThresholdRule("number", density, _quantile(rows, 1 - density)))
        if "channel" in kinds:
            scale = _scale(program, target, scales)
            found.append(ThresholdRule("channel", density, _quantile(rows * scale, 1 - density) / scale))
        if "top-k" in kinds:
            count = max(1, round(density * rows.shape[1]))
            found.append(ThresholdRule("top-k", density, None, count))
    return found


def _scale(program: Program, target: Target, scales: list[Tensor]) -> Tensor:
    """What each channel is multiplied with, [K]: positive."""
    if scales:
        scale = torch.stack(scales).mean(0)
    else:
        weights = [program.constant(n.args[1]) for n in target.measured]
        scale = torch.stack([w.float().square().sum(0) for w in weights if w is not None]).sum(0).sqrt()
    return scale.clamp(min=float(scale.max()) * 1e-6 + 1e-30)


def _quantile(x: Tensor, part: float) -> Tensor:
    """Between two values, so that no sample lies on the threshold."""
    values = x.flatten().sort().values
    place = max(1, min(len(values) - 1, round(part * len(values))))
    return (values[place - 1] + values[place]) / 2


def effects(
    program: Program,
    targets: Sequence[Target],
    choices: dict[Target, list[ThresholdRule]],
    samples: Sequence[list[Any]],
) -> dict[Target, dict[ThresholdRule, tuple[float, float]]]:
    """For every choice the squared relative error behind the layers that read the value, and the part of the columns that are listed."""
    errors = {t: [0.0] * len(choices[t]) for t in targets}
    parts = {t: [0.0] * len(choices[t]) for t in targets}
    norms = dict.fromkeys(targets, 0.0)
    grams = {t: _gram(program, t) for t in targets}

    def collect(target: Target, values: dict[fx.Node, Any]) -> None:
        x = values[target.value].float()
        whole = target.behind(x, values).flatten(0, -2).double()
        norms[target] += float(((whole @ grams[target]) * whole).sum())
        for i, choice in enumerate(choices[target]):
            left = choice.of(x)
            off = target.behind(x - left, values).flatten(0, -2).double()
            errors[target][i] += float(((off @ grams[target]) * off).sum())
            parts[target][i] += listed(left) / len(samples)

    watch(program, samples, _readers(targets, collect))
    return {
        t: {c: (max(e, 0.0) / max(norms[t], 1e-30), p) for c, e, p in zip(choices[t], errors[t], parts[t])}
        for t in targets
    }


def _gram(program: Program, target: Target) -> Tensor:
    """sum of W^T W over the layers that read the value: what a change of it weighs behind them."""
    weights = [program.constant(n.args[1]) for n in target.measured]
    return sum((w.double().T @ w.double() for w in weights if w is not None), torch.zeros((), dtype=torch.float64))


def _readers(targets: Sequence[Target], collect: Any) -> dict[fx.Node, Any]:
    """Where the values of a target are known: at the last of its readers. Targets of one reader do not meet."""
    return {max(t.readers): partial(collect, t) for t in targets}
