"""compile(): the table of contents of the whole thing. Only this module knows both the passes and the backends."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from thresher.analysis.attention.summary import describe_attentions
from thresher.analysis.cost.break_even import BreakEven, Layer, estimated, record, recorded
from thresher.analysis.cost.cost import constant_bytes, count_flops, seconds
from thresher.analysis.cost.peak_memory import peak_bytes
from thresher.analysis.slices.batch_independence import (
    free_batch,
    free_symbols,
    resized,
    why_samples_interact,
    with_batch,
)
from thresher.approximation.budget import Budget
from thresher.approximation.calibration import Calibration
from thresher.artifact.compiled import Compiled, ReferenceRun, check_outputs
from thresher.backends.base import Backend, Executable, LoweringOptions, find_backend
from thresher.backends.batched import BatchedExecutable
from thresher.driver import measure_machine
from thresher.driver.fold_variants import variants
from thresher.driver.measure_break_even import measure
from thresher.driver.measure_machine import WORKLOAD
from thresher.errors import InputError, RecordsError, ThresherError, ValidationError
from thresher.frontend.capture import capture, eval_mode
from thresher.frontend.masks import Masks, apply_masks
from thresher.ir.folded_module import FoldedModule, to_module
from thresher.ir.nodes import is_tensor, module_path
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.progress import Progress, show_progress
from thresher.report.data import Check, Figures, Kernel, Report
from thresher.report.graph_diff import graph_lines, mark_differences
from thresher.rewriting.contract import Context, Pass
from thresher.rewriting.manager import PassManager
from thresher.tuning.options import TorchKernel, Tune
from thresher.tuning.records import Record, Records
from thresher.tuning.timing import interleaved
from thresher.verification.compare import probes, steps, undecided

Model: TypeAlias = nn.Module | ExportedProgram | str | os.PathLike
Validate = Literal["error", "warn", "off"]


def compile(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    target: str | None = None,
    passes: pipelines.Passes = "exact",
    backend: str = "tvm",
    dynamic_shapes: Any = None,
    batch_sizes: Sequence[int] = (1, 8),
    masks: Masks | None = None,
    validate: Validate = "error",
    verify: Literal["each", "final", "off"] = "final",
    certificate: bool = False,
    widths: Literal["rule", "measured"] = "rule",
    strict_rounding: bool = False,
    tune: Tune | Literal["recorded", "never"] = "recorded",
    library: Literal["auto", "never"] = "auto",
    calibration: Iterable[Any] | None = None,
    budget: Budget | None = None,
    share: Compiled | None = None,
    progress: bool | None = None,
) -> Compiled:
    """Capture, fold, lower and validate ``model``; what comes back is called like it.

    Args:
        model: an ``nn.Module``, an ``ExportedProgram`` or the path of a ``.pt2`` or ``.onnx`` file.
        args, kwargs: example inputs; their shapes are compiled for, except dimensions that ``dynamic_shapes`` frees.
        target: ``cpu`` (this machine's), ``cpu:<llvm name>`` or ``cuda:sm_NN``; default: the GPU if there is one, else this CPU.
        passes: a pipeline by name (``exact``, ``canonicalize``, ``none``) or a sequence of passes and ``name{option=value}`` strings;
            approximate passes go after the exact ones: ``["exact", "sparse-attention"]``, or ``["exact", "approximate"]`` for all of them.
        backend: ``tvm``, or ``eager`` for the reference.
        dynamic_shapes: as in ``torch.export.export``.
        batch_sizes: where ``dynamic_shapes`` frees the first dimension and no sample reads another, code is made for batches of these
            sizes, and a batch of any size is computed in pieces of them (:class:`thresher.runtime.batching.BatchSplitter`). Otherwise, or
            with ``()``, the code is for any size, by TVM's own schedules, which are slow.
        masks: what a pruner removed, if it is not in the model: see :mod:`thresher.frontend.masks`. The reference is then the masked model.
        validate: ``error`` raises :class:`ValidationError` when a result is wrong, ``warn`` warns, ``off`` does not look.
        verify: when exact passes are checked in float64; see :class:`PassManager`.
        widths: ``measured`` builds the model folded to several widths and not folded, too, runs them in turn on the example inputs, and
            keeps what is fastest (``report.widths``): four times the build. ``rule`` trusts the rule of ``fold-channels``.
        strict_rounding: sums only as the operators define them. Otherwise 3x3 convolutions may use Winograd's filtering, which rounds about
            ten times more (1e-5 of the output's scale in float32); where a result then misses its bound, it is built again without.
        tune: :class:`Tune` measures the plans of the kernels on the target, records what is fastest, and keeps the result only if the whole
            model is not slower for it. ``recorded`` uses the records that stand (:mod:`thresher.tuning.records`) and those that come with
            the library; ``never`` uses none.
        library: ``auto``: where tuning finds torch's own kernel for an operator faster than all of ours, the build calls it, and needs
            torch where it runs (``report.library`` names the nodes). ``never``: it does not.
        calibration: samples for approximate passes: inputs like the example ones (a tensor, a tuple, or a dictionary of keyword arguments).
        budget: how far the approximate model may be from the original one (:class:`Budget`). What it saves is measured: an approximate
            model that is not faster than the exact one is not kept.
        certificate: keep the proof of the fold as ``compiled.certificate``; it holds the weights from before, too.
        share: another compiled model with the same parameters (for other shapes: prefill and decode). Linear layers read their weights in
            the order in which that one has packed them, where they can; a :class:`Bundle` of both then holds them once.
        progress: a progress bar; default: on a terminal.

    Raises:
        CaptureError, PassError, BackendError, ValidationError: each naming the place and what to do.
    """
    if not all(isinstance(size, int) and size > 0 for size in batch_sizes):
        raise InputError(f"batch_sizes must be positive whole numbers, not {tuple(batch_sizes)}")
    _one_of("validate", validate, ("error", "warn", "off"))
    _one_of("widths", widths, ("rule", "measured"))
    _one_of("library", library, ("auto", "never"))
    if widths == "measured" and budget is not None:
        raise InputError("widths='measured' compares exact models; with a budget use widths='rule'")
    target = target or default_target()
    model = _masked(model, masks, args, kwargs)
    with show_progress("thresher", progress) as step:
        build = _Build(
            model, tuple(args), kwargs or {}, target, backend, strict_rounding, tune, library == "auto", step
        )
        if share is not None:
            build.how = replace(build.how, shared_weights=share.executable.constants())
        build.batch_sizes = tuple(sorted(set(batch_sizes)))
        build.capture(dynamic_shapes)
        build.calibrate(calibration, budget)
        if widths == "rule":
            build.transform(pipelines.resolve(passes), verify)
            build.lower()
            build.keep_approximation_if_faster()
        else:
            build.fastest(variants(pipelines.resolve(passes)), verify)
        if isinstance(tune, Tune):
            build.tune(tune)
        if validate != "off":
            build.validate(validate)
    return build.finish(certificate)


def rewrite(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    passes: pipelines.Passes = "exact",
    dynamic_shapes: Any = None,
    masks: Masks | None = None,
    verify: Literal["each", "final", "off"] = "final",
    calibration: Iterable[Any] | None = None,
    budget: Budget | None = None,
) -> FoldedModule:
    """The transformed model as a torch module: smaller, and trainable. It takes and returns what the model does.

    ``module.unfold()`` gives the original-shape ``state_dict`` back, ``module.certificate`` is the proof of the fold, and ``module.ledger``
    what approximate passes spent of the budget.
    """
    model = _masked(model, masks, args, kwargs)
    program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    samples = _calibration(program, calibration, budget)
    manager = PassManager(pipelines.resolve(passes), verify)
    program = manager.run(program, Context(calibration=samples))
    return to_module(program, manager.certificate, manager.ledger)


def _calibration(captured: Program, samples: Iterable[Any] | None, budget: Budget | None) -> Calibration | None:
    if (samples is None) != (budget is None):
        raise InputError("approximate passes need both: calibration= (samples) and budget= (how much error is allowed)")
    return None if samples is None or budget is None else Calibration.of(captured, samples, budget)


def known_plans(backend: Backend, target: str, records: Records) -> dict[str, str]:
    """The plans on record for a target: what the library ships, and over it what was measured here."""
    if not backend.tunable:
        return {}
    fingerprint = backend.fingerprint(target)
    plans = {r.workload: r.plan for r in backend.shipped() if r.target == fingerprint}
    try:
        return plans | records.plans(fingerprint)
    except RecordsError as error:
        warnings.warn(f"building without the tuning records: {error}", stacklevel=4)
        return plans


def _masked(model: Model, masks: Masks | None, args: Sequence[Any], kwargs: dict[str, Any] | None) -> Model:
    if masks is None:
        return model
    if not isinstance(model, nn.Module):
        raise InputError("masks need an nn.Module; an exported program has no modules to name")
    return apply_masks(model, masks, args, kwargs)


def default_target() -> str:
    """``cuda:sm_NN`` of the first GPU, else ``cpu``."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"cuda:sm_{major}{minor}"
    return "cpu"


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ThresherError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")


def _figures(program: Program) -> Figures:
    return Figures(program.parameter_count(), count_flops(program), constant_bytes(program))


class _Build:
    """One build: each stage leaves its result here and its time in the report."""

    def __init__(
        self,
        model: Model,
        args: tuple,
        kwargs: dict,
        target: str,
        backend: str,
        strict_rounding: bool,
        tune: Tune | str,
        library: bool,
        step: Progress,
    ):
        self.model, self.args, self.kwargs, self.target, self.step = model, args, kwargs, target, step
        self.backend = find_backend(backend)
        self.records = Records(tune.records if isinstance(tune, Tune) else None)
        self.recording = tune != "never"
        plans = known_plans(self.backend, target, self.records) if self.recording else {}
        self.how = LoweringOptions(strict_rounding, plans, library, step)
        if (
            isinstance(tune, Tune)
            and tune.remote is None
            and WORKLOAD not in plans
            and self.backend.tunable
            and target.startswith("cpu")
            and self.runnable
        ):
            step("measuring the machine")
            found = measure_machine.record(
                measure_machine.calibrate(self.backend, target), self.backend.fingerprint(target)
            )
            self.records.put([found])
            plans[WORKLOAD] = found.plan
        self.machine = measure_machine.recorded(plans, target)
        self.seconds: dict[str, float] = {}
        self.zeros: list[dict[str, Any]] = []
        self.checks: list[Check] = []
        self.widths: dict[str, float] = {}
        self.tuning: dict[str, float] = {}
        self.approximation: dict[str, float] = {}
        self.calibration: Calibration | None = None
        self.batch_sizes: tuple[int, ...] = ()
        self.mixed = ""  # why a free batch is not computed in pieces
        self.exact: Program | None = None  # what an approximate model was made from

    def _timed(self, stage: str, start: float) -> None:
        self.seconds[stage] = time.perf_counter() - start

    def capture(self, dynamic_shapes: Any) -> None:
        start = time.perf_counter()
        self.step("capturing")
        self.captured = capture(self.model, self.args, self.kwargs, dynamic_shapes=dynamic_shapes)
        self._timed("capture", start)

    def calibrate(self, samples: Iterable[Any] | None, budget: Budget | None) -> None:
        self.calibration = _calibration(self.captured, samples, budget)

    def transform(self, passes: Sequence[str | Pass], verify: Any) -> None:
        start = time.perf_counter()
        manager = PassManager(passes, verify)
        context = Context(self.target, self.step, self.machine, self.calibration)
        self.rewritten = manager.run(self.captured, context).rounded()
        approximated = any(r.status == "changed" and r.kind == "approximate" for r in manager.records)
        self.exact = manager.exact.rounded() if approximated and manager.exact is not None else None
        self.pass_records, self.certificate, self.ledger = manager.records, manager.certificate, manager.ledger
        self._timed("passes", start)

    def lower(self) -> None:
        start = time.perf_counter()
        self.specialized = {size: self._specialize(p) for size, p in self._programs().items()}
        self.lowered: Executable = self._lowered(self.how)
        self._timed("lower", start)

    def _programs(self) -> dict[int, Program]:
        """What is lowered: the program (0), or where its batch is free and no sample reads another, the program for each of the sizes."""
        self.mixed = ""
        if self.backend.name != "tvm" or not self.batch_sizes or not free_batch(self.rewritten):
            return {0: self.rewritten}
        self.mixed = why_samples_interact(self.rewritten, self.batch_sizes)
        if self.mixed:
            return {0: self.rewritten}
        return {size: with_batch(self.rewritten, size) for size in self.batch_sizes}

    def _specialize(self, program: Program) -> Program:
        if self.backend.name != "tvm":
            return program
        manager = PassManager(pipelines.specialize, "off")
        context = Context(self.target, self.step, self.machine, self.calibration, find_break_even=self.break_even)
        program = manager.run(program, context).rounded()
        self.zeros = [asdict(z) for z in manager.zeros]
        return program

    def _lowered(self, how: LoweringOptions) -> Executable:
        """``specialized``, lowered; for several sizes of batches the smaller ones read the weights of the largest where they can."""
        if set(self.specialized) == {0}:
            return self.backend.lower(self.specialized[0], self.target, how)
        largest, *smaller = sorted(self.specialized, reverse=True)
        parts = {largest: self.backend.lower(self.largest, self.target, how)}
        how = replace(how, shared_weights=how.shared_weights or parts[largest].constants())
        parts |= {size: self.backend.lower(self.specialized[size], self.target, how) for size in smaller}
        device = self.target.partition(":")[0]
        given = {size: p.signature(device).check(list(p.probe)) for size, p in self.specialized.items()}
        batched = [is_tensor(n) and bool(free_symbols(n)) for n in self.rewritten.placeholders if is_tensor(n)]
        if self.runnable:
            self.step("measuring the sizes of batches")
            found = interleaved({str(s): partial(parts[s].run, given[s]) for s in parts}, rounds=7)
            times = {size: found[str(size)].median for size in parts}
        else:
            times = {size: 1e3 * seconds(p, self.machine) for size, p in self.specialized.items()}
        return BatchedExecutable(parts, batched, times)

    @property
    def largest(self) -> Program:
        """The specialized program, for the largest batch where there are several."""
        return self.specialized[max(self.specialized)]

    def break_even(self, layer: Layer) -> BreakEven:
        """What a layer takes dense and skipping zeros: on record, else measured, if that can be done here, and put on record."""
        found = recorded(layer, self.how.records)
        if found is not None or not self.runnable:
            return found or estimated(layer, self.machine)
        self.step(f"measuring {layer.workload}")
        found = measure(self.backend, self.target, layer)
        made = record(layer, found, self.backend.fingerprint(self.target))
        if self.recording:
            self._keep(made)
        self.how = replace(self.how, records={**self.how.records, made.workload: made.plan})
        return found

    def _keep(self, made: Record) -> None:
        """For later builds; this one does without where the cache is read-only or full."""
        try:
            self.records.put([made])
        except RecordsError as error:
            warnings.warn(f"measured, but not kept for later builds: {error}", stacklevel=2)
            self.recording = False

    def keep_approximation_if_faster(self) -> None:
        """Nobody wants an error that buys nothing."""
        if self.exact is None or not self.runnable:
            return
        start = time.perf_counter()
        built = {"approximate": (self.rewritten, self.specialized, self.lowered)}
        self.rewritten = self.exact
        self.lower()
        built["exact"] = self.rewritten, self.specialized, self.lowered
        self.step("comparing exact and approximate")
        self.approximation = self._race({name: lowered for name, (*_, lowered) in built.items()})
        best = min(self.approximation, key=self.approximation.__getitem__)
        self.rewritten, self.specialized, self.lowered = built[best]
        if best == "exact":
            self.exact = None
            for record in (r for r in self.pass_records if r.status == "changed" and r.kind == "approximate"):
                record.status, record.failure = "reverted", "measured: not faster than the exact model"
        self._timed("approximation", start)

    def tune(self, options: Tune) -> None:
        """Measure the kernels, build with the fastest, and keep that only if the whole model is not slower for it."""
        start = time.perf_counter()
        made: list[Record] = []

        def save(record: Record) -> None:
            self.records.put([record])
            made.append(record)

        for program in self.specialized.values():
            self.backend.tune(program, self.target, options, self.how, save)
            self.how = replace(self.how, records={**self.how.records, **{r.workload: r.plan for r in made}})
        before, self.lowered = self.lowered, self._lowered(self.how)
        if options.remote is None and self.runnable:
            self._keep_fastest(before, made)
        self._timed("tune", start)

    def _keep_fastest(self, before: Executable, made: Sequence[Record]) -> None:
        """The tuned build against the untuned one, and against itself without torch's kernels; what loses is withdrawn from the records."""
        hows = {"tuned": self.how, "untuned": replace(self.how, records={})}
        contenders = {"tuned": self.lowered}
        if self.lowered.library:
            hows["tuned, without torch"] = replace(self.how, library=False)
        for name in [n for n in hows if n != "tuned"]:
            stands = name == "untuned" and not before.tuned[0]  # it was built without records
            contenders[name] = before if stands else self._lowered(hows[name])
        self.step("comparing tuned and untuned")
        self.tuning = self._race(contenders, rounds=20)
        best = min(self.tuning, key=self.tuning.__getitem__)
        self.lowered, self.how = contenders[best], hows[best]
        if best != "tuned":
            self.records.put([r.untuned() for r in made if best == "untuned" or r.plan == repr(TorchKernel())])

    def _race(self, contenders: dict[str, Executable], **how: Any) -> dict[str, float]:
        """Milliseconds of each on the example inputs, in turn."""
        flat = self.captured.signature(self.target.partition(":")[0]).check(list(self.captured.probe))
        timings = interleaved({name: partial(lowered.run, flat) for name, lowered in contenders.items()}, **how)
        return {name: timing.median for name, timing in timings.items()}

    def fastest(self, candidates: dict[str, list[Pass]], verify: Any) -> None:
        """Build every candidate pipeline, and keep what runs fastest on the example inputs."""
        if not self.runnable:
            raise InputError(f"widths='measured' needs the target {self.target} on this machine")
        built, start = {}, time.perf_counter()
        for name, passes in candidates.items():
            self.transform(passes, verify)
            self.lower()
            built[name] = self.rewritten, self.pass_records, self.specialized, self.lowered
        self.step("measuring widths")
        self.widths = self._race({name: lowered for name, (*_, lowered) in built.items()})
        best = built[min(self.widths, key=self.widths.__getitem__)]
        self.rewritten, self.pass_records, self.specialized, self.lowered = best
        self._timed("widths", start)

    @property
    def runnable(self) -> bool:
        """Whether the target is here."""
        return self.backend.runs_here(self.target)

    def validate(self, mode: Validate) -> None:
        """The lowered code against the rewritten program, and against the eager model, on the user's inputs and on random ones."""
        start = time.perf_counter()
        self.step("validating")
        self.checks = self.compared()
        if self.runnable and not self.how.strict_rounding and not all(c.passed for c in self.checks):
            self.step("a result misses its bound: building with strict rounding")
            self.how = replace(self.how, strict_rounding=True)
            self.lower()
            self.checks = self.compared()
        self._timed("validate", start)
        failed = [c for c in self.checks if not c.passed]
        if failed and mode == "error":
            raise ValidationError(
                "\n".join(
                    [f"{c.name}: error {c.error:.2e} > {c.tolerance:.0e} {c.detail}" for c in failed]
                    + [self._suspect()]
                )
            )
        if failed:
            warnings.warn(f"validation failed: {failed[0].name}, error {failed[0].error:.2e}", stacklevel=3)

    def compared(self) -> list[Check]:
        """Every comparison that can be made here."""
        example, random = probes(self.rewritten)
        inputs = [("example input", example, 0), ("random input", random, 0)]
        sizes = sorted(set(self.specialized) - {0})
        inputs += [(f"batch of {size}", resized(self.rewritten, example, size), size) for size in sizes]
        checks = []
        for number, (label, flat, size) in enumerate(inputs):
            found = self.compared_on(flat, label)
            if not all(c.passed for c in found) and (choice := undecided(self.rewritten, flat)) is not None:
                others = (probes(self.rewritten, 1 + number + len(inputs) * i)[1] for i in range(8))
                others = (resized(self.rewritten, f, size) if size else f for f in others)
                clear = next((f for f in others if undecided(self.rewritten, f) is None), None)
                if clear is not None:
                    why = f"another input: rounding decides {choice.name} of the {label}"
                    found = [*(c for c in found if c.passed), *self.compared_on(clear, why)]
            checks += found
        return [*checks, *self.within_budget()]

    def compared_on(self, flat: tuple, label: str) -> list[Check]:
        """The checks on one input."""
        reference = self.eager(flat)
        rewritten = self.rewritten.run(*flat)
        exact = rewritten if self.exact is None else self.exact.run(*flat)
        rounded = steps(self.rewritten, flat)
        checks = [check_outputs(f"rewritten = eager, {label}", reference, exact, rounded)]
        if self.runnable:
            signature = self.rewritten.signature(self.target.partition(":")[0])
            outputs = signature.with_literals(self.lowered.run(signature.check(flat)))
            checks.append(check_outputs(f"compiled = rewritten, {label}", rewritten, outputs, rounded))
            if self.exact is None:
                checks.append(check_outputs(f"compiled = eager, {label}", reference, outputs, rounded))
        return checks

    def within_budget(self) -> list[Check]:
        """The approximate model, compiled where it runs here, against the eager one, on the samples that chose nothing."""
        calibration = self.calibration
        if self.exact is None or calibration is None:
            return []
        signature = self.rewritten.signature(self.target.partition(":")[0])

        def outputs(flat: list[Any]) -> list[Any]:
            if not self.runnable:
                return self.rewritten.run(*flat)
            return signature.with_literals(self.lowered.run(signature.check(flat)))

        found = calibration.budget.summary(
            [calibration.distance(flat, outputs(flat)) for flat in calibration.judging], calibration.rows
        )
        what = "compiled" if self.runnable else "rewritten"
        limit = calibration.budget.limit
        detail = f"worst sample {found.worst:.2e}"
        name = f"{what} ~ eager, {calibration.budget.name}, held-out samples"
        return [Check(name, found.mean, limit, found.bound <= limit * (1 + 1e-3), detail)]

    def eager(self, flat: Sequence[Any]) -> list[Any]:
        """The model itself on flat inputs; the captured program where there is no module to call."""
        if not isinstance(self.model, nn.Module):
            return self.captured.run(*flat)
        args, kwargs = torch.utils._pytree.tree_unflatten(
            [v.clone() if isinstance(v, Tensor) else v for v in flat], self.captured.in_spec
        )
        with eval_mode(self.model), torch.no_grad():
            return torch.utils._pytree.tree_leaves(self.model(*args, **kwargs))

    def _suspect(self) -> str:
        """The first operator whose lowering diverges, found by lowering ever longer prefixes of the program."""
        from thresher.debugging.bisect import first_wrong_operator

        found = first_wrong_operator(self.rewritten, self.backend, self.target)
        return f"first operator that diverges: {found}" if found else "no single operator diverges when lowered alone"

    def _batch(self) -> str:
        if isinstance(self.lowered, BatchedExecutable):
            sizes = (f"{s} ({self.lowered.splitter.times[s]:.2f} ms)" for s in sorted(self.lowered.parts))
            return f"any size, in pieces of {' and '.join(sizes)}"
        return f"any size at once, by TVM's own schedules: {self.mixed}" if self.mixed else ""

    def kernels(self) -> list[Kernel]:
        """What each kernel takes on the example inputs, in the words of the model."""
        if not self.runnable:
            return []
        modules = {n.name: module_path(n) for p in self.specialized.values() for n in p.calls()}
        flat = self.rewritten.signature(self.target.partition(":")[0]).check(list(self.rewritten.probe))
        return [
            Kernel(k.name, list(k.nodes), list(dict.fromkeys(modules[n] for n in k.nodes)), k.milliseconds)
            for k in self.lowered.profile(flat)
        ]

    def finish(self, certified: bool) -> Compiled:
        before = replace(_figures(self.captured), parameters=self.captured.original.parameter_count)
        graph = {"before": graph_lines(self.captured), "after": graph_lines(self.rewritten)}
        mark_differences(graph["before"], graph["after"])
        report = Report(
            self.captured.name, self.target, self.backend.name, before, _figures(self.rewritten),
            self.pass_records, self.checks, self.seconds, widths=self.widths, tuning=self.tuning, tuned=self.lowered.tuned,
            library=list(self.lowered.library), approximation=self.approximation,
            sparsity=self.zeros,
            spent=[] if self.exact is None else self.ledger,
            attention=describe_attentions(self.exact or self.rewritten), estimate=1e3 * seconds(self.rewritten, self.machine),
            memory={**self.lowered.memory, "one operator at a time": peak_bytes(self.rewritten)},
            graph=graph, kernels=self.kernels(), batch=self._batch(),
        )  # fmt: skip
        signature = self.rewritten.signature(self.target.partition(":")[0])
        flat = self.rewritten.probe
        proof = ReferenceRun(list(flat), self.eager(flat), steps(self.rewritten, flat))
        certificate = self.certificate if certified else None
        return Compiled(signature, self.lowered, report, self.rewritten.text(), proof, certificate)
