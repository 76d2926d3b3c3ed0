"""The table of ONNX operators: a rule is a function of torch, and its signature says what it reads.

    @rule("Trilu")
    def trilu(x: Tensor, k: Ints = (0,), *, upper: int) -> Tensor: ...

Positional parameters are inputs, in the order of the specification. Their annotations say in which form they come:

    Tensor      a tensor that depends on inputs of the model, or a constant
    Ints        numbers that must be constants: a list of whole numbers, however many dimensions the tensor has
    Floats      the same of floating-point numbers
    Number      a Python number where the input is a constant of one element, else a tensor
    Tensors     a sequence as a list of tensors
    Value       the input as it is, for operators that compute nothing

Keyword parameters are attributes. An attribute that the node has and the rule has no parameter for is refused, so no attribute is
ignored. Defaults come from the specification, as they are in the version that the file names; a rule states a default only for attributes
that some versions do not have, or that have none. Where versions differ in more than this, each has a rule (``since``).

A first parameter ``node: Node`` gets the node itself. A rule that returns NotImplemented leaves this use to the function body that
ONNX ships for the operator; for a use that it does not cover it raises :class:`Unsupported`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_type_hints

from torch import Tensor

from thresher.frontend.onnx.values import Unsupported, Value

Ints: TypeAlias = Annotated[Sequence[int], "ints"]
Floats: TypeAlias = Annotated[Sequence[float], "floats"]
Number: TypeAlias = Annotated[Any, "number"]
Tensors: TypeAlias = Annotated[list[Tensor], "tensors"]

#: How a rule takes unsigned integers of 16 to 64 bits, which torch hardly computes with. ``native``: as they are. ``bits``: as integers
#: that are congruent to them. ``order``: as integers in the same order. See :mod:`thresher.frontend.onnx.unsigned`.
Unsigned = Literal["native", "bits", "order"]


@dataclass(frozen=True)
class Node:
    """A node as its rule sees it.

    Attributes:
        outputs: the number of outputs that the file names.
        types: of the inputs, as ONNX numbers them; None for inputs that are left out or are no tensors.
        run: runs a graph that is an attribute, on the values of its inputs.
    """

    outputs: int
    types: Sequence[int | None]
    run: Callable[[Any, Sequence[Value | None]], list[Value | None]]


@dataclass(frozen=True)
class Rule:
    """A function that computes an operator, and how it takes unsigned integers."""

    function: Callable[..., Any]
    unsigned: Unsigned = "bits"

    @cached_property
    def _hints(self) -> dict[str, Any]:
        return get_type_hints(self.function, include_extras=True)

    @cached_property
    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function).parameters.values())

    @cached_property
    def takes_node(self) -> bool:
        """The first parameter is the node."""
        return bool(self._parameters) and self._hints.get(self._parameters[0].name) is Node

    @cached_property
    def attributes(self) -> frozenset[str]:
        """The names of all attributes that the rule reads."""
        return frozenset(p.name for p in self._parameters if p.kind is p.KEYWORD_ONLY)

    @cached_property
    def required(self) -> frozenset[str]:
        """The names of attributes for which the rule has no default."""
        return frozenset(p.name for p in self._parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty)

    def inputs(self, count: int) -> list[tuple[str, str]]:
        """Return name and form of the first ``count`` inputs; raise :class:`Unsupported` where there are not that many."""
        positional = [p for p in self._parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = [(p.name, self._form(p.name)) for p in positional[self.takes_node :]]
        rest = next((p for p in self._parameters if p.kind is p.VAR_POSITIONAL), None)
        if rest is not None:
            named += [(rest.name, self._form(rest.name))] * max(0, count - len(named))
        if count > len(named):
            raise Unsupported(f"it has {count} inputs, of which only {len(named)} are read")
        return named[:count]

    def _form(self, name: str) -> str:
        hint = self._hints.get(name, Tensor)
        options = [hint, *get_args(hint)]  # of ``Tensor | None``, too
        for option in options:
            if option is Value:
                return "value"
            if hasattr(option, "__metadata__"):
                return option.__metadata__[0]
        return "tensor"


RULES: dict[
    tuple[str, str], dict[int, Rule]
] = {}  # by domain and operator, then by the first opset that the rule is for


def find_rule(domain: str, op: str, opset: int) -> Rule | None:
    """Return the rule of an operator in an opset, or None."""
    versions = RULES.get((domain, op), {})
    return next((versions[v] for v in sorted(versions, reverse=True) if v <= opset), None)


def rule(*names: str, since: int = 1, domain: str = "", unsigned: Unsigned = "bits") -> Callable[[Any], Any]:
    """Register the decorated function for these operators, from the opset ``since`` on."""

    def add(function: Any) -> Any:
        for name in names:
            RULES.setdefault((domain, name), {})[since] = Rule(function, unsigned)
        return function

    return add


def plain(functions: dict[str, Callable[..., Any]], unsigned: Unsigned = "bits") -> None:
    """Register functions of tensors only, by the names of their operators."""
    for name, function in functions.items():
        rule(name, unsigned=unsigned)(_of_tensors(function))


def _of_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*values: Tensor) -> Any:
        return function(*values)

    return run
