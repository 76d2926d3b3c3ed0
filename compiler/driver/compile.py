"""compile(): from a model to a compiled model, in the order of its stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from thresher.approximation.budget import Budget
from thresher.approximation.calibration import Calibration
from thresher.artifact.compiled import Compiled
from thresher.backends.base import LoweringOptions
from thresher.driver.check import validate as validate_build
from thresher.driver.memory_limit import check_memory
from thresher.driver.options import CompileOptions, Validate, Verify, check_calibration
from thresher.driver.race import build_widths, keep_approximation_if_faster, tune_kernels
from thresher.driver.session import Session, open_session
from thresher.driver.stages import Build, Captured, Rewritten, capture_model, lower_program, prepared, transform
from thresher.driver.summary import summarize
from thresher.errors import InputError
from thresher.frontend.capture import Model, capture
from thresher.frontend.masks import Masks
from thresher.ir.folded_module import FoldedModule, to_module
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager
from thresher.tuning.options import Tune

Stage = Literal["captured", "rewritten", "lowered"]


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
    fixed: Mapping[str, Any] | None = None,
    validate: Validate = "error",
    verify: Verify = "final",
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
        fixed: arguments of ``forward`` (or inputs of an .onnx file) that have these values in every call, by name: they become constants,
            and a call leaves them out. For what decides sizes or how often a loop runs, as the grid of patches of a vision model does.
        validate: ``error`` raises :class:`ValidationError` when a result is wrong, ``warn`` warns, ``off`` does not look.
        verify: when exact passes are checked in float64; see :class:`PassManager`.
        widths: ``measured`` builds the model folded to several widths and not folded, too, runs them in turn on the example inputs, and
            keeps what is fastest (``report.widths``): four times the build. ``rule`` trusts the rule of ``fold-channels``.
        strict_rounding: sums only as the operators define them. Otherwise 3x3 convolutions may use Winograd's filtering, which rounds about
            ten times more (1e-5 of the output's scale in float32); where a result then misses its bound, it is built again without.
        tune: :class:`Tune` measures the plans of the kernels on the target, records what is fastest, and keeps the result only if the whole
            model is not slower for it. ``recorded`` uses the records that stand (:mod:`thresher.tuning.records`) and those that come with
            the library; ``never`` uses none.
        library: ``auto``: torch's own kernel computes an operator that has no other lowering, and one for which tuning finds it faster than
            all of ours; the build then needs torch where it runs (``report.library`` names the nodes, the reasons and the times).
            ``never``: such an operator is refused by name.
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
    options = CompileOptions(
        target or "", passes, backend, dynamic_shapes, batch_sizes, masks, fixed, validate, verify, certificate, widths, strict_rounding,
        tune, library, calibration, budget, share, progress,
    )  # fmt: skip
    with open_session(options) as session:
        return run_stages(capture_model(model, args, kwargs, options, session), options, session)


def run_stages(captured: Captured, options: CompileOptions, session: Session) -> Compiled:
    """Return the compiled model: the stages of :func:`compile` after the capture, in a session of the caller's."""
    calibration = calibration_of(captured.program, options.calibration, options.budget)
    build, widths = build_widths(captured, lowering_options_of(options, session), calibration, options, session)
    build, approximation = keep_approximation_if_faster(build, calibration, options, session)
    build, tuning = tune_kernels(build, options.tune, session) if isinstance(options.tune, Tune) else (build, {})
    validated = validate_build(build, captured, calibration, options, session)
    races = {"widths": widths, "approximation": approximation, "tuning": tuning}
    return summarize(captured, validated, races, options, session)


def lower(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    to: Stage = "lowered",
    **settings: Any,
) -> Captured | Rewritten | Build:
    """Run the stages of :func:`compile` up to one of them, and return what it gives: a value with ``as_text()`` and ``cost()``.

    Args:
        model, args, kwargs: as for :func:`compile`.
        to: ``captured``: the model as a program; ``rewritten``: after the passes; ``lowered``: code for the target, not yet validated.
        settings: the keyword arguments of :func:`compile`.

    Raises :class:`InputError` for a stage or a setting that does not exist, and what the stages raise.
    """
    if to not in ("captured", "rewritten", "lowered"):
        raise InputError(f"to must be 'captured', 'rewritten' or 'lowered', not {to!r}")
    options = CompileOptions.of(settings)
    with open_session(options) as session:
        captured = capture_model(model, args, kwargs, options, session)
        if to == "captured":
            return captured
        calibration = calibration_of(captured.program, options.calibration, options.budget)
        rewritten = transform(captured, pipelines.resolve(options.passes), calibration, options, session)
        if to == "rewritten":
            return rewritten
        return lower_program(rewritten, lowering_options_of(options, session), calibration, options, session)


def rewrite(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    passes: pipelines.Passes = "exact",
    dynamic_shapes: Any = None,
    masks: Masks | None = None,
    fixed: Mapping[str, Any] | None = None,
    verify: Verify = "final",
    calibration: Iterable[Any] | None = None,
    budget: Budget | None = None,
) -> FoldedModule:
    """Return the transformed model as a torch module: smaller, and trainable. It takes and returns what the model does.

    ``module.unfold()`` gives the original-shape ``state_dict`` back, ``module.certificate`` is the proof of the fold, and ``module.ledger``
    what approximate passes spent of the budget. The arguments are those of :func:`compile`.
    """
    check_calibration(calibration, budget)
    program = capture(prepared(model, fixed, masks, args, kwargs), args, kwargs, dynamic_shapes=dynamic_shapes)
    check_memory(program, verify)
    manager = PassManager(pipelines.resolve(passes), verify)
    context = Context(calibration=calibration_of(program, calibration, budget))
    program = manager.run(program, context)
    return to_module(program, manager.certificate, manager.ledger)


def calibration_of(program: Program, samples: Iterable[Any] | None, budget: Budget | None) -> Calibration | None:
    """Return the samples, checked and split, with what the captured program computes on them; None where there are none."""
    return None if samples is None or budget is None else Calibration.of(program, samples, budget)


def lowering_options_of(options: CompileOptions, session: Session) -> LoweringOptions:
    """Return what the backend is told."""
    shared = options.share.executable.constants() if options.share is not None else None
    library = options.library == "auto"
    return LoweringOptions(options.strict_rounding, session.plans, library, session.progress, shared)
