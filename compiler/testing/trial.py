"""One pass on one case, as a sequence of steps: each is a program on which the pass is tried.

The steps are made in order, and what follows looks at what the pass rewrote: so each is run before the next is asked for. A step can be run
again with another pass, such as a mutant of it: its program is there already.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from thresher.errors import CaptureError
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.passes.pipelines import resolve
from thresher.rewriting.contract import Context, Note, Pass
from thresher.rewriting.manager import PassManager
from thresher.testing.cases import Case, described
from thresher.testing.comparisons import divergence, new_precision, signature_change
from thresher.testing.judge import Finding, Judge
from thresher.testing.near_miss_graphs import near_misses

FREE_MISSES = 4  # one graph in so many that are tried one step off is tried with a free number of samples


@dataclass
class Step:
    """A program, and what the last pass that was run on it rewrote there."""

    where: str
    program: Program
    rewrites: Sequence[Note] = field(default=(), init=False)

    def run(self, judge: Judge) -> Iterator[Finding]:
        """Apply the pass and yield what is wrong."""
        raise NotImplementedError


@dataclass
class Example(Step):
    """The model in one size, after the passes that come first; ``captured`` is the program before them."""

    sizes: dict[str, Any]
    captured: Program
    restored: bool = False

    def run(self, judge: Judge) -> Iterator[Finding]:
        self.rewrites = ()
        result, wrong = judge.apply(self.program, self.where)
        yield from wrong
        if result is None:
            return
        self.rewrites = result.rewrites
        yield from judge.judge(self.program, result, self.where)
        if result.rewrites and judge.item.kind == "exact":
            state = self.captured.original.state
            yield from judge.way_back(self.captured, state, result.program, self.where, self.program, self.restored)


@dataclass
class FreeBatch(Step):
    """The model with the first dimension of all inputs free; ``more`` is its inputs with two more samples."""

    more: Sequence[Tensor]

    def run(self, judge: Judge) -> Iterator[Finding]:
        self.rewrites = ()
        result, wrong = judge.apply(self.program, self.where)
        yield from (replace(w, check="batch", message=f"{w.check}: {w.message}") for w in wrong)
        if result is None or not result.rewrites:
            return
        self.rewrites = result.rewrites
        if differs := divergence(self.program, result.program, self.more):
            samples = f"with {len(self.more[0])} samples instead of {len(self.more[0]) - 2}"
            yield Finding("batch", self.where, f"{samples}: {differs}")


@dataclass
class FreeMiss(FreeBatch):
    """A graph one step off the model with a free first dimension."""

    change: str

    def run(self, judge: Judge) -> Iterator[Finding]:
        for one in super().run(judge):
            yield Finding("near miss", self.where, f"where {self.change}: {one.check}: {one.message}")


@dataclass
class OtherDtype(Step):
    """The model in another dtype."""

    def run(self, judge: Judge) -> Iterator[Finding]:
        result, wrong = judge.apply(self.program, self.where)
        yield from (replace(w, check="dtypes", message=f"{w.check}: {w.message}") for w in wrong)
        if result is None or not result.rewrites:
            return
        after = result.program
        message = signature_change(self.program, after) or new_precision(self.program, after)
        if judge.item.kind == "exact":
            message = message or divergence(self.program, after, self.program.probe)
        if message:
            yield Finding("dtypes", self.where, message)


@dataclass
class NearMiss(Step):
    """A graph one step off; all checks of a program are made of it, the way back included.

    A pass that keeps copies has none where a constant is read twice.
    """

    change: str

    def run(self, judge: Judge) -> Iterator[Finding]:
        for one in self._faults(judge):
            yield Finding("near miss", self.where, f"where {self.change}: {one.check}: {one.message}")

    def _faults(self, judge: Judge) -> Iterator[Finding]:
        result, wrong = judge.apply(self.program, self.where)
        yield from wrong
        if result is None:
            return
        yield from judge.judge(self.program, result, self.where)
        constants = [n for n in self.program.graph.nodes if n.op == "get_attr"]
        copies = judge.item.keeps_copies and any(len(n.users) > 1 for n in constants)
        if result.rewrites and not copies:
            yield from judge.way_back(self.program, self.program.constants, result.program, self.where)


@dataclass
class Trial:
    """A pass and a case, and in how many variants the case is tried."""

    item: Pass
    case: Case
    first: Sequence[str | Pass]
    context: Callable[[Program], Context]
    draws: int | None
    misses: int
    dtypes: Sequence[torch.dtype]
    seed: int
    restored: bool = False
    examples: list[Example] = field(default_factory=list)

    @property
    def judge(self) -> Judge:
        """Return the judge of the pass as it is; a mutant of it has one of its own."""
        return Judge(self.item, self.context, self.seed)

    def steps(self) -> Iterator[Step]:
        """Yield all steps; each must have been run with :attr:`judge` before the next is asked for."""
        active = False
        for sizes in self.case.draws(self.draws, self.seed):
            captured = self.case.program(sizes)
            example = Example(described(self.case, sizes), self._prepared(captured), sizes, captured, self.restored)
            self.examples.append(example)
            yield example
            if not example.rewrites:
                continue
            free = self._free_batch(example) if self.item.kind == "exact" else None
            if free is not None:
                yield free
            if not active:  # once: what follows does not depend on sizes
                active = True
                yield from self._other_dtypes(example)
                yield from self._near_misses(example)
                if free is not None:
                    yield from self._free_misses(free)

    def unmet(self) -> Iterator[Finding]:
        """Yield the sizes in which the case does not test what it says, as far as its examples were run."""
        if not any(example.rewrites for example in self.examples):
            yield Finding("idle", self.case.name, f"{self.item} rewrote nothing, in no size")
            return
        drawn: list[tuple[str, Any]] = []  # values need not be hashable
        for example in self.examples:
            drawn += [item for item in example.sizes.items() if item not in drawn]
        met = [item for example in self.examples if example.rewrites for item in example.sizes.items()]
        for size, value in drawn:
            meant, seen = value in self.case.refused.get(size, ()), (size, value) in met
            if not seen and not meant:
                cure = f"Case(..., refused={{{size!r}: ({value!r},)}})"
                yield Finding("unmet", self.case.name, f"{size}={value}: no rewrite seen; if that is meant, say {cure}")
            if seen and meant:
                yield Finding("unmet", self.case.name, f"{size}={value} is said to be refused, and was rewritten")

    def _prepared(self, program: Program) -> Program:
        return prepared(program, self.first, self.context)

    def _free_batch(self, example: Example) -> FreeBatch | None:
        """Return the model captured with a free number of samples; None where it does not allow that."""
        model, args = self.case.module(example.sizes)
        if not args or not all(isinstance(a, Tensor) and a.dim() and len(a) == len(args[0]) > 1 for a in args):
            return None
        try:
            program = capture(model, args, dynamic_shapes=_free(model, len(args)))
        except Exception:  # the model needs just this number
            return None
        return FreeBatch(example.where, self._prepared(program), _with_two_more(args))

    def _other_dtypes(self, example: Example) -> Iterator[OtherDtype]:
        for dtype in self.dtypes:
            try:
                program = self._prepared(self.case.program(example.sizes, dtype))
            except CaptureError:  # the model has no such type
                continue
            yield OtherDtype(f"{example.where} in {str(dtype).removeprefix('torch.')}", program)

    def _near_misses(self, example: Example) -> Iterator[NearMiss]:
        if self.item.kind != "exact":
            return
        around = {note.node for note in example.rewrites}
        for change, other in near_misses(example.program, around, self.misses, self.seed):
            other.lineage.clear()  # its parameters are as they are here, whatever came before
            yield NearMiss(example.where, other, change)

    def _free_misses(self, free: FreeBatch) -> Iterator[FreeMiss]:
        around = {note.node for note in free.rewrites}
        for change, other in near_misses(free.program, around, self.misses // FREE_MISSES, self.seed):
            other.lineage.clear()
            yield FreeMiss(free.where, other, _with_two_more(other.probe), change)


def _with_two_more(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat([x, x[:2].flip(0)]) for x in inputs]


def prepared(program: Program, first: Sequence[str | Pass], context: Callable[[Program], Context]) -> Program:
    """Return the program after the passes that run first."""
    passes = resolve(first)
    return PassManager(passes, "off").run(program, context(program)) if passes else program


def _free(model: nn.Module, count: int) -> tuple:
    """Return a free first dimension of so many inputs, for torch.export: what ``*inputs`` takes is nested."""
    batch = torch.export.Dim("batch", min=2)
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    shapes = tuple({0: batch} for _ in range(count))
    single = next((i for i, kind in enumerate(kinds) if kind is inspect.Parameter.VAR_POSITIONAL), count)
    return shapes if single >= count else (*shapes[:single], shapes[single:])
