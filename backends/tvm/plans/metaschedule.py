"""The long option of tuning: TVM's MetaSchedule searches schedules for the kernels that have no plans of ours.

It takes seconds to minutes for every kernel, where measuring our plans takes one. What it finds is recorded as the trace of the schedule
and compared, like every plan, with what would be built without it. (Shao et al., Tensor Program Optimization with Probabilistic Programs,
NeurIPS 2022.)
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir.utils import derived_object

from thresher.backends.tvm.codegen.intrinsics import import_intrinsics
from thresher.backends.tvm.kernels.blocks import block_names

KERNEL, TRACE = "kernel ", "MetaSchedule "  # how the workloads and the plans begin
BATCH = 16  # schedules that are built and measured together


def workload_of(function: tirx.PrimFunc) -> str:
    """Describe the kernel by the names of its blocks and a hash of all that it computes."""
    plain = tirx.PrimFunc(function.params, function.body, function.ret_type)
    return f"{KERNEL}{' '.join(sorted(block_names(function)))} {tvm_ffi.structural_hash(plain, map_free_vars=True) & (2**64 - 1):016x}"


def scheduled(function: tirx.PrimFunc, plan: str) -> s_tir.Schedule:
    """Return the kernel with a recorded schedule."""
    schedule = s_tir.Schedule(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}))
    s_tir.schedule.Trace.apply_json_to_schedule(json.loads(plan.removeprefix(TRACE)), schedule)
    return schedule


def search(
    function: tirx.PrimFunc,
    target: tvm.target.Target,
    trials: int,
    built: Callable[[tvm.IRModule], Any],
    seconds: Callable[[Any], float],
) -> str | None:
    """Return the fastest of ``trials`` schedules as a plan, None where none could be built; ``seconds`` measures what ``built`` returns."""
    import_intrinsics()
    from tvm.s_tir import meta_schedule as ms

    logging.getLogger("tvm.s_tir.meta_schedule").setLevel(logging.ERROR)
    named = function.with_attr("global_symbol", "main").with_attr("estimated_flops", 1)  # its own estimate knows no Let
    module = tvm.IRModule({"main": named})
    kind = "cuda" if target.kind.name == "cuda" else "llvm"
    builder, runner = _measuring(ms, built, seconds)
    with tempfile.TemporaryDirectory(prefix="thresher-") as folder:
        database = ms.tir_integration.tune_tir(
            module,
            target,
            folder,
            trials,
            num_trials_per_iter=min(trials, BATCH),
            builder=builder,
            runner=runner,
            database="memory",
            cost_model="xgb" if find_spec("xgboost") else "random",
            measure_callbacks=[ms.measure_callback.AddToDatabase()],
            space=ms.space_generator.PostOrderApply(sch_rules=kind, postprocs=kind, mutator_probs=kind),
            # the usual population of 512 is worth it for thousands of trials only
            strategy=ms.search_strategy.EvolutionarySearch(
                population_size=min(64, 4 * trials), init_min_unmeasured=min(BATCH, trials), genetic_num_iters=2
            ),
            num_tuning_cores=len(os.sched_getaffinity(0)),
            seed=0,
        )
        record = database.query_tuning_record(module, target, "main")
    return None if record is None else TRACE + json.dumps(_plain(record.trace.as_json()))


def _plain(value: Any) -> Any:
    """Return TVM's containers and numbers as Python's."""
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if hasattr(value, "value"):
        return value.value
    return {str(k): _plain(v) for k, v in value.items()} if hasattr(value, "items") else [_plain(v) for v in value]


def _measuring(ms: Any, built: Callable[[tvm.IRModule], Any], seconds: Callable[[Any], float]) -> tuple[Any, Any]:
    """Return a builder and a runner that share built kernels by number: MetaSchedule passes on file names only."""
    kernels: dict[str, Any] = {}
    numbers = itertools.count()

    @derived_object
    class Builder(ms.builder.PyBuilder):
        def build(self, build_inputs: Sequence[Any]) -> list[Any]:
            def one(entry: Any) -> Any:
                try:
                    kernel = built(entry.mod)
                except Exception as error:
                    return ms.builder.BuilderResult(None, str(error)[-200:])
                name = str(next(numbers))
                kernels[name] = kernel
                return ms.builder.BuilderResult(name, None)

            with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
                return list(pool.map(one, build_inputs))

    @derived_object
    class Done(ms.runner.PyRunnerFuture):
        def __init__(self, taken: float | None, error: str | None):
            super().__init__()
            self.outcome = ms.runner.RunnerResult(None if taken is None else [taken], error)

        def done(self) -> bool:
            return True

        def result(self) -> Any:
            return self.outcome

    @derived_object
    class Runner(ms.runner.PyRunner):
        def run(self, runner_inputs: Sequence[Any]) -> list[Any]:
            results = []
            for entry in runner_inputs:
                try:
                    results.append(Done(seconds(kernels.pop(str(entry.artifact_path))), None))
                except Exception as error:
                    results.append(Done(None, str(error)[-200:]))
            return results

    return Builder(), Runner()
