"""Write the text form of a program: one line a node, to be read, compared and (structurally) read back.

    program tiny {
      %x = input : f32[1, 3, 8, 8]
      %w = constant "conv.weight" : f32[4, 3, 3, 3]
      %conv2d = aten.conv2d.default(%x, %w, None, [1, 1], [1, 1]) : f32[1, 4, 6, 6]  # conv
      return [%conv2d]
    }

Where the model writes, ``%n = state "steps" : i64[]`` is a tensor that it keeps, and ``write %n = %add`` before the last line says what it
becomes. :mod:`thresher.ir.parser` reads it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from thresher.ir.nodes import module_path

SHORT = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.bool: "b8",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.uint16: "u16", torch.uint32: "u32", torch.uint64: "u64", torch.complex64: "c64", torch.complex128: "c128",
    torch.complex32: "c32",
    torch.float8_e4m3fn: "f8e4m3fn", torch.float8_e4m3fnuz: "f8e4m3fnuz", torch.float8_e5m2: "f8e5m2",
    torch.float8_e5m2fnuz: "f8e5m2fnuz", torch.float8_e8m0fnu: "f8e8m0fnu",
}  # fmt: skip


def render(
    graph: fx.Graph, name: str = "model", canonical: bool = False, state: Sequence[str] = (), writes: Sequence[int] = ()
) -> str:
    """Return the text of ``graph``; ``canonical`` numbers the nodes and leaves out what is not structure (names, origins).

    ``state`` and ``writes`` are those of the program.
    """
    names: dict[fx.Node, str] = {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    kept = dict(zip(placeholders[len(placeholders) - len(state) :], state))
    lines = [] if canonical else [f"program {name} {{"]
    constants: dict[str, str] = {}
    for node in graph.nodes:
        names[node] = str(len(names)) if canonical else node.name
        if node.op == "output":
            outputs = list(node.args[0])
            new_values = outputs[len(outputs) - len(writes) :]
            lines += [f"  write %{names[placeholders[i]]} = {_literal(v, names)}" for i, v in zip(writes, new_values)]
            lines.append(f"  return {_literal(outputs[: len(outputs) - len(writes)], names)}")
            continue
        if node.op == "placeholder":
            body = f'state "{kept[node]}"' if node in kept else "input"
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
    """Return ``aten.conv2d.default`` for operator overloads, the plain name for Python builtins such as ``getitem``."""
    return str(target) if isinstance(target, torch._ops.OpOverload) else target.__name__


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
