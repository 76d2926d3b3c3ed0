"""Timing that can be trusted on a shared machine: contenders take turns in one process, and medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PAUSE = 0.1  # seconds between contenders: worker threads of the last one spin for a while before they sleep, and steal a core


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: the median and the quartiles over all rounds."""

    median: float
    low: float
    high: float


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int = 10, calls: int = 3) -> dict[str, Timing]:
    """Each round gives every contender one warm call and ``calls`` timed ones, in turn."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            time.sleep(PAUSE)
            call()
            for _ in range(calls):
                start = time.perf_counter()
                call()
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)
