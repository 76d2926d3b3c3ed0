"""Which nodes of the program each kernel computes, so that its time can be told in the words of the model.

TVM fuses operators into kernels and names them after operators; equal kernels are one function. So the calls of the module before fusion
and after it are laid over each other: a fused function holds the calls that went into it, and a call is known by its callee and its
arguments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import tvm
from tvm import relax

Kernels = list[tuple[str, tuple[str, ...]]]  # (name, nodes) of every call of a kernel, in order


class NamingBuilder(relax.BlockBuilder):
    """A builder that remembers which node every variable was emitted for."""

    def __init__(self) -> None:
        super().__init__()
        self.node = ""  # that is being converted
        self.origin: dict[str, str] = {}  # variable -> node

    def emit(self, expr: Any, name_hint: str = "") -> relax.Var:
        var = super().emit(expr, name_hint)
        self.origin[var.name] = self.node
        return var


def kernels(before: tvm.IRModule, fused: tvm.IRModule, origin: dict[str, str]) -> Kernels:
    """The calls of ``main`` in ``fused`` with the nodes they compute; ``before`` is the same module before ``FuseOps``."""
    main = before["main"]
    known: dict[Any, int] = {p: -1 - i for i, p in enumerate(main.params)}
    calls: dict[Any, list[int]] = defaultdict(list)
    names: list[str] = []
    for var, value in _bindings(main):
        calls[_key(value, known)].append(len(names))
        known[var] = len(names)
        names.append(origin.get(var.name, ""))

    def number(value: Any, numbers: dict[Any, int]) -> int:
        """The binding of ``before`` that ``value`` is; each is found once."""
        waiting = calls.get(_key(value, numbers))
        return waiting.pop(0) if waiting else len(names)

    names.append("")  # the name of what is not found
    found: Kernels = []
    main = fused["main"]
    numbers: dict[Any, int] = {p: -1 - i for i, p in enumerate(main.params)}
    for var, value in _bindings(main):
        callee = value.op if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar) else None
        inner = None if callee is None else fused[callee]
        if callee is None or not isinstance(inner, relax.Function):
            numbers[var] = number(value, numbers)
            if _is_kernel(value):
                found.append((value.args[0].name_hint, _named([names[numbers[var]]])))
            continue
        inside = {p: _key(a, numbers) for p, a in zip(inner.params, value.args)}
        parts = []
        for inner_var, inner_value in _bindings(inner):
            inside[inner_var] = number(inner_value, inside)
            parts.append(names[inside[inner_var]])
        numbers[var] = inside[inner.body.body] if inner.body.body in inside else len(names) - 1
        found.append((callee.name_hint, _named(parts)))
    return found


def _named(nodes: Sequence[str]) -> tuple[str, ...]:
    """Each node once; calls that no node is known for have none."""
    return tuple(dict.fromkeys(filter(None, nodes)))


def _bindings(function: relax.Function) -> Iterator[tuple[relax.Var, Any]]:
    for block in function.body.blocks:
        for binding in block.bindings:
            yield binding.var, binding.value


def _is_kernel(value: Any) -> bool:
    return isinstance(value, relax.Call) and getattr(value.op, "name", "") == "relax.call_tir"


def _key(value: Any, numbers: dict[Any, int]) -> Any:
    """What tells calls apart: the callee and the arguments, variables by their numbers."""
    if isinstance(value, relax.Var):
        return numbers.get(value)
    if isinstance(value, relax.Call):
        return str(getattr(value.op, "name", value.op)), *(_key(a, numbers) for a in value.args)
    if isinstance(value, relax.Tuple):
        return tuple(_key(f, numbers) for f in value.fields)
    if isinstance(value, relax.TupleGetItem):
        return _key(value.tuple_value, numbers), int(value.index)
    return value.name_hint if isinstance(value, tvm.ir.GlobalVar) else str(value)
