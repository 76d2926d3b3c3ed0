"""An exact pass that asks an analysis: a value that cannot be negative needs no relu, and no abs.

    python examples/pass_by_analysis.py

    relu(v) -> v,  abs(v) -> v        where thresher.analysis.signs finds that v >= 0

No pattern could describe this: v may be a mean of squares, a sum of softmaxes, or a product of other values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from thresher.analysis.signs import nonnegative
from thresher.authoring import Context, Note, Pass, PassResult, Program, register_pass

aten = torch.ops.aten


@register_pass
@dataclass(frozen=True)
class DropIdleRelu(Pass):
    """Remove relu and abs of what is never negative."""

    name: ClassVar[str] = "drop-idle-relu"
    target_ops: ClassVar[tuple] = (aten.relu.default, aten.abs.default)

    def apply(self, program: Program, context: Context) -> PassResult:
        work, notes = program.clone(), []
        for node in list(work.calls(*self.target_ops)):
            value = node.args[0]
            if nonnegative(work, value):
                notes.append(Note.at(node, f"{value.name} is never negative"))
                node.replace_all_uses_with(value)
        return PassResult(work.clean(), notes) if notes else PassResult(program)


class Energy(nn.Module):
    """Squares, pooled; then a relu that changes nothing, and one that does."""

    def __init__(self, width: int):
        super().__init__()
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        energy = (x**2).mean(1) + x.softmax(-1).sum(1)
        return self.head(energy.relu()).relu()


def main() -> None:
    from thresher.testing import Case, before_after, prove

    def build(batch: int, width: int) -> tuple[nn.Module, tuple]:
        return Energy(width), (torch.randn(batch, 4, width),)

    found = before_after(DropIdleRelu(), *build(2, 6))
    print(found)
    assert len(list(found.after.calls(aten.relu.default))) == 1, "the other relu has something to do"
    prove(DropIdleRelu(), Case("energy", build, batch=(1, 3), width=(4, 7)))
    print("proven")


if __name__ == "__main__":
    main()
