"""Relax module -> executable: the named phases, per target.

CPU:  legalise, fuse what follows a kernel into it, schedule every kernel with ours, plan memory.
CUDA: TVM's own pipeline with its dlight schedules.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, s_tir, tirx

from thresher.backends.tvm.converters import PADDED
from thresher.backends.tvm.kernels import attention, depthwise, gemm, generic, rows
from thresher.backends.tvm.kernels.machine import Machine
from thresher.errors import BackendError

FUSABLE = {gemm.BLOCK, depthwise.BLOCK, f"{attention.PREFIX}mixed"}  # elementwise operators behind these become part of them
INJECTIVE, OUT_ELEMENTWISE_FUSABLE = 2, 4  # TVM's OpPatternKind


def block_names(function: tirx.PrimFunc) -> set[str]:
    """The names of the outer blocks of a kernel: how a kernel of ours is recognised after fusion. Empty for opaque functions."""
    try:
        schedule = s_tir.Schedule(function)
        return {str(schedule.get(b).name_hint) for b in schedule.get_child_blocks(schedule.get_sblock("root"))}
    except s_tir.ScheduleError:
        return set()


@tvm.transform.module_pass(opt_level=0, name="MarkKernels")
class MarkKernels:
    """Our kernels take elementwise epilogues; TVM's analysis, which sees several stages, would call them opaque."""

    def transform_module(self, mod: tvm.IRModule, context: Any) -> tvm.IRModule:
        for name, function in list(mod.functions_items()):
            blocks = block_names(function) if isinstance(function, tirx.PrimFunc) else set()
            if blocks & FUSABLE:
                mod.update_func(name, function.with_attr("op_pattern", OUT_ELEMENTWISE_FUSABLE))
            elif blocks == {PADDED}:  # one that pads at the end only looks elementwise, but has another shape
                mod.update_func(name, function.with_attr("op_pattern", INJECTIVE))
        return mod


@tvm.transform.module_pass(opt_level=0, name="ScheduleKernels")
class ScheduleKernels:
    """Give every kernel its schedule, by the blocks it holds."""

    def __init__(self, machine: Machine):
        self.machine = machine

    def transform_module(self, mod: tvm.IRModule, context: Any) -> tvm.IRModule:
        for name, function in list(mod.functions_items()):
            if isinstance(function, tirx.PrimFunc) and not function.attrs.get("tirx.is_scheduled", False):
                mod.update_func(name, self.scheduled(str(name.name_hint), function))
        return mod

    def scheduled(self, name: str, function: tirx.PrimFunc) -> tirx.PrimFunc:
        blocks = block_names(function)
        if not blocks:
            return function
        schedule = s_tir.Schedule(function)
        try:
            family(blocks)(schedule, self.machine)
        except Exception as error:
            raise BackendError(f"cannot schedule kernel {name}: {error}") from error
        return schedule.mod["main"].with_attr("tirx.is_scheduled", True)


def family(blocks: set[str]) -> Any:
    """The schedule for a kernel with these blocks."""
    if gemm.BLOCK in blocks:
        return gemm.schedule
    if depthwise.BLOCK in blocks:
        return depthwise.schedule
    if any(b.startswith(attention.PREFIX) for b in blocks):
        return attention.schedule
    if any(b.startswith(rows.PREFIX) for b in blocks):
        return rows.schedule
    return generic.schedule


def build(mod: tvm.IRModule, target: tvm.target.Target, machine: Machine | None) -> relax.VMExecutable:
    """Compile for the CPU (``machine`` given) or for CUDA."""
    if machine is None:
        with target, tvm.transform.PassContext(opt_level=3):
            return tvm.compile(mod, target)
    backend = relax.backend.cpu_generic.pipeline
    phases = [
        *backend.library_dispatch_passes(target),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        MarkKernels(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
        ScheduleKernels(machine),
        *backend.dataflow_lower_passes(target),
        *backend.finalize_passes(target),
    ]
    with target, tvm.transform.PassContext(opt_level=3):
        return tvm.compile(mod, target, relax_pipeline=tvm.transform.Sequential(phases))
