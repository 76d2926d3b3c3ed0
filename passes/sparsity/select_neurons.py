"""A gated layer uses the blocks of its neurons that matter for what is read: chosen by the mean over all rows, for all rows alike.

    a = act(x G^T)                                                  as before, [rows, H]
    J = the m blocks of neurons with the largest sum_j w_j mean |a_j|       w_j: the norm of a column of D times the mean |x U^T|_j
    y = (a_J * (x U_J^T)) D_J^T                                     two of three products are smaller

Rows of one text use much the same neurons ("flocking": GRIFFIN, Dong et al., 2024, which chooses from the prompt and keeps the choice while
generating, neuron by neuron; here in blocks, anew for each call). For many rows, where rows share no zeros that could be skipped. The rows
of U and D^T that are chosen are gathered at run time. Refused: numbers of neurons that are no whole blocks, and products that several
layers read.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from thresher.analysis.slices.transfer.base import argument
from thresher.approximation.calibration import watch
from thresher.approximation.search import Candidate
from thresher.ir.nodes import shape_of
from thresher.ir.program import Program, Role
from thresher.passes.sparsity._targets import Target, targets_of
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.calls import inserter
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.registry import register_pass

aten = torch.ops.aten
FRACTIONS = (0.75, 0.5, 0.375, 0.25)  # of the neurons, that are used
MIN_BLOCKS = 4
MAX_SAMPLES = 8


@register_pass
@dataclass(frozen=True)
class SelectNeurons(ApproximatePass):
    """Use some of the neurons of gated layers, chosen by the input, within the budget."""

    name: ClassVar[str] = "select-neurons"
    target_ops: ClassVar[tuple] = (aten.linear.default,)
    block: int = 16  # neurons that are chosen together

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.block > 0, "block", "a number of neurons, from 1 on")

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        gates = [t for t in targets_of(program) if t.kind == "gate"]
        reasons = {t: self.unfit(t) for t in gates}
        refusals = [Note.at(t.value, f"all of its neurons are used: {r}") for t, r in reasons.items() if r]
        targets = [t for t in gates if not reasons[t]]
        samples = context.calibration.search_samples[:MAX_SAMPLES]
        context.progress(f"{self.name}: {len(targets)} layers")
        weights = importance(program, targets, samples)
        errors = self.errors(program, targets, weights, samples)
        candidates = []
        for target in targets:
            name, module = target.value.name, target.module
            for count in self.counts(target):
                choice = f"{count * self.block} of {neurons(target)} neurons, in blocks of {self.block}"
                error, payload = errors[target][count], (weights[target], count)
                candidates.append(Candidate(name, module, choice, error, 0.0, name, module, payload))
        return self.with_savings(program, candidates, context.machine), refusals

    def edit(self, program: Program, candidate: Candidate) -> None:
        weight, count = candidate.payload
        edit(program, candidate.node, weight, count, self.block)

    def unfit(self, target: Target) -> str:
        """Return why the neurons of a gated layer cannot be selected, or an empty string."""
        if neurons(target) % self.block or neurons(target) < MIN_BLOCKS * self.block:
            return f"{neurons(target)} are no four blocks of {self.block}, or not whole ones: another block= may fit"
        return "several layers read them" if len(target.measured) != 1 else ""

    def counts(self, target: Target) -> list[int]:
        """Return the numbers of blocks that are tried, ascending."""
        return sorted({max(1, round(p * neurons(target) / self.block)) for p in FRACTIONS})

    def errors(
        self, program: Program, targets: Sequence[Target], weights: dict[Target, Tensor], samples: Sequence[list[Any]]
    ) -> dict[Target, dict[int, float]]:
        """Return the squared relative error after the layer that reads the product, by number of blocks."""
        sums = {t: dict.fromkeys(self.counts(t), 0.0) for t in targets}
        norms = dict.fromkeys(targets, 0.0)

        def collect(target: Target, values: dict[fx.Node, Any]) -> None:
            a, down = values[target.value].float(), program.constant(target.measured[0].args[1])
            assert down is not None
            product = target.read_by_measured(a, values).flatten(0, -2)
            norms[target] += float((product @ down.float().T).square().sum())
            for count in sums[target]:
                chosen = torch.zeros(a.shape[-1], dtype=torch.bool)
                chosen[chosen_neurons(a, weights[target], count, self.block)] = True
                error = torch.where(chosen, 0.0, product) @ down.float().T
                sums[target][count] += float(error.square().sum())

        watch(program, samples, {t.readers[0]: partial(collect, t) for t in targets})
        return {t: {c: e / max(norms[t], 1e-30) for c, e in of_target.items()} for t, of_target in sums.items()}


def neurons(target: Target) -> int:
    """Return the number of neurons of a gated layer."""
    return int(shape_of(target.value)[-1])


def chosen_neurons(a: Tensor, weight: Tensor, count: int, block: int) -> Tensor:
    """Return the neurons, int64 [count * block], that activations a [.., H] choose, on values."""
    score = (a.abs().flatten(0, -2).mean(0) * weight).unflatten(0, (-1, block)).sum(-1)
    return (score.topk(count).indices[:, None] * block + torch.arange(block)).flatten()


def importance(program: Program, targets: Sequence[Target], samples: Sequence[list[Any]]) -> dict[Target, Tensor]:
    """Return the size of what each neuron's activation is multiplied with, [H]."""
    sums = {t: torch.zeros(neurons(t)) for t in targets}

    def collect(target: Target, values: dict[fx.Node, Any]) -> None:
        sums[target] += values[target.other].float().abs().flatten(0, -2).mean(0) / len(samples)

    watch(program, samples, {t.readers[0]: partial(collect, t) for t in targets})
    norms = {t: program.constants[t.measured[0].args[1].target].float().norm(dim=0) for t in targets}
    return {t: sums[t] * norms[t] for t in targets}


def edit(program: Program, name: str, weight: Tensor, count: int, block: int) -> None:
    """Let the gated layer whose gate is ``name`` use ``count`` blocks of its neurons, by importance ``weight`` [H]."""
    target = next(t for t in targets_of(program) if t.kind == "gate" and t.value.name == name)
    up, down, product = target.other, target.measured[0], target.readers[0]
    assert up is not None
    call = inserter(program, product)
    *lead, hidden = shape_of(target.value)
    rows = math.prod(lead)
    a = call(aten.reshape.default, target.value, [rows, hidden])
    chosen = _insert_choice(program, product, a, weight, count, block, name)
    x = call(aten.reshape.default, up.args[0], [rows, shape_of(up.args[0])[-1]])
    weights = call(aten.permute.default, call(aten.index_select.default, up.args[1], 0, chosen), [1, 0])
    u = call(aten.matmul.default, x, weights)
    bias = argument(up, 2, "bias")
    if bias is not None:
        u = call(aten.add.Tensor, u, call(aten.index_select.default, bias, 0, chosen))
    h = call(aten.mul.Tensor, call(aten.index_select.default, a, 1, chosen), u)
    transposed = program.constants[down.args[1].target].T.contiguous()
    rows_of_down = program.add_constant(transposed, f"{name}_down", down.args[1].meta["val"].dtype, like=product)
    y = call(aten.matmul.default, h, call(aten.index_select.default, rows_of_down, 0, chosen))
    bias = argument(down, 2, "bias")
    y = y if bias is None else call(aten.add.Tensor, y, bias)
    down.replace_all_uses_with(call(aten.reshape.default, y, [*lead, shape_of(y)[-1]]))


def _insert_choice(
    program: Program, before: fx.Node, a: fx.Node, weight: Tensor, count: int, block: int, name: str
) -> fx.Node:
    """Insert :func:`chosen_neurons` of a [rows, H]."""
    call = inserter(program, before)

    def constant(value: Tensor, label: str) -> fx.Node:
        return program.add_constant(value.contiguous(), f"{name}_{label}", like=before, role=Role.BUFFER)

    score = call(aten.mean.dim, call(aten.abs.default, a), [0])
    score = call(aten.mul.Tensor, score, constant(weight, "weight"))
    score = call(aten.sum.dim_IntList, call(aten.reshape.default, score, [shape_of(a)[1] // block, block]), [-1])
    best = call(aten.topk.default, score, count)
    first = call(aten.mul.Tensor, call(aten.unsqueeze.default, call(operator.getitem, best, 1), 1), block)
    return call(
        aten.reshape.default, call(aten.add.Tensor, first, constant(torch.arange(block), "block")), [count * block]
    )
