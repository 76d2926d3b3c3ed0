"""Everything that a build measures, in one place: tests, and builds that must come out the same each time, put another clock here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from thresher.analysis.cost.break_even import BreakEven, Layer
from thresher.analysis.cost.cost import MachineModel
from thresher.backends.base import Backend
from thresher.driver import measure_break_even, measure_machine
from thresher.tuning.timing import interleaved


class Clock:
    """The real one."""

    def now(self) -> float:
        """Return seconds since some fixed point."""
        return time.perf_counter()

    def race(self, contenders: Mapping[str, Callable[[], object]], rounds: int = 10) -> dict[str, float]:
        """Return the median milliseconds of each call; they take turns, so that all meet the same neighbours on the machine."""
        return {name: timing.median for name, timing in interleaved(contenders, rounds=rounds).items()}

    def break_even(self, backend: Backend, target: str, layer: Layer) -> BreakEven:
        """Return the seconds that ``layer`` takes dense and skipping zeros."""
        return measure_break_even.measure(backend, target, layer)

    def machine(self, backend: Backend, target: str) -> MachineModel:
        """Return what the machine does in a second."""
        return measure_machine.measure(backend, target)
