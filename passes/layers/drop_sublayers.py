"""Residual branches that change the output least are removed; what they are added to goes on.

    x + f(x)  ->  x            f: an attention, a feed-forward network, or any other branch

Which ones is found by the change of the model's output, one by one and then together, under the budget (FinerCut, Zhang et al., 2024). With
``speed=s`` the branches are spread evenly over the depth until the estimated time is 1/s (Unified Layer Skipping, Liu et al., 2024): all of
them or, over the budget, none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from thresher.analysis.cost.cost import seconds
from thresher.approximation.calibration import watch
from thresher.approximation.search import Candidate
from thresher.ir.nodes import is_tensor, module_path, shape_of
from thresher.ir.program import Program
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.registry import register_pass

aten = torch.ops.aten
WORK = {aten.linear.default, aten.matmul.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}


@dataclass(frozen=True)
class Branch:
    """``sum`` = ``stream`` + ``change``, where ``change`` is made from ``stream``."""

    sum: fx.Node
    stream: fx.Node
    change: fx.Node

    @property
    def module(self) -> str:
        return module_path(self.change)


@register_pass
@dataclass(frozen=True)
class DropSublayers(ApproximatePass):
    """Remove residual branches, within the budget."""

    name: ClassVar[str] = "drop-sublayers"
    target_ops: ClassVar[tuple] = (aten.add.Tensor,)
    speed: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.speed == 0 or self.speed > 1, "speed", "a factor above 1, or 0 for what the budget allows")

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        found = branches(program)
        before = seconds(program, context.machine)

        def time(dropped: Sequence[Branch]) -> float:
            return seconds(_without(program, [b.sum.name for b in dropped]), context.machine)

        if self.speed > 1:
            return self.balanced(found, before, time), []
        errors = _sizes(program, found, context.calibration.search_samples)
        made = []
        for b in found:
            group, words, saved = f"{b.module} ({b.sum.name})", "removed, its input goes on", before - time([b])
            made.append(Candidate(b.sum.name, group, words, errors[b], saved, b.sum.name, b.module, (b.sum.name,)))
        return made, []

    def balanced(self, found: Sequence[Branch], before: float, time: Any) -> list[Candidate]:
        """One candidate: the fewest branches, evenly spread, that give the speed."""
        for count in range(1, len(found) + 1):
            places = [round((i + 0.5) * len(found) / count - 0.5) for i in range(count)]
            dropped = [found[p] for p in places]
            after = time(dropped)
            if before / after >= self.speed:
                names, modules = tuple(b.sum.name for b in dropped), ", ".join(b.module for b in dropped)
                return [
                    Candidate("all", "all", f"{count} branches removed: {modules}", 1.0, before - after, payload=names)
                ]
        return []

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        return _without(program, [name for c in chosen for name in c.payload])


def branches(program: Program) -> list[Branch]:
    """All residual branches that hold some work and that nothing but their sum reads."""
    found = []
    for node in program.calls(aten.add.Tensor):
        left, right = node.args[:2]
        if "alpha" in node.kwargs or not is_tensor(left) or not is_tensor(right) or len(shape_of(node)) < 3:
            continue
        for stream, change in ((left, right), (right, left)):
            if shape_of(stream) == shape_of(node) == shape_of(change) and (inside := _between(stream, change)):
                if any(n.target in WORK for n in inside) and _closed(inside, node):
                    found.append(Branch(node, stream, change))
                break
    return found


def _between(stream: fx.Node, change: fx.Node) -> set[fx.Node]:
    """The nodes on paths from ``stream`` to ``change``; empty if there is none."""
    behind: dict[fx.Node, bool] = {stream: True}

    def reaches(node: fx.Node) -> bool:
        todo = [node]
        while todo:
            one = todo[-1]
            waiting = [n for n in one.all_input_nodes if n not in behind and n > stream]
            if waiting:
                todo += waiting
                continue
            behind[one] = behind.get(one, any(behind.get(n, False) for n in one.all_input_nodes))
            todo.pop()
        return behind[node]

    if not reaches(change):
        return set()
    return {n for n, yes in behind.items() if yes and n is not stream}


def _closed(inside: set[fx.Node], end: fx.Node) -> bool:
    return all(user in inside or user is end for node in inside for user in node.users)


def _without(program: Program, sums: Sequence[str]) -> Program:
    work = program.clone()
    for branch in reversed(branches(work)):  # the later first: its stream may be the sum of an earlier one
        if branch.sum.name in sums:
            branch.sum.replace_all_uses_with(branch.stream)
    return work.clean()


def _sizes(program: Program, found: Sequence[Branch], samples: Sequence[list[Any]]) -> dict[Branch, float]:
    """The squared size of each change beside the sum."""
    sizes = dict.fromkeys(found, 0.0)

    def add(branch: Branch, values: dict[fx.Node, Any]) -> None:
        part = values[branch.change].double().square().sum() / values[branch.sum].double().square().sum().clamp(
            min=1e-30
        )
        sizes[branch] += float(part) / len(samples)

    watch(program, samples, {b.sum: partial(add, b) for b in found})
    return sizes
