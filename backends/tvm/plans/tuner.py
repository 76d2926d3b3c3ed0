"""Measuring the plans of a program's kernels: each workload alone, every plan built, all of them run in turn.

A workload is lowered as a program of one operator, by the very code that lowers the whole model; on a GPU, where kernels get their
schedules after fusion, as a module of one kernel. First all plans take turns; then the
three fastest and the untuned one are measured again on fresh samples, and only a plan that wins there, too, is recorded: the fastest of
sixteen noisy medians is mostly luck. As in the model, the input is in the cache, because something has just written it, and the weights
are not, unless all weights of the model are: every call has other copies of them.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from torch import Tensor, fx
from tvm import relax, tirx
from tvm.runtime.vm import VirtualMachine

from thresher.analysis.cost.cost import constant_bytes
from thresher.backends.base import LoweringOptions
from thresher.backends.tvm.codegen.relax_pipeline import build, context_of, schedule
from thresher.backends.tvm.codegen.tir_pipeline import pipeline_of
from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.importing.importer import BUILDING, Importer, architecture
from thresher.backends.tvm.plans import metaschedule, torch_kernels
from thresher.backends.tvm.plans.plan_selection import MOST, PlanSelector, Site
from thresher.errors import BackendError
from thresher.ir.examples import random_example
from thresher.ir.nodes import dtype_of, shape_of
from thresher.ir.program import Program
from thresher.ir.subprogram import extract_subprogram
from thresher.tuning.options import Remote, TorchKernel, Tune
from thresher.tuning.records import Record
from thresher.tuning.timing import in_turn

FOOTPRINT = 64 << 20  # bytes of weights that certainly leave the cache
COPIES = 16  # of the weights, at most
ROUNDS, FINAL_ROUNDS = 5, 15
ENOUGH = 0.25  # seconds of a workload's first comparison, about


def tune(
    program: Program,
    target: tvm.target.Target,
    machine: CpuInfo | None,
    fingerprint: str,
    options: Tune,
    lowering_options: LoweringOptions,
    save: Callable[[Record], None],
) -> int:
    """Measure the workloads of ``program`` that ``lowering_options.records`` lacks; each record is ``save``d as soon as it stands.
    Without ``machine`` for a GPU."""
    with runner_of(options.remote, "cpu" if machine is not None else "cuda") as runner:
        by_library = machine is not None and lowering_options.library and options.remote is None
        bench = Bench(target, machine, lowering_options.strict_rounding, options, runner, by_library)
        choices = bench.sites(program)
        sites = choices.sites
        known = {w for w, plan in lowering_options.records.items() if choices.library or plan != repr(TorchKernel())}
        sites = {w: s for w, s in sites.items() if options.again or w not in known}
        start = time.perf_counter()
        for number, (workload, site) in enumerate(sites.items()):
            if options.seconds is not None and time.perf_counter() - start > options.seconds:
                lowering_options.progress(f"stopped after {options.seconds:.0f} s: {number} of {len(sites)} workloads")
                return number
            lowering_options.progress(f"tuning {number + 1} of {len(sites)}: {workload.partition(' ')[0]}")
            save(bench.measure(program, workload, site, fingerprint))
    return len(sites)


@dataclass(frozen=True)
class Candidates:
    """The plans of a workload as text; what is ``built`` from one (an executable and its weights), and what it is run on."""

    plans: list[str]
    built: Callable[[str], tuple[Any, list[np.ndarray]]]
    inputs: list[np.ndarray]


@dataclass(frozen=True)
class Bench:
    """Where and how kernels are measured: each as a program of one operator."""

    target: tvm.target.Target
    machine: CpuInfo | None
    strict_rounding: bool
    options: Tune
    runner: Runner
    library: bool  # whether torch's own kernel is a candidate

    def sites(self, program: Program) -> PlanSelector:
        """The workloads of ``program``; those of kernels, which have their schedules after fusion, where there can be some."""
        choices = PlanSelector(library=self.library, search=self.options.search > 0)
        module, _ = self.importer(program, choices).run()
        if self.machine is None or choices.search:
            schedule(module, self.target, self.machine, choices)
        return choices

    def importer(self, program: Program, choices: PlanSelector, apart: bool = False) -> Importer:
        return Importer(program, self.machine, self.strict_rounding, choices, apart, architecture(self.target))

    def candidates(self, program: Program, workload: str, site: Site) -> Candidates:
        plans = [repr(plan) for plan in site.plans(MOST)[: self.options.trials]]
        if isinstance(site.subject, fx.Node):
            return self._of_operator(program, workload, site, plans)
        return self._of_kernel(workload, site.subject, plans)

    def _of_operator(self, program: Program, workload: str, site: Site, plans: list[str]) -> Candidates:
        alone = extract_subprogram(program, [site.subject], values_of(site), {site.subject})
        if self.library and torch_kernels.possible(site.subject):
            plans.append(repr(TorchKernel()))
            _follow(alone)

        def built(plan: str) -> Any:
            choices = PlanSelector({workload: plan}, self.library)
            module, weights = self.importer(alone, choices, apart=True).run()
            return build(module, self.target, self.machine, choices).executable, weights

        return Candidates(plans, built, [x.numpy() for x in alone.probe if isinstance(x, Tensor)])

    def _of_kernel(self, workload: str, kernel: tirx.PrimFunc, plans: list[str]) -> Candidates:
        """A fused kernel, with all that was fused into it."""
        *shapes, _ = kinds = [
            ([int(d) for d in p.ty.shape], str(p.ty.dtype)) for p in kernel.params
        ]  # the last is the result
        inputs = [_example(*kind) for kind in shapes]
        if workload.startswith(metaschedule.KERNEL):
            arguments = self.runner.sent([_example(*kind) for kind in kinds])

            def compiled(module: tvm.IRModule) -> Any:
                with self.target, context_of(self.machine):
                    return tvm.compile(module, self.target, tir_pipeline=pipeline_of(self.machine))["main"]

            found = metaschedule.search(
                kernel, self.target, self.options.search, compiled, lambda main: self.runner.seconds(main, arguments)
            )
            plans = [*plans, *([found] if found else [])]

        # plans are built in several threads, and TVM's schedules must not share a function: each has a copy, made before they start
        text = tvm.ir.save_json(kernel)
        modules = {plan: _module_of(tvm.ir.load_json(text), kinds) for plan in plans}

        def built(plan: str) -> Any:
            return build(modules[plan], self.target, self.machine, PlanSelector({workload: plan})).executable, []

        return Candidates(plans, built, inputs)

    def measure(self, program: Program, workload: str, site: Site, fingerprint: str) -> Record:
        """The record of one workload."""
        given = self.candidates(program, workload, site)

        def prepared(plan: str) -> Any:
            executable, weights = given.built(plan)
            return self.runner.prepare(executable), weights

        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            kernels = dict(zip(given.plans, pool.map(prepared, given.plans)))
        around = min(FOOTPRINT, constant_bytes(program))
        calls = {p: self.runner.load(made, weights, given.inputs, around) for p, (made, weights) in kernels.items()}
        rule = given.plans[0]
        first = turns(calls, ROUNDS)
        best = sorted(first, key=first.__getitem__)[:3]
        final = turns({plan: calls[plan] for plan in dict.fromkeys((rule, *best))}, FINAL_ROUNDS)
        winner = min(final, key=final.__getitem__)
        found = Record.now(fingerprint, workload, winner, 1e6 * final[winner], 1e6 * final[rule])
        return found if final[winner] <= (1 - self.options.min_speedup) * final[rule] else found.untuned()


def _module_of(kernel: tirx.PrimFunc, kinds: list[tuple[list[int], str]]) -> tvm.IRModule:
    """A module that calls the kernel; ``kinds``: shape and type of its parameters, the last of them the result."""
    with BUILDING:
        builder = relax.BlockBuilder()
        *given, result = [relax.Var(f"x{i}", relax.TensorType(*kind)) for i, kind in enumerate(kinds)]
        with builder.function("main", given):
            with builder.dataflow():
                call = relax.call_tir(builder.add_func(kernel, "kernel"), given, out_ty=result.ty)
                value = builder.emit_output(call)
            builder.emit_func_output(value)
        return builder.get()


def _example(shape: list[int], dtype: str) -> np.ndarray:
    """Random numbers, and zeros for integers, which may be indices."""
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if kind.kind in "iub":
        return np.zeros(shape, kind)
    return np.random.default_rng(0).standard_normal(shape).astype(kind)


def _follow(program: Program) -> None:
    """Put a ReLU behind the result: in a kernel of ours what follows costs nothing, behind a library's it is a pass over the result."""
    result, end = program.output_nodes[0], program.graph.output_node()
    end.args = ((program.insert_call(end, torch.ops.aten.relu.default, (result,), like=result),),)


def values_of(site: Site) -> dict[Any, Any]:
    """Return example values of what a site's node reads."""
    generator = torch.Generator().manual_seed(0)
    sources = site.subject.all_input_nodes
    return {n: random_example([int(d) for d in shape_of(n)], dtype_of(n), generator) for n in sources}


def turns(calls: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, float]:
    """Median seconds per call, the contenders in turn; fast kernels are called more often in a round."""
    once = min(call(1) for call in calls.values())
    repeats = max(1, min(50, int(ENOUGH / (rounds * len(calls) * max(once, 1e-6)))))
    samples = in_turn({name: partial(call, repeats) for name, call in calls.items()}, rounds)
    return {name: statistics.median(values) for name, values in samples.items()}


class Runner:
    """Runs kernels in this process."""

    def __init__(self, kind: str):
        self.device = tvm.device(kind, 0)
        if not self.device.exist:
            raise BackendError(
                f"tuning for {kind} measures on the device, and none is here: tune where one is, or name one behind an RPC tracker (Remote)"
            )

    def prepare(self, executable: Any) -> Any:
        """What can be done in several threads: here, generating machine code."""
        return VirtualMachine(executable, self.device)

    def machine(self, prepared: Any) -> VirtualMachine:
        return prepared

    def load(
        self, prepared: Any, weights: Sequence[np.ndarray], inputs: Sequence[np.ndarray], around: int
    ) -> Callable[[int], float]:
        """A function of the number of calls: the seconds that one takes. The weights rotate over ``around`` bytes."""
        values = self.sent(inputs)
        copies = max(1, min(COPIES, around // max(1, sum(w.nbytes for w in weights))))
        sets = [[*values, *self.sent(weights)] for _ in range(copies)]
        return self.timed(self.machine(prepared), sets)

    def seconds(self, main: Callable[..., Any], arguments: Sequence[Any]) -> float:
        """What a call of a bare kernel takes: the median of a few."""
        samples = []
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            main(*arguments)
            self.device.sync()
            samples.append(time.perf_counter() - start)
        return statistics.median(samples[1:])

    def sent(self, arrays: Sequence[np.ndarray]) -> list[Any]:
        return [tvm.runtime.tensor(np.ascontiguousarray(a), self.device) for a in arrays]

    def timed(self, machine: VirtualMachine, sets: list[list[Any]]) -> Callable[[int], float]:
        main = machine["main"]
        for arguments in sets:
            main(*arguments)

        def call(times: int) -> float:
            main(*sets[0])  # the caches are the last contender's
            self.device.sync()
            start = time.perf_counter()
            for i in range(times):
                main(*sets[(i + 1) % len(sets)])
            self.device.sync()
            return (time.perf_counter() - start) / times

        return call


class RemoteRunner(Runner):
    """Runs kernels on a device behind an RPC tracker; the clock is the device's."""

    def __init__(self, remote: Remote, kind: str, folder: Path):
        from tvm import rpc

        try:
            self.session = rpc.connect_tracker(remote.host, remote.port).request(remote.key, session_timeout=600)
        except Exception as error:
            raise BackendError(
                f"no device {remote.key!r} at the RPC tracker {remote.host}:{remote.port}: {error}; is the tracker running, and a "
                "server registered under that key?"
            ) from error
        self.device, self.folder, self.count = self.session.device(kind, 0), folder, itertools.count()

    def prepare(self, executable: Any) -> Path:
        path = self.folder / f"kernel{next(self.count)}.so"
        executable.export_library(str(path))
        return path

    def machine(self, prepared: Path) -> VirtualMachine:
        self.session.upload(str(prepared))
        return VirtualMachine(self.session.load_module(prepared.name), self.device)

    def timed(self, machine: VirtualMachine, sets: list[list[Any]]) -> Callable[[int], float]:
        def call(times: int) -> float:
            return float(
                statistics.mean(
                    machine.time_evaluator("main", self.device, number=1, repeat=1)(*sets[i % len(sets)]).mean
                    for i in range(times)
                )
            )

        return call


@contextmanager
def runner_of(remote: Remote | None, kind: str) -> Iterator[Runner]:
    """Of devices of a ``kind``: cpu or cuda."""
    if remote is None:
        yield Runner(kind)
        return
    with tempfile.TemporaryDirectory(prefix="thresher-") as folder:
        yield RemoteRunner(remote, kind, Path(folder))
