"""The nodes of the program that each kernel computes, so that a profile can name modules instead of kernels.

TVM fuses operators into kernels and names them after operators; equal kernels are one function. So the calls of the module before fusion
are matched with those after it: a fused function contains the calls that went into it, and a call is identified by its callee and its
arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tvm
from tvm import relax

from thresher.backends.tvm.library import CALL

Kernels = list[tuple[str, tuple[str, ...]]]  # (name, nodes) of every call of a kernel, in order


class NamingBuilder(relax.BlockBuilder):
    """A builder that records the node for which every variable was emitted, in ``origins``; ``node`` names the current one."""

    def __init__(self) -> None:
        super().__init__()
        self.node = ""
        self.origins: dict[str, str] = {}

    def emit(self, expr: Any, name_hint: str = "") -> relax.Var:
        """Bind an expression to a new variable and record it for the current node."""
        var = super().emit(expr, name_hint)
        self.origins[var.name] = self.node
        return var

    def _exit_function_scope(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        """Leave the function. After an error its last block is still open, of which TVM would warn on standard error."""
        super()._exit_function_scope(exc_type, exc_val, exc_tb)
        if exc_type is not None:
            self._end_block()


def kernels(before: tvm.IRModule, fused: tvm.IRModule, origins: Mapping[str, str]) -> Kernels:
    """Return the calls of ``main`` in ``fused`` with the nodes they compute; ``before`` is the same module before ``FuseOps``.

    Calls are told apart by what they compute, all equal ones alike: which of two equal values another call reads, nobody can tell.
    """
    main = before["main"]
    known: dict[Any, int] = {p: -1 - i for i, p in enumerate(main.params)}
    computations: dict[Any, int] = {}
    names: list[list[str]] = []  # of the nodes of each computation
    for var, value in _bindings(main):
        known[var] = computations.setdefault(_key(value, known), len(names))
        if known[var] == len(names):
            names.append([])
        names[known[var]].append(origins.get(var.name, ""))
    unknown = len(names)
    names.append([])  # of a call that has no counterpart

    def number(value: Any, numbers: dict[Any, int]) -> int:
        return computations.get(_key(value, numbers), unknown)

    def name(of: int) -> str:
        return names[of].pop(0) if names[of] else ""

    result: Kernels = []
    main = fused["main"]
    numbers: dict[Any, int] = {p: -1 - i for i, p in enumerate(main.params)}
    for var, value in _bindings(main):
        callee = value.op if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar) else None
        inner = None if callee is None else fused[callee]
        if callee is None or not isinstance(inner, relax.Function):
            numbers[var] = number(value, numbers)
            node = name(numbers[var])
            if _is_kernel(value):
                result.append((_kernel_name(value), _named([node])))
            continue
        inside = {p: _key(a, numbers) for p, a in zip(inner.params, value.args)}
        nodes = []
        for inner_var, inner_value in _bindings(inner):
            inside[inner_var] = number(inner_value, inside)
            nodes.append(name(inside[inner_var]))
        numbers[var] = inside.get(inner.body.body, unknown)
        result.append((callee.name_hint, _named(nodes)))
    return result


def _named(nodes: Sequence[str]) -> tuple[str, ...]:
    """Return each node once; a call without a known node has the empty name, which is left out."""
    return tuple(dict.fromkeys(filter(None, nodes)))


def _bindings(function: relax.Function) -> Iterator[tuple[relax.Var, Any]]:
    for block in function.body.blocks:
        for binding in block.bindings:
            yield binding.var, binding.value


def _is_kernel(value: Any) -> bool:
    return isinstance(value, relax.Call) and (
        getattr(value.op, "name", "") == "relax.call_tir" or _kernel_name(value) == CALL
    )


def _kernel_name(call: relax.Call) -> str:
    """Return the name of what a call runs: a kernel, or a function of the runtime."""
    callee = call.args[0] if call.args else None
    return getattr(callee, "name_hint", "") or getattr(callee, "global_symbol", "")


def _key(value: Any, numbers: dict[Any, int]) -> Any:
    """Return the identity of a call: the callee and the arguments, variables by their numbers."""
    if isinstance(value, relax.Var):
        return numbers.get(value)
    if isinstance(value, relax.Call):
        return str(getattr(value.op, "name", value.op)), *(_key(a, numbers) for a in value.args)
    if isinstance(value, relax.Tuple):
        return tuple(_key(f, numbers) for f in value.fields)
    if isinstance(value, relax.TupleGetItem):
        return _key(value.tuple_value, numbers), int(value.index)
    return value.name_hint if isinstance(value, tvm.ir.GlobalVar) else str(value)
