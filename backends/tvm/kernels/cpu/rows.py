"""Rows: softmax and the norms over the last dimension, each row in few passes while it is in the cache.

Sums run in ``LANES`` independent partial sums (a vector register), because a float sum may not be reordered by the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import s_tir, te, tirx

from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.kernels.cpu import elementwise
from thresher.backends.tvm.kernels.cpu.registers import vectorise

LANES = 16
PREFIX = "row_"  # blocks of these kernels


def _reduced(x: te.Tensor, name: str, combine: Callable, start: Any, f: Callable[..., Any]) -> te.Tensor:
    """Return ``combine`` over the last dimension of f(*index): first into LANES partial results, then into one."""
    *lead, size = x.shape
    k = te.reduce_axis((0, (size + LANES - 1) // LANES), name="k")
    full = int(size) % LANES == 0

    def partial(*index: Any) -> Any:
        position = k * LANES + index[-1]
        value = f(*index[:-1], position if full else te.min(position, size - 1))
        return combine(value if full else tirx.Select(position < size, value, start), axis=k)

    parts = te.compute((*lead, LANES), partial, name=f"{PREFIX}{name}_parts")
    j = te.reduce_axis((0, LANES), name="j")
    return te.compute(tuple(lead), lambda *i: combine(parts[(*i, j)], axis=j), name=f"{PREFIX}{name}")


def _zero() -> Any:
    return tirx.const(0.0, "float32")


def softmax(x: te.Tensor, log: bool = False) -> te.Tensor:
    """Compute softmax or log_softmax over the last dimension."""
    top = _reduced(x, "max", te.max, te.min_value("float32"), lambda *i: x(*i))
    powers = te.compute(
        x.shape, lambda *i: elementwise.named(x(*i) - top(*i[:-1]), elementwise.short_exp), name=f"{PREFIX}exp"
    )
    total = _reduced(powers, "sum", te.sum, _zero(), lambda *i: powers(*i))
    if log:
        return te.compute(x.shape, lambda *i: x(*i) - top(*i[:-1]) - te.log(total(*i[:-1])), name=f"{PREFIX}out")
    return te.compute(x.shape, lambda *i: powers(*i) * (1.0 / total(*i[:-1])), name=f"{PREFIX}out")


def norm(
    x: te.Tensor,
    weight: te.Tensor | None,
    bias: te.Tensor | None,
    epsilon: float,
    centred: bool,
    gone: tuple[int, float, float] | None = None,
) -> te.Tensor:
    """Compute layer_norm (``centred``) or rms_norm over the last dimension.

    ``gone``: (count, total, square) of ``thresher::layer_norm``, whose constant channels are not in ``x``.
    """
    width = int(x.shape[-1])
    count, gone_total, gone_square = gone or (width, 0.0, 0.0)
    size = tirx.const(float(count), "float32")
    mean = None
    if centred:
        total = _reduced(x, "total", te.sum, _zero(), lambda *i: x(*i))
        offset = tirx.const(gone_total, "float32")
        mean = te.compute(total.shape, lambda *i: (total(*i) + offset) / size, name=f"{PREFIX}mean")

    def rest(*i: Any) -> Any:
        """What the channels that are gone add to the sum of squares."""
        if gone is None or mean is None:
            return 0.0
        a, b, c = (tirx.const(v, "float32") for v in (gone_square, -2.0 * gone_total, float(count - width)))
        return a + mean(*i) * (b + c * mean(*i))

    def shifted(*i: Any) -> Any:
        return x(*i) if mean is None else x(*i) - mean(*i[:-1])

    square = _reduced(x, "square", te.sum, _zero(), lambda *i: shifted(*i) * shifted(*i))
    scale = te.compute(
        square.shape,
        lambda *i: 1.0 / te.sqrt((square(*i) + rest(*i)) / size + tirx.const(epsilon, "float32")),
        name=f"{PREFIX}scale",
    )

    def element(*i: Any) -> Any:
        value = shifted(*i) * scale(*i[:-1])
        value = value * weight(i[-1]) if weight is not None else value
        return value + bias(i[-1]) if bias is not None else value

    return te.compute(x.shape, element, name=f"{PREFIX}out")


def schedule(sch: s_tir.Schedule, machine: CpuInfo) -> None:
    """Spread rows over the threads; all stages of a row are computed together."""
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    last = blocks[-1]
    names = [sch.get(b).name_hint for b in blocks]
    for block, name in zip(blocks[:-1], names[:-1]):
        if not name.startswith(PREFIX):  # part of an epilogue
            sch.compute_inline(block)
    *lead, _ = sch.get_loops(last)
    row = sch.fuse(*lead) if len(lead) > 1 else lead[0] if lead else sch.add_unit_loop(last)
    sch.parallel(row)
    stages = [b for b, name in zip(blocks[:-1], names[:-1]) if name.startswith(PREFIX)]
    for block in reversed(stages):
        sch.compute_at(block, row, preserve_unit_loops=True)
    for block, name in zip(blocks[:-1], names[:-1]):
        if name.startswith(PREFIX) and name.endswith("_parts"):
            *_, lane, k = sch.get_loops(block)
            sch.reorder(k, lane)
            sch.vectorize(lane)
            start = sch.decompose_reduction(block, k)
            sch.vectorize(sch.get_loops(start)[-1])
    for block in [*(b for b, name in zip(blocks, names) if name == f"{PREFIX}exp" and b is not last), last]:
        vectorise(sch, sch.get_loops(block)[-1], machine.lanes)
