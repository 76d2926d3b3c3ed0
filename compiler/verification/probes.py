"""Inputs that a program is compared on: the user's example, and random ones that fit the operators as the example does.

A random input keeps what its example shows and an operator may need: matrices that are symmetric (and positive definite) or triangular,
distributions that sum to one, sorted rows, rows with one number that is not zero, whole numbers that may be indices, infinities, and its
range: signs, and an interval between -1 and 1. Where the example shows none of these it is normal noise, whose columns differ in scale by
powers of four, so that no column stands for another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from thresher.ir.program import Program

SUM_TOLERANCE = 1e-2  # of the sum of a distribution: float16 has no more digits where there are many classes
Draw = Callable[[Tensor, torch.Generator], Tensor]


def probes(program: Program, seed: int = 0) -> list[tuple]:
    """Return two lists of flat inputs: the user's example, and a random one that fits it (:func:`random_inputs`)."""
    return [program.probe, random_inputs(program, seed)]


def random_inputs(program: Program, seed: int = 0, ranges: bool = True) -> tuple[Any, ...]:
    """Return random flat inputs that fit the example; without ``ranges`` numbers of any sign and size, as far as nothing else is kept."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(random_like(v, generator, ranges) for v in program.probe)


def random_like(example: Any, generator: torch.Generator, ranges: bool = True) -> Any:
    """Return a random value with the shape, the dtype and the properties of ``example``; literals as they are."""
    if not isinstance(example, Tensor) or example.dtype is torch.bool or example.numel() == 0:
        return example.clone() if isinstance(example, Tensor) else example
    wide = _wide(example.detach().cpu())
    draw = next((draw for holds, draw in KINDS if holds(wide)), _in_range if ranges else _noise)
    return draw(wide, generator).to(example.dtype).reshape(example.shape).to(example.device)


def _wide(value: Tensor) -> Tensor:
    if value.is_complex():
        return value.resolve_conj().cdouble()
    if value.dtype in (torch.uint16, torch.uint32, torch.uint64):  # with which torch hardly computes
        return value.to(torch.int64)
    return value.double() if value.is_floating_point() else value


# ---------------------------------------------------------------------- properties


def _is_whole(value: Tensor) -> bool:
    """Whole numbers; of floating-point numbers, several different ones: all zeros or all ones are an example of anything."""
    if not value.is_floating_point():
        return not value.is_complex()
    return bool((value == value.round()).all()) and bool((value != value.flatten()[0]).any())


def _is_sorted(value: Tensor) -> bool:
    """Rows of three or more that rise, or fall, and not all are constant."""
    if value.is_complex() or value.dim() == 0 or value.shape[-1] < 3:
        return False
    steps = value.diff(dim=-1)
    return bool((steps != 0).any()) and (bool((steps >= 0).all()) or bool((steps <= 0).all()))


def _is_one_hot(value: Tensor) -> bool:
    return value.dim() > 1 and value.shape[-1] > 1 and bool((value != 0).sum(-1).eq(1).all())


def _is_matrix(value: Tensor) -> bool:
    """Square matrices of numbers that are not all the same."""
    square = value.dim() > 1 and value.shape[-1] == value.shape[-2] > 1
    return square and (value.is_floating_point() or value.is_complex()) and bool((value != value.flatten()[0]).any())


def _is_hermitian(value: Tensor) -> bool:
    return _is_matrix(value) and bool(((value - value.mH).abs() <= 1e-5 * value.abs().max()).all())


def _is_triangular(value: Tensor) -> bool:
    return _is_matrix(value) and (torch.equal(value, value.tril()) or torch.equal(value, value.triu()))


def _distribution_dim(value: Tensor) -> int | None:
    """Return the last dimension along which numbers from 0 to 1 sum to 1; None where there is none."""
    if not value.is_floating_point() or not bool((value >= 0).all()):
        return None
    dims = (d for d in reversed(range(value.dim())) if value.shape[d] > 1)
    return next((d for d in dims if bool(((value.sum(d) - 1).abs() <= SUM_TOLERANCE).all())), None)


# ---------------------------------------------------------------------- draws


def _shuffled(value: Tensor, generator: torch.Generator) -> Tensor:
    """The same numbers in another order: they may be indices, and only those seen are known to be valid."""
    return value.flatten()[torch.randperm(value.numel(), generator=generator)]


def _shuffled_rows(value: Tensor, generator: torch.Generator) -> Tensor:
    rows = value.reshape(-1, value.shape[-1])
    return rows[torch.randperm(len(rows), generator=generator)]


def _sorted(value: Tensor, generator: torch.Generator) -> Tensor:
    descending = bool((value.diff(dim=-1) < 0).any())
    return _in_range(value, generator).reshape(value.shape).sort(-1, descending=descending).values


def _rescaled(value: Tensor, generator: torch.Generator) -> Tensor:
    """``D A D`` with a positive diagonal ``D``: zeros, symmetry, definiteness and a determinant that is not 0 remain."""
    scales = torch.exp2(2 * torch.rand(value.shape[-1], generator=generator, dtype=torch.float64) - 1)
    return value * scales * scales[:, None]


def _hermitian(value: Tensor, generator: torch.Generator) -> Tensor:
    rescaled = _rescaled(value, generator)
    return (rescaled + rescaled.mH) / 2


def _distribution(value: Tensor, generator: torch.Generator) -> Tensor:
    """Other weights for the same events; an impossible one remains so."""
    weights = value * torch.exp(torch.randn(value.shape, generator=generator, dtype=torch.float64))
    return weights / weights.sum(_distribution_dim(value), keepdim=True)


def _with_infinities(value: Tensor, generator: torch.Generator) -> Tensor:
    finite = value.isfinite()
    drawn = random_like(value[finite], generator)
    return value.masked_scatter(finite, drawn)


def _in_range(value: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of the example's signs and, where all of it is from -1 to 1, from its own interval.

    All zeros or all ones are an example of anything.
    """
    low, high = float(value.min()), float(value.max())
    if low == high:
        anything = low == 0 or (value.numel() > 1 and low.is_integer())
        return _noise(value, generator) if anything else _nearby(value, generator)
    if low >= -1 and high <= 1:
        return low + (high - low) * torch.rand(value.shape, generator=generator, dtype=torch.float64)
    noise = _noise(value, generator)
    if low < 0 < high:
        return noise
    return low + noise.abs() if low >= 0 else high - noise.abs()


def _nearby(value: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers a little smaller where they are from -1 to 1, else a little larger."""
    factors = 1 + 0.5 * torch.rand(value.shape, generator=generator, dtype=torch.float64)
    return torch.where(value.abs() <= 1, value / factors, value * factors)


def _noise(value: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    if value.dim() > 1:
        noise = noise * 4.0 ** (torch.arange(value.shape[-1], dtype=torch.float64) % 3 - 1)
    scale = value.std().item() if value.numel() > 1 else 1.0
    return noise * (scale if scale > 0 else 1.0)


#: What is kept of an example besides its range, the most particular first, and how another value that has it is drawn.
KINDS: Sequence[tuple[Callable[[Tensor], bool], Draw]] = (
    (lambda v: not bool(v.isfinite().all()), _with_infinities),
    (_is_hermitian, _hermitian),
    (_is_triangular, _rescaled),
    (_is_one_hot, _shuffled_rows),
    (lambda v: _is_whole(v) and _is_sorted(v), _shuffled_rows),
    (lambda v: _is_whole(v) or v.is_complex(), _shuffled),
    (lambda v: _distribution_dim(v) is not None, _distribution),
    (_is_sorted, _sorted),
)
