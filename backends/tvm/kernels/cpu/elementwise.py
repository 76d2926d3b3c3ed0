"""Elementary functions that vectorise: polynomials instead of calls into the C library, which run one element at a time.

exp:  2^n p(r), n = round(x / ln 2), |r| <= ln 2 / 2, p of degree 6 (Cephes); error about 1 unit in the last place.
erf:  x P(x^2) / Q(x^2) on [-4, 4];  tanh: the same form on [-9, 9] (the rational minimax fits of Eigen); error about 3e-7.
NaN stays NaN, and infinities go where they must.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx

ROUNDER, ROUNDER_BITS = 12582912.0, 0x4B400000  # 1.5 * 2^23: adding it rounds to the nearest integer
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


def named(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return ``function`` of a value that has a name. TVM makes branches of selects whose sides read memory; where a loop does not
    vectorise, the processor then mispredicts one per element. Of bfloat16 it is computed in float32 without a name, because what
    TVM makes of a conversion to bfloat16 reads its argument several times.
    """
    if str(value.ty.dtype) == "bfloat16":
        return tirx.Cast("bfloat16", function(tirx.Cast("float32", value)))
    name = tirx.Var("x", value.ty)
    return tirx.Let(name, value, function(name))


def widened(x: Any) -> Any:
    """Return a bfloat16 that is read from memory as float32, by its bits: TVM takes these for a whole number inside of a name."""
    bits = tirx.Cast("uint32", tirx.reinterpret("uint16", x))
    return tirx.reinterpret("float32", bits << tirx.const(16, "uint32"))


def _f(value: float) -> Any:
    return tirx.const(value, "float32")


def _horner(x: Any, coefficients: Sequence[float]) -> Any:
    result = _f(coefficients[0])
    for c in coefficients[1:]:
        result = result * x + _f(c)
    return result


def clamp(x: Any, low: float, high: float) -> Any:
    """Clamp a float32 expression by selects, not min and max: a NaN must pass."""
    return tirx.Select(x < _f(low), _f(low), tirx.Select(x > _f(high), _f(high), x))


def _exp(x: Any, low: float, high: float) -> tuple[Any, Any]:
    """Return (p, n) with e^x = p 2^n for x clamped to [low, high]; n is an int32."""
    y = clamp(x, low, high)
    bits = tirx.reinterpret(
        "int32", y * _f(LOG2E) + _f(ROUNDER)
    )  # the last ones are n: no conversion, no call to round
    n = tirx.reinterpret("float32", bits) - _f(
        ROUNDER
    )  # (TVM would cancel the two ROUNDERs; it does not look through bits)
    r = y - n * _f(LN2_HIGH) - n * _f(LN2_LOW)
    return _horner(r, EXP) * (r * r) + r + _f(1.0), bits - tirx.const(ROUNDER_BITS, "int32")


def _power(n: Any) -> Any:
    """Return 2^n for -127 <= n <= 128, where the ends are 0 and infinity."""
    return tirx.reinterpret("float32", (n + 127) << 23)


def exp(x: Any) -> Any:
    """Return e^x for a float32 expression, with an error of about one unit in the last place."""
    p, n = _exp(x, -104.0, 89.0)
    half = n >> 1
    return p * _power(half) * _power(n - half)  # 2^n itself may be no float32 where e^x is one


def expm1(x: Any) -> Any:
    """Return e^x - 1 for a float32 expression; near 0 by the polynomial of e^x without its 1."""
    return tirx.Select(te.abs(x) < _f(0.34), _horner(x, EXP) * (x * x) + x, exp(x) - _f(1.0))


def log1p(x: Any) -> Any:
    """Return log(1 + x) for an expression x >= 0: log(u), and below 1 what u = 1 + x has lost of x (Kahan)."""
    kind, one = str(x.ty.dtype), tirx.const(1.0, x.ty.dtype)
    bits = f"int{kind.removeprefix('float')}" if kind.startswith("float") else "int16"
    u = tirx.reinterpret(kind, tirx.reinterpret(bits, one + x))  # (TVM would cancel the two ones)
    return te.log(u) - tirx.Select(x < one, ((u - one) - x) / u, tirx.const(0.0, kind))


def c_function(name: str, *arguments: Any) -> Any:
    """Return a call of a function of the C library; half types are computed in float32."""
    kind = str(arguments[0].ty.dtype)
    if kind not in ("float32", "float64"):
        return tirx.Cast(kind, c_function(name, *(tirx.Cast("float32", a) for a in arguments)))
    return tirx.call_pure_extern(kind, f"{name}f" if kind == "float32" else name, *arguments)


def short_exp(x: Any) -> Any:
    """Return e^x without subnormals: 0 below 1.2e-38, infinite from 2.4e38 on."""
    p, n = _exp(x, -88.0, 89.0)
    return p * _power(n)


def erf(x: Any) -> Any:
    """Return the error function of a float32 expression, with an error of about 3e-7."""
    y = clamp(x, -4.0, 4.0)
    s = y * y
    inner = y * _horner(s, ERF_P) / _horner(s, ERF_Q)
    return tirx.Select(x <= _f(-4.0), _f(-1.0), tirx.Select(x >= _f(4.0), _f(1.0), inner))


def tanh(x: Any) -> Any:
    """Return tanh of a float32 expression, with an error of about 3e-7."""
    y = clamp(x, -7.90531110763549805, 7.90531110763549805)
    s = y * y
    return tirx.Select(te.abs(x) < _f(0.0004), x, y * _horner(s, TANH_P) / _horner(s, TANH_Q))


def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + e^-x) of a float32 expression."""
    return _f(1.0) / (_f(1.0) + short_exp(-x))


def gelu(x: Any) -> Any:
    """Return x (1 + erf(x / sqrt 2)) / 2 of a float32 expression (Hendrycks & Gimpel, 2016)."""
    return (_f(0.5) * x) * (_f(1.0) + erf(x * _f(0.7071067811865476)))  # halved first: 3e38 stays finite


def gelu_tanh(x: Any) -> Any:
    """Return the approximation x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 of GELU."""
    return _f(0.5) * x * (_f(1.0) + tanh(_f(0.7978845608028654) * (x + _f(0.044715) * x * x * x)))


def silu(x: Any) -> Any:
    """Return x / (1 + e^-x) of a float32 expression."""
    return x / (_f(1.0) + short_exp(-x))


def hardswish(x: Any) -> Any:
    """Return x min(max(x + 3, 0), 6) / 6 of an expression of any floating type."""
    three, six, zero, sixth = (tirx.const(v, x.ty.dtype) for v in (3.0, 6.0, 0.0, 1 / 6))
    return x * te.max(te.min(x + three, six), zero) * sixth


#: What replaces a call into the C library, by the name of the torch operator.
VECTORISED: dict[str, Callable[[Any], Any]] = {"exp": exp, "erf": erf, "tanh": tanh, "sigmoid": sigmoid, "silu": silu}
