"""Depthwise convolution, channels last: one multiply-add per tap and channel, so memory decides.

    out[b, y, x, c] = sum_{i, j} in[b, y S + i D, x S + j D, c] * w[i, j, c]

A few neighbouring pixels times a register's width of channels are computed together, the taps unrolled, so that each loaded
input row serves several outputs.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, te

from thresher.backends.tvm.kernels.gemm import inline_epilogue
from thresher.backends.tvm.kernels.machine import Machine

BLOCK = "depthwise"


def convolution(
    x: te.Tensor, weight: te.Tensor, out: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> te.Tensor:
    """``x`` [B, H, W, C] already padded, ``weight`` [KH, KW, C] -> [B, *out, C]."""
    i, j = (te.reduce_axis((0, weight.shape[d]), name=f"k{d}") for d in (0, 1))

    def element(b: Any, y: Any, z: Any, c: Any) -> Any:
        return te.sum(
            x[b, y * stride[0] + i * dilation[0], z * stride[1] + j * dilation[1], c] * weight[i, j, c], axis=[i, j]
        )

    return te.compute((x.shape[0], *out, x.shape[3]), element, name=BLOCK)


def schedule(sch: s_tir.Schedule, machine: Machine) -> None:
    """Rows over the threads, pixels x channels in registers."""
    conv = sch.get_sblock(BLOCK)
    epilogue = inline_epilogue(sch, conv)
    alone = sch.get(epilogue).name_hint == BLOCK
    if alone:
        epilogue = sch.cache_write(conv, 0, "local")
    b, y, x, c = sch.get_loops(epilogue)
    if int(sch.get(c).extent) % machine.lanes:
        _schedule_odd(sch, conv, (b, y, c), alone)
        return
    pixels = next(p for p in (4, 2, 7, 3, 1) if int(sch.get(x).extent) % p == 0)
    x, pixel = sch.split(x, [None, pixels])
    c, lane = sch.split(c, [None, machine.lanes])
    sch.reorder(b, y, x, c, pixel, lane)
    sch.parallel(sch.fuse(b, y))
    sch.compute_at(conv, c, preserve_unit_loops=True)
    if not alone:
        sch.set_scope(conv, 0, "local")
    *spatial, i, j = sch.get_loops(conv)
    inner = spatial[-2:]
    sch.reorder(i, j, *inner)
    for loop in (i, j, inner[0]):
        sch.unroll(loop)
    sch.vectorize(inner[1])
    start = sch.decompose_reduction(conv, i)
    *_, row, lanes = sch.get_loops(start)
    sch.unroll(row)
    sch.vectorize(lanes)
    sch.unroll(pixel)
    sch.vectorize(lane)


def _schedule_odd(sch: s_tir.Schedule, conv: Any, loops: tuple[Any, Any, Any], alone: bool) -> None:
    """Widths that registers do not divide: one plain loop over the channels with the taps unrolled in it.

    LLVM vectorises that loop and its rest; lanes with a condition each would run one at a time.
    """
    b, y, c = loops
    sch.parallel(sch.fuse(b, y))
    sch.compute_at(conv, c, preserve_unit_loops=True)
    if not alone:
        sch.set_scope(conv, 0, "local")
    *_, i, j = sch.get_loops(conv)
    sch.unroll(i)
    sch.unroll(j)
    sch.decompose_reduction(conv, i)
