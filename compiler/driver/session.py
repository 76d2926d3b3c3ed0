"""``Session``: where a build happens (backend, target, machine), what is on record of it, and who is told and asked on the way."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from thresher.analysis.cost.break_even import BreakEven, Layer, estimated, record, recorded
from thresher.analysis.cost.cost import MachineModel
from thresher.backends.base import Backend, find_backend
from thresher.driver import measure_machine
from thresher.driver.clock import Clock
from thresher.driver.options import CompileOptions
from thresher.errors import RecordsError
from thresher.ir.program import Program
from thresher.progress import Progress, show_progress
from thresher.tuning.options import Tune
from thresher.tuning.records import Record, Records


@dataclass(frozen=True)
class Session:
    """The surroundings of one build.

    ``plans`` are the records for the target, workload -> plan; ``records`` is the file that new ones go to, None where nothing is to be
    remembered. ``seconds`` collects the time of each stage; ``measured`` the break-even points that this build has measured;
    ``record_failures`` why a record could not be kept: after the first one this build writes no more, because a locked file is waited for.
    """

    backend: Backend
    target: str
    machine: MachineModel
    plans: Mapping[str, str]
    records: Records | None
    progress: Progress
    clock: Clock
    seconds: dict[str, float] = field(default_factory=dict)
    measured: dict[Layer, BreakEven] = field(default_factory=dict)
    record_failures: list[RecordsError] = field(default_factory=list)

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``: where the inputs of the compiled model are."""
        return self.target.partition(":")[0]

    @property
    def runs_here(self) -> bool:
        """True where this machine can run code for the target."""
        return self.backend.runs_here(self.target)

    @contextmanager
    def stage(self, name: str, message: str) -> Iterator[None]:
        """Tell ``message``, and add the seconds of the block to those of the stage ``name``."""
        self.progress(message)
        start = self.clock.now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.clock.now() - start

    def inputs(self, program: Program) -> list[Any]:
        """Return the tensors of the example inputs, checked against the signature of ``program``."""
        return program.signature(self.device).check(list(program.probe))

    def break_even(self, layer: Layer) -> BreakEven:
        """Return what ``layer`` takes dense and skipping zeros: on record, else measured and put on record, else estimated."""
        known = self.measured.get(layer) or recorded(layer, self.plans)
        if known is not None or not self.runs_here:
            return known or estimated(layer, self.machine)
        self.progress(f"measuring {layer.workload}")
        self.measured[layer] = self.clock.break_even(self.backend, self.target, layer)
        self.remember(record(layer, self.measured[layer], self.backend.fingerprint(self.target)))
        return self.measured[layer]

    def remember(self, entry: Record) -> None:
        """Keep a record for later builds; warn where the file cannot be written: this build does without."""
        if self.records is None or self.record_failures:
            return
        try:
            self.records.put([entry])
        except RecordsError as error:
            self.record_failures.append(error)
            warnings.warn(f"measured, but not kept for later builds: {error}", stacklevel=2)


@contextmanager
def open_session(options: CompileOptions, clock: Clock | None = None) -> Iterator[Session]:
    """Yield the session of a build; the machine is measured where kernels are to be and it is not on record."""
    clock, target = clock or Clock(), options.target
    with show_progress("thresher", options.progress) as progress:
        backend = find_backend(options.backend)
        records = None if options.tune == "never" else records_of(options.tune)
        plans = known_plans(backend, target, records) if records is not None else {}
        if records is not None and _measures_machine(options, backend, plans):
            progress("measuring the machine")
            machine = clock.machine(backend, target)
            entry = measure_machine.record(machine, backend.fingerprint(target))
            records.put([entry])
            plans[entry.workload] = entry.plan
        machine = measure_machine.recorded(plans, target)
        yield Session(backend, target, machine, plans, records, progress, clock)


def records_of(tune: Tune | str) -> Records:
    """Return the records that ``tune`` names, else the user's own."""
    return Records(tune.records if isinstance(tune, Tune) else None)


def known_plans(backend: Backend, target: str, records: Records) -> dict[str, str]:
    """Return the plans on record for a target: what the library ships, and over it what was measured here."""
    if not backend.tunable:
        return {}
    fingerprint = backend.fingerprint(target)
    plans = {r.workload: r.plan for r in backend.shipped() if r.target == fingerprint}
    try:
        return plans | records.plans(fingerprint)
    except RecordsError as error:
        warnings.warn(f"building without the tuning records: {error}", stacklevel=5)
        return plans


def _measures_machine(options: CompileOptions, backend: Backend, plans: Mapping[str, str]) -> bool:
    return (
        isinstance(options.tune, Tune)
        and options.tune.remote is None
        and measure_machine.WORKLOAD not in plans
        and backend.tunable
        and options.target.startswith("cpu")
        and backend.runs_here(options.target)
    )
