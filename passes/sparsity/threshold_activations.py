"""Small activations become 0, and what they would have been multiplied with is not read.

A value x that linear layers read, or the gate g of g * (x W^T), is thresholded (``thresher::shrink``, hard) at

    number    t, one for all channels: a quantile of |x| on calibration samples   (CATS for gates, Lee et al., 2024; TEAL, Liu et al., 2024)
    channel   t_j = tau / w_j, where w_j is what channel j is multiplied with: the norm of a column of the weight, or the mean |x W^T|_j
              of a gated layer                                                           (CHESS, He et al., 2024; WINA, Chen et al., 2025)
    top-k     the k-th largest |x| of each row, computed at run time                     (k-winners: Ahmad & Scheinkman, 2019)

The fraction that stays of each value is found under the budget, or is ``density`` everywhere; no weights are tuned, as CATS may do.
``skip-zeros`` makes the saving real. Refused: values where the break-even points of their layers say that zeros save nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.cost.break_even import CACHED_BYTES, BreakEven
from thresher.analysis.cost.cost import constant_bytes
from thresher.approximation.calibration import watch
from thresher.approximation.search import Candidate
from thresher.ir.nodes import dtype_of
from thresher.ir.program import Program
from thresher.passes.sparsity._densities import listed
from thresher.passes.sparsity._targets import Target, targets_of
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.calls import inserter
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.options import names_in
from thresher.rewriting.registry import register_pass

aten, ops = torch.ops.aten, torch.ops.thresher
DENSITIES = (0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # fractions that stay
KINDS = ("number", "channel", "top-k")
VALUES = ("gate", "input")
MAX_SAMPLES = 16
MAX_ELEMENTS = 1 << 20  # of a value, that quantiles are made of


@dataclass(frozen=True, eq=False)
class ThresholdRule:
    """A threshold ``t``, a number or one per channel [K]; or the ``count`` that stays of each row."""

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

    def apply_to(self, x: Tensor) -> Tensor:
        """Return x with 0 for what is small."""
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
        samples = context.calibration.search_samples[:MAX_SAMPLES]
        context.progress(f"{self.name}: thresholds of {len(targets)} activations")
        densities = (self.density,) if self.density else DENSITIES
        choices = thresholds(program, targets, samples, kinds, densities)
        context.progress(f"{self.name}: errors of {sum(map(len, choices.values()))} thresholds")
        measured = effects(program, targets, choices, samples)
        cold, candidates, refusals = constant_bytes(program) > CACHED_BYTES, [], []
        for target in targets:
            times = [context.break_even(layer) for layer in target.layers(cold)]
            saving = _candidates_of(target, measured[target], times)
            candidates += saving
            if not saving:
                refusals.append(Note.at(target.value, "zeros here would save nothing: too many rows share a list"))
        return candidates, refusals

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        work = program.clone()
        targets = {(t.value.name, t.kind): t for t in targets_of(work)}
        for candidate in chosen:
            kind, choice = candidate.payload
            insert(work, targets[candidate.node, kind], choice)
        return work.clean()


def _candidates_of(
    target: Target, measured: dict[ThresholdRule, tuple[float, float]], times: Sequence[BreakEven]
) -> list[Candidate]:
    """Return the candidates of a target that save something."""
    candidates, (name, module) = [], (target.value.name, target.module)
    for choice, (error, density) in measured.items():
        saved = sum(t.dense - min(t.dense, t.at(density)) for t in times)
        if saved > 0:
            key, payload = (name, target.kind), (target.kind, choice)
            candidates.append(Candidate(key, module, f"{target.kind}: {choice}", error, saved, name, module, payload))
    return candidates


def insert(program: Program, target: Target, choice: ThresholdRule) -> None:
    """Insert the threshold before the readers of a value."""
    value, before = target.value, min(target.readers)
    call = inserter(program, before)
    if choice.t is not None:
        limit = program.add_constant(choice.t.double(), f"{value.name}_t", dtype_of(value), like=before)
        thresholded = call(ops.shrink.default, value, limit, "hard", "nle")
    else:
        kth = call(ops.kth_largest.default, call(aten.abs.default, value), choice.count)
        thresholded = call(ops.shrink.default, value, kth, "hard", "nlt")
    for reader in target.readers:
        reader.replace_input_with(value, thresholded)


# ---------------------------------------------------------------------- measured


def thresholds(
    program: Program,
    targets: Sequence[Target],
    samples: Sequence[list[Any]],
    kinds: Sequence[str],
    densities: Sequence[float],
) -> dict[Target, list[ThresholdRule]]:
    """Return the rules to try for each target: quantiles over the samples."""
    seen: dict[Target, list[Tensor]] = {t: [] for t in targets}
    scales: dict[Target, list[Tensor]] = {t: [] for t in targets}

    def collect(target: Target, values: dict[fx.Node, Any]) -> None:
        rows = values[target.value].float().abs().flatten(0, -2)
        seen[target].append(rows[:: max(1, rows.numel() * len(samples) // MAX_ELEMENTS)])
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
    rules = []
    for density in densities:
        if "number" in kinds:
            rules.append(ThresholdRule("number", density, _quantile(rows, 1 - density)))
        if "channel" in kinds:
            scale = _scale(program, target, scales)
            rules.append(ThresholdRule("channel", density, _quantile(rows * scale, 1 - density) / scale))
        if "top-k" in kinds:
            count = max(1, round(density * rows.shape[1]))
            rules.append(ThresholdRule("top-k", density, None, count))
    return rules


def _scale(program: Program, target: Target, scales: list[Tensor]) -> Tensor:
    """Return the size of what each channel is multiplied with, [K], positive."""
    if scales:
        scale = torch.stack(scales).mean(0)
    else:
        weights = [program.constant(n.args[1]) for n in target.measured]
        scale = torch.stack([w.float().square().sum(0) for w in weights if w is not None]).sum(0).sqrt()
    return scale.clamp(min=float(scale.max()) * 1e-6 + 1e-30)


def _quantile(x: Tensor, fraction: float) -> Tensor:
    """Return a quantile between two values, so that no sample lies on the threshold."""
    values = x.flatten().sort().values
    index = max(1, min(len(values) - 1, round(fraction * len(values))))
    return (values[index - 1] + values[index]) / 2


def effects(
    program: Program,
    targets: Sequence[Target],
    choices: dict[Target, list[ThresholdRule]],
    samples: Sequence[list[Any]],
) -> dict[Target, dict[ThresholdRule, tuple[float, float]]]:
    """Return for every rule the squared relative error after the layers that read the value, and the fraction of listed columns."""
    errors = {t: [0.0] * len(choices[t]) for t in targets}
    densities = {t: [0.0] * len(choices[t]) for t in targets}
    norms = dict.fromkeys(targets, 0.0)
    grams = {t: _gram(program, t) for t in targets}

    def collect(target: Target, values: dict[fx.Node, Any]) -> None:
        x = values[target.value].float()
        product = target.read_by_measured(x, values).flatten(0, -2).double()
        norms[target] += float(((product @ grams[target]) * product).sum())
        for i, choice in enumerate(choices[target]):
            kept = choice.apply_to(x)
            difference = target.read_by_measured(x - kept, values).flatten(0, -2).double()
            errors[target][i] += float(((difference @ grams[target]) * difference).sum())
            densities[target][i] += listed(kept) / len(samples)

    watch(program, samples, _readers(targets, collect))
    return {
        t: {c: (max(e, 0.0) / max(norms[t], 1e-30), p) for c, e, p in zip(choices[t], errors[t], densities[t])}
        for t in targets
    }


def _gram(program: Program, target: Target) -> Tensor:
    """Return the sum of W^T W [K, K], float64, over the layers that read the value: the weight of a change after them."""
    weights = [program.constant(n.args[1]) for n in target.measured]
    return sum((w.double().T @ w.double() for w in weights if w is not None), torch.zeros((), dtype=torch.float64))


def _readers(targets: Sequence[Target], collect: Any) -> dict[fx.Node, Any]:
    """Return the nodes where the values of targets are known, the last of their readers. Targets of one reader do not meet."""
    return {max(t.readers): partial(collect, t) for t in targets}
