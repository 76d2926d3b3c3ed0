"""A gated layer uses the blocks of its neurons that matter for what is read: chosen by the mean over all rows, for all rows alike.

    a = act(x G^T)                                                  as before, [rows, H]
    J = the m blocks of neurons with the largest sum_j w_j mean |a_j|       w_j: the norm of a column of D times the mean |x U^T|_j
    y = (a_J * (x U_J^T)) D_J^T                                     two of three products are smaller

Rows of one text use much the same neurons ("flocking": GRIFFIN, Dong et al., 2024); what is chosen follows the input. For many rows, where
rows share no zeros that could be skipped. The rows of U and D^T that are chosen are gathered at run time.
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

from thresher.analysis.cost.cost import seconds
from thresher.analysis.slices.transfer.base import argument
from thresher.approximation.calibration import watch
from thresher.approximation.search import Candidate
from thresher.ir.nodes import shape_of
from thresher.ir.program import Program, Role
from thresher.passes.sparsity._targets import Target, targets_of
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.registry import register_pass

aten = torch.ops.aten
PARTS = (0.75, 0.5, 0.375, 0.25)  # of the neurons, that are used
BLOCK = 16  # neurons
SAMPLES = 8


@register_pass
@dataclass(frozen=True)
class SelectNeurons(ApproximatePass):
    """Use a part of the neurons of gated layers, chosen by the input, within the budget."""

    name: ClassVar[str] = "select-neurons"
    target_ops: ClassVar[tuple] = (aten.linear.default,)
    block: int = BLOCK

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.block > 0, "block", "a number of neurons, from 1 on")

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        found = [t for t in targets_of(program) if t.kind == "gate"]
        refusals = [Note.at(t.value, f"all of its neurons are used: {why}") for t in found if (why := self.unfit(t))]
        targets = [t for t in found if not self.unfit(t)]
        samples = context.calibration.search_samples[:SAMPLES]
        context.progress(f"{self.name}: {len(targets)} layers")
        weights = importance(program, targets, samples)
        errors = self.errors(program, targets, weights, samples)
        before, made = seconds(program, context.machine), []
        for target in targets:
            for count in self.counts(target):
                trial = program.clone()
                edit(trial, target.value.name, weights[target], count, self.block)
                saved = before - seconds(trial.clean(), context.machine)
                words = f"{count * self.block} of {neurons(target)} neurons, in blocks of {self.block}"
                where = (target.value.name, target.module)
                how = weights[target], count
                made.append(
                    Candidate(target.value.name, target.module, words, errors[target][count], saved, *where, how)
                )
        return made, refusals

    def unfit(self, target: Target) -> str:
        if neurons(target) % self.block or neurons(target) < 4 * self.block:
            return f"{neurons(target)} are no four blocks of {self.block}, or not whole ones"
        return "several layers read them" if len(target.measured) != 1 else ""

    def counts(self, target: Target) -> list[int]:
        """Numbers of blocks."""
        return sorted({max(1, round(p * neurons(target) / self.block)) for p in PARTS})

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        work = program.clone()
        for candidate in chosen:
            weight, count = candidate.payload
            edit(work, candidate.node, weight, count, self.block)
        return work.clean()

    def errors(
        self, program: Program, targets: Sequence[Target], weights: dict[Target, Tensor], samples: Sequence[list[Any]]
    ) -> dict[Target, dict[int, float]]:
        """The squared relative error behind the layer that reads the product."""
        sums = {t: dict.fromkeys(self.counts(t), 0.0) for t in targets}
        norms = dict.fromkeys(targets, 0.0)

        def collect(target: Target, values: dict[fx.Node, Any]) -> None:
            a, down = values[target.value].float(), program.constant(target.measured[0].args[1])
            assert down is not None
            product = target.behind(a, values).flatten(0, -2)
            norms[target] += float((product @ down.float().T).square().sum())
            for count in sums[target]:
                chosen = torch.zeros(a.shape[-1], dtype=torch.bool)
                chosen[chosen_neurons(a, weights[target], count, self.block)] = True
                off = torch.where(chosen, 0.0, product) @ down.float().T
                sums[target][count] += float(off.square().sum())

        watch(program, samples, {t.readers[0]: partial(collect, t) for t in targets})
        return {t: {c: e / max(norms[t], 1e-30) for c, e in own.items()} for t, own in sums.items()}


def neurons(target: Target) -> int:
    return int(shape_of(target.value)[-1])


def chosen_neurons(a: Tensor, weight: Tensor, count: int, block: int) -> Tensor:
    """int64 [count * block], on values."""
    score = (a.abs().flatten(0, -2).mean(0) * weight).unflatten(0, (-1, block)).sum(-1)
    return (score.topk(count).indices[:, None] * block + torch.arange(block)).flatten()


def importance(program: Program, targets: Sequence[Target], samples: Sequence[list[Any]]) -> dict[Target, Tensor]:
    """What a neuron's activation is multiplied with, [H]."""
    sums = {t: torch.zeros(neurons(t)) for t in targets}

    def collect(target: Target, values: dict[fx.Node, Any]) -> None:
        sums[target] += values[target.other].float().abs().flatten(0, -2).mean(0) / len(samples)

    watch(program, samples, {t.readers[0]: partial(collect, t) for t in targets})
    norms = {t: program.constants[t.measured[0].args[1].target].float().norm(dim=0) for t in targets}
    return {t: sums[t] * norms[t] for t in targets}


def edit(program: Program, name: str, weight: Tensor, count: int, block: int) -> None:
    """The gated layer whose gate is ``name`` with ``count`` blocks of its neurons."""
    target = next(t for t in targets_of(program) if t.kind == "gate" and t.value.name == name)
    up, down, product = target.other, target.measured[0], target.readers[0]
    assert up is not None
    hidden, used = neurons(target), count * block

    def call(op: Any, *args: Any) -> fx.Node:
        return program.insert_call(product, op, args, like=product)

    def constant(value: Tensor, label: str) -> fx.Node:
        return program.add_constant(value.contiguous(), f"{name}_{label}", like=product, role=Role.BUFFER)

    *lead, _ = shape_of(target.value)
    rows = math.prod(lead)
    a = call(aten.reshape.default, target.value, [rows, hidden])
    score = call(aten.mean.dim, call(aten.abs.default, a), [0])
    score = call(aten.mul.Tensor, score, constant(weight, "weight"))
    score = call(aten.sum.dim_IntList, call(aten.reshape.default, score, [hidden // block, block]), [-1])
    best = call(aten.topk.default, score, count)
    first = call(aten.mul.Tensor, call(aten.unsqueeze.default, call(operator.getitem, best, 1), 1), block)
    chosen = call(aten.reshape.default, call(aten.add.Tensor, first, constant(torch.arange(block), "block")), [used])

    x = call(aten.reshape.default, up.args[0], [rows, shape_of(up.args[0])[-1]])
    part = call(aten.permute.default, call(aten.index_select.default, up.args[1], 0, chosen), [1, 0])
    u = call(aten.matmul.default, x, part)
    bias = argument(up, 2, "bias")
    if bias is not None:
        u = call(aten.add.Tensor, u, call(aten.index_select.default, bias, 0, chosen))
    h = call(aten.mul.Tensor, call(aten.index_select.default, a, 1, chosen), u)
    turned = program.add_constant(
        program.constants[down.args[1].target].T.contiguous(),
        f"{name}_down",
        down.args[1].meta["val"].dtype,
        like=product,
    )
    y = call(aten.matmul.default, h, call(aten.index_select.default, turned, 0, chosen))
    bias = argument(down, 2, "bias")
    y = y if bias is None else call(aten.add.Tensor, y, bias)
    y = call(aten.reshape.default, y, [*lead, shape_of(y)[-1]])
    down.replace_all_uses_with(y)
