"""Races: which of several builds is the fastest on the example inputs. Whatever claims to save time is compared with what it replaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from thresher.approximation.calibration import Calibration
from thresher.backends.base import MEASURED_AS_FASTER, LoweringOptions
from thresher.driver.fold_variants import variants
from thresher.driver.options import CompileOptions
from thresher.driver.session import Session
from thresher.driver.stages import Build, Captured, lower_again, lower_program, transform
from thresher.errors import InputError
from thresher.passes import pipelines
from thresher.tuning.options import TorchKernel, Tune
from thresher.tuning.records import Record

TUNING_ROUNDS = 20  # a tuned kernel saves little of a whole model: more rounds tell it from chance
Times = dict[str, float]  # milliseconds, by the name of the contender


def race(contenders: Mapping[str, Build], session: Session, rounds: int = 10) -> tuple[Build, Times]:
    """Return the build that runs fastest on the example inputs, and the milliseconds of all of them; they run in turn."""
    inputs = session.inputs(next(iter(contenders.values())).rewritten.program)
    times = session.clock.race({n: partial(b.executable.run, inputs) for n, b in contenders.items()}, rounds)
    return contenders[fastest(times)], times


def fastest(times: Times) -> str:
    """Return the name of the contender that took the least time."""
    return min(times, key=times.__getitem__)


def build_widths(
    captured: Captured,
    lowering_options: LoweringOptions,
    calibration: Calibration | None,
    options: CompileOptions,
    session: Session,
) -> tuple[Build, Times]:
    """Return the build of the passes that were asked for; with ``widths="measured"`` the fastest of several foldings.

    Raises :class:`InputError` where widths are to be measured and the target is not here.
    """
    passes = pipelines.resolve(options.passes)

    def build(chain: Sequence) -> Build:
        rewritten = transform(captured, chain, calibration, options, session)
        return lower_program(rewritten, lowering_options, calibration, options, session)

    if options.widths == "rule":
        return build(passes), {}
    if not session.runs_here:
        raise InputError(f"widths='measured' needs the target {session.target} on this machine")
    contenders = {name: build(chain) for name, chain in variants(passes).items()}
    with session.stage("widths", "measuring widths"):
        return race(contenders, session)


def keep_approximation_if_faster(
    build: Build, calibration: Calibration | None, options: CompileOptions, session: Session
) -> tuple[Build, Times]:
    """Return the approximate build, or the exact one where the approximation buys nothing: nobody wants an error for nothing."""
    if build.rewritten.exact is None or not session.runs_here:
        return build, {}
    with session.stage("approximation", "comparing exact and approximate"):
        rewritten = build.rewritten.without_approximation("measured: not faster than the exact model")
        exact = lower_program(rewritten, build.lowering_options, calibration, options, session)
        return race({"approximate": build, "exact": exact}, session)


def tune_kernels(build: Build, tune: Tune, session: Session) -> tuple[Build, Times]:
    """Measure the kernels, build with the fastest plans, and keep that only if the whole model is not slower for it.

    The tuned build races the untuned one, and itself without torch's kernels; the plans of what loses are withdrawn from the records.
    """
    with session.stage("tune", "tuning"):
        entries: list[Record] = []
        tuned_options = build.lowering_options
        for program in build.specialized.values():
            session.backend.tune(program, session.target, tune, tuned_options, partial(_save, session, entries))
            plans = {r.workload: r.plan for r in entries}
            tuned_options = replace(tuned_options, records={**tuned_options.records, **plans})
        tuned = lower_again(build, tuned_options, session)
        if tune.remote is not None or not session.runs_here:
            return tuned, {}
        contenders = {"tuned": tuned, "untuned": build}
        if build.executable.tuned[0]:  # it was built with records
            contenders["untuned"] = lower_again(build, replace(tuned_options, records={}), session)
        if any(call.reason == MEASURED_AS_FASTER for call in tuned.executable.library):
            without = {w: plan for w, plan in tuned_options.records.items() if plan != repr(TorchKernel())}
            without_torch = replace(tuned_options, records=without)
            contenders["tuned, without torch"] = lower_again(build, without_torch, session)
        session.progress("comparing tuned and untuned")
        best, times = race(contenders, session, TUNING_ROUNDS)
        _withdraw(fastest(times), entries, session)
        return best, times


def _save(session: Session, entries: list[Record], entry: Record) -> None:
    assert session.records is not None, "tuning keeps records"
    session.records.put([entry])
    entries.append(entry)


def _withdraw(best: str, entries: Sequence[Record], session: Session) -> None:
    """Take the plans of what lost from the records."""
    if best == "tuned" or session.records is None:
        return
    torch_plan = repr(TorchKernel())
    session.records.put([r.untuned() for r in entries if best == "untuned" or r.plan == torch_plan])
