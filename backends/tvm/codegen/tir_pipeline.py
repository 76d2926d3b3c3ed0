"""Scheduled kernels -> code for the CPU: TVM's own phases, less those that only GPUs need, and three things done differently.

* Buffers of less than a kilobyte that live within a kernel are on the stack (TVM would ask its runtime for those in the scope ``local``;
  ours are ``global``), so that LLVM can keep them in registers.
* Indices stay 64 bits wide: from 32 LLVM makes no pointers, and computes each address in the innermost loop.
* A loop is cut where a schedule says so (:func:`thresher.backends.tvm.kernels.loop_marks.cut`). Where a row of results ends within a
  tile, the last step of the loop over the tiles of a row becomes code of its own: in the steps before it no store has a condition, and
  in the last every condition is known when it is compiled, so that what nobody stores is not computed either.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.kernels.loop_marks import CUTS, IDLE, SUMS

CPU = "thresher_cpu"  # the name of the pipeline


@tvm.transform.module_pass(opt_level=0, name="CutLoops")
class CutLoops:
    """A pass that cuts every loop that a schedule has marked."""

    def transform_module(self, mod: tvm.IRModule, context: Any) -> tvm.IRModule:
        """Return the module with the marked loops in parts."""
        return _mapped(mod, _cut)


def _cut(loop: tirx.For) -> tirx.Stmt:
    if CUTS not in loop.annotations:
        return loop
    bounds = [0, *(int(step) for step in loop.annotations[CUTS]), int(loop.extent)]
    resting = int(loop.annotations.get(IDLE, loop.extent))
    parts = []
    for start, end in itertools.pairwise(bounds):
        body = loop.body if start < resting else tvm_ffi.structural_map(loop.body, (tirx.For, _left_out))
        first, count = (tirx.const(v, "int64") for v in (start, end - start))
        parts.append(tirx.For(loop.loop_var, first, count, loop.kind, body))
    return tirx.SeqStmt(parts)


def _left_out(loop: tirx.For) -> tirx.Stmt:
    return tirx.Evaluate(tirx.const(0, "int32")) if SUMS in loop.annotations else loop


@tvm.transform.module_pass(opt_level=0, name="ShortenVectors")
class ShortenVectors:
    """A pass that shortens a vectorised loop to its first steps, if only these do anything, instead of making it scalar."""

    def transform_module(self, mod: tvm.IRModule, context: Any) -> tvm.IRModule:
        """Return the module with such loops shortened."""
        return _mapped(mod, _shortened)


def _shortened(loop: tirx.For) -> tirx.Stmt:
    if int(loop.kind) != tirx.ForKind.VECTORIZED:
        return loop
    lane, body = loop.loop_var, loop.body
    if isinstance(body, tirx.IfThenElse) and body.else_case is None:
        size, rest = _first_lanes(body.condition, lane)
        if 0 < size < int(loop.extent) and not rest:
            return _lanes(lane, 0, size, body.then_case)
    if isinstance(body, tirx.BufferStore) and _is_choice(body.value):
        condition, value, other = body.value.args
        size, rest = _first_lanes(condition, lane)
        if 0 < size < int(loop.extent):
            for term in rest:
                value = tirx.if_then_else(term, value, other)
            first = _lanes(lane, 0, size, tirx.BufferStore(body.buffer, value, body.indices))
            others = tirx.BufferStore(body.buffer, other, body.indices)
            return tirx.SeqStmt([first, _lanes(lane, size, int(loop.extent) - size, others)])
    return loop


def _lanes(lane: tirx.Var, start: int, count: int, body: tirx.Stmt) -> tirx.Stmt:
    """Return ``body`` for ``count`` neighbouring lanes from ``start`` on, in one register."""
    step = tirx.Var(lane.name, "int64")
    zero, size = (tirx.const(v, "int64") for v in (0, count))
    kind = tirx.ForKind.VECTORIZED if count > 1 else tirx.ForKind.SERIAL

    def moved(variable: tirx.Var) -> Any:
        return step + start if variable.same_as(lane) else variable

    return tirx.For(step, zero, size, kind, tvm_ffi.structural_map(body, (tirx.Var, moved)))


def _is_choice(value: Any) -> bool:
    return isinstance(value, tvm.ir.Call) and getattr(value.op, "name", "") == "tirx.if_then_else"


def _first_lanes(condition: Any, lane: tirx.Var) -> tuple[int, list[Any]]:
    """Return the bound in a condition of the form ``lane < bound`` and others (0: it has none), and its other terms."""
    terms, bound, rest = [condition], 0, []
    while terms:
        term = terms.pop()
        if isinstance(term, tirx.And):
            terms += [term.a, term.b]
        elif isinstance(term, tirx.LT) and term.a.same_as(lane) and isinstance(term.b, tirx.IntImm):
            bound = min(bound or int(term.b), int(term.b))
        else:
            rest.append(term)
    return bound, rest


def _mapped(mod: tvm.IRModule, change: Callable[[tirx.For], tirx.Stmt]) -> tvm.IRModule:
    """Return the module with the loops of every kernel changed, inner ones first."""
    for name, function in list(mod.functions_items()):
        if isinstance(function, tirx.PrimFunc):
            mod.update_func(name, function.with_body(tvm_ffi.structural_map(function.body, (tirx.For, change))))
    return mod


def phases() -> tvm.transform.Sequential:
    """Return the passes from blocks and loops to functions that LLVM can translate."""
    return tvm.transform.Sequential(
        [
            s_tir.transform.CanonicalizeLoop(),
            s_tir.transform.LowerInitBlock(),
            s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
            s_tir.transform.ConvertBlocksToOpaque(),
            s_tir.transform.CompactBufferAllocation(),
            s_tir.transform.LowerMatchBuffer(),
            s_tir.transform.StmtSimplify(),
            s_tir.transform.LowerOpaqueBlock(),
            tirx.transform.FlattenBuffer(),
            tirx.transform.BF16ComputeLegalize(),
            CutLoops(),
            tirx.transform.ConvertSSA(),
            s_tir.transform.StmtSimplify(),
            ShortenVectors(),
            s_tir.transform.LoopPartition(),
            tirx.transform.VectorizeLoop(True),
            tirx.transform.StorageRewrite(),
            s_tir.transform.HoistIfThenElse(),
            tirx.transform.UnrollLoop(),
            s_tir.transform.RenormalizeSplitPattern(),
            tirx.transform.StmtSimplify(),
            tirx.transform.RemoveNoOp(),
            s_tir.transform.RewriteUnsafeSelect(),
            tirx.transform.CommonSubexprElim(),
            tirx.transform.FP8ComputeLegalize(),
            tirx.transform.VerifyMemory(),
            tirx.transform.AnnotateEntryFunc(),
            tirx.transform.SplitHostDevice(),
            tirx.transform.MakePackedAPI(),
            tirx.transform.FP8StorageLegalize(),
            tirx.transform.BF16StorageLegalize(),
        ]
    )


def pipeline_of(machine: CpuInfo | None) -> str:
    """Return the name of the phases for the CPU, or of TVM's own ones for a GPU (None)."""
    return CPU if machine is not None else "default"


tirx.compilation_pipeline.register_tir_pipeline(
    CPU,
    lambda: (
        phases(),
        tirx.compilation_pipeline.finalize_host_passes,
        tirx.compilation_pipeline.finalize_device_passes,
    ),
)
