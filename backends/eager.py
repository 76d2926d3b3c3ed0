"""The reference backend: torch runs the program node by node. Nothing is generated, so nothing can be saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, fx

from thresher.analysis.cost.cost import constant_bytes
from thresher.backends.base import DEFAULT, Backend, Executable, LoweringOptions
from thresher.errors import BackendError
from thresher.ir.nodes import is_tensor
from thresher.ir.program import Program
from thresher.runtime.memory import Region
from thresher.runtime.weight_store import Weights


class EagerExecutable(Executable):
    """A program that torch runs node by node, with constants of its own: those of the captured model are the user's live parameters."""

    def __init__(self, program: Program):
        self.program, self.memory = program.detached(), {"weights": constant_bytes(program)}
        self.literals = [() if is_tensor(n) else (n.meta.get("val"),) for n in program.placeholders]
        self.computed = [isinstance(o, fx.Node) for o in program.output_nodes]

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        tensors = iter(inputs)
        outputs = self.program.run(*(literal[0] if literal else next(tensors) for literal in self.literals))
        results: list[Any] = []
        for value, computed in zip(outputs, self.computed):
            if computed:
                others = [*inputs, *self.program.constants.values(), *results]
                shares = isinstance(value, Tensor) and Region(t for t in others if isinstance(t, Tensor)).touches(value)
                results.append(value.clone() if shares else value)
        return results

    def as_text(self) -> str:
        return self.program.text()

    def save(self, directory: Path, weights: Weights) -> dict[str, Any]:
        raise BackendError(
            "the eager backend has nothing to save: it runs the captured program in torch; use backend='tvm'"
        )


class EagerBackend(Backend):
    """Runs the captured program in torch, on any target; what it computes is what other backends are compared with."""

    name: ClassVar[str] = "eager"

    def lower(self, program: Program, target: str, lowering_options: LoweringOptions = DEFAULT) -> Executable:
        return EagerExecutable(program)

    def load(self, code: bytes, manifest: dict[str, Any], weights: Weights) -> Executable:
        raise BackendError("artifacts of the eager backend do not exist")
