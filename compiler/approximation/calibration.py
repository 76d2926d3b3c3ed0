"""Calibration: what the original model says to the user's samples, and how far a candidate is from it.

The samples are split once, by the budget's seed: one part chooses among candidates, the other judges what was chosen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from thresher.approximation.budget import Budget, Measured
from thresher.errors import InputError
from thresher.ir.program import Program

LEAST = 4  # samples
MOST = 256  # samples that are used, from the first on


@dataclass
class Calibration:
    """``choosing`` and ``judging`` are flat inputs; ``original`` is the captured model."""

    original: Program
    budget: Budget
    choosing: list[list[Any]]
    judging: list[list[Any]]
    _references: dict[int, list[Any]] = field(default_factory=dict)

    @staticmethod
    def of(original: Program, samples: Iterable[Any], budget: Budget) -> Calibration:
        """``samples``: tensors, tuples of positional or dictionaries of keyword arguments, like the example inputs.

        Raises :class:`InputError` naming the sample that does not fit, or if there are too few.
        """
        signature, flat = original.signature("cpu"), []
        for number, sample in zip(range(MOST), samples):
            args, kwargs = ((), sample) if isinstance(sample, dict) else (sample, {})
            args = (args,) if isinstance(args, Tensor) else tuple(args)
            try:
                flat.append(signature.check(original.flatten_inputs(args, kwargs)))
            except InputError as error:
                raise InputError(f"calibration sample {number}: {error}") from error
        if len(flat) < LEAST:
            raise InputError(
                f"calibration needs at least {LEAST} samples, some of which judge the result; there are {len(flat)}"
            )
        order = random.Random(budget.seed).sample(range(len(flat)), len(flat))
        judges = min(max(round(budget.held_out * len(flat)), 2), len(flat) - 2)
        return Calibration(original, budget, [flat[i] for i in order[judges:]], [flat[i] for i in order[:judges]])

    def measure(self, program: Program, samples: Sequence[list[Any]]) -> Measured:
        """The budget's metric of ``program`` against the original."""
        return self.budget.summary([self.error(program, flat) for flat in samples], self.rows)

    @property
    def rows(self) -> int:
        """Of the first output of a sample."""
        first = next((o for o in self.reference(self.choosing[0]) if isinstance(o, Tensor)), None)
        return max(1, first.numel() // first.shape[-1]) if first is not None and first.dim() else 1

    def error(self, program: Program, flat: list[Any], metric: Callable[[Any, Any], float] | None = None) -> float:
        """Of one sample, by the budget's metric or another one on flat outputs."""
        return self.distance(flat, program.run(*flat), metric)

    def distance(self, flat: list[Any], found: list[Any], metric: Callable[[Any, Any], float] | None = None) -> float:
        """From what the original says to a sample to what was found, both flat."""
        reference = self.reference(flat)
        if metric is not None:
            return metric(reference, found)
        if self.budget.on_structure:
            reference, found = (self.original.unflatten_outputs(outputs) for outputs in (reference, found))
        return float(self.budget.measure(reference, found))

    def reference(self, flat: list[Any]) -> list[Any]:
        """What the original says; remembered."""
        if id(flat) not in self._references:
            self._references[id(flat)] = self.original.run(*flat)
        return self._references[id(flat)]


def watch(
    program: Program, samples: Sequence[list[Any]], nodes: Mapping[fx.Node, Callable[[dict[fx.Node, Any]], None]]
) -> None:
    """Run ``program`` on every sample, and call ``nodes[n]`` with the values of n and of its arguments when n has been computed."""
    needed = {source for node in nodes for source in (node, *node.all_input_nodes)}
    for flat in samples:
        values: dict[fx.Node, Any] = {}

        def see(node: fx.Node, value: Any, values: dict[fx.Node, Any] = values) -> None:
            if node in needed:
                values[node] = value
            if node in nodes:
                nodes[node](values)

        program.run(*flat, watch=see)
