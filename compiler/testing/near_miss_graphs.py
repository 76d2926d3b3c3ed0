"""Graphs one step off: a number that is another one, operands exchanged, a neighbour of the operator, a value that somebody else reads,
a constant that is shared, a zero that is none. What a pass takes for its pattern there, it must still get right.
"""

from __future__ import annotations

import itertools
import logging
import operator
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.ir.program import Program

aten = torch.ops.aten
Change = Callable[[Program], None]
#: Operators that are easily taken for each other.
NEIGHBOURS: dict[Any, Sequence[Any]] = {
    aten.add.Tensor: (aten.sub.Tensor, aten.mul.Tensor), aten.sub.Tensor: (aten.add.Tensor,),
    aten.mul.Tensor: (aten.add.Tensor, aten.div.Tensor), aten.div.Tensor: (aten.mul.Tensor,),
    aten.relu.default: (aten.neg.default, aten.sigmoid.default, aten.relu6.default), aten.gelu.default: (aten.silu.default,),
    aten.silu.default: (aten.gelu.default,), aten.sigmoid.default: (aten.tanh.default, aten.relu.default),
    aten.tanh.default: (aten.sigmoid.default,), aten.neg.default: (aten.abs.default,), aten.abs.default: (aten.neg.default,),
    aten.exp.default: (aten.sin.default,), aten.maximum.default: (aten.minimum.default,), aten.minimum.default: (aten.maximum.default,),
    aten.gt.Scalar: (aten.ge.Scalar, aten.lt.Scalar), aten.lt.Scalar: (aten.le.Scalar, aten.gt.Scalar),
    aten.mean.dim: (aten.sum.dim_IntList,), aten.sum.dim_IntList: (aten.mean.dim,), aten.amax.default: (aten.amin.default,),
    aten.sqrt.default: (aten.exp.default,), aten.rsqrt.default: (aten.sqrt.default,),
}  # fmt: skip
REACH = 2  # steps from a rewritten node that are looked at


def near_misses(
    program: Program, around: Collection[str] = (), limit: int = 100, seed: int = 0
) -> Iterator[tuple[str, Program]]:
    """Up to ``limit`` well-formed programs, each one step away from ``program``, with a sentence that says which.

    ``around`` names the nodes near which the steps are made; default: everywhere. Programs that cannot run are left out.
    """
    region = _region(program, around)
    steps = [step for node in program.graph.nodes if node in region for step in _steps(node, program)]
    random.Random(seed).shuffle(steps)
    variants = ((description, _changed(program, change)) for description, change in steps)
    return itertools.islice(((description, other) for description, other in variants if other is not None), limit)


def _changed(program: Program, change: Change) -> Program | None:
    """The program after a step; None where it cannot run."""
    changed, reports = program.clone(), logging.getLogger("torch._subclasses.fake_tensor")
    before, reports.disabled = reports.disabled, True  # it reports every call whose arguments do not fit
    try:
        change(changed)
        changed.clean().propagate().verify().run(*changed.probe, dtype=torch.float64)
    except Exception:  # whatever an operator says of them
        return None
    finally:
        reports.disabled = before
    return changed


def _region(program: Program, around: Collection[str]) -> set[fx.Node]:
    nodes = {n for n in program.graph.nodes if n.op != "output"}
    region = {n for n in nodes if n.name in around} or nodes
    for _ in range(REACH):
        region |= {m for n in region for m in (*n.all_input_nodes, *n.users) if m.op != "output"}
    return region


def _steps(node: fx.Node, program: Program) -> Iterator[tuple[str, Change]]:
    if node.op == "get_attr" and program.constants[node.target].is_floating_point():
        yield from _constants(node, program)
    if node.op != "call_function" or not is_tensor(node):
        return
    if node.target is not operator.getitem:
        yield from _literals(node)
    yield from _operands(node)
    for other in NEIGHBOURS.get(node.target, ()):
        yield f"{node.name} is {other} instead of {node.target}", _replaced(node.name, other)
    yield f"{node.name} is an output, too", partial(_also_output, node.name)
    if dtype_of(node).is_floating_point:
        yield f"{node.name} is shifted before it is read", partial(_shifted, node.name)
    for source in node.all_input_nodes[:1]:
        if is_tensor(source) and shape_of(source) == shape_of(node) and dtype_of(source) == dtype_of(node):
            yield f"{node.name} is left out", _left_out(node.name, source.name)


def _find(program: Program, name: str) -> fx.Node:
    return next(n for n in program.graph.nodes if n.name == name)


# ---------------------------------------------------------------------- constants


def _constants(node: fx.Node, program: Program) -> Iterator[tuple[str, Change]]:
    value = program.constants[node.target]
    zeros = (value == 0).flatten().nonzero().flatten()
    if len(zeros):
        index = int(zeros[len(zeros) // 2])
        yield f"{node.target} has a number where it had a zero", _written(node.name, index, 0.75)
    if value.numel():
        yield f"one number of {node.target} is another one", _written(node.name, value.numel() // 2, -1.25)
    alike = [
        n
        for n in program.graph.nodes
        if n.op == "get_attr" and n is not node and shape_of(n) == shape_of(node) and dtype_of(n) == dtype_of(node)
    ]
    for other in alike[:1]:
        yield f"{node.target} is used in the place of {other.target}, too", _left_out(other.name, node.name)


def _written(name: str, index: int, number: float) -> Change:
    def change(program: Program) -> None:
        target = _find(program, name).target
        value = program.constants[target].detach().clone()
        value.view(-1)[index] = number
        program.constants[target] = value

    return change


# ---------------------------------------------------------------------- arguments


def _literals(node: fx.Node) -> Iterator[tuple[str, Change]]:
    leaves, _ = pytree.tree_flatten((list(node.args), dict(node.kwargs)), is_leaf=lambda v: isinstance(v, fx.Node))
    for index, value in enumerate(leaves):
        for other in _others(value):
            yield f"{node.name} has {other!r} where it had {value!r}", _argument(node.name, index, other)


def _others(value: Any) -> tuple:
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return (value + 1, value - 1, -value) if value else (1, -1)
    if isinstance(value, float):
        return (value * 1.5, -value) if value else (0.5,)
    return ()


def _argument(name: str, index: int, other: Any) -> Change:
    def change(program: Program) -> None:
        node = _find(program, name)
        whole = (list(node.args), dict(node.kwargs))
        leaves, spec = pytree.tree_flatten(whole, is_leaf=lambda v: isinstance(v, fx.Node))
        leaves[index] = other
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        node.args, node.kwargs = tuple(args), kwargs

    return change


def _operands(node: fx.Node) -> Iterator[tuple[str, Change]]:
    tensors = [i for i, a in enumerate(node.args) if is_tensor(a)]
    for i, j in itertools.pairwise(tensors):
        if node.args[i] is not node.args[j]:
            yield f"{node.name} has its operands {i} and {j} exchanged", _exchanged(node.name, i, j)


def _exchanged(name: str, i: int, j: int) -> Change:
    def change(program: Program) -> None:
        node = _find(program, name)
        args = list(node.args)
        args[i], args[j] = args[j], args[i]
        node.args = tuple(args)

    return change


# ---------------------------------------------------------------------- nodes


def _replaced(name: str, target: Any) -> Change:
    def change(program: Program) -> None:
        _find(program, name).target = target

    return change


def _left_out(name: str, by: str) -> Change:
    def change(program: Program) -> None:
        node, other = _find(program, name), _find(program, by)
        if other > node:
            raise ValueError("it comes later")
        node.replace_all_uses_with(other)

    return change


def _also_output(name: str, program: Program) -> None:
    output = program.output
    values = [*output.args[0], _find(program, name)]
    output.args = (tuple(values),)
    program.out_spec = pytree.tree_flatten(tuple(values))[1]


def _shifted(name: str, program: Program) -> None:
    node = _find(program, name)
    users = list(node.users)
    with program.graph.inserting_after(node):
        moved = program.graph.call_function(aten.add.Tensor, (node, 0.25))
    for user in users:
        user.replace_input_with(node, moved)
