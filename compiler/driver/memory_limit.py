"""The memory of a build, estimated before it is taken: a limit with a cause, where the system would end the process.

weights once more, packed   +   the larger of a run as the model declares it and of the float64 run that exact passes are held to
"""

from __future__ import annotations

import os
from pathlib import Path

from thresher.analysis.cost.cost import constant_bytes
from thresher.analysis.cost.peak_memory import Peak, bytes_of, peak_of
from thresher.driver.options import Verify
from thresher.errors import InputError, MemoryLimitError
from thresher.ir.nodes import module_path, source_line
from thresher.ir.program import Program

VARIABLE = "THRESHER_MEMORY"  # gigabytes that a build may take, instead of what is available
GIGABYTE = 10**9
CONTROL_GROUP = Path("/sys/fs/cgroup")  # of a container
PROCESS = Path("/proc/self")


def check_memory(program: Program, verify: Verify, available: int | None = None) -> None:
    """Raise :class:`MemoryLimitError`, naming the value that takes most, where building ``program`` needs more than is available.

    Args:
        program: as it was captured.
        verify: as in :func:`thresher.compile`; without the check in float64 a build needs less.
        available: bytes; default: those of the environment variable, else those of this machine, where it tells.
    """
    available = available_bytes() if available is None else available
    if available is None:
        return
    packed, plain = constant_bytes(program), peak_of(program)
    peak = plain if verify == "off" else max(plain, peak_of(program, wide=True), key=lambda p: p.bytes)
    if packed + peak.bytes > available:
        raise MemoryLimitError(_explain(program, packed, plain, peak, available))


def _explain(program: Program, packed: int, plain: Peak, peak: Peak, available: int) -> str:
    text = f"building {program.name} needs about {_shown(packed + peak.bytes)}, and {_shown(available)} are available"
    if peak.node is not None and peak.largest is not None:
        line = source_line(peak.largest)
        held = bytes_of(peak.largest, peak is not plain)
        text += (
            f": {_shown(peak.bytes)} for the values that live when {peak.node.name} is computed, {_shown(held)} of it for "
            f"{peak.largest.name} ({peak.largest.target}, module {module_path(peak.largest)}){f' at {line}' if line else ''}"
        )
    cures = ["give a smaller example, with dynamic_shapes for the size that varies"]
    if peak is not plain and packed + plain.bytes <= available:
        cures.append(f'verify="off", without which {_shown(packed + plain.bytes)} are enough')
    return f"{text}; {', or '.join(cures)}, or set {VARIABLE} to the gigabytes that a build may take"


def _shown(count: int) -> str:
    return f"{count / GIGABYTE:.3g} GB"


def available_bytes() -> int | None:
    """Return the memory that a build may take; None where the system does not tell.

    Raises :class:`InputError` where the environment variable is no number.
    """
    if text := os.environ.get(VARIABLE):
        try:
            return int(float(text) * GIGABYTE)
        except ValueError as error:
            raise InputError(f"{VARIABLE} must be a number of gigabytes, not {text!r}") from error
    known = [size for size in (_of_machine(), _of_container(), _of_process()) if size is not None]
    return min(known, default=None)


def _of_machine() -> int | None:
    """Return what Linux counts as available: free, or caches that it would give up."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _of_container() -> int | None:
    """Return what the control group of this process may still take; caches of files that nobody reads any more count as free."""
    try:
        limit, used = (int((CONTROL_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
        return max(limit - used + int(statistics.get("inactive_file", 0)), 0)
    except (OSError, ValueError):  # no group, or no limit ("max")
        return None


def _of_process() -> int | None:
    """Return what this process may still take of its address space (``ulimit -v``)."""
    try:
        lines = (PROCESS / "limits").read_text().splitlines()
        limit = int(
            next(line.removeprefix("Max address space").split()[0] for line in lines if "address space" in line)
        )
        return max(limit - int((PROCESS / "statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE"), 0)
    except (OSError, StopIteration, ValueError):  # no such system, or no limit ("unlimited")
        return None
