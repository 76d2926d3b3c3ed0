"""The proof that a fold leaves behind: what it claims of every value, and why each removed index could go.

A step leads from one program to the next. For the values of the first it claims

* known:   these elements are constant, with this content;
* read:    no other elements influence an output;
* kept:    the value stands in the second program under this name, with these indices of each dimension;
* nonnegative: no element is negative;
* unrouted: no output depends on the rows that go to these experts,

and for every removed index it gives a reason: the operator, the rule, and what the rule was applied to, so that a chain of reasons leads
to a constant of the model. ``thresher.verification.verifier`` checks all of it without the optimiser. On disk a certificate is one zip
file: the programs as text, all tensors in safetensors, the claims in JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from thresher.atomic_files import new_zip
from thresher.errors import ArtifactError
from thresher.ir.nodes import is_tensor, shape_of
from thresher.ir.parser import parse
from thresher.ir.program import Program
from thresher.runtime.package import damage_named, read_package

FORMAT = 1
CLAIMS, TENSORS = "certificate.json", "tensors.safetensors"  # the members of the file


@dataclass(frozen=True)
class Reason:
    """The reason for which indices of a dimension of a value were removed.

    ``kind``: ``zero`` or ``constant`` (they are known, by ``rule`` from the arguments ``source`` of ``operator``) or ``unread`` (none of
    the users ``source`` reads them).
    """

    value: str
    dim: int
    indices: tuple[int, ...]
    kind: str
    operator: str
    rule: str
    source: tuple[str, ...]


@dataclass
class Step:
    """The claims about one rewrite. Facts are narrow tensors (size 1 along a dimension in which they do not vary), by value name."""

    before: Program
    after: Program
    known: dict[str, tuple[Tensor, Tensor]]  # mask, content
    read: dict[str, Tensor]  # a value that is missing here is not read at all
    kept: dict[str, tuple[str, dict[int, Tensor]]]  # name in ``after``, kept indices of the dimensions that lost some
    reasons: list[Reason] = field(default_factory=list)
    nonnegative: frozenset[str] = frozenset()  # values of which no element is negative
    #: Of a value: the name of another one, whole numbers, one for each row, and for which numbers (bool) the row is not read.
    unrouted: dict[str, tuple[str, Tensor]] = field(default_factory=dict)


@dataclass
class Certificate:
    """The proof of a fold: its steps, in order."""

    steps: list[Step]

    def explain(self, value: str, dim: int, index: int, step: int = 0) -> str:
        """Return the chain of reasons for one removed index, one line each, down to the constant that needs none."""
        reasons = {(r.value, r.dim, i): r for r in self.steps[step].reasons for i in r.indices}
        known = {r.value: r for r in self.steps[step].reasons if r.kind != "unread"}
        lines, todo, seen = [], [(value, reasons.get((value, dim, index)))], set()
        while todo:
            name, reason = todo.pop(0)
            if reason is None or name in seen:
                continue
            seen.add(name)
            shown = ", ".join(reason.source)
            how = f"not read by {shown}" if reason.kind == "unread" else f"{reason.kind} by {reason.rule} from {shown}"
            lines.append(f"{name} ({reason.operator}): {how}")
            todo += [(s, known.get(s)) for s in reason.source if reason.kind != "unread"]
        return "\n".join(lines) or f"index {index} of dimension {dim} of {value} was not removed"

    def detached(self) -> Certificate:
        """Return a copy that shares no tensor with the model that was folded: training it on would make the claims wrong."""
        programs: dict[int, Program] = {}

        def copied(program: Program) -> Program:
            if id(program) not in programs:
                programs[id(program)] = program.detached()
            return programs[id(program)]

        return Certificate(
            [
                Step(
                    copied(step.before),
                    copied(step.after),
                    {name: (mask.clone(), content.clone()) for name, (mask, content) in step.known.items()},
                    {name: mask.clone() for name, mask in step.read.items()},
                    {n: (name, {d: t.clone() for d, t in dims.items()}) for n, (name, dims) in step.kept.items()},
                    step.reasons,
                    step.nonnegative,
                    {value: (name, unread.clone()) for value, (name, unread) in step.unrouted.items()},
                )
                for step in self.steps
            ]
        )

    # ------------------------------------------------------------------ on disk

    def save(self, path: str | os.PathLike) -> Path:
        """Write the certificate, with both programs of every step, to one file.

        Raises :class:`ArtifactError` where the file cannot be written, or a program has a dynamic shape: its text cannot be read back.
        """
        path, tensors, steps = Path(path), _Tensors(), []
        for program in (p for step in self.steps for p in (step.before, step.after)):
            for node in program.placeholders:
                if is_tensor(node) and any(isinstance(d, torch.SymInt) for d in shape_of(node)):
                    raise ArtifactError(
                        f"input {node.name} has the dynamic shape {tuple(shape_of(node))}: a certificate is saved for static shapes; "
                        "build without dynamic_shapes, or check it in this process with thresher.verification.verifier.verify"
                    )
        for step in self.steps:
            steps.append(
                {
                    "before": _program_to_json(step.before, tensors),
                    "after": _program_to_json(step.after, tensors),
                    "known": {k: [tensors.add(t) for t in pair] for k, pair in step.known.items()},
                    "read": {k: tensors.add(t) for k, t in step.read.items()},
                    "kept": {
                        k: [name, {str(d): tensors.add(t) for d, t in dims.items()}]
                        for k, (name, dims) in step.kept.items()
                    },
                    "reasons": [vars(r) for r in step.reasons],
                    "nonnegative": sorted(step.nonnegative),
                    "unrouted": {value: [name, tensors.add(t)] for value, (name, t) in step.unrouted.items()},
                }
            )
        with new_zip(path) as package:
            package.writestr(CLAIMS, json.dumps({"format": FORMAT, "steps": steps}))
            package.writestr(TENSORS, save_tensors(tensors.by_name))
        return path

    @staticmethod
    def load(path: str | os.PathLike) -> Certificate:
        """Read a certificate back. Raise :class:`ArtifactError` where the file is none, or damaged."""
        path = Path(path)
        raw, members = read_package(path, "a certificate", CLAIMS, lambda raw: {TENSORS})
        with damage_named(path):
            if raw["format"] > FORMAT:
                raise ArtifactError(
                    f"{path} has format {raw['format']}; this library reads up to {FORMAT}: update thresher"
                )
            tensors = load_tensors(members[TENSORS])
            return Certificate([_step_from_json(step, tensors) for step in raw["steps"]])


class _Tensors:
    """Each tensor once, under a number."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}
        self.names: dict[int, str] = {}
        self.alive: list[Tensor] = []  # an id is only good while its tensor lives

    def add(self, tensor: Tensor) -> str:
        if id(tensor) not in self.names:
            self.alive.append(tensor)
            self.names[id(tensor)] = name = str(len(self.by_name))
            self.by_name[name] = tensor.detach().cpu().contiguous().clone()
        return self.names[id(tensor)]


def _program_to_json(program: Program, tensors: _Tensors) -> dict[str, Any]:
    probe = [{"tensor": tensors.add(v)} if isinstance(v, Tensor) else {"literal": v} for v in program.probe]
    return {
        "text": program.text(),
        "constants": {name: tensors.add(t) for name, t in program.constants.items()},
        "probe": probe,
    }


def _program_from_json(raw: dict[str, Any], tensors: dict[str, Tensor]) -> Program:
    program = parse(raw["text"])
    program.constants = {name: tensors[number] for name, number in raw["constants"].items()}
    program.probe = tuple(tensors[p["tensor"]] if "tensor" in p else p["literal"] for p in raw["probe"])
    return program


def _step_from_json(raw: dict[str, Any], tensors: dict[str, Tensor]) -> Step:
    def reasons() -> Iterator[Reason]:
        for r in raw["reasons"]:
            yield Reason(**{**r, "indices": tuple(r["indices"]), "source": tuple(r["source"])})

    return Step(
        _program_from_json(raw["before"], tensors),
        _program_from_json(raw["after"], tensors),
        {k: (tensors[a], tensors[b]) for k, (a, b) in raw["known"].items()},
        {k: tensors[t] for k, t in raw["read"].items()},
        {k: (name, {int(d): tensors[t] for d, t in dims.items()}) for k, (name, dims) in raw["kept"].items()},
        list(reasons()),
        frozenset(raw.get("nonnegative", ())),
        {value: (name, tensors[t]) for value, (name, t) in raw.get("unrouted", {}).items()},
    )


def indices_of(mask: Tensor) -> tuple[int, ...]:
    """Return the indices at which a boolean vector is true."""
    return tuple(torch.nonzero(mask).reshape(-1).tolist())
