"""ONNX operators that compute each element by itself, in torch: functions of one input, and their activations."""

from __future__ import annotations

import builtins
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.frontend.onnx.rules import Number, plain, rule

plain({
    "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Exp": torch.exp, "Log": torch.log, "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal, "Neg": torch.neg, "Floor": torch.floor, "Ceil": torch.ceil, "Round": torch.round,
    "Erf": torch.erf, "Sin": torch.sin, "Cos": torch.cos, "Tan": torch.tan, "Asin": torch.asin, "Acos": torch.acos,
    "Atan": torch.atan, "Sinh": torch.sinh, "Cosh": torch.cosh, "Asinh": torch.asinh, "Acosh": torch.acosh, "Atanh": torch.atanh,
    "Softplus": F.softplus, "HardSwish": F.hardswish, "Mish": F.mish, "BitwiseNot": torch.bitwise_not, "Not": torch.logical_not,
})  # fmt: skip


@rule("Abs", unsigned="native")
def absolute(x: Tensor) -> Tensor:
    """Return the magnitudes."""
    return x.abs() if x.dtype.is_signed else x


@rule("Sign", unsigned="native")
def sign(x: Tensor) -> Tensor:
    """Return -1, 0 or 1."""
    return x.sign() if x.dtype.is_signed else (x != 0).to(x.dtype)


@rule("IsNaN", unsigned="native")
def is_nan(x: Tensor) -> Tensor:
    """Return where x is no number."""
    return torch.isnan(_wide(x))


@rule("IsInf", unsigned="native")
def is_inf(x: Tensor, *, detect_negative: int, detect_positive: int) -> Tensor:
    """Return where x is infinite, of the signs asked for."""
    positive, negative = _wide(x) == math.inf, _wide(x) == -math.inf
    if detect_positive and detect_negative:
        return positive | negative
    if detect_positive:
        return positive
    return negative if detect_negative else torch.zeros_like(positive)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32) if x.element_size() == 1 else x


@rule("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float) -> Tensor:
    """Return x, times alpha where it is negative."""
    return F.leaky_relu(x, alpha)


@rule("Elu")
def elu(x: Tensor, *, alpha: float) -> Tensor:
    """Return x, and alpha (exp x - 1) where it is negative."""
    return F.elu(x, alpha)


@rule("Celu")
def celu(x: Tensor, *, alpha: float) -> Tensor:
    """Return x, and alpha (exp(x / alpha) - 1) where it is negative."""
    return F.celu(x, alpha)


SELU_ALPHA, SELU_GAMMA = 1.6732632423543772, 1.0507009873554805  # of torch's own selu


@rule("Selu")
def selu(x: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Return gamma times: x, and alpha (exp x - 1) where it is negative."""
    if math.isclose(alpha, SELU_ALPHA, rel_tol=1e-7) and math.isclose(gamma, SELU_GAMMA, rel_tol=1e-7):
        return F.selu(x)
    return gamma * F.elu(x, alpha)


@rule("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float) -> Tensor:
    """Return x where it is above alpha, else 0."""
    return F.threshold(x, alpha, 0.0)


@rule("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Return alpha x + beta within 0 and 1."""
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


@rule("Gelu")
def gelu(x: Tensor, *, approximate: str) -> Tensor:
    """Return x times the normal distribution at x."""
    return F.gelu(x, approximate=approximate)


@rule("Swish")
def swish(x: Tensor, *, alpha: float) -> Tensor:
    """Return x times the sigmoid of alpha x."""
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@rule("PRelu", since=7, unsigned="native")
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """Return x, times ``slope`` where it is negative; ``slope`` is broadcast to x."""
    return torch.where(x < 0, x * slope, x) if x.dtype.is_signed else x


@rule("PRelu", since=6)
def prelu_of_channels(x: Tensor, slope: Tensor) -> Tensor:
    """Return x, times ``slope`` where it is negative; a vector has a number for each channel."""
    return prelu(x, slope.reshape(-1, *[1] * (x.dim() - 2)) if slope.dim() == 1 and x.dim() > 1 else slope)


@rule("Clip", since=11, unsigned="order")
def clip(x: Tensor, low: Number = None, high: Number = None) -> Tensor:
    """Return x within bounds; where they contradict each other the upper one."""
    if low is None and high is None:
        return x
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        bounds = [v if v is None or isinstance(v, Tensor) else torch.full_like(x, v) for v in (low, high)]
        return torch.clamp(x, min=bounds[0], max=bounds[1])
    return torch.clamp(x, low, high)


@rule("Clip", since=6)
def clip_by_attributes(x: Tensor, *, min: float, max: float) -> Tensor:
    """Return x within bounds that are attributes."""
    limits = torch.finfo(x.dtype)
    return torch.clamp(x, builtins.max(min, limits.min), builtins.min(max, limits.max))
