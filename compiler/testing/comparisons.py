"""What the proof kit compares: programs with each other, on which inputs, and the notes of a pass with what it did.

Each comparison returns or yields sentences; an empty one means that nothing is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.ir.program import Program, Role
from thresher.rewriting.contract import PassResult
from thresher.verification.compare import EXACT_TOLERANCE, compare, first_divergence, probes


def inputs_of(program: Program) -> Iterator[tuple[str, str, Sequence[Any]]]:
    """Yield what a result is judged on: the name of the check, a description, and flat inputs.

    The example, random, negative and zero inputs; inputs with other strides; and, where two inputs are alike, one tensor for both.
    """
    example, random = probes(program)
    yield "exact", "on the example", example
    yield "exact", "on random inputs", random
    yield "exact", "on negative inputs", [_floating(v, lambda t: -t.abs() - 0.5) for v in example]
    yield "exact", "on zeros", [_floating(v, torch.zeros_like) for v in example]
    yield "strides", "on inputs with other strides", [_floating(v, _strided) for v in random]
    tensors = [v for v in example if isinstance(v, Tensor)]
    if len(tensors) > 1 and len({(t.shape, t.dtype) for t in tensors}) < len(tensors):
        shared: dict[Any, Tensor] = {}
        wide = [_floating(v, Tensor.double) for v in example]  # as it is run: a conversion would make copies of it
        alike = [shared.setdefault((v.shape, v.dtype), v) if isinstance(v, Tensor) else v for v in wide]
        yield "aliasing", "with one tensor for several inputs", alike


def _floating(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _strided(value: Tensor) -> Tensor:
    """Return the same numbers, with gaps between them and the dimensions in the other order in memory."""
    order = list(range(value.dim()))[::-1]
    gapped = torch.full([*(value.shape[d] for d in order), 2], float("nan"), dtype=value.dtype)[..., 0]
    return gapped.permute(order).copy_(value)


def divergence(before: Program, after: Program, flat: Sequence[Any], tolerance: float = EXACT_TOLERANCE) -> str:
    """Return how far two programs are apart in float64 on ``flat``, and the first node that differs; empty where they are equal.

    Inputs that the program ``before`` cannot run on count as equal.
    """
    try:
        wanted = before.run(*flat, dtype=torch.float64)
    except Exception:  # the model itself cannot be run on this
        return ""
    try:
        outputs = after.run(*flat, dtype=torch.float64)
    except Exception as error:
        return f"the result cannot run: {type(error).__name__}: {error}"
    measured = compare(wanted, outputs)
    if not measured.exceeds(tolerance):
        return ""
    node = _first(before, after)
    return f"{measured.reason or f'relative error {measured.relative:.1e}'}{f', first at {node.name}' if node else ''}"


def _first(before: Program, after: Program) -> fx.Node | None:
    try:
        return first_divergence(before, after, EXACT_TOLERANCE)
    except Exception:
        return None


@dataclass(frozen=True)
class Snapshot:
    """A program as it was at one moment: its text, copies of its constants, their roles, and the length of its lineage."""

    text: str
    constants: dict[str, Tensor]
    roles: dict[str, Role]
    lineage: int

    @staticmethod
    def of(program: Program) -> Snapshot:
        """Take a snapshot that later writes into the program's tensors do not reach."""
        constants = {k: v.clone() for k, v in program.constants.items()}
        return Snapshot(program.text(), constants, dict(program.roles), len(program.lineage))

    def changes(self, program: Program) -> Iterator[str]:
        """Yield a sentence for everything in which ``program`` is no longer what it was."""
        if program.text() != self.text:
            yield "the graph that it was given has changed"
        if program.constants.keys() != self.constants.keys():
            yield f"it added or removed constants: {sorted(program.constants.keys() ^ self.constants.keys())}"
        for name in self.constants.keys() & program.constants.keys():
            if not _equal(self.constants[name], program.constants[name]):
                yield f"it wrote into the constant {name!r} that it was given"
        if (program.roles, len(program.lineage)) != (self.roles, self.lineage):
            yield "it changed the roles or the lineage of the program that it was given"


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a.nan_to_num(1.5), b.nan_to_num(1.5)))


def signature_change(before: Program, after: Program) -> str:
    """Return in which way ``after`` takes or returns something else: structure, shapes or dtypes; empty where it does not."""

    def described(nodes: Sequence[Any]) -> list[str]:
        return [f"{dtype_of(n)} {tuple(map(str, shape_of(n)))}" if is_tensor(n) else repr(n) for n in nodes]

    if before.in_spec != after.in_spec or before.out_spec != after.out_spec:
        return "the structure of its inputs or outputs has changed"
    if (before.state, before.writes) != (after.state, after.writes):
        return "it keeps or writes something else"
    for what, old, new in (
        ("takes", before.placeholders, after.placeholders),
        ("returns", before.output_nodes, after.output_nodes),
    ):
        if described(old) != described(new):
            return f"it {what} {described(new)} instead of {described(old)}"
    return ""


def new_precision(before: Program, after: Program) -> str:
    """Return the nodes of ``after`` whose floating-point or complex dtype occurs nowhere in ``before``; empty where there are none."""

    def types(program: Program) -> dict[torch.dtype, str]:
        dtypes = ((dtype_of(n), n.name) for n in program.graph.nodes if is_tensor(n))
        return {t: name for t, name in dtypes if t.is_floating_point or t.is_complex}

    new = types(after).items() - types(before).items()
    fresh = {t: name for t, name in new if t not in types(before)}
    return "; ".join(f"{name} is {t}, a type that was not there" for t, name in fresh.items())


def faults_of_notes(program: Program, result: PassResult) -> Iterator[str]:
    """Yield a sentence for every note that does not say what the pass did to ``program``, and for what no note says."""
    names = {n.name for n in program.graph.nodes}
    differs = difference(program, result.program)
    if differs and not result.rewrites:
        yield f"it says nothing of what it changed: {differs}"
    if result.program is not program and not differs and not result.rewrites:
        yield "it rewrote nothing and returns another program: return the one that was passed in"
    if result.rewrites and not differs:
        yield "it says that it rewrote something, and nothing has changed"
    for note in (*result.rewrites, *result.refusals):
        if note.node and note.node not in names:
            yield f"it speaks of the node {note.node!r}, which the program does not have"
        if not note.message:
            yield f"its note on {note.node!r} says nothing"


def difference(a: Program, b: Program) -> str:
    """Return whether the graphs of two programs or the numbers of which constant differ; empty where they are equal."""
    if not a.structurally_equal(b):
        return "the graphs differ"
    for x, y in zip(a.graph.nodes, b.graph.nodes):
        if x.op == "get_attr" and not _equal(a.constants[x.target], b.constants[y.target]):
            return f"the constant {x.target!r} differs"
    return ""
