"""The last stage: the report, the reference run that an artifact proves itself with, and the compiled model around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from thresher.analysis.attention.summary import describe_attentions
from thresher.analysis.cost.peak_memory import peak_bytes
from thresher.artifact.compiled import Compiled
from thresher.backends.base import Executable
from thresher.backends.batched import BatchedExecutable
from thresher.driver.check import Validated
from thresher.driver.options import CompileOptions
from thresher.driver.race import Times
from thresher.driver.session import Session
from thresher.driver.stages import Build, Captured, cost_of
from thresher.ir.nodes import module_path
from thresher.ir.program import Program
from thresher.report.data import Figures, Kernel, TorchCall
from thresher.report.graph_diff import Line, graph_lines, mark_differences
from thresher.report.report import Report
from thresher.runtime.comparison import Check


def summarize(
    captured: Captured, validated: Validated, races: Mapping[str, Times], options: CompileOptions, session: Session
) -> Compiled:
    """Return the compiled model. ``races``: the times of ``widths``, ``approximation`` and ``tuning``, where they were measured."""
    build, program = validated.build, validated.build.rewritten.program
    report = _report(captured, build, validated.checks, races, session)
    certificate = build.rewritten.certificate if options.certificate else None
    certificate = certificate and certificate.detached()
    signature = program.signature(session.device)
    return Compiled(signature, build.executable, report, program.text(), validated.reference_run, certificate)


def _report(
    captured: Captured, build: Build, checks: Sequence[Check], races: Mapping[str, Times], session: Session
) -> Report:
    rewritten, executable = build.rewritten, build.executable
    kernels = _kernels(build, session)
    before = replace(_figures(captured.program, session), parameters=captured.program.original.parameter_count)
    return Report(
        captured.program.name,
        session.target,
        session.backend.name,
        before,
        _figures(rewritten.program, session),
        [*rewritten.records, *build.records],
        list(checks),
        dict(session.seconds),
        widths=races["widths"],
        tuning=races["tuning"],
        tuned=executable.tuned,
        library=_library(executable, kernels),
        approximation=races["approximation"],
        sparsity=list(build.zeros),
        spent=list(rewritten.ledger),
        attention=describe_attentions(rewritten.exact or rewritten.program),
        estimate=rewritten.cost().milliseconds,
        memory={**executable.memory, "one operator at a time": peak_bytes(rewritten.program)},
        graph=_graph(captured.program, rewritten.program),
        kernels=kernels,
        batch=_batch(build),
    )


def _figures(program: Program, session: Session) -> Figures:
    cost = cost_of(program, session.machine)
    return Figures(cost.parameters, cost.flops, cost.bytes)


def _graph(before: Program, after: Program) -> dict[str, list[Line]]:
    """Return both programs line by line, marked with what differs."""
    graph = {"before": graph_lines(before), "after": graph_lines(after)}
    mark_differences(graph["before"], graph["after"])
    return graph


def _kernels(build: Build, session: Session) -> list[Kernel]:
    """Return the time of each kernel on the example inputs, in the words of the model; nothing where the target is not here."""
    if not session.runs_here:
        return []
    modules = {n.name: module_path(n) for p in build.specialized.values() for n in p.calls()}
    return [
        Kernel(k.name, list(k.nodes), list(dict.fromkeys(modules[n] for n in k.nodes)), k.milliseconds)
        for k in build.executable.profile(session.inputs(build.rewritten.program))
    ]


def _library(executable: Executable, kernels: Sequence[Kernel]) -> list[TorchCall]:
    """Return the nodes that torch computes, each with its time."""
    times = {node: kernel.milliseconds for kernel in kernels for node in kernel.nodes}
    return [TorchCall(c.node, c.operator, c.reason, times.get(c.node, 0.0)) for c in executable.library]


def _batch(build: Build) -> str:
    """Return a sentence on how a batch of any size is computed; empty where the batch is fixed."""
    if isinstance(build.executable, BatchedExecutable):
        times = build.executable.splitter.times
        sizes = (f"{size} ({times[size]:.2f} ms)" for size in sorted(times))
        return f"any size, in pieces of {' and '.join(sizes)}"
    return f"any size at once, by TVM's own schedules: {build.interaction}" if build.interaction else ""
