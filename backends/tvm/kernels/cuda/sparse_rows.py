"""The product of a few rows and a weight on a GPU, without the inputs that are 0: the caller of ``sparse_rows.cuh``."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm import te, tirx

from thresher.backends.tvm.kernels.cuda.schedules import MULTIPROCESSORS

THREADS, MAX_ROWS = 128, 8
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
NAMES = {"float32": "float", "float16": "half", "bfloat16": "nv_bfloat16"}
MIN_SLICE, MAX_SLICE = 32, 512  # inputs of a slice


@dataclass(frozen=True)
class Problem:
    """A product of x [m, k] and a weight [k, n]."""

    m: int
    k: int
    n: int
    dtype: str

    @property
    def columns(self) -> int:
        """The columns of a thread: 16 bytes."""
        return 16 // BYTES[self.dtype]

    @property
    def across(self) -> int:
        """The blocks beside each other."""
        return -(-self.n // (THREADS * self.columns))

    @property
    def slice(self) -> int:
        """The inputs of a block: so many slices that each multiprocessor has two blocks, if the inputs are enough."""
        wanted = -(-self.k * self.across // (2 * MULTIPROCESSORS))
        return min(MAX_SLICE, max(MIN_SLICE, -(-wanted // MIN_SLICE) * MIN_SLICE))

    @property
    def slices(self) -> int:
        """The number of slices of the inputs."""
        return -(-self.k // self.slice)

    @property
    def function(self) -> str:
        """The instance of the template."""
        return f"thresher::sparse_rows<{self.m}, {self.k}, {self.n}, {self.slice}, {self.columns}>"


def fits(m: int, n: int, dtype: str) -> bool:
    """Return whether there is a kernel."""
    return 0 < m <= MAX_ROWS and dtype in BYTES and n % (16 // BYTES[dtype]) == 0


@functools.cache
def source() -> str:
    """Return the CUDA C++ source of the template."""
    return Path(__file__).with_suffix(".cuh").read_text()


def sums(problem: Problem, x: te.Tensor, weight: te.Tensor) -> te.Tensor:
    """Return the sums of every slice, [slices, m, n] in float32."""
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
