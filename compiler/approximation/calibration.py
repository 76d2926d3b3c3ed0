"""Calibration: the outputs of the original model on the user's samples, and the error of a candidate on them.

The samples are split once, by the budget's seed: the search compares candidates on some, and the error of its result is measured on the
others, which are held out from it.
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

MIN_SAMPLES = 4
MAX_SAMPLES = 256  # that are used, from the first on


@dataclass
class Calibration:
    """The samples of the user, as flat inputs, and the captured model ``original`` that they are run on.

    ``search_samples`` are for the search, ``held_out_samples`` for its result.
    """

    original: Program
    budget: Budget
    search_samples: list[list[Any]]
    held_out_samples: list[list[Any]]
    _references: dict[int, list[Any]] = field(default_factory=dict)

    @staticmethod
    def of(original: Program, samples: Iterable[Any], budget: Budget) -> Calibration:
        """Check the samples and split them by the budget's seed.

        Args:
            original: the captured model.
            samples: tensors, tuples of positional or dictionaries of keyword arguments, like the example inputs.
            budget: names the metric, the seed and the fraction of the samples that is held out.

        Raises:
            InputError: naming the sample that does not fit, or if there are fewer than MIN_SAMPLES.
        """
        signature, flat = original.signature("cpu"), []
        for number, sample in zip(range(MAX_SAMPLES), samples):
            args, kwargs = ((), sample) if isinstance(sample, dict) else (sample, {})
            args = (args,) if isinstance(args, Tensor) else tuple(args)
            try:
                flat.append(signature.check(original.flatten_inputs(args, kwargs)))
            except InputError as error:
                raise InputError(f"calibration sample {number}: {error}") from error
        if len(flat) < MIN_SAMPLES:
            raise InputError(
                f"calibration needs at least {MIN_SAMPLES} samples, some of which are held out to measure the result; there are {len(flat)}"
            )
        order = random.Random(budget.seed).sample(range(len(flat)), len(flat))
        held_out = min(max(round(budget.held_out * len(flat)), 2), len(flat) - 2)
        return Calibration(original, budget, [flat[i] for i in order[held_out:]], [flat[i] for i in order[:held_out]])

    def measure(self, program: Program, samples: Sequence[list[Any]]) -> Measured:
        """Return the budget's metric of ``program`` against the original, over ``samples``."""
        return self.budget.summary([self.error(program, flat) for flat in samples], self.rows)

    @property
    def rows(self) -> int:
        """The number of rows in the first output of a sample: all its dimensions but the last."""
        first = next((o for o in self.reference(self.search_samples[0]) if isinstance(o, Tensor)), None)
        return max(1, first.numel() // first.shape[-1]) if first is not None and first.dim() else 1

    def error(self, program: Program, flat: list[Any], metric: Callable[[Any, Any], float] | None = None) -> float:
        """Return the error of ``program`` on one sample, by the budget's metric or by another ``metric`` on flat outputs."""
        return self.distance(flat, program.run(*flat), metric)

    def distance(self, flat: list[Any], outputs: list[Any], metric: Callable[[Any, Any], float] | None = None) -> float:
        """Return the error of flat ``outputs`` against those of the original on a sample; ``metric`` as in :meth:`error`."""
        reference = self.reference(flat)
        if metric is not None:
            return metric(reference, outputs)
        if self.budget.on_user_structure:
            reference, outputs = (self.original.unflatten_outputs(leaves) for leaves in (reference, outputs))
        return float(self.budget.measure(reference, outputs))

    def reference(self, flat: list[Any]) -> list[Any]:
        """Return the flat outputs of the original on a sample, which are computed once."""
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
