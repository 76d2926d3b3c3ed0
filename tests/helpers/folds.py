"""What the tests of the fold share: small networks by name, dead rows, and a fold that proves itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.passes.fold.fold_channels import FoldChannels
from thresher.rewriting.manager import PassManager, PassRecord
from thresher.verification.compare import EXACT_TOLERANCE, compare_programs, observe


def fold(model: nn.Module, *args: Tensor) -> tuple[Program, PassRecord]:
    """The folded program, proven equal in float64, and the record of fold-channels."""
    program = capture(model.eval(), args)
    exact = [FoldChannels(round_to=1) if isinstance(p, FoldChannels) else p for p in pipelines.exact]
    manager = PassManager(exact, "each")
    folded = manager.run(program)
    assert [r.failure for r in manager.records if r.status == "reverted"] == []
    assert not compare_programs(observe(program), folded).exceeds(EXACT_TOLERANCE)
    return folded, next(r for r in manager.records if r.name == "fold-channels")


def shapes(program: Program) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in program.constants.items()}


def kill(weight: Tensor, *rows: int, dim: int = 0) -> None:
    with torch.no_grad():
        weight.index_fill_(dim, torch.tensor(rows), 0.0)


IMAGE = (2, 3, 9, 9)


class Net(nn.Module):
    """Layers by name, and the function that uses them."""

    def __init__(self, forward: Callable, **layers: nn.Module):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)
