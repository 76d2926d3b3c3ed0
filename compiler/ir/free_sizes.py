"""Free sizes stay free: within a block, a question that would fix one, or bound it, is an error.

The sizes of a program are symbols of torch's ``ShapeEnv``, which all programs of one capture share. Where code asks a symbol for its number
(``int(size)``, ``size == 4``, ``if size > 8``), torch answers for the example, and from then on supposes the answer: a guard, which
nobody would check in a compiled model. The error comes before the supposition, so the sizes are as free afterwards as before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from thresher.errors import ProgramError
from thresher.ir.nodes import is_tensor, shape_of
from thresher.ir.program import Program
from thresher.ir.sizes import SIZES, Numbers, number, other_sizes


def free_sizes(program: Program) -> dict[str, tuple[str, ...]]:
    """Return the shape of every input that has free sizes, by its name, as text."""
    inputs = (n for n in program.placeholders if is_tensor(n))
    return {n.name: tuple(map(str, shape_of(n))) for n in inputs if any(type(d) is not int for d in shape_of(n))}


def at_other_sizes(program: Program, flat: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Yield flat inputs of other sizes than the example's: those of ``flat``, repeated and cut. Not all may fit the model.

    Sizes are all different, and then those alike that are in the example, in turn. None where no size is free.
    """
    values = [n.meta.get("val") for n in program.placeholders]
    pairs = itertools.zip_longest(other_sizes(values), other_sizes(values, together=True))
    for numbers in filter(None, itertools.chain.from_iterable(pairs)):
        yield tuple(_resized(value, declared, numbers) for value, declared in zip(flat, values, strict=True))


def _resized(value: Any, declared: Any, numbers: Numbers) -> Any:
    if not isinstance(value, Tensor) or not isinstance(declared, Tensor):
        return number(declared, numbers) if isinstance(declared, SIZES) else value
    for dim, size in enumerate(declared.shape):
        if isinstance(size, SIZES) and value.shape[dim] > 0:
            value = value.index_select(dim, torch.arange(number(size, numbers), device=value.device) % value.shape[dim])
    return value


@contextmanager
def sizes_kept_free(program: Program) -> Iterator[None]:
    """Raise :class:`ProgramError`, naming the question and the inputs, where code in the block would fix or bound a free size."""
    environment = program.fake_mode.shape_env
    if environment is None or not any(_symbols(n) for n in program.placeholders):
        yield
        return
    try:
        with environment.error_on_new_guards():
            yield
    except torch.fx.experimental.symbolic_shapes._ShapeEnvGuardError as error:
        question = str(error).rpartition(": ")[2].removesuffix(" == True").removesuffix(" == False")
        inputs = ", ".join(f"{name} {list(shape)}".replace("'", "") for name, shape in free_sizes(program).items())
        raise ProgramError(f"it asks for {question}, which would fix a free size of {inputs}") from error


def _symbols(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.SymInt) or (is_tensor(node) and any(type(d) is not int for d in value.shape))
