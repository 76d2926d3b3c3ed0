"""The CPU that schedules are made for: its registers, its caches and its instructions."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE_LINE = 64  # bytes of a line of the cache
INSTRUCTIONS = (
    "sse",
    "ssse",
    "avx",
    "fma",
    "f16c",
    "bmi",
    "lzcnt",
    "movbe",
    "popcnt",
    "neon",
    "sve",
    "fullfp16",
    "dotprod",
)
CROSS_TRIPLES = ("aarch64-linux-gnu", "x86_64-linux-gnu")  # architectures that code is built for on others
STACK_BYTES = 1024  # bytes: smaller buffers within a kernel are on the stack, where LLVM can keep them in registers


@dataclass(frozen=True)
class CpuInfo:
    """A CPU: ``lanes`` float32 elements per vector register, ``registers`` of them, ``threads`` workers, ``cache`` bytes of L2 per core."""

    lanes: int = 8
    registers: int = 16
    threads: int = 2
    cache: int = 1 << 20

    @property
    def accumulators(self) -> int:
        """The registers a tile may use for its sums: two or more stay free for operands, and their buffer is on the stack."""
        return min(12 if self.registers == 16 else 26, (STACK_BYTES - 1) // (4 * self.lanes))


@functools.cache
def cpu_name() -> str:
    """Return the LLVM name of this machine's CPU."""
    import tvm

    return str(tvm.get_global_func("target.llvm_get_system_cpu")())


@functools.cache
def triple_of(cpu: str) -> str | None:
    """Return the LLVM triple of a CPU's architecture: empty for this machine's, None where code cannot be built for it."""
    import tvm

    names = tvm.get_global_func("target.llvm_get_cpu_archlist")
    return next((t for t in ("", *CROSS_TRIPLES) if cpu in names(tvm.target.Target(_description(t)))), None)


def _description(triple: str, **more: Any) -> dict[str, Any]:
    return {"kind": "llvm", **({"mtriple": triple} if triple else {}), **more}


def llvm_target(cpu: str, **more: Any) -> Any:
    """Return TVM's target for an LLVM CPU name."""
    import tvm

    return tvm.target.Target(_description(triple_of(cpu) or "", mcpu=cpu, **more))


@functools.cache
def features(cpu: str) -> frozenset[str]:
    """Return the instruction sets an LLVM CPU name stands for that LLVM uses without being asked, from its own table."""
    import tvm

    enabled = tvm.get_global_func("target.llvm_get_cpu_features")(llvm_target(cpu))
    return frozenset(str(name) for name in enabled if str(name).startswith(INSTRUCTIONS))


def missing_features(cpu: str) -> list[str]:
    """Return the instruction sets that code for ``cpu`` may use and this processor has not."""
    return sorted(features(cpu) - features(cpu_name())) if cpu else []


def cpu_info(cpu: str, threads: int | None = None) -> CpuInfo:
    """Return the registers of an LLVM CPU name, with the cache of this machine if it is this machine's; ``threads`` defaults to the
    number that this process may use.
    """
    threads = threads or int(os.environ.get("TVM_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
    cache = (cache_size() if cpu == cpu_name() else None) or CpuInfo.cache
    if "avx512f" in features(cpu):
        return CpuInfo(16, 32, threads, cache)
    if "neon" in features(cpu):
        return CpuInfo(4, 32, threads, cache)
    return CpuInfo(8, 16, threads, cache)


@functools.cache
def cache_size() -> int | None:
    """Return the bytes of L2 per core, where the system tells (Linux); None elsewhere."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) << 10
    except (OSError, ValueError):
        return None
