"""The stages of a build as values: ``Captured`` -> ``Rewritten`` -> ``Build``, each with its text and its cost.

    capture_model(model, ...) -> Captured        the model as a program
    transform(captured, passes, ...) -> Rewritten    the program after the passes
    lower_program(rewritten, ...) -> Build           code for the target

Nothing here changes a value that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from thresher.analysis.cost.cost import MachineModel, constant_bytes, count_flops, seconds
from thresher.analysis.slices.batch_independence import free_batch, free_symbols, why_samples_interact, with_batch
from thresher.approximation.calibration import Calibration
from thresher.approximation.ledger import Spent
from thresher.backends.base import Executable, LoweringOptions
from thresher.backends.batched import BatchedExecutable
from thresher.driver.memory_limit import check_memory
from thresher.driver.options import CompileOptions
from thresher.driver.session import Session
from thresher.errors import InputError
from thresher.frontend.capture import Model, capture
from thresher.frontend.fixed_arguments import fix_arguments
from thresher.frontend.masks import Masks, apply_masks
from thresher.frontend.module_state import eval_mode, holding
from thresher.ir.nodes import is_tensor
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.rewriting.contract import Context, Pass, SkippedZeros
from thresher.rewriting.manager import PassManager, PassRecord
from thresher.runtime.comparison import Check
from thresher.verification.certificate import Certificate

BATCH_ROUNDS = 7  # of the race between batch sizes: their ratios decide, not their last per cent


@dataclass(frozen=True)
class Cost:
    """``parameters`` (elements), ``flops`` of a run, ``bytes`` of all constants, and the estimated ``milliseconds`` of a run."""

    parameters: int
    flops: int
    bytes: int
    milliseconds: float


def cost_of(program: Program, machine: MachineModel) -> Cost:
    """Return the cost of ``program`` on inputs of the example's shapes."""
    milliseconds = 1e3 * seconds(program, machine)
    return Cost(program.parameter_count(), count_flops(program), constant_bytes(program), milliseconds)


@dataclass(frozen=True)
class Captured:
    """A model as a program. ``model`` is the module that was captured, with its masks applied; it is the reference.

    None is a graph that no module stands for: the program itself, run by torch, is the reference.
    """

    program: Program
    model: Model | None
    machine: MachineModel

    def as_text(self) -> str:
        """Return the program, one line a node."""
        return self.program.text()

    def cost(self) -> Cost:
        """Return what the model costs as it was captured."""
        return cost_of(self.program, self.machine)

    def eager(self, flat: Sequence[Any]) -> list[Any]:
        """Return the flat outputs of the model itself; of the captured program where there is no module to call.

        The model runs on copies of the inputs and of its state, so that neither is changed.
        """
        if not isinstance(self.model, nn.Module):
            return self.program.run(*flat)
        program, copies = self.program, [v.clone() if isinstance(v, Tensor) else v for v in flat]
        count = len(copies) - len(program.state)
        args, kwargs = pytree.tree_unflatten(copies[:count], program.in_spec)
        with eval_mode(self.model), torch.no_grad(), holding(self.model, zip(program.state, copies[count:])) as held:
            results = pytree.tree_leaves(self.model(*args, **kwargs))
            values = [*copies[:count], *held()]
            return [*results, *(values[i] for i in program.writes)]


@dataclass(frozen=True)
class Rewritten:
    """The program after the passes, its constants rounded to the dtypes that they declare.

    ``exact`` is the program that approximate passes started from, None where none of them changed anything; ``certificate`` proves the
    fold, ``ledger`` lists what was spent of the budget, and ``unmade`` are comparisons of passes that could not be made.
    """

    program: Program
    machine: MachineModel
    records: Sequence[PassRecord] = ()
    exact: Program | None = None
    certificate: Certificate | None = None
    ledger: Sequence[Spent] = ()
    unmade: Sequence[Check] = ()

    def as_text(self) -> str:
        """Return the program, one line a node."""
        return self.program.text()

    def cost(self) -> Cost:
        """Return what the rewritten program costs."""
        return cost_of(self.program, self.machine)

    def without_approximation(self, reason: str) -> Rewritten:
        """Return the exact program, in whose records the approximate passes are reverted for ``reason``."""
        assert self.exact is not None
        records = [
            replace(r, status="reverted", failure=reason) if r.status == "changed" and r.kind == "approximate" else r
            for r in self.records
        ]
        return replace(self, program=self.exact, records=records, exact=None, ledger=())


@dataclass(frozen=True)
class Build:
    """Code for the target.

    ``specialized`` are the programs that were lowered, in the form that the backend's kernels run best, by the size of their batch (0: as
    it was captured); ``records`` and ``zeros`` are what the specialising passes did and looked at. ``interaction`` says why a batch that
    was left free is not computed in batches of a few sizes; empty where it is, or where none was left free.
    """

    rewritten: Rewritten
    specialized: dict[int, Program]
    executable: Executable
    lowering_options: LoweringOptions
    records: Sequence[PassRecord] = ()
    zeros: Sequence[SkippedZeros] = ()
    interaction: str = ""

    @property
    def largest(self) -> Program:
        """The specialised program, for the largest batch where there are several."""
        return self.specialized[max(self.specialized)]

    def as_text(self) -> str:
        """Return the generated code in a readable form."""
        return self.executable.as_text()

    def cost(self) -> Cost:
        """Return what the lowered program costs."""
        return cost_of(self.largest, self.rewritten.machine)


# ---------------------------------------------------------------------- model -> program


def capture_model(
    model: Model, args: Sequence[Any], kwargs: dict[str, Any] | None, options: CompileOptions, session: Session
) -> Captured:
    """Return ``model``, with the fixed arguments and the masks of ``options``, as a program."""
    with session.stage("capture", "capturing"):
        model = prepared(model, options.fixed, options.masks, args, kwargs)
        program = capture(model, args, kwargs, dynamic_shapes=options.dynamic_shapes)
        check_memory(program, options.verify)
        return Captured(program, model, session.machine)


def prepared(
    model: Model,
    fixed: Mapping[str, Any] | None,
    masks: Masks | None,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None,
) -> Model:
    """Return ``model`` without its ``fixed`` arguments, and a copy with what ``masks`` name set to 0 where there are any.

    Raises :class:`InputError` for masks of something that has no modules to name, and what :func:`fix_arguments` raises.
    """
    model = fix_arguments(model, fixed or {})
    if masks is None:
        return model
    if not isinstance(model, nn.Module):
        raise InputError("masks need an nn.Module; an exported program has no modules to name")
    return apply_masks(model, masks, args, kwargs)


# ---------------------------------------------------------------------- program -> program


def transform(
    captured: Captured,
    passes: Sequence[str | Pass],
    calibration: Calibration | None,
    options: CompileOptions,
    session: Session,
) -> Rewritten:
    """Return the captured program after ``passes``."""
    with session.stage("passes", "rewriting"):
        manager = PassManager(passes, options.verify)
        context = Context(session.target, session.progress, session.machine, calibration)
        program = manager.run(captured.program, context).rounded()
        approximated = any(r.status == "changed" and r.kind == "approximate" for r in manager.records)
        exact = manager.exact.rounded() if approximated and manager.exact is not None else None
        return Rewritten(
            program, session.machine, manager.records, exact, manager.certificate, manager.ledger, manager.unmade
        )


# ---------------------------------------------------------------------- program -> code


def lower_program(
    rewritten: Rewritten,
    lowering_options: LoweringOptions,
    calibration: Calibration | None,
    options: CompileOptions,
    session: Session,
) -> Build:
    """Return code for the rewritten program: specialised for the backend, for each batch size where that is allowed, and lowered.

    Raises :class:`BackendError` naming the node that cannot be lowered.
    """
    with session.stage("lower", "lowering"):
        programs, interaction = _programs(rewritten.program, options, session)
        managers = {size: PassManager(pipelines.specialize, "off") for size in programs}
        context = Context(
            session.target, session.progress, session.machine, calibration, find_break_even=session.break_even
        )
        specialized = programs
        if session.backend.specializes:
            specialized = {size: managers[size].run(p, context).rounded() for size, p in programs.items()}
        largest = managers[max(managers)]
        executable = _execute(rewritten.program, specialized, lowering_options, session)
        return Build(rewritten, specialized, executable, lowering_options, largest.records, largest.zeros, interaction)


def lower_again(build: Build, lowering_options: LoweringOptions, session: Session) -> Build:
    """Return the same programs lowered in another way."""
    with session.stage("lower", "lowering"):
        executable = _execute(build.rewritten.program, build.specialized, lowering_options, session)
        return replace(build, executable=executable, lowering_options=lowering_options)


def _programs(program: Program, options: CompileOptions, session: Session) -> tuple[dict[int, Program], str]:
    """Return the program itself (0), or, where its batch is free and no sample reads another, the program for each batch size; and why
    not, where a free batch is kept."""
    if not session.backend.specializes or not options.batch_sizes:
        return {0: program}, ""
    if program.writes and any(free_symbols(n) for n in program.placeholders if is_tensor(n)):
        return {0: program}, f"the model writes into {program.placeholders[program.writes[0]].name}, once a call"
    if not free_batch(program):
        return {0: program}, ""
    interaction = why_samples_interact(program, options.batch_sizes)
    if interaction:
        return {0: program}, interaction
    return {size: with_batch(program, size) for size in options.batch_sizes}, ""


def _execute(
    program: Program, specialized: dict[int, Program], lowering_options: LoweringOptions, session: Session
) -> Executable:
    """Lower the specialised programs; smaller batches read the weights of the largest where they can."""
    if set(specialized) == {0}:
        return session.backend.lower(specialized[0], session.target, lowering_options)
    largest, *smaller = sorted(specialized, reverse=True)
    members = {largest: session.backend.lower(specialized[largest], session.target, lowering_options)}
    shared = lowering_options.shared_weights or members[largest].constants()
    sharing = replace(lowering_options, shared_weights=shared)
    members |= {size: session.backend.lower(specialized[size], session.target, sharing) for size in smaller}
    batched = [bool(free_symbols(n)) for n in program.placeholders if is_tensor(n)]
    return BatchedExecutable(members, batched, _batch_times(members, specialized, session))


def _batch_times(members: dict[int, Executable], specialized: dict[int, Program], session: Session) -> dict[int, float]:
    """Return the milliseconds of each batch size: measured where the target is here, else estimated."""
    if not session.runs_here:
        return {size: 1e3 * seconds(p, session.machine) for size, p in specialized.items()}
    session.progress("measuring the batch sizes")
    calls = {str(size): _Call(members[size], session.inputs(specialized[size])) for size in members}
    times = session.clock.race(calls, rounds=BATCH_ROUNDS)
    return {size: times[str(size)] for size in members}


@dataclass(frozen=True)
class _Call:
    """A run of an executable on fixed inputs."""

    executable: Executable
    inputs: list[Any] = field(repr=False)

    def __call__(self) -> object:
        return self.executable.run(self.inputs)
