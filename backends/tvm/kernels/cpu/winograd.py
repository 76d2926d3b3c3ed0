"""3x3 convolutions with stride 1 by Winograd's minimal filtering, F(m x m, 3 x 3) for m = 2 and 4, channels last.

    Y = A^T [ (G g G^T) * (B^T d B) ] A         for every tile d of (m + 2)^2 pixels, m^2 results

Summed over the input channels, the elementwise products are a batch of (m + 2)^2 matrix products ``[tiles, C] x [C, N]``: 2.25 (m = 2) or
4 (m = 4) times fewer multiplications than the convolution has, for three passes over the data. The filters are transformed at compile time
in float64. (Lavin & Gray, CVPR 2016; Winograd, 1980.) Rounding: m = 2 as the convolution itself, m = 4 about ten times that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import s_tir, te, tirx

from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.kernels.cpu import batched
from thresher.backends.tvm.kernels.cpu.epilogue import inline_epilogue
from thresher.backends.tvm.kernels.cpu.gemm import whole
from thresher.backends.tvm.kernels.cpu.registers import register_part
from thresher.backends.tvm.kernels.loop_marks import cut

PREFIX = "winograd_"
ROWS, INPUT, COLUMNS, OUT = (f"{PREFIX}{stage}" for stage in ("rows", "input", "columns", "out"))

#: m -> (B^T, G, A^T)
TRANSFORMS: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {
    2: (
        np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], float),
        np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], float) / 2,
        np.array([[1, 1, 1, 0], [0, 1, -1, -1]], float),
    ),
    4: (
        np.array(
            [
                [4, 0, -5, 0, 1, 0],
                [0, -4, -4, 1, 1, 0],
                [0, 4, -4, -1, 1, 0],
                [0, -2, -1, 2, 1, 0],
                [0, 2, -1, -2, 1, 0],
                [0, 4, 0, -5, 0, 1],
            ],
            float,
        ),
        np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], float) / 24,
        np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], float),
    ),
}


@dataclass(frozen=True)
class Tiling:
    """A result [batch, height, width, ...] in tiles of ``m`` x ``m``."""

    m: int
    batch: int
    height: int
    width: int

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles per column and per row of an image."""
        return -(-self.height // self.m), -(-self.width // self.m)

    @property
    def count(self) -> int:
        """The number of tiles of all images."""
        return self.batch * self.grid[0] * self.grid[1]

    @property
    def products(self) -> int:
        """The number of products, (m + 2)^2."""
        return (self.m + 2) ** 2


def transform_filters(weight: np.ndarray, m: int) -> np.ndarray:
    """Return filters [N, C, 3, 3] as [(m + 2)^2, C, N], computed in float64 and then rounded."""
    g = TRANSFORMS[m][1]
    transformed = np.einsum("xi,ncij,yj->xycn", g, weight.astype(np.float64), g, optimize=True)
    return np.ascontiguousarray(transformed.reshape(-1, *transformed.shape[2:]).astype(weight.dtype))


def _combined(row: Sequence[float], values: Sequence[Any]) -> Any:
    """Return ``sum_i row[i] * values[i]``, without zeros and products with 1."""
    total = None
    for factor, value in zip(row, values):
        if factor == 0:
            continue
        term = value if abs(factor) == 1 else value * tirx.const(abs(float(factor)), "float32")
        if total is None:
            total = term if factor > 0 else tirx.const(0.0, "float32") - term
        else:
            total = total + term if factor > 0 else total - term
    return total


def _chosen(index: Any, options: Sequence[Any]) -> Any:
    """Return ``options[index]``; the loop over ``index`` is unrolled, so nothing is chosen at run time."""
    result = options[-1]
    for i in range(len(options) - 2, -1, -1):
        result = tirx.Select(index == i, options[i], result)
    return result


def transform_input(image: te.Tensor, tiling: Tiling) -> te.Tensor:
    """Return ``image`` [B, H, W, C], padded to whole tiles and 2 more, as [(m + 2)^2, tiles, C]."""
    matrix, m, (down, across) = TRANSFORMS[tiling.m][0], tiling.m, tiling.grid
    size, channels = m + 2, int(image.shape[3])
    rows = te.compute(
        (tiling.count, size, size, channels),
        lambda p, x, j, c: _chosen(
            x,
            [
                _combined(
                    row,
                    [
                        image[p // (down * across), p // across % down * m + i, p % across * m + j, c]
                        for i in range(size)
                    ],
                )
                for row in matrix
            ],
        ),
        name=ROWS,
    )
    return te.compute(
        (size * size, tiling.count, channels),
        lambda xy, p, c: _chosen(
            xy % size, [_combined(row, [rows[p, xy // size, j, c] for j in range(size)]) for row in matrix]
        ),
        name=INPUT,
    )


def transform_output(products: te.Tensor, tiling: Tiling, outputs: int) -> te.Tensor:
    """Return [(m + 2)^2, tiles, N in whole registers] as [B, H, W, N]."""
    matrix, m, (down, across) = TRANSFORMS[tiling.m][2], tiling.m, tiling.grid
    size, full = m + 2, int(products.shape[2])
    columns = te.compute(
        (tiling.count, m, size, full),
        lambda p, a, y, n: _chosen(
            a, [_combined(row, [products[x * size + y, p, n] for x in range(size)]) for row in matrix]
        ),
        name=COLUMNS,
    )

    def element(b: Any, y: Any, x: Any, n: Any) -> Any:
        p = (b * down + y // m) * across + x // m
        return _chosen(x % m, [_combined(row, [columns[p, y % m, j, n] for j in range(size)]) for row in matrix])

    result = te.compute((tiling.batch, tiling.height, tiling.width, full), element, name=OUT)
    if outputs == full:
        return result
    return te.compute((*result.shape[:-1], outputs), lambda *i: result[i], name="crop")


@dataclass(frozen=True)
class Plan:
    """Minimal filtering F(m x m, 3 x 3), its products computed by ``product``."""

    m: int
    product: batched.Plan


def plans(
    tiling_of: Callable[[int], Tiling], channels: int, outputs: int, machine: CpuInfo, limit: int = 1
) -> tuple[list[Plan], bool]:
    """Return the plans for either ``m``, ``limit`` in all, the most promising first, and whether that one is estimated to beat the
    convolution itself.

    Estimated seconds: arithmetic at the rate of the packed product, less where it has few rows; what the transforms read and write, and
    the transformed filters, once each.
    """
    direct = tiling_of(2)
    pixels = direct.batch * direct.height * direct.width
    if machine.lanes < 8:
        return [], False
    convolution = _product_seconds(pixels, 9 * channels, whole(outputs, machine.lanes), 1, machine)
    channels, outputs = (whole(size, machine.lanes) for size in (channels, outputs))
    costs = {}
    for m in (2, 4):
        tiling = tiling_of(m)
        between = tiling.products * tiling.count
        moved = 4 * (pixels + 2 * between) * (channels + outputs)
        speed = MOVE_RATES[4 * between * max(channels, outputs) > machine.cache * machine.threads]
        cost = _product_seconds(tiling.count, channels, outputs, tiling.products, machine)
        costs[m] = cost + moved / (speed * machine.threads) + STAGE_SECONDS
    order = [4, 2] if costs[4] < 0.9 * costs[2] else [2, 4]
    estimates = []
    for rank, m in enumerate(order):
        tiling = tiling_of(m)
        products = batched.plans(tiling.count, outputs, channels, tiling.products, machine, limit)
        estimates += [(rank + i, Plan(m, product)) for i, product in enumerate(products)]
    estimates.sort(key=lambda f: f[0])
    faster = costs[order[0]] < 0.9 * convolution
    return [plan for _, plan in estimates[:limit]], faster


MOVE_RATES = (
    4e10,
    3e10,
)  # bytes a thread moves in a second between the stages, where they fit the L2 caches, and where not
STREAM_RATE = 1.4e10  # bytes of weights that all threads together read in a second
STAGE_SECONDS = 2e-5  # seconds that two more parallel stages cost
MULTIPLY_RATE = 7.5e9  # multiply-adds per lane and second of the packed product, per thread, with enough rows


def _product_seconds(rows: int, depth: int, outputs: int, batch: int, machine: CpuInfo) -> float:
    full = -(-rows // 6) * 6 if rows > 6 else rows
    busy = min(1.0, full / 6)
    arithmetic = batch * full * depth * outputs / (MULTIPLY_RATE * machine.lanes / 2 * machine.threads * busy)
    return max(arithmetic, 4 * batch * depth * outputs / STREAM_RATE)


def schedule_input(sch: s_tir.Schedule, machine: CpuInfo) -> None:
    """Compute a tile and a register's width of channels at a time, everything in it unrolled."""
    rows, last = sch.get_sblock(ROWS), sch.get_sblock(INPUT)
    for block in sch.get_producers(rows):
        sch.compute_inline(block)
    xy, p, c = sch.get_loops(last)
    size = int(sch.get(rows).writes[0].source.shape[1])
    x, y = sch.split(xy, [size, size])
    c, lane = sch.split(c, [None, machine.lanes])
    sch.reorder(p, c, x, y, lane)
    sch.parallel(p)
    _on_tile(sch, rows, x, (x, y), lane)


def schedule_output(sch: s_tir.Schedule, machine: CpuInfo) -> None:
    """Compute as for the input; what follows the convolution is computed on the tile."""
    columns, output = sch.get_sblock(COLUMNS), sch.get_sblock(OUT)
    m = int(sch.get(columns).writes[0].source.shape[1])
    full = int(sch.get(columns).writes[0].source.shape[-1])
    last = inline_epilogue(sch, output, keep=frozenset((COLUMNS, OUT)))
    cropped = int(sch.get(sch.get_loops(last)[-1]).extent) != full
    if cropped:
        epilogue, last = last, output
    elif sch.get(last).name_hint != OUT:
        sch.compute_inline(output)
    b, y, x, n = sch.get_loops(last)
    y, row = sch.split(y, [None, m])
    x, column = sch.split(x, [None, m])
    n, lane = sch.split(n, [None, machine.lanes])
    sch.reorder(b, y, x, n, row, column, lane)
    sch.parallel(sch.fuse(b, y, x))
    if cropped:  # whole registers are computed, what there is of them is stored
        sch.reverse_compute_at(epilogue, row)
        *_, beside, stored = sch.get_loops(epilogue)
        outputs = int(sch.get(epilogue).writes[0].source.shape[-1])
        part = register_part(outputs, machine.lanes)
        if not part and outputs > machine.lanes:
            cut(sch, n, outputs // machine.lanes)
        within, stored = sch.split(stored, [None, part or machine.lanes])
        sch.vectorize(stored)
        for loop in (beside, within):
            sch.unroll(loop)
    _on_tile(sch, columns, row, (row, column), lane)


def _on_tile(sch: s_tir.Schedule, first: Any, at: Any, tile: tuple[Any, Any], lane: Any) -> None:
    """Compute the first of two one-dimensional transforms in registers at ``at``, all loops over the tile unrolled."""
    sch.compute_at(first, at, preserve_unit_loops=True)
    *_, i, j, inner = sch.get_loops(first)
    for loop in (i, j, *tile):
        sch.unroll(loop)
    sch.vectorize(inner)
    sch.vectorize(lane)
