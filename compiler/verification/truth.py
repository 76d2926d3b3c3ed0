"""A program in float64, and how far rounding moves its results: the judge where two float32 results differ by more than they should.

How far an element may be off is measured, not modelled: the program runs in its own dtypes and in float64 on the same numbers, and the
difference of the two is what rounding did there. One run says little of a single element, which may be right by accident. So the
program runs at other points, too: its numbers are changed at random, by a few units in the last place, as is needed to meet the other
side of a jump, and by up to a few per cent, as is needed to round a small number otherwise that is added to a large one. Whole numbers
stay: they are masks, counts and indices, and a model may rely on a mask of exactly 1.

Nothing is excused where torch's own rounding is small: another output, another element and what is right in float64 alone are judged by
their own spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from thresher.ir.program import Program
from thresher.runtime.comparison import Truth

STEPS = (8, 2.0**10)  # units in the last place of a number's dtype, at most
LARGEST_STEP = 2.0**-5  # relative to the number
RUNS = 24  # at most; most errors are explained by four


class SampledTruth(Truth):
    """The truth on one input. A run of the program is made when it is asked for, and not before.

    Args:
        program: in its own dtypes it is the reference, in float64 the truth.
        flat: its flat inputs.

    Raises :class:`ValueError` where the program in float64 is another one.
    """

    def __init__(self, program: Program, flat: Sequence[Any]):
        self.program, self.flat, self.runs = program, flat, 0
        outputs = program.run(*flat, dtype=torch.float64)
        for node, output in zip(program.output_nodes, outputs):
            if isinstance(output, Tensor) and isinstance(node, fx.Node) and not _fits(output, node.meta["val"]):
                raise ValueError(f"{node.name} looks at bits, of which float64 has others")
        none = [torch.zeros_like(o, dtype=torch.float64) if isinstance(o, Tensor) else o for o in outputs]
        super().__init__(outputs, none)

    def widen(self) -> bool:
        """Run the program once more: first on the input itself, then next to it."""
        if self.runs >= RUNS:
            return False
        program, flat = neighbour(self.program, self.flat, self.runs)
        self.runs += 1
        try:
            narrow, wide = program.run(*flat), program.run(*flat, dtype=torch.float64)
        except Exception:  # the model cannot be run on this neighbour, which then says nothing
            return True
        self.spread = [
            torch.maximum(s, _distance(a, b)) if isinstance(s, Tensor) else s
            for s, a, b in zip(self.spread, narrow, wide)
        ]
        return True

    def settled(self) -> Truth:
        """Return the truth with the spread of all runs, for those who cannot run the program."""
        while self.widen():
            pass
        return Truth(self.outputs, self.spread)


def neighbour(program: Program, flat: Sequence[Any], seed: int) -> tuple[Program, list[Any]]:
    """Return the program and its inputs with all numbers but whole ones a little changed; for seed 0 just as they are.

    The steps are those of STEPS and LARGEST_STEP in turn.
    """
    if seed == 0:
        return program, list(flat)
    generator, ulps = torch.Generator().manual_seed(seed), (*STEPS, math.inf)[seed % (len(STEPS) + 1)]
    constants = {name: _moved(value, ulps, generator) for name, value in program.constants.items()}
    return replace(program, constants=constants), [_moved(v, ulps, generator) for v in flat]


def _moved(value: Any, ulps: float, generator: torch.Generator) -> Any:
    """Return ``value`` with each number moved by at most so many units; what lies from -1 to 1 stays there, what is finite stays finite."""
    if isinstance(value, Tensor) and value.is_complex():
        return torch.view_as_complex(_moved(torch.view_as_real(value.resolve_conj()), ulps, generator))
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    limits = torch.finfo(value.dtype)
    step = min(ulps * limits.eps, LARGEST_STEP)
    factors = 1 + step * (2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1)
    wide = value.double()
    bound = torch.full_like(wide, limits.max).masked_fill(wide.abs() <= 1, 1.0)
    moved = torch.clamp(wide * factors.to(value.device), -bound, bound)
    return torch.where(wide == wide.round(), wide, moved).to(value.dtype)


def _fits(output: Tensor, declared: Any) -> bool:
    """Return whether an output has the shape that its node declares, where that is not free."""
    sizes = zip(output.shape, declared.shape)
    return output.dim() == declared.dim() and all(a == b for a, b in sizes if isinstance(b, int))


def _distance(value: Tensor, truth: Tensor) -> Tensor:
    """Return the absolute errors; infinity where one is not finite and the other is something else."""
    wide = torch.complex128 if value.is_complex() or truth.is_complex() else torch.float64
    a, b = value.to(wide), truth.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
