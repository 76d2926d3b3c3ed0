"""Residual branches that change the output least are removed; what they are added to goes on.

    x + f(x)  ->  x            f: an attention, a feed-forward network, or any other branch

They are found by the change of the model's output, one by one and then together, under the budget (FinerCut, Zhang et al., 2024, which is
greedy and measures every step anew; here the steps are ordered once). With ``speed=s`` the branches are spread evenly over the depth until
the estimated time is 1/s (Unified Layer Skipping, Liu et al., 2024, which skips whole layers): all of them or, over the budget, none. A
branch must hold a product or a convolution, and nothing but its sum may read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from thresher.analysis.cost.cost import MachineModel, seconds
from thresher.approximation.calibration import watch
from thresher.approximation.search import Candidate
from thresher.ir.nodes import is_tensor, module_path, shape_of
from thresher.ir.program import Program
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.registry import register_pass

aten = torch.ops.aten
PRODUCTS = {aten.linear.default, aten.matmul.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}


@dataclass(frozen=True)
class Branch:
    """A residual branch: ``sum`` = ``stream`` + ``change``, where ``change`` is made from ``stream``."""

    sum: fx.Node
    stream: fx.Node
    change: fx.Node

    @property
    def module(self) -> str:
        """The dotted path of the module that ends the branch."""
        return module_path(self.change)


@register_pass
@dataclass(frozen=True)
class DropSublayers(ApproximatePass):
    """Remove residual branches, within the budget."""

    name: ClassVar[str] = "drop-sublayers"
    target_ops: ClassVar[tuple] = (aten.add.Tensor,)
    speed: float = 0.0  # how many times faster, with evenly spread branches; 0: what the budget allows

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.speed == 0 or self.speed > 1, "speed", "a factor above 1, or 0 for what the budget allows")

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        all_branches = branches(program)
        if self.speed > 1:
            return self.balanced(program, all_branches, context.machine), []
        errors = _sizes(program, all_branches, context.calibration.search_samples)
        candidates = []
        for b in all_branches:
            name, group, choice = b.sum.name, f"{b.module} ({b.sum.name})", "removed, its input goes on"
            candidates.append(Candidate(name, group, choice, errors[b], 0.0, name, b.module, (name,)))
        return self.with_savings(program, candidates, context.machine), []

    def balanced(self, program: Program, all_branches: Sequence[Branch], machine: MachineModel) -> list[Candidate]:
        """Return one candidate: the fewest branches, evenly spread, that give the speed; none where all of them do not."""
        before = seconds(program, machine)
        for count in range(1, len(all_branches) + 1):
            indices = [round((i + 0.5) * len(all_branches) / count - 0.5) for i in range(count)]
            dropped = [all_branches[i] for i in indices]
            names, modules = tuple(b.sum.name for b in dropped), ", ".join(b.module for b in dropped)
            after = seconds(_without(program, names), machine)
            if before / after >= self.speed:
                choice = f"{count} branches removed: {modules}"
                return [Candidate("all", "all", choice, 1.0, before - after, payload=names)]
        return []

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        return _without(program, [name for c in chosen for name in c.payload])


def branches(program: Program) -> list[Branch]:
    """Return the residual branches that hold a product or a convolution and that nothing but their sum reads, in order."""
    result = []
    for node in program.calls(aten.add.Tensor):
        left, right = node.args[:2]
        if "alpha" in node.kwargs or not is_tensor(left) or not is_tensor(right) or len(shape_of(node)) < 3:
            continue
        for stream, change in ((left, right), (right, left)):
            if shape_of(stream) == shape_of(node) == shape_of(change) and (inside := _between(stream, change)):
                if any(n.target in PRODUCTS for n in inside) and _closed(inside, node):
                    result.append(Branch(node, stream, change))
                break
    return result


def _between(stream: fx.Node, change: fx.Node) -> set[fx.Node]:
    """Return the nodes on paths from ``stream`` to ``change``; empty if there is none."""
    reached: dict[fx.Node, bool] = {stream: True}

    def reaches(node: fx.Node) -> bool:
        stack = [node]
        while stack:
            top = stack[-1]
            waiting = [n for n in top.all_input_nodes if n not in reached and n > stream]
            if waiting:
                stack += waiting
                continue
            reached[top] = reached.get(top, any(reached.get(n, False) for n in top.all_input_nodes))
            stack.pop()
        return reached[node]

    if not reaches(change):
        return set()
    return {n for n, is_reached in reached.items() if is_reached and n is not stream}


def _closed(inside: set[fx.Node], end: fx.Node) -> bool:
    return all(user in inside or user is end for node in inside for user in node.users)


def _without(program: Program, sums: Sequence[str]) -> Program:
    work = program.clone()
    for branch in reversed(branches(work)):  # the later first: its stream may be the sum of an earlier one
        if branch.sum.name in sums:
            branch.sum.replace_all_uses_with(branch.stream)
    return work.clean()


def _sizes(program: Program, all_branches: Sequence[Branch], samples: Sequence[list[Any]]) -> dict[Branch, float]:
    """Return the squared size of each change relative to its sum."""
    sizes = dict.fromkeys(all_branches, 0.0)

    def add(branch: Branch, values: dict[fx.Node, Any]) -> None:
        size = values[branch.change].double().square().sum() / values[branch.sum].double().square().sum().clamp(
            min=1e-30
        )
        sizes[branch] += float(size) / len(samples)

    watch(program, samples, {b.sum: partial(add, b) for b in all_branches})
    return sizes
