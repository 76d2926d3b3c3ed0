"""Elementary functions that vectorise: polynomials instead of calls into the C library, which run one element at a time.

exp:  2^n p(r), n = round(x / ln 2), |r| <= ln 2 / 2, p of degree 6 (Cephes); error about 1 unit in the last place.
erf:  x P(x^2) / Q(x^2) on [-4, 4];  tanh: the same form on [-9, 9] (the rational minimax fits of Eigen); error about 3e-7.
NaN stays NaN, and infinities go where they must.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx

LOG2E, LN2_HIGH, LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
ERF_P = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
         -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02)  # fmt: skip
ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
TANH_P = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
          1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03)  # fmt: skip
TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


def _f(value: float) -> Any:
    return tirx.const(value, "float32")


def _horner(x: Any, coefficients: Sequence[float]) -> Any:
    result = _f(coefficients[0])
    for c in coefficients[1:]:
        result = result * x + _f(c)
    return result


def _clamp(x: Any, low: float, high: float) -> Any:
    """Selects, not min and max: a NaN must pass."""
    return tirx.Select(x < _f(low), _f(low), tirx.Select(x > _f(high), _f(high), x))


def exp(x: Any) -> Any:
    """e^x for a float32 expression."""
    y = _clamp(x, -87.33, 88.7)
    n = te.floor(y * _f(LOG2E) + _f(0.5))
    r = y - n * _f(LN2_HIGH) - n * _f(LN2_LOW)
    p = _horner(r, EXP) * r * r + r + _f(1.0)
    scaled = p * tirx.reinterpret("float32", (n.astype("int32") + 127) << 23)
    return tirx.Select(x < _f(-87.33), _f(0.0), tirx.Select(x > _f(88.7), x * _f(3.4e38), scaled))


def erf(x: Any) -> Any:
    y = _clamp(x, -4.0, 4.0)
    s = y * y
    inner = y * _horner(s, ERF_P) / _horner(s, ERF_Q)
    return tirx.Select(x <= _f(-4.0), _f(-1.0), tirx.Select(x >= _f(4.0), _f(1.0), inner))


def tanh(x: Any) -> Any:
    y = _clamp(x, -7.90531110763549805, 7.90531110763549805)
    s = y * y
    return tirx.Select(te.abs(x) < _f(0.0004), x, y * _horner(s, TANH_P) / _horner(s, TANH_Q))


def sigmoid(x: Any) -> Any:
    return _f(1.0) / (_f(1.0) + exp(-x))


def gelu(x: Any) -> Any:
    return (_f(0.5) * x) * (_f(1.0) + erf(x * _f(0.7071067811865476)))  # halved first: 3e38 stays finite


def gelu_tanh(x: Any) -> Any:
    return _f(0.5) * x * (_f(1.0) + tanh(_f(0.7978845608028654) * (x + _f(0.044715) * x * x * x)))


def silu(x: Any) -> Any:
    return x / (_f(1.0) + exp(-x))


#: What replaces a call into the C library, by the name of the torch operator.
VECTORISED: dict[str, Callable[[Any], Any]] = {"exp": exp, "erf": erf, "tanh": tanh, "sigmoid": sigmoid, "silu": silu}
