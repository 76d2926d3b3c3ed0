"""A batch of any size, computed in pieces of sizes that there is code for.

A batch of n is covered by pieces whose sizes add up to n or more; what is missing in the last piece is filled with copies of its last
sample, and cut off the results. Those pieces are taken that need the least time together, by the time that each size takes.

    best(0) = 0,  best(n) = min over sizes b: time(b) + best(max(n - b, 0))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from thresher.runtime.memory import memory_of

Run = Callable[[Sequence[Any]], list[Any]]


class BatchSplitter:
    """Computes a batch of any size in pieces.

    Args:
        runs: the function that computes a batch, by the size of the batch.
        batched: for every input, True if its first dimension is the batch.
        times: the time of each size in milliseconds.
    """

    def __init__(self, runs: Mapping[int, Run], batched: Sequence[bool], times: Mapping[int, float]):
        self.runs, self.batched, self.times = dict(runs), list(batched), dict(times)
        self.plan = lru_cache(256)(self._plan)

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Compute flat outputs from flat inputs; all are torch tensors, or all NumPy arrays."""
        count = self.count(inputs)
        sizes = self.plan(count)
        if sizes == (count,):
            return self.runs[count](inputs)
        done, results = 0, []
        for size in sizes:
            piece = [_piece(x, done, size) if batched else x for x, batched in zip(inputs, self.batched)]
            results.append([y[: count - done] for y in self.runs[size](piece)])
            done += size
        return [_joined(pieces) for pieces in zip(*results)]

    def count(self, inputs: Sequence[Any]) -> int:
        """Return the number of samples."""
        return next(len(x) for x, batched in zip(inputs, self.batched) if batched)

    def _plan(self, count: int) -> tuple[int, ...]:
        """Return the sizes for a batch of ``count``, the largest first; a batch of none is computed as one and cut."""
        best, chosen = [0.0], [0]
        for n in range(1, max(count, 1) + 1):
            time, size = min((self.times[b] + best[max(n - b, 0)], b) for b in self.runs)
            best.append(time)
            chosen.append(size)
        sizes, remaining = [], max(count, 1)
        while remaining > 0:
            sizes.append(chosen[remaining])
            remaining -= chosen[remaining]
        return tuple(sorted(sizes, reverse=True))


def _piece(x: Any, start: int, size: int) -> Any:
    """Return ``size`` samples from ``start`` on; where there are fewer, the last one again."""
    piece = x[start : start + size]
    missing = size - len(piece)
    if not missing:
        return piece
    if not len(piece):  # a batch of none: any numbers do
        return x.new_zeros((size, *x.shape[1:])) if _is_torch(x) else np.zeros((size, *x.shape[1:]), x.dtype)
    return _joined([piece, *[piece[-1:]] * missing])


def _joined(pieces: Sequence[Any]) -> Any:
    """Return the pieces, all torch tensors or all NumPy arrays, as one along the first dimension."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if not _is_torch(first):
        return np.concatenate(pieces)
    whole = first.new_empty((sum(len(p) for p in pieces), *first.shape[1:]))
    if first.device.type == "cpu":
        # by one thread: after work of several, torch's threads spin for a while, and whoever runs next waits for a core
        np.concatenate([memory_of(p.detach().contiguous()) for p in pieces], out=memory_of(whole))
        return whole
    start = 0
    for piece in pieces:
        whole[start : start + len(piece)].copy_(piece)
        start += len(piece)
    return whole


def _is_torch(x: Any) -> bool:
    return not isinstance(x, np.ndarray)
