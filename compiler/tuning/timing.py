"""Timing that can be trusted on a shared machine: contenders take turns in one process, and medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PAUSE = 0.1  # seconds between contenders: worker threads of the last one spin for a while before they sleep, and steal a core


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: the median and the quartiles over all rounds, and the median of each round."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...] = ()

    def over(self, other: Timing) -> float:
        """How many times as long as ``other``: the median of the ratios of each round, in which both met the same neighbours."""
        return statistics.median(mine / its for mine, its in zip(self.rounds, other.rounds, strict=True))


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int = 10, calls: int = 3) -> dict[str, Timing]:
    """Each round gives every contender one warm call and ``calls`` timed ones, in turn."""
    samples: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            time.sleep(PAUSE)
            call()
            samples[name].append([_milliseconds(call) for _ in range(calls)])
    return {name: _timing(values) for name, values in samples.items()}


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _timing(rounds: list[list[float]]) -> Timing:
    low, median, high = statistics.quantiles([sample for of_round in rounds for sample in of_round], n=4)
    return Timing(median, low, high, tuple(map(statistics.median, rounds)))
