"""Relax module -> executable: the named phases, per target.

CPU:  legalise, fuse what follows a kernel into it, schedule every kernel with ours, plan memory.
CUDA: the same with the rules of ``kernels/cuda``; the launches of static shapes are captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, s_tir, tirx
from tvm.relax.backend.cuda import pipeline as cuda_pipeline

from thresher.backends.tvm.codegen.intrinsics import import_intrinsics
from thresher.backends.tvm.codegen.legalization import LEGALIZATIONS
from thresher.backends.tvm.codegen.tir_pipeline import pipeline_of
from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.importing.provenance import Kernels, kernels
from thresher.backends.tvm.kernels.blocks import ELEMENTWISE, INJECTIVE, OPAQUE, OUT_ELEMENTWISE_FUSABLE, block_names
from thresher.backends.tvm.kernels.cpu import attention, batched, depthwise, gemm, generic, rows, winograd
from thresher.backends.tvm.kernels.cuda import schedules as cuda_schedules
from thresher.backends.tvm.plans.plan_selection import PlanSelector
from thresher.backends.tvm.target import TVMTarget
from thresher.errors import BackendError

#: Blocks of kernels that take in the elementwise operators after them.
FUSABLE = {gemm.BLOCK, depthwise.BLOCK, batched.SUMS, winograd.OUT, f"{attention.PREFIX}mixed"}
STORAGE = "relax.memory.alloc_storage"


@tvm.transform.module_pass(opt_level=0, name="MarkKernels")
class MarkKernels:
    """A pass that corrects TVM's analysis of the kernels before operators are fused.

    Our kernels take elementwise epilogues, but have several stages and would pass for opaque. Winograd's input transform must not take in
    the operator before it, because it reads every pixel several times; kernels marked as apart take in nothing. A compacted bias map is
    read at other indices than the result has, but stays an elementwise sum. A padding or a slice at the end reads and writes the same
    indices and would pass for elementwise, but changes the shape.
    """

    def transform_module(self, mod: tvm.IRModule, context: Any) -> tvm.IRModule:
        """Set ``op_pattern`` of the kernels it concerns."""
        for name, function in list(mod.functions_items()):
            if not isinstance(function, tirx.PrimFunc):
                continue
            blocks = block_names(function)
            if winograd.INPUT in blocks or generic.APART in blocks:
                mod.update_func(name, function.with_attr("op_pattern", OPAQUE))
            elif generic.BIAS_MAP in blocks:
                mod.update_func(name, function.with_attr("op_pattern", ELEMENTWISE))
            elif blocks & FUSABLE:
                mod.update_func(name, function.with_attr("op_pattern", OUT_ELEMENTWISE_FUSABLE))
            elif int(function.attrs.get("op_pattern", OPAQUE)) < INJECTIVE and not _keeps_shape(function):
                mod.update_func(name, function.with_attr("op_pattern", INJECTIVE))
        return mod


def _keeps_shape(function: tirx.PrimFunc) -> bool:
    """Return whether every argument broadcasts to the result, which is the last parameter."""
    *inputs, output = [[str(d) for d in p.ty.shape] for p in function.params if hasattr(p.ty, "shape")]
    return all(have in ("1", want) for shape in inputs for have, want in zip(reversed(shape), reversed(output)))


Schedule = Callable[[s_tir.Schedule, CpuInfo], None]
#: The schedule of the kernels with a block of this name, and of those with blocks whose names begin so.
SCHEDULES: Mapping[str, Schedule] = {
    gemm.BLOCK: gemm.schedule,
    depthwise.BLOCK: depthwise.schedule,
    batched.SUMS: batched.schedule,
    winograd.OUT: winograd.schedule_output,
    winograd.INPUT: winograd.schedule_input,
}
SCHEDULES_BY_PREFIX: Mapping[str, Schedule] = {attention.PREFIX: attention.schedule, rows.PREFIX: rows.schedule}


def schedule_of(blocks: set[str]) -> Schedule:
    """Return the schedule for a CPU kernel with these blocks."""
    for name, schedule in SCHEDULES.items():
        if name in blocks:
            return schedule
    for prefix, schedule in SCHEDULES_BY_PREFIX.items():
        if any(name.startswith(prefix) for name in blocks):
            return schedule
    return generic.schedule


def schedule_kernels(mod: tvm.IRModule, machine: CpuInfo, selector: PlanSelector) -> tvm.IRModule:
    """Give every kernel its schedule, by its blocks. Not a TVM pass, so that an error reaches the caller as ours.

    Raises:
        BackendError: a schedule does not fit its kernel; the message names the kernel.
    """
    scheduled = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    for name, function in mod.functions_items():
        blocks = block_names(function) if isinstance(function, tirx.PrimFunc) else set()
        if blocks and not function.attrs.get("tirx.is_scheduled", False):
            schedule = _scheduled_kernel(name.name_hint, function, schedule_of(blocks), machine, selector)
            scheduled.update_func(name, schedule.mod["main"].with_attr("tirx.is_scheduled", True))
    return scheduled


def _scheduled_kernel(
    name: str, function: tirx.PrimFunc, apply: Schedule, machine: CpuInfo, selector: PlanSelector
) -> s_tir.Schedule:
    if apply is generic.schedule and (recorded := selector.schedule(function)) is not None:
        return recorded
    schedule = s_tir.Schedule(function)
    try:
        apply(schedule, machine)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BackendError(f"cannot schedule kernel {name}: {lines[0]} ... {lines[-1]}") from error
    return schedule


@tvm.transform.module_pass(opt_level=0, name="CountStorage")
class CountStorage:
    """A pass that adds up the buffers which the memory plan gives to intermediate values, in ``bytes``.

    Values that do not live together share a buffer, which counts once; a buffer of dynamic size counts nothing.
    """

    def __init__(self) -> None:
        self.bytes = 0

    def transform_module(self, mod: tvm.IRModule, context: Any) -> tvm.IRModule:
        """Add the buffers of ``mod``, which stays as it is, to ``bytes``."""

        def count(expression: Any) -> None:
            if isinstance(expression, relax.Call) and getattr(expression.op, "name", "") == STORAGE:
                sizes = expression.args[0].values
                self.bytes += int(sizes[0]) if hasattr(sizes[0], "value") else 0

        for _, function in mod.functions_items():
            if isinstance(function, relax.Function):
                relax.analysis.post_order_visit(function, count)
        return mod


@dataclass(frozen=True)
class Built:
    """Compiled code; ``activations``: bytes of the planned buffers for intermediate values; ``kernels``: the nodes that each computes."""

    executable: relax.VMExecutable
    activations: int
    kernels: Kernels


def build(
    mod: tvm.IRModule, target: TVMTarget, selector: PlanSelector, origins: Mapping[str, str] | None = None
) -> Built:
    """Compile a module.

    Args:
        mod: as the importer returns it.
        target: the machine to generate code for.
        selector: chooses the plans of kernels that get their schedules after fusion.
        origins: the node that each variable of ``mod`` was emitted for.

    Raises:
        BackendError: a kernel cannot be scheduled.
    """
    plan, *rest = _stock(target).finalize_passes(target.tvm)
    counted = CountStorage()
    finish = tvm.transform.Sequential([*_stock(target).dataflow_lower_passes(target.tvm), plan, counted, *rest])
    lower = pipeline_of(target.machine)
    separate, fused = _fuse_operators(mod, target)
    scheduled = _scheduled(_fuse_kernels(fused, target), target, selector)
    with target.tvm, context_of(target):
        executable = tvm.compile(scheduled, target.tvm, relax_pipeline=finish, tir_pipeline=lower)
    return Built(executable, counted.bytes, kernels(separate, fused, origins or {}))


def context_of(target: TVMTarget) -> tvm.transform.PassContext:
    """Return the settings of TVM's passes.

    For CUDA without storage rewriting: after it, code generation rejects the fragments of products that are summed in float32, because a
    pointer into a shared buffer no longer has the type of its elements.
    """
    if target.machine is not None:
        return tvm.transform.PassContext(opt_level=3)
    config = {"relax.backend.use_cuda_graph": True, "tirx.disable_storage_rewrite": True}
    return tvm.transform.PassContext(opt_level=3, config=config)


def _stock(target: TVMTarget) -> Any:
    """Return TVM's own passes for the kind of target."""
    return cuda_pipeline if target.machine is None else relax.backend.cpu_generic.pipeline


def schedule(mod: tvm.IRModule, target: TVMTarget, selector: PlanSelector) -> tvm.IRModule:
    """Return the module fused, and every kernel with its schedule."""
    return _scheduled(fuse(mod, target), target, selector)


def _scheduled(mod: tvm.IRModule, target: TVMTarget, selector: PlanSelector) -> tvm.IRModule:
    with target.tvm, tvm.transform.PassContext(opt_level=3):
        if target.machine is not None:
            return schedule_kernels(mod, target.machine, selector)
        import_intrinsics()
        return s_tir.dlight.ApplyDefaultSchedule(*cuda_schedules.rules(selector))(mod)


def fuse(mod: tvm.IRModule, target: TVMTarget) -> tvm.IRModule:
    """Return the module with operators as kernels, and what follows a kernel as part of it."""
    return _fuse_kernels(_fuse_operators(mod, target)[1], target)


def _fuse_operators(mod: tvm.IRModule, target: TVMTarget) -> tuple[tvm.IRModule, tvm.IRModule]:
    """Return the module with every operator as a kernel of its own, and with these in groups, each to become one kernel."""
    passes = [
        *_stock(target).library_dispatch_passes(target.tvm),
        relax.transform.LegalizeOps(LEGALIZATIONS),
        relax.transform.AnnotateTIROpPattern(),
        MarkKernels(),
        *([relax.transform.FoldConstant()] if target.machine is None else []),
    ]
    with target.tvm, tvm.transform.PassContext(opt_level=3):
        separate = tvm.transform.Sequential(passes)(mod)
        return separate, relax.transform.FuseOps()(separate)


def _fuse_kernels(mod: tvm.IRModule, target: TVMTarget) -> tvm.IRModule:
    """Return the module with each group as one kernel."""
    passes = [
        relax.transform.FuseTIR(),
        relax.transform.RewriteDataflowReshape(),  # before scheduling: after it a reshape cannot be told from other copies
        relax.transform.DeadCodeElimination(),
    ]
    with target.tvm, tvm.transform.PassContext(opt_level=3):
        return tvm.transform.Sequential(passes)(mod)
