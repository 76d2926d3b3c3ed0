"""``Budget``: how far an approximate model may be from the original one, and by which metric.

An error is measured per calibration sample between the outputs of the original eager model and those of the candidate. What must stay
within the limit is not the mean of a few samples but the mean that is to be expected: the upper end of its confidence interval,

    mean + t(n - 1) s / sqrt(n)            Student's t, one-sided, at ``confidence``; s: the samples' standard deviation

so that the budget also holds on inputs that nobody measured. Fractions of rows (``top1``) have Wilson's interval instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thresher.errors import InputError

Metric = Callable[[Any, Any], float]


def _floats(outputs: Sequence[Any]) -> list[Tensor]:
    floats = [o.double() for o in outputs if isinstance(o, Tensor) and o.is_floating_point()]
    if not floats:
        raise InputError(
            "the model has no floating-point output to measure an error on: give Budget(metric=f, max_drop=...)"
        )
    return floats


def rel_l2(reference: Sequence[Any], candidate: Sequence[Any]) -> float:
    """Return |a - b| / |a| over all floating-point outputs."""
    pairs = list(zip(_floats(reference), _floats(candidate), strict=True))
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return math.sqrt(difference / max(sum(float(a.square().sum()) for a, _ in pairs), 1e-300))


def cosine(reference: Sequence[Any], candidate: Sequence[Any]) -> float:
    """Return 1 - cos(a, b) over the last dimension: the mean over the others, and the worst of the outputs."""
    pairs = zip(_floats(reference), _floats(candidate), strict=True)
    return max(float(1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs)


def top1(reference: Sequence[Any], candidate: Sequence[Any]) -> float:
    """Return the fraction of rows of the first output whose largest element is at another index."""
    a, b = _floats(reference)[0], _floats(candidate)[0]
    return float((a.argmax(-1) != b.argmax(-1)).double().mean())


def kl(reference: Sequence[Any], candidate: Sequence[Any]) -> float:
    """Return KL(softmax(a) || softmax(b)) over the last dimension of the first output, the mean over the others, in nats."""
    a, b = (o.log_softmax(-1) for o in (_floats(reference)[0], _floats(candidate)[0]))
    return float((a.exp() * (a - b)).sum(-1).mean())


METRICS: dict[str, Metric] = {"rel_l2": rel_l2, "cosine": cosine, "top1": top1, "kl": kl}


@dataclass(frozen=True)
class Budget:
    """An upper limit of one metric.

    Examples are ``Budget(rel_l2=0.01)``, ``Budget(cosine=0.01)``, ``Budget(top1=0.005)``, ``Budget(kl=0.02)``, and
    ``Budget(metric=f, max_drop=0.005)`` with f(reference, candidate) -> float on what the model returns, for one sample.

    Args:
        seed: of the split of the calibration samples into those for the search and those held out.
        held_out: the fraction of the samples that is held out to measure the result.
        confidence: with which the mean of the error is within the limit.

    Raises:
        InputError: for none or several metrics, or a number out of its range.
    """

    rel_l2: float | None = None
    cosine: float | None = None
    top1: float | None = None
    kl: float | None = None
    metric: Metric | None = None
    max_drop: float | None = None
    seed: int = 0
    held_out: float = 0.5
    confidence: float = 0.99

    def __post_init__(self) -> None:
        names = [n for n in METRICS if getattr(self, n) is not None]
        if len(names) + (self.metric is not None) != 1 or (self.metric is None) != (self.max_drop is None):
            raise InputError(f"a budget takes one of {', '.join(METRICS)}, or metric= and max_drop=; given: {names}")
        if not 0 <= self.limit < math.inf:
            raise InputError(f"the limit of a budget must be a number from 0 on, not {self.limit}")
        if not 0 < self.held_out < 1 or not 0.5 <= self.confidence < 1:
            raise InputError("held_out must be between 0 and 1, confidence from 0.5 to below 1")

    @property
    def name(self) -> str:
        """The name of the metric."""
        builtin = next((n for n in METRICS if getattr(self, n) is not None), None)
        return builtin or str(getattr(self.metric, "__name__", "metric"))

    @property
    def limit(self) -> float:
        """The largest error that is allowed, in the unit of the metric."""
        value = self.max_drop if self.metric is not None else getattr(self, self.name)
        assert value is not None
        return float(value)

    @property
    def on_user_structure(self) -> bool:
        """True if the metric takes what the model returns, not its flat outputs."""
        return self.metric is not None

    @property
    def measure(self) -> Metric:
        """The metric: a function of the reference and the candidate outputs of one sample."""
        return self.metric or METRICS[self.name]

    def summary(self, errors: Sequence[float], rows: int = 1) -> Measured:
        """Summarize the errors of samples; ``rows``: the number of rows of which each error is a fraction, where the metric counts them."""
        from scipy import stats  # a second to import

        values = torch.tensor(errors, dtype=torch.float64)
        if not bool(torch.isfinite(values).all()):
            return Measured(math.inf, math.inf, math.inf, int(values.isfinite().logical_not().int().argmax()))
        spread = float(values.std()) if len(errors) > 1 else abs(float(values.mean()))
        quantile = stats.t.ppf(self.confidence, max(len(errors) - 1, 1))
        bound = float(values.mean()) + float(quantile) * spread / math.sqrt(len(errors))
        if self.top1 is not None:
            bound = wilson(float(values.mean()), rows * len(errors), float(stats.norm.ppf(self.confidence)))
        return Measured(float(values.mean()), bound, float(values.max()), int(values.argmax()))


def wilson(p: float, n: int, z: float) -> float:
    """Return the upper end of Wilson's score interval for a fraction p of n, at the normal quantile z (Wilson 1927).

    It is above 0 for p = 0, too: what was never seen may still happen now and then.
    """
    return (p + z * z / (2 * n) + z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)


@dataclass(frozen=True)
class Measured:
    """An error over samples: its mean, the upper end of the mean's confidence interval, and the worst sample."""

    mean: float
    bound: float
    worst: float
    worst_sample: int
