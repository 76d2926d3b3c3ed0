"""A model that a pass is tried on, in many sizes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from thresher.errors import PassError
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Pass
from thresher.rewriting.registry import make_pass

Built = tuple[nn.Module, tuple]


@dataclass(frozen=True, init=False)
class Case:
    """A model in many sizes: ``build(**sizes)`` makes a module and its inputs, and each size is drawn from the values given here.

    ``Case("conv, relu", build, n=(1, 3), channels=(4, 6))``. Weights and inputs are random; the generator is seeded before each build.

    Attributes:
        name: for messages.
        build: the builder.
        sizes: the values of each size, by its name.
        refused: values of sizes with which the pass is meant to rewrite nothing.
    """

    name: str
    build: Callable[..., Built]
    sizes: dict[str, Sequence[Any]]
    refused: dict[str, Sequence[Any]]

    def __init__(
        self,
        name: str,
        build: Callable[..., Built],
        refused: Mapping[str, Sequence[Any]] | None = None,
        **sizes: Sequence[Any],
    ):
        for size, values in {**sizes, **(refused or {})}.items():
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ValueError(
                    f"case {name!r}: the values of {size} are a sequence, and not {values!r}: {size}=({values!r},)"
                )
        if unknown := sorted((refused or {}).keys() - sizes.keys()):
            raise ValueError(f"case {name!r}: it refuses values of {', '.join(unknown)}, which is no size of it")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "build", build)
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "refused", dict(refused or {}))

    def draws(self, count: int | None = None, seed: int = 0) -> Iterator[dict[str, Any]]:
        """Yield combinations of sizes in which any two values of different sizes occur together; the first ``count`` of them, if given.

        The first is the first value of each size, the second the last of each; the others are chosen greedily, each with as many new pairs
        as can be had.
        """
        every = list(itertools.product(*(range(len(values)) for values in self.sizes.values())))
        rest = every[1:-1]
        random.Random(seed).shuffle(rest)
        chosen = list(dict.fromkeys([every[0], every[-1]]))
        missing = {pair for row in every for pair in _pairs(row)}.difference(*map(_pairs, chosen))
        while missing:
            best = max(rest, key=lambda row: len(missing & _pairs(row)))
            chosen.append(best)
            missing -= _pairs(best)
        for row in chosen[:count]:
            yield {name: values[index] for (name, values), index in zip(self.sizes.items(), row)}

    def module(self, sizes: dict[str, Any], dtype: torch.dtype | None = None, seed: int = 0) -> Built:
        """Return the module in evaluation mode and its inputs; floating ones in ``dtype``."""
        torch.manual_seed(seed)
        model, args = self._checked(self.build(**sizes))
        if dtype is not None:
            model = model.to(dtype)
            args = tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
        return model.eval(), args

    def _checked(self, result: Any) -> Built:
        """Return what the builder returned. Raises :class:`TypeError` where it is no module with its inputs."""
        start = f"case {self.name!r}: the builder returns (module, inputs), with the inputs in a tuple; "
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"{start}it returned a {type(result).__name__}")
        model, args = result
        if not isinstance(model, nn.Module):
            raise TypeError(f"{start}its first value is a {type(model).__name__}")
        if not isinstance(args, (tuple, list)):
            raise TypeError(f"{start}its second value is a {type(args).__name__}: write (x,) for one input")
        return model, tuple(args)

    def program(self, sizes: dict[str, Any], dtype: torch.dtype | None = None) -> Program:
        """Return the captured module. Raises :class:`CaptureError` where it cannot be captured, as in a dtype that it does not have."""
        model, args = self.module(sizes, dtype)
        return capture(model, args)


@dataclass(frozen=True)
class Entry:
    """A case of one pass, and how the pass is run on it.

    ``Entry(case, "{limit=5}", first=("simplify",))``. A table of passes has entries: ``CASES = {"my-pass": [Entry(case)]}``.

    Attributes:
        case: the models.
        options: of the pass.
        first: passes that run before it.
        context: what the pass may look at, made for each program.
        draws, misses: sizes, and graphs one step off, that are tried at most, whatever the other cases of the pass have.
        restored: every parameter of the result must lead back to those of the model; else one that does not is only frozen.
    """

    case: Case
    options: str = ""
    first: Sequence[str | Pass] = ()
    context: Callable[[Program], Context] | None = None
    draws: int | None = None
    misses: int | None = None
    restored: bool = False

    def configured(self, item: str | Pass) -> Pass:
        """Return the pass with the options of this entry, which go with the name of a pass only."""
        if not self.options:
            return make_pass(item)
        if not isinstance(item, str) or "{" in item:
            raise PassError(
                f"case {self.case.name!r} has the options {self.options}: name the pass without any, not {item}"
            )
        return make_pass(item + self.options)


def _pairs(row: tuple[int, ...]) -> set[tuple]:
    """Return the values that occur together in a row, two and two; one alone where there is one size only."""
    places = list(enumerate(row))
    return set(itertools.combinations(places, min(2, len(places))))


def described(case: Case, sizes: dict[str, Any]) -> str:
    """Return the name of the case with its sizes, as findings say it."""
    return f"{case.name} ({', '.join(f'{k}={v}' for k, v in sizes.items())})" if sizes else case.name
