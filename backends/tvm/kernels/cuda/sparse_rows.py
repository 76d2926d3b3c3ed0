"""A few rows times a weight on a GPU, without the inputs that are 0: what calls ``sparse_rows.cuh``."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm import te, tirx

from thresher.backends.tvm.kernels.cuda.schedules import MULTIPROCESSORS

THREADS, FEW = 128, 8
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
NAMES = {"float32": "float", "float16": "half", "bfloat16": "nv_bfloat16"}
LEAST, MOST = 32, 512  # inputs of a slice


@dataclass(frozen=True)
class Problem:
    """x [m, k] times a weight [k, n]."""

    m: int
    k: int
    n: int
    dtype: str

    @property
    def columns(self) -> int:
        """Of a thread: 16 bytes."""
        return 16 // BYTES[self.dtype]

    @property
    def across(self) -> int:
        """Blocks beside each other."""
        return -(-self.n // (THREADS * self.columns))

    @property
    def slice(self) -> int:
        """Inputs of a block: so many slices that each multiprocessor has two blocks, if the inputs are enough."""
        wanted = -(-self.k * self.across // (2 * MULTIPROCESSORS))
        return min(MOST, max(LEAST, -(-wanted // LEAST) * LEAST))

    @property
    def slices(self) -> int:
        return -(-self.k // self.slice)

    @property
    def function(self) -> str:
        """The instance of the template."""
        return f"thresher::sparse_rows<{self.m}, {self.k}, {self.n}, {self.slice}, {self.columns}>"


def fits(m: int, n: int, dtype: str) -> bool:
    """Whether there is a kernel."""
    return 0 < m <= FEW and dtype in BYTES and n % (16 // BYTES[dtype]) == 0


@functools.cache
def source() -> str:
    return Path(__file__).with_suffix(".cuh").read_text()


def sums(problem: Problem, x: te.Tensor, weight: te.Tensor) -> te.Tensor:
    """[slices, m, n], float32."""
    from tvm.backend.cuda.op import cuda_func_call

    def body(inputs: Any, outputs: Any) -> Any:
        pointers = [b.data for b in (*inputs, *outputs)]
        statement = tirx.Evaluate(cuda_func_call(problem.function, *pointers, source_code=source()))
        extents = (THREADS, problem.slices, problem.across)
        for axis, extent in zip(("threadIdx.x", "blockIdx.y", "blockIdx.x"), extents):
            statement = tirx.AttrStmt(te.thread_axis(axis), "thread_extent", tirx.const(extent, "int32"), statement)
        return statement

    shape = [problem.slices, problem.m, problem.n]
    return te.extern([shape], [x, weight], body, name="sparse_rows", dtype="float32")
