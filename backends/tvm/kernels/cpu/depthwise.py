"""Convolution of groups that have fewer outputs than a register has lanes, channels last: depthwise ones first of all.

    out[b, y, x, c] = sum_{i, j, q} in[b, y S + i D - P, x S + j D - P, (c / O) I + q] * w[i, j, q, c],   q < I

for I inputs and O outputs in each group. A depthwise convolution (I = O = 1) has one multiply-add per tap and channel, so memory decides. A
task takes a few rows of some channels. What it reads is first copied, with the zeros around the image, and once for each output that reads
it, to a buffer that stays in the cache: the hot loop has no condition and reads whole registers, and the padded image is never in memory. A
few neighbouring pixels times a register's width of channels are computed together, the taps unrolled, so that each loaded row serves
several outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from tvm import s_tir, te, tirx

from thresher.backends.tvm.cpu import CACHE_LINE, CpuInfo
from thresher.backends.tvm.kernels.cpu.epilogue import inline_epilogue
from thresher.backends.tvm.kernels.cpu.gemm import shares, whole
from thresher.backends.tvm.kernels.cpu.registers import register_part, vectorise
from thresher.backends.tvm.kernels.loop_marks import cut

BLOCK, STAGED = "depthwise", "depthwise_staged"
MOST_INPUTS = 4  # of a group: with more, the copy for each output costs more than products by group do
MAX_UNROLLED_TAPS = 49  # taps times inputs of a group; of more only a row is unrolled
FREE_STAGE_BYTES = 48 << 10  # bytes of a staged copy up to which it costs nothing more
SEQUENCE_PIXELS = 256  # pixels of a task where images are long and one pixel high


@dataclass(frozen=True)
class Window:
    """The pixels that an output reads, as (y, x) of the stride, the dilation and the zeros before the image."""

    stride: Sequence[int]
    dilation: Sequence[int]
    before: Sequence[int]

    def extent(self, outputs: int, taps: int, axis: int) -> int:
        """Return the number of pixels that ``outputs`` neighbouring outputs read along ``axis``."""
        return (outputs - 1) * self.stride[axis] + (taps - 1) * self.dilation[axis] + 1


@dataclass(frozen=True)
class Task:
    """The outputs that a thread computes from one staged copy: rows x pixels x channels, ``step`` pixels in registers at a time."""

    rows: int
    pixels: int
    channels: int
    step: int


def pack(weight: np.ndarray, lanes: int) -> np.ndarray:
    """Return [C, I, KH, KW] as [KH, KW, I, C], the channels padded with zeros to whole registers."""
    channels, inputs, *taps = weight.shape
    padded = np.zeros((*taps, inputs, -(-channels // lanes) * lanes), weight.dtype)
    padded[..., :channels] = weight.transpose(2, 3, 1, 0)
    return padded


def convolution(
    x: te.Tensor, weight: te.Tensor, out: Sequence[int], groups: int, window: Window, task: Task
) -> te.Tensor:
    """Compute ``x`` [B, H, W, groups * I], ``weight`` packed -> ``out``: [B, OH, OW, C]."""
    batch, height, width, _ = (int(d) for d in x.shape)
    _, *pixels, channels = out
    *taps, inputs, full = (int(d) for d in weight.shape)
    across = whole(pixels[1], task.step)
    need = [window.extent(size, k, d) for d, (size, k) in enumerate(zip((pixels[0], across), taps))]

    def element(b: Any, y: Any, z: Any, q: Any, c: Any) -> Any:
        row, column = y - window.before[0], z - window.before[1]
        inside = [row >= 0, row < height, column >= 0, column < width]
        inside += [c < channels] if full != channels else []
        value = x[b, row, column, tirx.floordiv(c, channels // groups) * inputs + q]
        return tirx.if_then_else(te.all(*inside), value, tirx.const(0, x.dtype))

    staged = te.compute((batch, *need, inputs, full), element, name=STAGED)
    i, j, q = (te.reduce_axis((0, k), name=f"k{d}") for d, k in enumerate((*taps, inputs)))
    (down, right), (up, left) = window.stride, window.dilation

    def one(b: Any, y: Any, z: Any, c: Any) -> Any:
        return te.sum(staged[b, y * down + i * up, z * right + j * left, q, c] * weight[i, j, q, c], axis=[i, q, j])

    shape = (batch, pixels[0], across, full)
    sums = te.compute(shape, one, name=BLOCK, attrs={"task": list(astuple(task))})
    return te.compute(out, lambda *index: sums[index], name="crop")


def tasks(out: Sequence[int], weight: Sequence[int], window: Window, machine: CpuInfo, limit: int = 1) -> list[Task]:
    """Return the ``limit`` tasks with the least estimated time: little copied twice, little staged at a time, whole cache lines, work
    for all threads. ``out``: [B, rows, pixels] of the result; ``weight``: the shape of the filters, [C, I, KH, KW].

    Few pixels computed together load each row more often; those past the end are lost.
    """
    (batch, height, width), (channels, inputs, *taps) = out, weight
    lanes, registers = machine.lanes, -(-channels // machine.lanes)
    even = bool(register_part(channels, lanes))  # else a task takes all channels, and knows where they end
    estimates = []
    steps = sorted((7, 6, 5, 4, 3, 2, 1), key=lambda p: whole(width, p) * (1 + 0.5 / p))
    for order, step in enumerate(steps[: 1 if limit == 1 else 3]):
        across = whole(width if height > 1 or width <= SEQUENCE_PIXELS else SEQUENCE_PIXELS, step)
        for part in (d for d in range(1, registers + 1) if registers % d == 0 and (even or d == registers)):
            for rows in shares(height):
                read_rows = window.extent(rows, taps[0], 0)
                read = read_rows * window.extent(across, taps[1], 1) * inputs * part * lanes * 4
                count = batch * -(-height // rows) * -(-width // across) * (registers // part)
                cost = float(-(-count // machine.threads) * machine.threads * rows * across * part * inputs)
                whole_lines = part == registers or part * lanes * 4 % CACHE_LINE == 0
                cost *= (1 + 0.4 * read_rows / (rows * window.stride[0])) * (1.0 if whole_lines else 1.2)
                cost *= 1 + 0.15 * max(0.0, math.log2(read / FREE_STAGE_BYTES))
                cost += 150 * count / machine.threads  # each starts with a buffer of its own
                estimates.append((cost * (1 + 0.1 * order), Task(rows, across, part * lanes, step)))
    return [task for _, task in sorted(estimates, key=lambda f: f[0])[:limit]]


def schedule(sch: s_tir.Schedule, machine: CpuInfo) -> None:
    """Spread tasks over the threads, pixels x channels in registers."""
    conv, staged = sch.get_sblock(BLOCK), sch.get_sblock(STAGED)
    reduced = [int(sch.get(loop).extent) for loop in sch.get_loops(conv)[-3:]]
    epilogue = inline_epilogue(sch, conv, keep=frozenset((STAGED,)))
    b, y, x, c = sch.get_loops(epilogue)
    channels = int(sch.get(c).extent)
    task = Task(*(int(size) for size in sch.get(conv).annotations["task"]))
    y, row = sch.split(y, [None, task.rows])
    x, column, pixel = sch.split(x, [None, task.pixels // task.step, task.step])
    c, register, lane = sch.split(c, [None, task.channels // machine.lanes, machine.lanes])
    sch.reorder(b, y, x, c, row, column, register, pixel, lane)
    start = sch.fuse(b, y, x, c)
    sch.parallel(start)
    sch.compute_at(conv, register, preserve_unit_loops=True)
    sch.compute_at(staged, start, preserve_unit_loops=True)
    _copy(sch, staged, channels, machine.lanes)
    *spatial, i, q, j = sch.get_loops(conv)
    inner = spatial[-2:]
    sch.reorder(i, q, j, *inner)
    for loop in (i, q, j, inner[0]) if math.prod(reduced) <= MAX_UNROLLED_TAPS else (j, inner[0]):
        sch.unroll(loop)
    sch.vectorize(inner[1])
    *_, row, lanes = sch.get_loops(sch.decompose_reduction(conv, i))
    sch.unroll(row)
    sch.vectorize(lanes)
    sch.unroll(pixel)
    if part := register_part(channels, machine.lanes):
        within, lane = sch.split(lane, [None, part])
        sch.unroll(within)
    elif channels > machine.lanes:
        cut(sch, register, channels // machine.lanes)
    sch.vectorize(lane)


def _copy(sch: s_tir.Schedule, staged: Any, channels: int, lanes: int) -> None:
    """Give the columns of zeros loops of their own, so that the pixels between them are copied without a condition."""
    *_, column, _, channel = sch.get_loops(staged)
    sch.annotate(column, "pragma_loop_partition_hint", 1)
    vectorise(sch, channel, lanes, channels)
