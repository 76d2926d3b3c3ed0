"""Relax module -> executable: the named phases, per target.

CPU:  legalise, fuse what follows a kernel into it, schedule every kernel with ours, plan memory.
CUDA: the same with the rules of ``kernels/cuda``; the launches of static shapes are captured as a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, s_tir, tirx
from tvm.relax.backend.cuda import pipeline as cuda_pipeline

from thresher.backends.tvm.codegen.intrinsics import import_intrinsics
from thresher.backends.tvm.codegen.tir_pipeline import pipeline_of
from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.importing.importer import OPAQUE
from thresher.backends.tvm.importing.provenance import Kernels, kernels
from thresher.backends.tvm.kernels.blocks import block_names
from thresher.backends.tvm.kernels.cpu import attention, batched, depthwise, gemm, generic, rows, winograd
from thresher.backends.tvm.kernels.cuda import schedules as cuda_schedules
from thresher.backends.tvm.plans.plan_selection import PlanSelector
from thresher.errors import BackendError

FUSABLE = {
    gemm.BLOCK,
    depthwise.BLOCK,
    batched.SUMS,
    winograd.OUT,
    f"{attention.PREFIX}mixed",
}  # elementwise operators behind these become part of them
STORAGE = "relax.memory.alloc_storage"
ELEMENTWISE, INJECTIVE, OUT_ELEMENTWISE_FUSABLE = 0, 2, 4  # TVM's OpPatternKind


@tvm.transform.module_pass(opt_level=0, name="MarkKernels")
class MarkKernels:
    """Correct what TVM's analysis says of a kernel before operators are fused.

    Ours take elementwise epilogues, but have several stages and would pass for opaque. Winograd's input transform must not take in what
    comes before it, because it reads every pixel several times; functions that stand apart take in nothing. A compacted bias map is read at
    other indices than the result has, but stays an elementwise sum. A padding or a slice at the end reads and writes the same indices and
    would pass for elementwise, but changes the shape.
    """

    def transform_module(self, mod: tvm.IRModule, context: Any) -> tvm.IRModule:
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
    """Whether every argument broadcasts to the result, which is the last parameter."""
    *inputs, output = [[str(d) for d in p.ty.shape] for p in function.params if hasattr(p.ty, "shape")]
    return all(have in ("1", want) for shape in inputs for have, want in zip(reversed(shape), reversed(output)))


def schedule_kernels(mod: tvm.IRModule, machine: CpuInfo, choices: PlanSelector) -> tvm.IRModule:
    """Give every kernel its schedule, by the blocks it holds. Not a TVM pass: an error must reach the caller as ours."""
    scheduled = {}
    for name, function in mod.functions_items():
        blocks = block_names(function) if isinstance(function, tirx.PrimFunc) else set()
        if not blocks or function.attrs.get("tirx.is_scheduled", False):
            continue
        own = family(blocks)
        schedule = choices.schedule(function) if own is generic.schedule else None
        if schedule is not None:
            scheduled[name] = schedule.mod["main"].with_attr("tirx.is_scheduled", True)
            continue
        schedule = s_tir.Schedule(function)
        try:
            own(schedule, machine)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise BackendError(f"cannot schedule kernel {name.name_hint}: {reason[0]} ... {reason[-1]}") from error
        scheduled[name] = schedule.mod["main"].with_attr("tirx.is_scheduled", True)
    mod = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    for name, function in scheduled.items():
        mod.update_func(name, function)
    return mod


def family(blocks: set[str]) -> Any:
    """The schedule for a kernel with these blocks."""
    if gemm.BLOCK in blocks:
        return gemm.schedule
    if depthwise.BLOCK in blocks:
        return depthwise.schedule
    if batched.SUMS in blocks:
        return batched.schedule
    if winograd.OUT in blocks:
        return winograd.schedule_output
    if winograd.INPUT in blocks:
        return winograd.schedule_input
    if any(b.startswith(attention.PREFIX) for b in blocks):
        return attention.schedule
    if any(b.startswith(rows.PREFIX) for b in blocks):
        return rows.schedule
    return generic.schedule


@tvm.transform.module_pass(opt_level=0, name="CountStorage")
class CountStorage:
    """Add up the buffers that the memory plan gives to intermediate values (they are shared by values that do not live together)."""

    def __init__(self) -> None:
        self.bytes = 0

    def transform_module(self, mod: tvm.IRModule, context: Any) -> tvm.IRModule:
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
    """Compiled code; ``activations``: the bytes that the plan gives to intermediate values; ``kernels``: the nodes that each computes."""

    executable: relax.VMExecutable
    activations: int
    kernels: Kernels


def build(
    mod: tvm.IRModule,
    target: tvm.target.Target,
    machine: CpuInfo | None,
    choices: PlanSelector,
    origin: dict[str, str] | None = None,
) -> Built:
    """Compile for the CPU (``machine`` given) or for CUDA. ``origin``: the node that each variable of ``mod`` was emitted for."""
    plan, *rest = _stock(machine).finalize_passes(target)
    counted = CountStorage()
    finish = tvm.transform.Sequential([*_stock(machine).dataflow_lower_passes(target), plan, counted, *rest])
    lower = pipeline_of(machine)
    separate, fused = _fuse_operators(mod, target, machine)
    scheduled = _scheduled(_fuse_kernels(fused, target), target, machine, choices)
    with target, context_of(machine):
        built = tvm.compile(scheduled, target, relax_pipeline=finish, tir_pipeline=lower)
    return Built(built, counted.bytes, kernels(separate, fused, origin or {}))


def context_of(machine: CpuInfo | None) -> tvm.transform.PassContext:
    """What TVM's passes are told. CUDA: no storage rewriting, which breaks the accumulators of products that sum in float32
    (shared/design/tvm-cuda.md)."""
    if machine is not None:
        return tvm.transform.PassContext(opt_level=3)
    config = {"relax.backend.use_cuda_graph": True, "tirx.disable_storage_rewrite": True}
    return tvm.transform.PassContext(opt_level=3, config=config)


def _stock(machine: CpuInfo | None) -> Any:
    """TVM's own passes for the kind of target."""
    return cuda_pipeline if machine is None else relax.backend.cpu_generic.pipeline


def schedule(
    mod: tvm.IRModule, target: tvm.target.Target, machine: CpuInfo | None, choices: PlanSelector
) -> tvm.IRModule:
    """Fused, and every kernel with its schedule."""
    return _scheduled(fuse(mod, target, machine), target, machine, choices)


def _scheduled(
    mod: tvm.IRModule, target: tvm.target.Target, machine: CpuInfo | None, choices: PlanSelector
) -> tvm.IRModule:
    with target, tvm.transform.PassContext(opt_level=3):
        if machine is not None:
            return schedule_kernels(mod, machine, choices)
        import_intrinsics()
        return s_tir.dlight.ApplyDefaultSchedule(*cuda_schedules.rules(choices))(mod)


def fuse(mod: tvm.IRModule, target: tvm.target.Target, machine: CpuInfo | None) -> tvm.IRModule:
    """Operators as kernels, and what follows a kernel as part of it."""
    return _fuse_kernels(_fuse_operators(mod, target, machine)[1], target)


def _fuse_operators(
    mod: tvm.IRModule, target: tvm.target.Target, machine: CpuInfo | None
) -> tuple[tvm.IRModule, tvm.IRModule]:
    """Every operator as a kernel of its own, and then in groups, each to become one kernel."""
    passes = [
        *_stock(machine).library_dispatch_passes(target),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        MarkKernels(),
        *([relax.transform.FoldConstant()] if machine is None else []),
    ]
    with target, tvm.transform.PassContext(opt_level=3):
        separate = tvm.transform.Sequential(passes)(mod)
        return separate, relax.transform.FuseOps()(separate)


def _fuse_kernels(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Each group as one kernel."""
    passes = [
        relax.transform.FuseTIR(),
        relax.transform.RewriteDataflowReshape(),  # before it is scheduled: then it cannot be told from other copies
        relax.transform.DeadCodeElimination(),
    ]
    with target, tvm.transform.PassContext(opt_level=3):
        return tvm.transform.Sequential(passes)(mod)
