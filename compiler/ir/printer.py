"""The text form of a program: one line a node, made to be read, compared and (structurally) read back.

    program tiny {
      %x = input : f32[1, 3, 8, 8]
      %w = constant "conv.weight" : f32[4, 3, 3, 3]
      %conv2d = aten.conv2d.default(%x, %w, None, [1, 1], [1, 1]) : f32[1, 4, 6, 6]  # conv
      return [%conv2d]
    }

``parse`` gives back the structure with random constants of the written shapes; it evaluates literals only, never code.
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

from thresher.errors import ProgramError
from thresher.ir.program import Program, module_path

SHORT = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.bool: "b8",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip
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


def render(program: Program, canonical: bool = False) -> str:
    """The text of ``program``; ``canonical`` numbers the nodes and leaves out what is not structure (names, origins)."""
    names: dict[fx.Node, str] = {}
    lines = [] if canonical else [f"program {program.name} {{"]
    constants: dict[str, str] = {}
    for node in program.graph.nodes:
        names[node] = str(len(names)) if canonical else node.name
        if node.op == "output":
            lines.append(f"  return {_literal(list(node.args[0]), names)}")
            continue
        if node.op == "placeholder":
            body = "input"
        elif node.op == "get_attr":
            label = constants.setdefault(node.target, str(len(constants)) if canonical else node.target)
            body = f'constant "{label}"'
        else:
            args = [_literal(a, names) for a in node.args]
            args += [f"{k}={_literal(v, names)}" for k, v in node.kwargs.items()]
            body = f"{operator_name(node.target)}({', '.join(args)})"
        path = module_path(node)
        origin = f"  # {path}" if node.op == "call_function" and not canonical and path != node.name else ""
        lines.append(f"  %{names[node]} = {body} : {_type(node.meta.get('val'))}{origin}")
    if not canonical:
        lines.append("}")
    return "\n".join(lines)


def operator_name(target: Any) -> str:
    """``aten.conv2d.default`` for operator overloads, the plain name for Python builtins such as ``getitem``."""
    return str(target) if isinstance(target, torch._ops.OpOverload) else target.__name__


def find_operator(name: str) -> Any:
    """The callable behind an operator name written by :func:`operator_name`."""
    if name in BUILTINS:
        return BUILTINS[name]
    parts = name.split(".")
    try:
        namespace, op, overload = parts
        return getattr(getattr(getattr(torch.ops, namespace), op), overload)
    except (ValueError, AttributeError) as error:
        raise ProgramError(f"unknown operator {name!r}") from error


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{SHORT[value.dtype]}[{', '.join(str(d) for d in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_type(v) for v in value)})"
    return type(value).__name__


def _literal(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return f"%{names[value]}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_literal(v, names) for v in value)}]"
    if isinstance(value, torch.device):
        return repr(str(value))
    return repr(value)


LINE = re.compile(r"\s*%(?P<name>\w+) = (?P<body>.*) : (?P<type>[^:#]*?)(?:  # .*)?$")


def parse(text: str) -> Program:
    """The program that ``text`` describes: same structure, random constants of the written shapes and dtypes.

    Raises :class:`ProgramError` naming the line that cannot be read.
    """
    graph, name = fx.Graph(), "model"
    nodes: dict[str, fx.Node] = {}
    constants: dict[str, Tensor] = {}
    program: Program | None = None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    outputs: list[Any] = []
    for number, line in enumerate(text.strip().splitlines(), 1):
        try:
            if line.startswith("program "):
                name = line.split()[1]
            elif line.strip().startswith("return "):
                outputs = _evaluate(line.strip().removeprefix("return "), nodes)
                graph.output(tuple(outputs))
            elif match := LINE.match(line):
                nodes[match["name"]] = _parse_node(graph, match, nodes, constants, mode)
        except Exception as error:  # whatever Python's parser, torch or fx say of it
            raise ProgramError(f"line {number} cannot be read: {line.strip()!r} ({error})") from error
    if not any(n.op == "output" for n in graph.nodes):
        raise ProgramError("there is no line that returns something")
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    probe = tuple(_random(n.meta["val"]) for n in inputs)
    in_spec = pytree.tree_flatten((probe, {}))[1]
    out_spec = pytree.tree_flatten(tuple(outputs))[1]
    program = Program(graph, constants, in_spec, out_spec, probe, name)
    for node in program.calls():
        try:
            program.refresh(node)
        except Exception as error:
            raise ProgramError(f"node {node.name} does not fit its arguments: {error}") from error
    return program


def _parse_node(graph: fx.Graph, match: re.Match, nodes: dict, constants: dict, mode: FakeTensorMode) -> fx.Node:
    body, name = match["body"], match["name"]
    if body == "input":
        node = graph.placeholder(name)
        node.meta["val"] = _fake(match["type"], mode)
    elif body.startswith("constant "):
        target = ast.literal_eval(body.removeprefix("constant "))
        node = graph.create_node("get_attr", target, name=name)
        node.meta["val"] = _fake(match["type"], mode)
        constants[target] = _random(node.meta["val"])
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


def _random(value: Tensor) -> Tensor:
    if value.dtype.is_floating_point:
        return torch.randn(tuple(value.shape), dtype=value.dtype)
    return torch.zeros(tuple(value.shape), dtype=value.dtype)


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
