"""Comparison: of programs in float64 (exact passes), and of compiled results with the eager model (lowering).

Every error is relative to the scale of the reference output (its largest finite magnitude), so that one number means the
same for logits and for probabilities. NaN and infinities must be in the same places.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.ir.free_sizes import at_other_sizes
from thresher.ir.nodes import is_tensor
from thresher.ir.program import Program
from thresher.runtime.comparison import EXACT_TOLERANCE as EXACT_TOLERANCE  # the public name
from thresher.runtime.comparison import TOLERANCE, Divergence, compare
from thresher.verification.probes import probes, random_inputs

#: The tolerances of :mod:`thresher.runtime.comparison` by torch's dtypes.
LOWERING_TOLERANCE = {getattr(torch, name): tolerance for name, tolerance in TOLERANCE.items()}


MAX_SIZES = 12  # that are tried, until the model runs on one

# ---------------------------------------------------------------------- programs in float64


@dataclass
class Observed:
    """A program with its outputs on its probes, for comparison with a later version of it.

    ``skipped`` says why there is no random input among them: the program itself fails on it; empty where there is one. ``dtype``: that of
    all floating-point numbers; None for those that the program has.
    """

    program: Program
    probes: list[tuple] = field(default_factory=list)
    outputs: list[list] = field(default_factory=list)
    skipped: str = ""
    dtype: torch.dtype | None = torch.float64

    def add(self, flat: tuple) -> Exception | None:
        """Run the program on one more input; return its error, where it fails."""
        try:
            outputs = self.program.run(*flat, dtype=self.dtype)
        except Exception as error:  # whatever an operator of torch raises
            return error
        self.probes.append(flat)
        self.outputs.append(outputs)
        return None


def observe(program: Program) -> Observed:
    """Run ``program`` in float64 on its example, on random inputs that fit it, and, where it can be, on more.

    That is normal noise, where the range of the random inputs is limited, and other sizes, where sizes are free: an exact pass is exact for
    numbers and sizes that the example does not show, too. Inputs on which the program fails are left out.
    """
    example, fitting = probes(program)
    observed = Observed(program)
    if observed.add(example):  # it looks at bits, of which float64 has others
        observed.dtype = None
        if error := observed.add(example):
            raise error
    if error := observed.add(fitting):
        observed.skipped = describe(error)
        return observed
    noise = random_inputs(program, ranges=False)
    if not _equal(fitting, noise):
        observed.add(noise)
    if (resized := resized_inputs(program, fitting)) is not None:
        observed.add(resized)
    return observed


def resized_inputs(program: Program, flat: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return flat inputs like ``flat`` of other sizes that fit ``program``; None where no size is free, or none of those tried fits.

    Attention is computed step by step to find that out: torch's fused kernels read past the end of keys and values of different lengths.
    """
    for resized in itertools.islice(at_other_sizes(program, flat), MAX_SIZES):
        try:
            with sdpa_kernel(SDPBackend.MATH):
                program.run(*resized)
        except Exception:  # whatever an operator of torch raises
            continue
        return resized
    return None


def describe(error: Exception) -> str:
    """Return one line that names an error of the model itself."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(torch.equal(x, y) if isinstance(x, Tensor) else True for x, y in zip(a, b))


def compare_programs(before: Observed, after: Program) -> Divergence:
    """Return the worst float64 divergence of ``after`` over the probes of ``before``."""
    divergences = [
        compare(expected, after.run(*flat, dtype=before.dtype)) for flat, expected in zip(before.probes, before.outputs)
    ]
    return max(divergences, key=lambda d: (bool(d.reason), d.relative))


def first_divergence(before: Program, after: Program, tolerance: float) -> fx.Node | None:
    """Return the first node of ``after`` whose value differs from that of the node with its name and shape in ``before``; else None."""
    values: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor) and node.op == "call_function":
            values[node.name] = value

    suspects: list[fx.Node] = []

    def check(node: fx.Node, value: Any) -> None:
        known = values.get(node.name)
        if (
            known is not None
            and is_tensor(node)
            and known.shape == value.shape
            and compare([known], [value]).exceeds(tolerance)
        ):
            suspects.append(node)

    before.run(*before.probe, dtype=torch.float64, watch=keep)
    after.run(*before.probe, dtype=torch.float64, watch=check)
    return suspects[0] if suspects else None
