"""Read the text form back (:mod:`thresher.ir.printer` writes it): the structure, with random constants of the written shapes.

It evaluates literals only, never code.
"""

from __future__ import annotations

import ast
import operator
import re
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.errors import ProgramError
from thresher.ir.examples import random_example
from thresher.ir.nodes import dtype_of, shape_of
from thresher.ir.printer import SHORT
from thresher.ir.program import Program

LONG = {short: dtype for dtype, short in SHORT.items()}
BUILTINS = {
    "getitem": operator.getitem,
    "mul": operator.mul,
    "add": operator.add,
    "sub": operator.sub,
    "floordiv": operator.floordiv,
}
NAMED = {
    str(v): v
    for v in (*LONG.values(), torch.strided, torch.contiguous_format, torch.preserve_format, torch.channels_last)
}
CONSTANTS = {"inf": float("inf"), "nan": float("nan")}
WRITE = re.compile(r"\s*write %(?P<target>\w+) = (?P<value>.*)$")
LINE = re.compile(r"\s*%(?P<name>\w+) = (?P<body>.*) : (?P<type>[^:#]*?)(?:  # .*)?$")


def find_operator(name: str) -> Any:
    """Return the operator of a name written by :func:`operator_name`. Raises :class:`ProgramError` where there is none."""
    if name in BUILTINS:
        return BUILTINS[name]
    parts = name.split(".")
    try:
        namespace, op, overload = parts
        return getattr(getattr(getattr(torch.ops, namespace), op), overload)
    except (ValueError, AttributeError) as error:
        raise ProgramError(f"unknown operator {name!r}") from error


def parse(text: str) -> Program:
    """Return the program that ``text`` describes: same structure, random constants of the written shapes and dtypes.

    Raises :class:`ProgramError` naming the line that cannot be read.
    """
    graph, name = fx.Graph(), "model"
    nodes: dict[str, fx.Node] = {}
    constants: dict[str, Tensor] = {}
    program: Program | None = None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    outputs: list[Any] = []
    state: list[str] = []
    written: dict[fx.Node, Any] = {}
    for number, line in enumerate(text.strip().splitlines(), 1):
        try:
            if line.startswith("program "):
                name = line.split()[1]
            elif line.strip().startswith("return "):
                outputs = _evaluate(line.strip().removeprefix("return "), nodes)
                graph.output((*outputs, *written.values()))
            elif match := WRITE.match(line):
                written[nodes[match["target"]]] = _evaluate(match["value"], nodes)
            elif match := LINE.match(line):
                nodes[match["name"]] = _parse_node(graph, match, nodes, constants, state, mode)
        except Exception as error:  # whatever Python's parser, torch or fx say of it
            raise ProgramError(f"line {number} cannot be read: {line.strip()!r} ({error})") from error
    if not any(n.op == "output" for n in graph.nodes):
        raise ProgramError("there is no line that returns something")
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    probe = tuple(random_example(shape_of(n), dtype_of(n)) for n in inputs)
    in_spec = pytree.tree_flatten((probe[: len(probe) - len(state)], {}))[1]
    out_spec = pytree.tree_flatten(tuple(outputs))[1]
    writes = tuple(inputs.index(node) for node in written)
    program = Program(graph, constants, in_spec, out_spec, probe, name, state=tuple(state), writes=writes)
    for node in program.calls():
        try:
            program.refresh(node)
        except Exception as error:
            raise ProgramError(f"node {node.name} does not fit its arguments: {error}") from error
    return program


def _parse_node(
    graph: fx.Graph, match: re.Match, nodes: dict, constants: dict, state: list[str], mode: FakeTensorMode
) -> fx.Node:
    body, name = match["body"], match["name"]
    if body == "input" or body.startswith("state "):
        node = graph.placeholder(name)
        node.meta["val"] = _fake(match["type"], mode)
        if body != "input":
            state.append(ast.literal_eval(body.removeprefix("state ")))
    elif body.startswith("constant "):
        target = ast.literal_eval(body.removeprefix("constant "))
        node = graph.create_node("get_attr", target, name=name)
        node.meta["val"] = _fake(match["type"], mode)
        constants[target] = random_example(shape_of(node), dtype_of(node))
    else:
        op, _, rest = body.partition("(")
        args, kwargs = _evaluate_call(rest.removesuffix(")"), nodes)
        node = graph.create_node("call_function", find_operator(op), args, kwargs, name=name)
    return node


def _fake(text: str, mode: FakeTensorMode) -> Tensor:
    short, _, dims = text.strip().rstrip("]").partition("[")
    shape = [int(d) for d in dims.split(",") if d.strip()]
    with mode:
        return torch.empty(shape, dtype=LONG[short])


def _evaluate(text: str, nodes: dict[str, fx.Node]) -> Any:
    return _value(ast.parse(text.replace("%", "_node_"), mode="eval").body, nodes)


def _evaluate_call(text: str, nodes: dict[str, fx.Node]) -> tuple[tuple, dict]:
    call = ast.parse(f"f({text.replace('%', '_node_')})", mode="eval").body
    assert isinstance(call, ast.Call)
    return tuple(_value(a, nodes) for a in call.args), {k.arg: _value(k.value, nodes) for k in call.keywords if k.arg}


def _value(tree: ast.expr, nodes: dict[str, fx.Node]) -> Any:
    """Literals, lists, node references and ``torch.<dtype>``; nothing is ever executed."""
    if isinstance(tree, ast.Name) and tree.id.startswith("_node_"):
        return nodes[tree.id.removeprefix("_node_")]
    if isinstance(tree, ast.Name) and tree.id in CONSTANTS:
        return CONSTANTS[tree.id]
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_value(tree.operand, nodes)
    if isinstance(tree, (ast.List, ast.Tuple)):
        return [_value(e, nodes) for e in tree.elts]
    if isinstance(tree, ast.Attribute) and isinstance(tree.value, ast.Name) and tree.value.id == "torch":
        return NAMED[f"torch.{tree.attr}"]
    return ast.literal_eval(tree)
