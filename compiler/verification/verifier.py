"""Check a fold's certificate independently: this module imports torch and the graph IR, nothing of the optimiser.

The claims of a step are an inductive invariant: *each value of the new program equals the kept part of the old one wherever it is read, and
known elements have the content that is claimed*. It holds for the inputs; that every operator carries it on is checked operator by
operator, by running the operator itself in float64 on random values that satisfy the claims about its arguments:

    known    the result has the content that is claimed for it, and is not negative where that is claimed;
    unread   other values at the unread elements of the arguments do not change what is read of the result;
    kept     the new program's expression, given the kept parts of the arguments, gives the kept part of the result.

A wrong claim is found with probability 1 for piecewise analytic operators: a polynomial that is not 0 is not 0 at a random point (Schwartz
1980, Zippel 1979). Outputs must be kept whole. Every removed index must have a reason, and the reason must agree with the claims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from thresher.errors import ProgramError
from thresher.ir.nodes import is_tensor, shape_of
from thresher.ir.program import Program
from thresher.verification.certificate import Certificate, Step

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Verdict:
    """The extent of a successful check: how many steps, values and removed indices there were."""

    steps: int
    values: int
    removed: int


def verify(certificate: Certificate, seed: int = 0) -> Verdict:
    """Check every step of a certificate.

    Integers and booleans may be indices, so they are not random: their claims are checked on the values of one run, that of the probe.

    Raises:
        ProgramError: naming the step, the value and the claim that does not hold.
    """
    checked = removed = 0
    previous: Program | None = None
    for number, step in enumerate(certificate.steps):
        if previous is not None and not _same(previous, step.before):
            raise ProgramError(f"step {number} does not start where step {number - 1} ended")
        try:
            step.before.verify()
            step.after.verify()
            check = _Check(step, seed)
            checked += check.run()
            removed += check.reasons()
        except ProgramError as error:
            raise ProgramError(f"step {number} of the certificate does not hold: {error}") from error
        except (
            IndexError,
            KeyError,
            ValueError,
            TypeError,
            RuntimeError,
        ) as error:  # claims of another form than theirs
            raise ProgramError(
                f"step {number} of the certificate is malformed: {type(error).__name__}: {error}"
            ) from error
        previous = step.after
    return Verdict(len(certificate.steps), checked, removed)


def _same(a: Program, b: Program) -> bool:
    equal = a.constants.keys() == b.constants.keys() and all(
        torch.equal(t, b.constants[k]) for k, t in a.constants.items()
    )
    return equal and a.text() == b.text()


class _Check:
    def __init__(self, step: Step, seed: int):
        self.step, self.generator = step, torch.Generator().manual_seed(seed)
        self.before = {n.name: n for n in step.before.graph.nodes}
        self.after = {n.name: n for n in step.after.graph.nodes}
        self.discrete: dict[str, Tensor] = {}  # integers may be indices: they come from a run
        step.before.run(*step.before.probe, dtype=torch.float64, watch=self._note)
        for name, (other, _) in step.kept.items():
            if name not in self.before or other not in self.after:
                raise ProgramError(f"the kept value {name} ({other}) does not exist")

    def _note(self, node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex():
            self.discrete[node.name] = value

    # ------------------------------------------------------------------ the invariant

    def run(self) -> int:
        """Check all values and outputs; return the number of values."""
        count = 0
        self._inputs()
        for node in self.step.before.calls():
            if is_tensor(node):
                for positive in (False, True):  # logarithms and roots say nothing about negative numbers
                    self._operator(node, positive)
                count += 1
        self._outputs()
        return count

    def _inputs(self) -> None:
        pairs = zip(self.step.before.placeholders, self.step.after.placeholders, strict=True)
        for old, new in pairs:
            name, dims = self.step.kept.get(old.name, (new.name, {}))
            whole = all(len(i) == s for i, s in ((i, self._shape(old)[d]) for d, i in dims.items()))
            if name != new.name or not whole or old.name in self.step.known:
                raise ProgramError(f"input {old.name} must stay as it is")

    def _operator(self, node: fx.Node, positive: bool) -> None:
        arguments = self._values(node, positive)
        result = self._evaluate(node, arguments)
        mask, content = self._known(node)
        if not _agree(result[mask], content[mask]):
            raise ProgramError(f"{node.name} ({node.target}) does not have the content that is claimed to be known")
        if node.name in self.step.nonnegative and bool((result < 0).any()):
            raise ProgramError(f"{node.name} ({node.target}) is negative, which is claimed not to be")
        wanted = self._read(node)
        other = {a: self._scrambled(a, value) for a, value in arguments.items()}
        live = wanted & ~mask
        if not _agree(self._evaluate(node, other)[live], result[live]):
            raise ProgramError(f"{node.name} ({node.target}) depends on elements that are claimed to be unread")
        if node.name in self.step.kept:
            for values in (arguments, other):
                self._kept(node, values, torch.where(mask, content, result), wanted)

    def _kept(self, node: fx.Node, arguments: dict[fx.Node, Tensor], result: Tensor, wanted: Tensor) -> None:
        """What stands for ``node`` in the new program, from the kept parts of the arguments."""
        seeds = {}
        for argument, value in arguments.items():
            if argument.name in self.step.kept:
                seeds[self.after[self.step.kept[argument.name][0]]] = self._part(argument, value)
        actual = self._new(self.after[self.step.kept[node.name][0]], seeds, f"for {node.name}")
        expected, relevant = self._part(node, result), self._part(node, wanted)
        if actual.shape != expected.shape:
            raise ProgramError(f"{node.name} is kept as {tuple(expected.shape)}, but there it is {tuple(actual.shape)}")
        if not _agree(actual[relevant], expected[relevant]):
            raise ProgramError(f"{node.name} ({node.target}) has another value in the new program")

    def _outputs(self) -> None:
        for old, new in zip(self.step.before.output_nodes, self.step.after.output_nodes, strict=True):
            if not is_tensor(old):
                if isinstance(old, fx.Node) or old != new:
                    raise ProgramError(f"output {old} is no tensor, and cannot be shown to be {new}")
                continue
            if old.op == "placeholder":
                if new is not self.after[old.name]:
                    raise ProgramError(f"output {old.name} is another value in the new program")
                continue
            if not bool(self._read(old).all()):
                raise ProgramError(f"output {old.name} is claimed not to be read")
            name, dims = self.step.kept.get(old.name, ("", {}))
            if name == new.name:
                if any(len(i) != self._shape(old)[d] for d, i in dims.items()):
                    raise ProgramError(f"output {old.name} lost indices")
                continue
            constant = self.step.before.constant(old)
            whole = _double(constant) if constant is not None else self._consistent(old, positive=False)
            if name == "" and constant is None and not bool(self._known(old)[0].all()):
                raise ProgramError(f"output {old.name} is neither kept nor known")
            seeds = {self.after[name]: self._part(old, whole)} if name else {}
            if not _agree(self._new(new, seeds, f"for output {old.name}"), whole):
                raise ProgramError(f"output {old.name} is another value in the new program")

    # ------------------------------------------------------------------ claims

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(int(d) if not isinstance(d, torch.SymInt) else int(d.node.hint) for d in shape_of(node))

    def _spread(self, node: fx.Node, narrow: Tensor) -> Tensor:
        try:
            return narrow.expand(self._shape(node))
        except RuntimeError as error:
            raise ProgramError(f"a claim about {node.name} does not fit its shape: {error}") from error

    def _known(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        mask, content = self.step.known.get(node.name, (torch.tensor(False), torch.tensor(0.0)))
        content = content.double() if content.is_floating_point() and node.meta["val"].is_floating_point() else content
        return self._spread(node, mask), self._spread(node, content)

    def _read(self, node: fx.Node) -> Tensor:
        read = self._spread(node, self.step.read.get(node.name, torch.tensor(False)))
        if node.name not in self.step.unrouted:
            return read
        name, unread = self.step.unrouted[node.name]
        numbers = self.discrete[name].reshape(-1)
        rows = (numbers >= 0) & (numbers < len(unread))
        rows[rows.clone()] = unread[numbers[rows]]
        return read & ~rows.reshape([*read.shape[:-1], 1])

    def _part(self, node: fx.Node, value: Tensor) -> Tensor:
        value = self._spread(node, value)
        for dim, indices in self.step.kept[node.name][1].items():
            value = value.index_select(dim, indices)
        return value

    # ------------------------------------------------------------------ values

    def _random(self, shape: tuple[int, ...], positive: bool) -> Tensor:
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return value.abs() + 0.1 if positive else value

    def _consistent(self, node: fx.Node, positive: bool) -> Tensor:
        """A random value of ``node`` that satisfies what is claimed to be known."""
        if node.name in self.discrete:
            return self.discrete[node.name]
        mask, content = self._known(node)
        value = self._random(self._shape(node), positive or node.name in self.step.nonnegative)
        return torch.where(mask, content.to(value.dtype), value)

    def _values(self, node: fx.Node, positive: bool) -> dict[fx.Node, Tensor]:
        """A value for every argument; those that are one value in the new program are equal."""
        values: dict[fx.Node, Tensor] = {}
        stands: dict[str, Tensor] = {}
        for argument in self._arguments(node):
            value = self._consistent(argument, positive)
            if argument.name in self.step.kept:
                value = stands.setdefault(self.step.kept[argument.name][0], value)
            values[argument] = value
        return values

    def _arguments(self, node: fx.Node) -> list[fx.Node]:
        """Tensor arguments that are no constants, those of calls with several results included."""
        arguments: list[fx.Node] = []
        for source in node.all_input_nodes:
            if is_tensor(source):
                arguments += [source] if source.op != "get_attr" else []
            else:
                arguments += self._arguments(source)
        return list(dict.fromkeys(arguments))

    def _scrambled(self, node: fx.Node, value: Tensor) -> Tensor:
        """``value`` with other content where it is neither known nor read."""
        if node.name in self.discrete or node.op == "placeholder":
            return value
        fixed = self._known(node)[0] | self._read(node)
        return torch.where(fixed, value, self._random(tuple(value.shape), node.name in self.step.nonnegative))

    def _evaluate(self, node: fx.Node, arguments: dict[fx.Node, Tensor]) -> Tensor:
        """The old program's operator on ``arguments``."""
        return _call(node, lambda source: self._old(source, arguments))

    def _old(self, node: fx.Node, arguments: dict[fx.Node, Tensor]) -> Any:
        if node in arguments:
            return arguments[node]
        if node.op == "get_attr":
            return _double(self.step.before.constants[node.target])
        return _call(node, lambda source: self._old(source, arguments))

    def _new(self, node: fx.Node, seeds: dict[fx.Node, Tensor], purpose: str) -> Any:
        """The new program's value of ``node``, from ``seeds`` and constants alone."""
        if node in seeds:
            return seeds[node]
        if node.op == "get_attr":
            return _double(self.step.after.constants[node.target])
        if node.op == "placeholder":
            raise ProgramError(f"the new program reads input {node.name} {purpose}, where the old one does not")
        value = _call(node, lambda source: self._new(source, seeds, purpose))
        seeds[node] = value
        return value

    # ------------------------------------------------------------------ reasons

    def reasons(self) -> int:
        """Check that every removed index has a reason that agrees with the claims; return the number of removed indices."""
        justified: dict[tuple[str, int], set[int]] = {}
        for reason in self.step.reasons:
            node = self.before.get(reason.value)
            if node is None or str(node.target) != reason.operator:
                raise ProgramError(f"the reason for {reason.value} names an operator that it is not")
            if reason.kind == "unread":
                named = {n.name for n in node.users}
                claimed = ~self._read(node) | self._known(node)[0]
            else:
                named = {n.name for n in node.all_input_nodes}
                mask, content = self._known(node)
                claimed = mask & (content == 0) if reason.kind == "zero" else mask
            if not set(reason.source) <= named:
                raise ProgramError(f"the reason for {reason.value} names values that it has nothing to do with")
            if not bool(claimed.index_select(reason.dim, torch.tensor(reason.indices)).all()):
                raise ProgramError(f"the reason for {reason.value} ({reason.kind}) does not agree with the claims")
            justified.setdefault((reason.value, reason.dim), set()).update(reason.indices)
        removed = 0
        for name, (_, dims) in self.step.kept.items():
            for dim, kept in dims.items():
                gone = set(range(self._shape(self.before[name])[dim])) - set(kept.tolist())
                if missing := gone - justified.get((name, dim), set()):
                    raise ProgramError(
                        f"no reason is given why {sorted(missing)[:5]} of dimension {dim} of {name} went"
                    )
                removed += len(gone)
        return removed


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _call(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    def one(a: Any) -> Any:
        if isinstance(a, fx.Node):
            return value_of(a)
        return torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), one)
    with torch.no_grad():
        return node.target(*args, **kwargs)


def _agree(actual: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding, NaN and infinities in the same places."""
    if not actual.is_floating_point():
        return bool((actual == expected).all())
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)):
        return False
    if not bool(finite.any()):
        return True
    scale = max(float(expected[finite].abs().max()), 1.0)
    return float((actual - expected)[finite].abs().max()) <= TOLERANCE * scale
