"""Helpers for kernels that are written out as loops instead of scheduled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tvm.tirx.script.builder as T
from tvm import tirx
from tvm.script.ir_builder import IRBuilder

MASKED_SCORE = -3.0e38  # of a score that is masked


@contextmanager
def function() -> Iterator[IRBuilder]:
    """Build a kernel in the body of the ``with``; ``get()`` of the value is the function afterwards."""
    with IRBuilder() as builder, T.prim_func(is_private=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        yield builder


def argument(name: str, shape: Sequence[int], dtype: str = "float32") -> Any:
    """Declare a parameter of the kernel, a contiguous buffer."""
    return T.arg(name, T.Buffer(tuple(shape), dtype))


def f32(value: float) -> Any:
    """Return a float32 constant."""
    return tirx.const(value, "float32")


def i32(value: int) -> Any:
    """Return an int32 constant."""
    return tirx.const(value, "int32")


def i64(value: int) -> Any:
    """Return an int64 constant, the type of indices."""
    return tirx.const(value, "int64")


def buffer(size: int, dtype: str = "float32") -> Any:
    """Allocate ``size`` elements of scratch memory for a task; below a kilobyte they are on the stack."""
    return T.alloc_buffer((size,), dtype, scope="global")


def store(target: Any, value: Any, *index: Any) -> None:
    """Store a value in the element of a buffer at an index."""
    T.buffer_store(target, value, list(index))


def prefetch(source: Any, *index: Any) -> None:
    """Fetch the cache line of an element into the caches."""
    address = tirx.address_of(source[tuple(index)])
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", address, i32(0), i32(3), i32(1)))


def broadcast(index: Sequence[Any], shape: Sequence[Any]) -> tuple[Any, ...]:
    """Return the index of an element where dimensions of size 1 stand for all."""
    return tuple(i if int(size) > 1 else i64(0) for i, size in zip(index, shape))


def unflattened(shape: Sequence[int], flat: Any) -> tuple[Any, ...]:
    """Return the index of the element with number ``flat``."""
    index: list[Any] = []
    for size in reversed(shape[1:]):
        index.insert(0, tirx.floormod(flat, size))
        flat = tirx.floordiv(flat, size)
    return (flat, *index) if shape else ()


@contextmanager
def loop(size: int, depth: int) -> Iterator[Any]:
    """Loop over ``size`` elements, ``depth`` steps written out, or fewer if these do not divide."""
    unrolled = next(u for u in (depth, 2, 1) if size % u == 0)
    with T.serial(size // unrolled) as outer, T.unroll(unrolled) as inner:
        yield outer * unrolled + inner


@contextmanager
def vectors(size: int, lanes: int) -> Iterator[Any]:
    """Loop over neighbouring elements in registers of ``lanes``, or in one if ``lanes`` does not divide ``size``."""
    if size % lanes == 0:
        with T.serial(size // lanes) as outer, T.vectorized(lanes) as inner:
            yield outer * lanes + inner
    else:
        with T.vectorized(size) as inner:
            yield inner
