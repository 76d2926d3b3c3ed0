"""Time contenders on a shared machine: they take turns in one process, and their medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

Name = TypeVar("Name")
Sample = TypeVar("Sample")
PAUSE = 0.1  # seconds between contenders: worker threads of the last one spin for a while before they sleep, and steal a core


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: the median and the quartiles over all rounds, and the median of each round."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...] = ()

    def over(self, other: Timing) -> float:
        """Return how many times as long this takes as ``other``: the median of the ratios of the rounds.

        In one round both met the same neighbours.
        """
        return statistics.median(mine / its for mine, its in zip(self.rounds, other.rounds, strict=True))


def seconds(call: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(contenders: Mapping[Name, Callable[[], Sample]], rounds: int) -> dict[Name, list[Sample]]:
    """Take one sample of every contender in each round, in turn; return the samples of each."""
    samples: dict[Name, list[Sample]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, sample in contenders.items():
            samples[name].append(sample())
    return samples


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int = 10, calls: int = 3) -> dict[str, Timing]:
    """Time the contenders in turn: in each round each makes one warm call and ``calls`` timed ones, after a pause."""

    def sample(call: Callable[[], object]) -> list[float]:
        time.sleep(PAUSE)
        call()
        return [1e3 * seconds(call) for _ in range(calls)]

    samples = in_turn({name: partial(sample, call) for name, call in contenders.items()}, rounds)
    return {name: _timing(values) for name, values in samples.items()}


def _timing(rounds: list[list[float]]) -> Timing:
    low, median, high = statistics.quantiles([sample for of_round in rounds for sample in of_round], n=4)
    return Timing(median, low, high, tuple(map(statistics.median, rounds)))
