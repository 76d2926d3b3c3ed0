"""A clock that says what a test wants it to, and builds that go by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from thresher.analysis.cost.break_even import BreakEven, Layer
from thresher.analysis.cost.cost import MachineModel, machine_model
from thresher.artifact.compiled import Compiled
from thresher.backends.base import Backend
from thresher.driver.clock import Clock
from thresher.driver.compile import run_stages
from thresher.driver.options import CompileOptions
from thresher.driver.session import open_session
from thresher.driver.stages import capture_model


class FakeClock(Clock):
    """Contenders are run once and take the milliseconds in ``times`` (others: 2). ``break_even`` gives the break-even point of a layer
    (None: as the conftest has it), ``machine`` the machine (None: a typical one). ``asked`` lists what was to be measured."""

    def __init__(
        self,
        times: Mapping[str, float] | None = None,
        break_even: Callable[[Layer], BreakEven] | None = None,
        machine: MachineModel | None = None,
    ):
        self.times, self.points, self.speed = times or {}, break_even, machine
        self.asked: list[str] = []

    def race(self, contenders: Mapping[str, Callable[[], object]], rounds: int = 10) -> dict[str, float]:
        for call in contenders.values():
            call()
        return {name: self.times.get(name, 2.0) for name in contenders}

    def break_even(self, backend: Backend, target: str, layer: Layer) -> BreakEven:
        self.asked.append(layer.workload)
        return super().break_even(backend, target, layer) if self.points is None else self.points(layer)

    def machine(self, backend: Backend, target: str) -> MachineModel:
        self.asked.append("machine")
        return self.speed or machine_model(target)


def compile_with(clock: Clock, model: nn.Module, args: Sequence[Any], **settings: Any) -> Compiled:
    """``thresher.compile`` by another clock."""
    options = CompileOptions.of(settings)
    with open_session(options, clock) as session:
        return run_stages(capture_model(model, args, None, options, session), options, session)
