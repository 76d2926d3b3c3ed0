"""The data of a report: records of what a build did and what it gained, which JSON carries.

:class:`~thresher.report.report.Report` adds how they are shown: as tables on a terminal, as Markdown, or as a page.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Self, get_args, get_origin, get_type_hints

import torch

from thresher.approximation.ledger import Spent
from thresher.report.graph_diff import Line
from thresher.rewriting.contract import SkippedZeros
from thresher.rewriting.manager import PassRecord
from thresher.runtime.comparison import Check


@dataclass
class Figures:
    """Size and work of a program: its parameters, the floating-point operations of a run, and the bytes of its constants."""

    parameters: int
    flops: int
    bytes: int


@dataclass
class Kernel:
    """One call of a kernel: the nodes of the lowered program that it computes, their modules, and the median of its times in ms."""

    name: str
    nodes: list[str]
    modules: list[str]
    milliseconds: float


@dataclass
class TorchCall:
    """A node that torch computes: its operator, the reason, and the median of its times in ms (0 where the target is not here)."""

    node: str
    operator: str
    reason: str
    milliseconds: float


@dataclass
class Layer:
    """The shape of one weight before and after; ``after`` is empty where the weight is gone."""

    module: str
    operator: str
    before: list[int]
    after: list[int]

    @property
    def remaining(self) -> float:
        """The fraction of the numbers of this weight that remain, 0 to 1."""
        before, after = (torch.Size(shape).numel() for shape in (self.before, self.after))
        return after / before if self.after and before else 0.0


@dataclass
class ReportData:
    """Everything that a build records of itself.

    Attributes:
        before, after: the captured and the rewritten program.
        passes: every pass that ran or was skipped, in order.
        checks: every comparison that validation made.
        seconds: build time by stage.
        latency: milliseconds by contender, where a benchmark was run.
        widths: milliseconds by candidate, where widths were measured.
        tuning: milliseconds tuned and untuned, where kernels were tuned.
        tuned: the number of workloads with a plan from a record, and of all that have plans.
        attention: the module and the kind of every attention that was found.
        approximation: milliseconds of the exact and of the approximate model.
        spent: what approximate passes spent of the error budget.
        sparsity: the layers that meet zeros.
        library: the nodes that torch computes.
        estimate: milliseconds of a run by the cost model that the passes decide with.
        batch: a sentence on how a batch of any size is computed; empty where the size is fixed.
        memory: bytes. ``weights`` are as packed for the kernels, ``activations`` as planned for all intermediate values; ``one operator at
            a time`` is what these take if each is freed after its last use, for comparison.
        graph: the lines of the captured program (``before``) and of the rewritten one (``after``).
        kernels: in the order in which they run; empty where the target is not on this machine.
    """

    model: str
    target: str
    backend: str
    before: Figures
    after: Figures
    passes: list[PassRecord] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    latency: dict[str, float] = field(default_factory=dict)
    widths: dict[str, float] = field(default_factory=dict)
    tuning: dict[str, float] = field(default_factory=dict)
    tuned: tuple[int, int] = (0, 0)
    attention: list[tuple[str, str]] = field(default_factory=list)
    approximation: dict[str, float] = field(default_factory=dict)
    spent: list[Spent] = field(default_factory=list)
    sparsity: list[SkippedZeros] = field(default_factory=list)
    library: list[TorchCall] = field(default_factory=list)
    estimate: float = 0.0
    batch: str = ""
    memory: dict[str, int] = field(default_factory=dict)
    graph: dict[str, list[Line]] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)

    def layers(self) -> list[Layer]:
        """Return the weights of the captured program with their shapes before and after, in the order in which they are read."""
        return [
            Layer(line.module, line.operator, weight, _shape_after(line, i))
            for line in self.graph.get("before", ())
            for i, weight in enumerate(line.weights)
        ]

    def to_json(self) -> str:
        """Return all of the report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the report that :meth:`to_json` wrote."""
        return _restore(cls, json.loads(text))


def _shape_after(line: Line, index: int) -> list[int]:
    if line.mark == "gone":
        return []
    weights = line.other["weights"] if line.other else line.weights
    return weights[index] if index < len(weights) else []


def _restore(kind: Any, value: Any) -> Any:
    """Return ``value``, as JSON has it, as an instance of the type ``kind``."""
    parameters = get_args(kind)
    if dataclasses.is_dataclass(kind):
        kinds = get_type_hints(kind)
        return kind(**{name: _restore(kinds[name], v) for name, v in value.items()})  # type: ignore[operator]
    if get_origin(kind) is list:
        return [_restore(parameters[0], v) for v in value]
    if get_origin(kind) is dict:
        return {key: _restore(parameters[1], v) for key, v in value.items()}
    return tuple(value) if get_origin(kind) is tuple else value
