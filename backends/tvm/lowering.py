"""Scheduled kernels -> code for the CPU: TVM's own phases, less those that only GPUs need, and three things done differently.

* Buffers of less than a kilobyte that live within a kernel are on the stack (TVM would ask its runtime for those in the scope ``local``;
  ours are ``global``), so that LLVM can keep them in registers.
* Indices stay 64 bits wide: from 32 LLVM makes no pointers, and computes each address in the innermost loop.
* The last step of a loop marked ``PEEL`` becomes code of its own. Where a row of results ends within a tile, the loop over the tiles of
  a row is marked: in the steps before the last no store has a condition, and in the last every condition is known when it is compiled,
  so that what nobody stores is not computed either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from thresher.backends.tvm.kernels.machine import Machine

PEEL = "thresher.peel_last"  # the annotation of a loop
CPU = "thresher_cpu"  # the name of the pipeline


@tvm.transform.module_pass(opt_level=0, name="PeelLast")
class PeelLast:
    """Cut the last step off every marked loop of known length."""

    def transform_module(self, mod: tvm.IRModule, context: Any) -> tvm.IRModule:
        return _mapped(mod, _peeled)


def _peeled(loop: tirx.For) -> tirx.Stmt:
    if PEEL not in loop.annotations:
        return loop
    one = tirx.const(1, "int64")
    parts = [(loop.min, loop.extent - one), (loop.min + loop.extent - one, one)]
    return tirx.SeqStmt([tirx.For(loop.loop_var, start, size, loop.kind, loop.body) for start, size in parts])


@tvm.transform.module_pass(opt_level=0, name="ShortenVectors")
class ShortenVectors:
    """A vectorised loop of which only the first steps do anything becomes that much shorter, instead of a loop over single elements."""

    def transform_module(self, mod: tvm.IRModule, context: Any) -> tvm.IRModule:
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
    """``body`` for ``count`` neighbouring lanes from ``start`` on, in one register."""

    def moved(variable: tirx.Var) -> Any:
        return variable + start if start and variable.same_as(lane) else variable

    zero, size = (tirx.const(v, "int64") for v in (0, count))
    kind = tirx.ForKind.VECTORIZED if count > 1 else tirx.ForKind.SERIAL
    return tirx.For(lane, zero, size, kind, tvm_ffi.structural_map(body, (tirx.Var, moved)))


def _is_choice(value: Any) -> bool:
    return isinstance(value, tvm.ir.Call) and value.op.name == "tirx.if_then_else"


def _first_lanes(condition: Any, lane: tirx.Var) -> tuple[int, list[Any]]:
    """The bound in a condition that says ``lane < bound`` (0: it does not), and the terms that it says besides."""
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
    """Every kernel with its loops changed, inner ones first."""
    for name, function in mod.functions_items():
        if isinstance(function, tirx.PrimFunc):
            mod.update_func(name, function.with_body(tvm_ffi.structural_map(function.body, (tirx.For, change))))
    return mod


def phases() -> tvm.transform.Sequential:
    """From blocks and loops to functions that LLVM can translate."""
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
            PeelLast(),
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


def pipeline_of(machine: Machine | None) -> str:
    """The name of the phases for the CPU, or of TVM's (None: a GPU)."""
    return CPU if machine is not None else "default"


tirx.compilation_pipeline.register_tir_pipeline(
    CPU,
    lambda: (
        phases(),
        tirx.compilation_pipeline.finalize_host_passes,
        tirx.compilation_pipeline.finalize_device_passes,
    ),
)
