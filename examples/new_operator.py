"""A new operator with a kernel of its own, and the pass that introduces it: squared relu (So et al., Primer, 2021).

    python examples/new_operator.py

    relu(x) ** 2  ->  examples::squared_relu(x)

Three things make an operator: its meaning (a reference in torch, and the shapes of its result), its lowering (a converter to TVM, for every
target or for the CPU only), and a pass that introduces it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from tvm import te, tirx

import thresher
from thresher.authoring import Context, Note, Pass, PassResult, Program, matches, register_pass
from thresher.backends.tvm.importing.converters.registry import semantics
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.kernels.cpu import elementwise
from thresher.ops.define import define

aten, ops = torch.ops.aten, torch.ops.examples

# 1. The meaning. The reference runs on any device and gives the gradients; the fake one says what the result looks like.
define("examples::squared_relu", "(Tensor x) -> Tensor", lambda x: x.relu().square(), torch.empty_like)


# 2. The lowering. A tensor expression fuses into the kernel before it; `named` keeps a value from being computed twice.
@semantics(ops.squared_relu.default)
def squared_relu(importer: Importer, node: fx.Node) -> Any:
    def one(x: Any) -> Any:
        return tirx.Select(x < tirx.const(0.0, x.ty.dtype), tirx.const(0.0, x.ty.dtype), x * x)

    def compute(t: te.Tensor) -> te.Tensor:
        return te.compute(t.shape, lambda *i: elementwise.named(t(*i), one), name="T_squared_relu")

    return importer.emit_te("squared_relu", compute, importer.value(node.args[0]))


# 3. The pass that introduces it.
def written_out(x):
    return aten.pow.Tensor_Scalar(aten.relu.default(x), 2)


@register_pass
@dataclass(frozen=True)
class FuseSquaredRelu(Pass):
    """Write relu(x) ** 2 as one operator."""

    name: ClassVar[str] = "fuse-squared-relu"
    target_ops: ClassVar[tuple] = (aten.relu.default,)

    def apply(self, program: Program, context: Context) -> PassResult:
        work, notes = program.clone(), []
        for match in list(matches(work, written_out)):
            call = work.insert_call(match.anchor, ops.squared_relu.default, (match.bound["x"],), like=match.anchor)
            match.anchor.replace_all_uses_with(call)
            notes.append(Note.at(match.anchor, "a squared relu"))
        return PassResult(work.clean(), notes) if notes else PassResult(program)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu() ** 2)


def main() -> None:
    from thresher.testing import Case, prove

    def build(batch: int, width: int) -> tuple[nn.Module, tuple]:
        return FeedForward(width), (torch.randn(batch, width),)

    prove(FuseSquaredRelu(), Case("feed-forward", build, batch=(1, 3), width=(8, 12)))
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.squared_relu, x)

    model, args = build(3, 16)
    compiled = thresher.compile(model, args, passes=["exact", FuseSquaredRelu()], target="cpu")  # checked against eager
    print(compiled.text)
    assert "examples.squared_relu" in compiled.text
    print("proven")


if __name__ == "__main__":
    main()
