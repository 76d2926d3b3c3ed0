"""Measuring the plans of a program's kernels: each workload alone, every plan built, all of them run in turn.

A workload is lowered as a program of one operator, by the very code that lowers the whole model; on a GPU, where kernels get their
schedules after fusion, as a module of one kernel. First all plans take turns; then the three fastest and the untuned one are measured again
on fresh samples, and only a plan that wins there, too, is recorded: the fastest of sixteen noisy medians is mostly luck. As in the model,
the input is in the cache, because something has just written it, and the weights are not, unless all weights of the model are: every call
has other copies of them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import tvm
from torch import Tensor, fx
from tvm import relax, tirx

from thresher.analysis.cost.cost import constant_bytes
from thresher.backends.base import LoweringOptions
from thresher.backends.tvm.codegen.relax_pipeline import build, context_of, schedule
from thresher.backends.tvm.codegen.tir_pipeline import pipeline_of
from thresher.backends.tvm.importing.import_program import import_program
from thresher.backends.tvm.importing.importer import BUILDER_LOCK
from thresher.backends.tvm.plans import metaschedule, torch_kernels
from thresher.backends.tvm.plans.plan_selection import MAX_PLANS, PlanSelector, Site
from thresher.backends.tvm.plans.runner import Runner, runner_of
from thresher.backends.tvm.target import TVMTarget
from thresher.ir.examples import random_example
from thresher.ir.nodes import dtype_of, shape_of
from thresher.ir.program import Program
from thresher.ir.subprogram import extract_subprogram
from thresher.tuning.options import TorchKernel, Tune
from thresher.tuning.records import Record
from thresher.tuning.timing import in_turn

UNCACHED_BYTES = 64 << 20  # of weights that certainly leave the cache
ROUNDS, FINAL_ROUNDS = 5, 15
FINALISTS = 3  # plans that are measured again on fresh samples
COMPARISON_SECONDS = 0.25  # of a workload's first comparison, about
MAX_REPEATS = 50  # calls of a kernel in a round

ShapeAndDtype = tuple[list[int], str]


def tune(
    program: Program,
    target: TVMTarget,
    fingerprint: str,
    options: Tune,
    lowering_options: LoweringOptions,
    save: Callable[[Record], None],
) -> int:
    """Measure the workloads of ``program`` that ``lowering_options.records`` lacks and ``save`` each record as soon as it is complete.

    Returns:
        The number of workloads that were measured; fewer than there are if ``options.seconds`` ran out.

    Raises:
        BackendError: the device to measure on is not there.
    """
    with runner_of(options.remote, target.device) as runner:
        library = target.machine is not None and lowering_options.library and options.remote is None
        bench = Bench(program, target, fingerprint, options, lowering_options.strict_rounding, library, runner)
        known = {w for w, plan in lowering_options.records.items() if library or plan != repr(TorchKernel())}
        sites = {w: site for w, site in bench.sites().items() if options.again or w not in known}
        start = time.perf_counter()
        for number, (workload, site) in enumerate(sites.items()):
            if options.seconds is not None and time.perf_counter() - start > options.seconds:
                lowering_options.progress(f"stopped after {options.seconds:.0f} s: {number} of {len(sites)} workloads")
                return number
            lowering_options.progress(f"tuning {number + 1} of {len(sites)}: {workload.partition(' ')[0]}")
            save(bench.measure(workload, site))
    return len(sites)


@dataclass(frozen=True)
class Candidates:
    """The plans of a workload as text, the one that is used without a record first.

    ``build`` returns the executable of a plan and its weights; ``inputs`` are what it is run on.
    """

    plans: list[str]
    build: Callable[[str], tuple[Any, list[np.ndarray]]]
    inputs: list[np.ndarray]


@dataclass(frozen=True)
class Bench:
    """The measurement of a program's kernels; ``library``: torch's own kernels are candidates, too."""

    program: Program
    target: TVMTarget
    fingerprint: str
    options: Tune
    strict_rounding: bool
    library: bool
    runner: Runner

    def sites(self) -> dict[str, Site]:
        """Return the workloads of the program, with those of kernels that get their schedules after fusion."""
        selector = PlanSelector(library=self.library, search=self.options.search > 0)
        imported = import_program(self.program, self.target, selector, self._lowering_options)
        if self.target.machine is None or selector.search:
            schedule(imported.module, self.target, selector)
        return selector.sites

    def measure(self, workload: str, site: Site) -> Record:
        """Return the record of one workload, without a plan where none is faster by ``options.min_speedup`` than the first."""
        candidates = self.candidates(workload, site)

        def prepared(plan: str) -> Any:
            executable, weights = candidates.build(plan)
            return self.runner.prepare(executable), weights

        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            kernels = dict(zip(candidates.plans, pool.map(prepared, candidates.plans)))
        footprint = min(UNCACHED_BYTES, constant_bytes(self.program))
        calls = {
            plan: self.runner.load(kernel, weights, candidates.inputs, footprint)
            for plan, (kernel, weights) in kernels.items()
        }
        rule = candidates.plans[0]
        first = turns(calls, ROUNDS)
        best = sorted(first, key=first.__getitem__)[:FINALISTS]
        final = turns({plan: calls[plan] for plan in dict.fromkeys((rule, *best))}, FINAL_ROUNDS)
        winner = min(final, key=final.__getitem__)
        record = Record.now(self.fingerprint, workload, winner, 1e6 * final[winner], 1e6 * final[rule])
        return record if final[winner] <= (1 - self.options.min_speedup) * final[rule] else record.untuned()

    def candidates(self, workload: str, site: Site) -> Candidates:
        """Return the plans that a workload may have, at most ``options.trials`` of its family, and how each is built."""
        plans = [repr(plan) for plan in site.plans(MAX_PLANS)[: self.options.trials]]
        if isinstance(site.subject, fx.Node):
            return self._of_operator(workload, site, plans)
        return self._of_kernel(workload, site.subject, plans)

    @property
    def _lowering_options(self) -> LoweringOptions:
        return LoweringOptions(strict_rounding=self.strict_rounding, library=self.library)

    def _of_operator(self, workload: str, site: Site, plans: list[str]) -> Candidates:
        """Return the candidates of a node, as programs of one operator."""
        alone = extract_subprogram(self.program, [site.subject], values_of(site), {site.subject})
        if self.library and torch_kernels.possible(site.subject):
            plans.append(repr(TorchKernel()))
            _append_relu(alone)

        def built(plan: str) -> tuple[Any, list[np.ndarray]]:
            selector = PlanSelector({workload: plan}, self.library)
            imported = import_program(alone, self.target, selector, self._lowering_options, separate_weights=True)
            return build(imported.module, self.target, selector).executable, imported.weights

        return Candidates(plans, built, [x.numpy() for x in alone.probe if isinstance(x, Tensor)])

    def _of_kernel(self, workload: str, kernel: tirx.PrimFunc, plans: list[str]) -> Candidates:
        """Return the candidates of a fused kernel, with all that was fused into it."""
        kinds = [([int(d) for d in p.ty.shape], str(p.ty.dtype)) for p in kernel.params]  # the last is the result
        if workload.startswith(metaschedule.KERNEL):
            plans = [*plans, *self._searched(kernel, kinds)]

        # plans are built in several threads, and TVM's schedules must not share a function: each has a copy, made before they start
        text = tvm.ir.save_json(kernel)
        modules = {plan: _module_of(tvm.ir.load_json(text), kinds) for plan in plans}

        def built(plan: str) -> tuple[Any, list[np.ndarray]]:
            return build(modules[plan], self.target, PlanSelector({workload: plan})).executable, []

        return Candidates(plans, built, [_example(*kind) for kind in kinds[:-1]])

    def _searched(self, kernel: tirx.PrimFunc, kinds: list[ShapeAndDtype]) -> list[str]:
        """Return the best schedule that MetaSchedule finds, as a plan; none where it finds none."""
        arguments = self.runner.sent([_example(*kind) for kind in kinds])

        def compiled(module: tvm.IRModule) -> Any:
            with self.target.tvm, context_of(self.target):
                return tvm.compile(module, self.target.tvm, tir_pipeline=pipeline_of(self.target.machine))["main"]

        plan = metaschedule.search(
            kernel, self.target.tvm, self.options.search, compiled, lambda main: self.runner.seconds(main, arguments)
        )
        return [plan] if plan else []


def _module_of(kernel: tirx.PrimFunc, kinds: list[ShapeAndDtype]) -> tvm.IRModule:
    """Return a module that calls the kernel, whose parameters have these shapes and dtypes; the last of them is the result."""
    with BUILDER_LOCK:
        builder = relax.BlockBuilder()
        *inputs, result = [relax.Var(f"x{i}", relax.TensorType(*kind)) for i, kind in enumerate(kinds)]
        with builder.function("main", inputs):
            with builder.dataflow():
                call = relax.call_tir(builder.add_func(kernel, "kernel"), inputs, out_ty=result.ty)
                value = builder.emit_output(call)
            builder.emit_func_output(value)
        return builder.get()


def _example(shape: list[int], dtype: str) -> np.ndarray:
    """Return random numbers; zeros for integers, which may be indices."""
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if kind.kind in "iub":
        return np.zeros(shape, kind)
    return np.random.default_rng(0).standard_normal(shape).astype(kind)


def _append_relu(program: Program) -> None:
    """Put a ReLU after the result: after a kernel of ours it costs nothing, after a library's it is a pass over the result."""
    result, end = program.output_nodes[0], program.graph.output_node()
    end.args = ((program.insert_call(end, torch.ops.aten.relu.default, (result,), like=result),),)


def values_of(site: Site) -> dict[Any, Any]:
    """Return example values of the nodes that a site reads."""
    generator = torch.Generator().manual_seed(0)
    sources = site.subject.all_input_nodes
    return {n: random_example([int(d) for d in shape_of(n)], dtype_of(n), generator) for n in sources}


def turns(calls: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, float]:
    """Return the median seconds per call of every contender; they take turns, and fast kernels are called more often in a round."""
    once = min(call(1) for call in calls.values())
    repeats = max(1, min(MAX_REPEATS, int(COMPARISON_SECONDS / (rounds * len(calls) * max(once, 1e-6)))))
    samples = in_turn({name: partial(call, repeats) for name, call in calls.items()}, rounds)
    return {name: statistics.median(values) for name, values in samples.items()}
