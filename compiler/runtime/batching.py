"""A batch of any size, computed in pieces of sizes that there is code for. Needs neither torch nor the compiler.

A batch of n is covered by pieces whose sizes add up to n or more; what is missing in the last piece is filled with copies of its last
sample, and cut off the results. Which pieces: those that take the least time together, by the time that each size takes.

    best(0) = 0,  best(n) = min over sizes b: time(b) + best(max(n - b, 0))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

Run = Callable[[Sequence[Any]], list[Any]]


class BatchSplitter:
    """``runs``: what computes a batch of each size; ``batched``: for every input, whether it has a sample for each of the batch (its first
    dimension); ``times``: milliseconds of each size."""

    def __init__(self, runs: Mapping[int, Run], batched: Sequence[bool], times: Mapping[int, float]):
        self.runs, self.batched, self.times = dict(runs), list(batched), dict(times)
        self.plan = lru_cache(256)(self._plan)

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Flat inputs, all torch tensors or all NumPy arrays, to flat outputs of the same kind."""
        count = self.count(inputs)
        sizes = self.plan(count)
        if sizes == (count,):
            return self.runs[count](inputs)
        done, results = 0, []
        for size in sizes:
            part = [_part(x, done, size) if batched else x for x, batched in zip(inputs, self.batched)]
            results.append([y[: count - done] for y in self.runs[size](part)])
            done += size
        return [_joined(parts) for parts in zip(*results)]

    def count(self, inputs: Sequence[Any]) -> int:
        """How many samples there are."""
        return next(len(x) for x, batched in zip(inputs, self.batched) if batched)

    def _plan(self, count: int) -> tuple[int, ...]:
        """The sizes for a batch of ``count``, the largest first; a batch of none is computed as one and cut."""
        best, chosen = [0.0], [0]
        for n in range(1, max(count, 1) + 1):
            time, size = min((self.times[b] + best[max(n - b, 0)], b) for b in self.runs)
            best.append(time)
            chosen.append(size)
        sizes, left = [], max(count, 1)
        while left > 0:
            sizes.append(chosen[left])
            left -= chosen[left]
        return tuple(sorted(sizes, reverse=True))


def _part(x: Any, start: int, size: int) -> Any:
    part = x[start : start + size]
    missing = size - len(part)
    if not missing:
        return part
    if not len(part):  # a batch of none: any numbers do
        return x.new_zeros((size, *x.shape[1:])) if hasattr(x, "new_zeros") else np.zeros((size, *x.shape[1:]), x.dtype)
    return _joined([part, *[part[-1:]] * missing])


def _joined(parts: Sequence[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    import torch

    if parts[0].device.type != "cpu":
        return torch.cat(list(parts))
    # by one thread: after work of several, torch's threads spin for a while, and whoever runs next waits for a core
    whole = torch.empty((sum(len(p) for p in parts), *parts[0].shape[1:]), dtype=parts[0].dtype)
    np.concatenate([memory_of(p.detach().contiguous()) for p in parts], out=memory_of(whole))
    return whole


def memory_of(x: Any) -> np.ndarray:
    """The bytes of a contiguous tensor on the CPU, whatever its dtype (NumPy has no bfloat16)."""
    import torch

    return x.reshape(-1).view(torch.uint8).numpy()
