"""A model with random weights and the inputs it is run on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, and the flat outputs that are expected of it (None: those of eager torch)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    expected: list[Any] | None = None


@dataclass(frozen=True)
class Case:
    """One model and the inputs it is judged on.

    Attributes:
        model: a torch module, or the path of an ONNX file; a file needs inputs with expected outputs.
        inputs: what the model is compiled for.
        others: further inputs of the same shapes, on which the compiled model is called too.
        tolerance: the largest error relative to an output's scale, where its source states one and the judge's is smaller.
    """

    model: nn.Module | Path
    inputs: Inputs
    others: list[Inputs] = field(default_factory=list)
    tolerance: float = 0.0


class SampleExcluded(Exception):
    """A sample that is counted apart: its message says why no compiler of dense tensors could be judged by it."""
