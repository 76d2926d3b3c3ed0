"""Measuring the plans of a program's kernels: each workload alone, every plan built, all of them run in turn.

A workload is lowered as a program of one operator, by the very code that lowers the whole model. First all plans take turns; then the
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from torch import Tensor
from tvm.runtime.vm import VirtualMachine

from thresher.analysis.cost import constant_bytes
from thresher.backends.base import Lowering
from thresher.backends.tvm import library
from thresher.backends.tvm.choices import MOST, Choices, Site
from thresher.backends.tvm.importer import Importer
from thresher.backends.tvm.kernels.machine import Machine
from thresher.backends.tvm.pipeline import build
from thresher.bisect import isolate
from thresher.errors import BackendError
from thresher.program import Program, dtype_of, shape_of
from thresher.records import Record
from thresher.tuning import Library, Remote, Tune

FOOTPRINT = 64 << 20  # bytes of weights that certainly leave the cache
COPIES = 16  # of the weights, at most
ROUNDS, FINAL_ROUNDS = 5, 15
ENOUGH = 0.25  # seconds of a workload's first comparison, about


def tune(
    program: Program,
    target: tvm.target.Target,
    machine: Machine,
    fingerprint: str,
    options: Tune,
    how: Lowering,
    save: Callable[[Record], None],
) -> int:
    """Measure the workloads of ``program`` that ``how.records`` lacks; each record is ``save``d as soon as it stands."""
    choices = Choices(library=how.library and options.remote is None)
    Importer(program, machine, how.strict_rounding, choices).run()
    known = {w for w, plan in how.records.items() if choices.library or plan != repr(Library())}
    sites = {w: s for w, s in choices.sites.items() if options.again or w not in known}
    start = time.perf_counter()
    with runner_of(options.remote) as runner:
        bench = Bench(target, machine, how.strict_rounding, options, runner, choices.library)
        for number, (workload, site) in enumerate(sites.items()):
            if options.seconds is not None and time.perf_counter() - start > options.seconds:
                how.progress(f"stopped after {options.seconds:.0f} s: {number} of {len(sites)} workloads")
                return number
            how.progress(f"tuning {number + 1} of {len(sites)}: {workload.partition(' ')[0]}")
            save(bench.measure(program, workload, site, fingerprint))
    return len(sites)


@dataclass(frozen=True)
class Bench:
    """Where and how kernels are measured."""

    target: tvm.target.Target
    machine: Machine
    strict_rounding: bool
    options: Tune
    runner: Runner
    library: bool  # whether torch's own kernel is a candidate

    def measure(self, program: Program, workload: str, site: Site, fingerprint: str) -> Record:
        """The record of one workload."""
        alone, inputs = isolate(program, site.node, values_of(site))
        plans = [repr(plan) for plan in site.plans(MOST)[: self.options.trials]]
        if self.library and library.possible(site.node):
            plans.append(repr(Library()))
            _follow(alone)

        def built(plan: str) -> Any:
            choices = Choices({workload: plan}, self.library)
            module, weights = Importer(alone, self.machine, self.strict_rounding, choices, apart=True).run()
            return self.runner.prepare(build(module, self.target, self.machine)[0]), weights

        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            kernels = dict(zip(plans, pool.map(built, plans)))
        around = min(FOOTPRINT, constant_bytes(program))
        calls = {plan: self.runner.load(made, weights, inputs, around) for plan, (made, weights) in kernels.items()}
        rule = plans[0]
        first = turns(calls, ROUNDS)
        best = sorted(first, key=first.__getitem__)[:3]
        final = turns({plan: calls[plan] for plan in dict.fromkeys((rule, *best))}, FINAL_ROUNDS)
        winner = min(final, key=final.__getitem__)
        found = Record.now(fingerprint, workload, winner, 1e6 * final[winner], 1e6 * final[rule])
        return found if final[winner] <= (1 - self.options.gain) * final[rule] else found.untuned()


def _follow(program: Program) -> None:
    """Put a ReLU behind the result: in a kernel of ours what follows costs nothing, behind a library's it is a pass over the result."""
    result, end = program.output_nodes[0], program.graph.output_node()
    end.args = ((program.insert_call(end, torch.ops.aten.relu.default, (result,), like=result),),)


def values_of(site: Site) -> dict[Any, Any]:
    """Example values of what a node reads: random numbers, and zeros for integers, which may be indices."""
    generator = torch.Generator().manual_seed(0)

    def value(node: Any) -> Tensor:
        shape, dtype = [int(d) for d in shape_of(node)], dtype_of(node)
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        return torch.ones(shape, dtype=dtype) if dtype is torch.bool else torch.zeros(shape, dtype=dtype)

    return {node: value(node) for node in site.node.all_input_nodes}


def turns(calls: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, float]:
    """Median seconds per call, the contenders in turn; fast kernels are called more often in a round."""
    once = min(call(1) for call in calls.values())
    repeats = max(1, min(50, int(ENOUGH / (rounds * len(calls) * max(once, 1e-6)))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(call(repeats))
    return {name: statistics.median(values) for name, values in samples.items()}


class Runner:
    """Runs kernels in this process."""

    device = tvm.cpu(0)

    def prepare(self, executable: Any) -> Any:
        """What can be done in several threads: here, generating machine code."""
        return VirtualMachine(executable, self.device)

    def machine(self, prepared: Any) -> VirtualMachine:
        return prepared

    def load(
        self, prepared: Any, weights: Sequence[np.ndarray], inputs: Sequence[Any], around: int
    ) -> Callable[[int], float]:
        """A function of the number of calls: the seconds that one takes. The weights rotate over ``around`` bytes."""
        values = self.sent([x.numpy() for x in inputs if isinstance(x, Tensor)])
        copies = max(1, min(COPIES, around // max(1, sum(w.nbytes for w in weights))))
        sets = [[*values, *self.sent(weights)] for _ in range(copies)]
        return self.timed(self.machine(prepared), sets)

    def sent(self, arrays: Sequence[np.ndarray]) -> list[Any]:
        return [tvm.runtime.tensor(np.ascontiguousarray(a), self.device) for a in arrays]

    def timed(self, machine: VirtualMachine, sets: list[list[Any]]) -> Callable[[int], float]:
        main = machine["main"]
        for arguments in sets:
            main(*arguments)

        def call(times: int) -> float:
            main(*sets[0])  # the caches are the last contender's
            start = time.perf_counter()
            for i in range(times):
                main(*sets[(i + 1) % len(sets)])
            return (time.perf_counter() - start) / times

        return call


class RemoteRunner(Runner):
    """Runs kernels on a device behind an RPC tracker; the clock is the device's."""

    def __init__(self, remote: Remote, folder: Path):
        from tvm import rpc

        try:
            self.session = rpc.connect_tracker(remote.host, remote.port).request(remote.key, session_timeout=600)
        except Exception as error:
            raise BackendError(
                f"no device {remote.key!r} at the RPC tracker {remote.host}:{remote.port}: {error}; is the tracker running, and a "
                "server registered under that key?"
            ) from error
        self.device, self.folder, self.count = self.session.cpu(0), folder, itertools.count()

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
def runner_of(remote: Remote | None) -> Iterator[Runner]:
    if remote is None:
        yield Runner()
        return
    with tempfile.TemporaryDirectory(prefix="thresher-") as folder:
        yield RemoteRunner(remote, Path(folder))
