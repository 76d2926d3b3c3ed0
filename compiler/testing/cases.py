"""A model that a pass is tried on, in many sizes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from thresher.frontend.capture import capture
from thresher.ir.program import Program

Built = tuple[nn.Module, tuple]


@dataclass(frozen=True, init=False)
class Case:
    """A model in many sizes: ``build(**sizes)`` makes a module and its inputs, and each size is drawn from the values given here.

    ``Case("conv, relu", build, n=(1, 3), channels=(4, 6))``. Weights and inputs are random; the generator is seeded before each build.
    """

    name: str
    build: Callable[..., Built]
    sizes: dict[str, Sequence[Any]]

    def __init__(self, name: str, build: Callable[..., Built], **sizes: Sequence[Any]):
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "build", build)
        object.__setattr__(self, "sizes", sizes)

    def draws(self, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
        """Return up to ``count`` different combinations of sizes: the first value of each, the last of each, then random ones."""
        every = list(itertools.product(*self.sizes.values()))
        first, last, rest = every[0], every[-1], every[1:-1]
        random.Random(seed).shuffle(rest)
        chosen = list(dict.fromkeys([first, last, *rest]))[:count]
        return (dict(zip(self.sizes, values)) for values in chosen)

    def module(self, sizes: dict[str, Any], dtype: torch.dtype | None = None, seed: int = 0) -> Built:
        """Return the module in evaluation mode and its inputs; floating ones in ``dtype``."""
        torch.manual_seed(seed)
        model, args = self.build(**sizes)
        if dtype is not None:
            model = model.to(dtype)
            args = tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
        return model.eval(), tuple(args)

    def program(self, sizes: dict[str, Any], dtype: torch.dtype | None = None) -> Program:
        """Return the captured module. Raises :class:`CaptureError` where it cannot be captured, as in a dtype that it does not have."""
        model, args = self.module(sizes, dtype)
        return capture(model, args)


def described(case: Case, sizes: dict[str, Any]) -> str:
    """Return the name of the case with its sizes, as findings say it."""
    return f"{case.name} ({', '.join(f'{k}={v}' for k, v in sizes.items())})" if sizes else case.name
