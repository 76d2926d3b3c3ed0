"""Makers of tensors: each draws one from a generator, so that two seeds give two inputs of the same shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

#: What it returns is a tensor, or a tuple or a dictionary of them.
Maker = Callable[[torch.Generator], Any]


def normal(*shape: int) -> Maker:
    """Return a maker of normal numbers."""
    return lambda generator: torch.randn(shape, generator=generator)


def whole(high: int, *shape: int, low: int = 0) -> Maker:
    """Return a maker of integers from ``low`` to below ``high``."""
    return lambda generator: torch.randint(low, high, shape, generator=generator)


#: Twelve tokens of text; special tokens of small configurations are above them.
PROMPT = whole(300, 1, 12, low=5)


def ones(*shape: int, dtype: torch.dtype = torch.int64) -> Maker:
    """Return a maker of ones: a mask that leaves out nothing."""
    return lambda generator: torch.ones(shape, dtype=dtype)


def fixed(value: Any) -> Maker:
    """Return a maker of the same numbers every time: the sizes of images, the indices of patches."""
    return lambda generator: torch.tensor(value)


def pair(*makers: Maker) -> Maker:
    """Return a maker of a tuple."""
    return lambda generator: tuple(maker(generator) for maker in makers)


def parts(makers: Mapping[str, Maker]) -> Maker:
    """Return a maker of a dictionary."""
    return lambda generator: {name: maker(generator) for name, maker in makers.items()}


def constant(value: Any) -> Maker:
    """Return a maker of what is no tensor: a flag."""
    return lambda generator: value


def text_with(token: int, count: int, vocabulary: int = 300) -> Maker:
    """Return a maker of a prompt that has ``count`` placeholders of an image between its tokens."""

    def make(generator: torch.Generator) -> torch.Tensor:
        tokens = torch.randint(5, vocabulary, (1, count + 8), generator=generator)
        tokens[:, 2 : count + 2] = token
        return tokens

    return make


def patches(height: int, width: int, numbers: int) -> Maker:
    """Return a maker of the patches of one image, each with its row and its column (from 1) before its numbers."""

    def make(generator: torch.Generator) -> torch.Tensor:
        grid = torch.cartesian_prod(torch.arange(1.0, height + 1), torch.arange(1.0, width + 1))
        return torch.cat((grid, torch.randn(height * width, numbers, generator=generator)), 1)[None]

    return make


def boxes(count: int) -> Maker:
    """Return a maker of boxes (left, top, right, bottom), as fractions of a page."""

    def make(generator: torch.Generator) -> torch.Tensor:
        corners = torch.rand(1, count, 2, 2, generator=generator)
        return corners.sort(2).values.flatten(2)

    return make
