"""The contexts that cases of approximate and specialising passes need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helpers.attention import SLOW
from thresher import Budget
from thresher.analysis.cost.break_even import BreakEven, Layer
from thresher.approximation.calibration import Calibration
from thresher.ir.program import Program
from thresher.rewriting.contract import Context

SAMPLES = 6


def calibrated(limit: float, noise: float = 1.0) -> Callable[[Program], Context]:
    """Return contexts with a budget of ``limit`` (rel_l2), on a machine on which small products are worth saving.

    The samples are the example inputs with ``noise`` times normal noise; integers and booleans stay.
    """

    def context(program: Program) -> Context:
        generator = torch.Generator().manual_seed(0)
        samples = [tuple(_noisy(v, noise, generator) for v in program.probe) for _ in range(SAMPLES)]
        calibration = Calibration.of(program, samples, Budget(rel_l2=limit))
        return Context(machine=SLOW, calibration=calibration, find_break_even=free)

    return context


def _noisy(value: Any, noise: float, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value + noise * torch.randn(value.shape, generator=generator).to(value.dtype)


def free(layer: Layer) -> BreakEven:
    """Return times with which skipping zeros takes what is left."""
    return BreakEven(1.0, (0.01, 1.0), (0.01, 1.0))


def skipping(program: Program) -> Context:
    """Return a context in which skipping zeros costs nothing."""
    return Context(find_break_even=free)
