"""A call with other arguments: each that the schema of its operator has, also one that was left at its default, alone or two at once.

Which arguments there are, and of which type, the schemas of torch say; there is no list of operators here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from thresher.ir.arguments import bound_arguments, has_schema
from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.ir.program import Program

#: Values of arguments that are strings; an operator that does not know one refuses it.
WORDS = ("none", "tanh", "mean", "sum", "trunc", "floor", "reflect", "nearest", "bilinear")
#: Values for an argument that may be left out, by its type in the schema.
INSTEAD_OF_NONE = {"float": 0.5, "number": 0.5, "int": 1, "bool": True, "ScalarType": torch.float64}


@dataclass(frozen=True)
class Edit:
    """One argument of a call with another value.

    Attributes:
        argument: its name in the schema of the operator.
        sentence: a sentence for whoever reads the finding.
        value: the other value; of a constant, numbers of other sizes.
        kind: equal for the same edit of another call of the operator.
    """

    argument: str
    sentence: str
    value: Any
    kind: str


def edits(node: fx.Node, program: Program) -> Iterator[Edit]:
    """Yield the call with one argument changed: literals, defaults, tensors that were left out, constants of other sizes."""
    if not has_schema(node):
        return
    bound = bound_arguments(node)
    for argument in node.target._schema.arguments:
        value, kind = bound[argument.name], str(argument.real_type)
        left = "" if _is_written(node, argument.name) else " (its default)"
        if isinstance(value, fx.Node):
            yield from _resized(argument.name, value, program)
        elif value is None and "Tensor" in kind:
            shapes = dict.fromkeys([*((d,) for d in _first_shape(node)), _first_shape(node)])
            for shape in shapes:
                sentence = f"{node.name} has a tensor of shape {list(shape)} as {argument.name}, which was left out"
                yield Edit(argument.name, sentence, _numbers(shape), f"{argument.name} of rank {len(shape)}")
        else:
            for other in _alternatives(value, kind):
                sentence = f"{node.name} has {argument.name}={other!r} where it had {value!r}{left}"
                yield Edit(argument.name, sentence, other, f"{argument.name} {_by(value, other)}")


def pairs(node: fx.Node, program: Program) -> Iterator[tuple[Edit, Edit]]:
    """Yield two edits of a call neither of which leaves its result the shape that it had, while both together do.

    So a pass that only compares shapes sees nothing: padding with dilation, the size of a kernel with padding, groups with a width.
    """
    wanted = _result_shapes(node, ())
    for a, b in itertools.combinations([edit for edit, _ in reshaping(node, program)], 2):
        if a.argument != b.argument and _result_shapes(node, (a, b)) == wanted:
            yield a, b


def reshaping(node: fx.Node, program: Program) -> Iterator[tuple[Edit, Any]]:
    """Yield the edits that give the call a result of another shape, with the shapes; None where it has none any more."""
    wanted = _result_shapes(node, ())
    for edit in edits(node, program) if wanted is not None else ():
        if (shapes := _result_shapes(node, (edit,))) != wanted:
            yield edit, shapes


def apply_edits(program: Program, node: fx.Node, changed: Sequence[Edit]) -> None:
    """Make the changes in place; ``node`` is a call of ``program``."""
    bound = bound_arguments(node)
    for edit in changed:
        old = bound[edit.argument]
        if isinstance(old, fx.Node):
            program.constants[old.target] = edit.value.to(program.constants[old.target].dtype)
        elif isinstance(edit.value, Tensor):
            bound[edit.argument] = program.add_constant(
                edit.value.to(dtype_of(_first_tensor(node))), "extra", like=node
            )
        else:
            bound[edit.argument] = edit.value
    arguments = node.target._schema.arguments
    positional = [a for a in arguments if not a.kwarg_only and a.name not in node.kwargs]
    while len(positional) > len(node.args) and bound[positional[-1].name] == positional[-1].default_value:
        positional.pop()
    named = [a for a in arguments if a not in positional and (a.kwarg_only or a.name in node.kwargs)]
    kept = [a for a in named if a.name in node.kwargs or bound[a.name] is not a.default_value]
    node.args = tuple(bound[a.name] for a in positional)
    node.kwargs = {a.name: bound[a.name] for a in kept}


# ---------------------------------------------------------------------- arguments


def _is_written(node: fx.Node, name: str) -> bool:
    names = [a.name for a in node.target._schema.arguments if not a.kwarg_only]
    return name in names[: len(node.args)] or name in node.kwargs


def _alternatives(value: Any, kind: str) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1, -value) if value else (1, -1)
    elif isinstance(value, float):
        yield from (value * 1.5, -value) if value else (0.5,)
    elif isinstance(value, str):
        yield from (word for word in WORDS if word != value)
    elif isinstance(value, torch.dtype):
        yield torch.float32 if value is torch.float64 else torch.float64
    elif isinstance(value, (list, tuple)) and all(type(v) in (int, float, bool) for v in value):
        for index, part in enumerate(value):
            for other in _alternatives(part, kind):
                yield [*value[:index], other, *value[index + 1 :]]
        if len(value) > 1:
            yield [next(_alternatives(v, kind)) for v in value]
    elif value is None:
        yield from (other for name, other in INSTEAD_OF_NONE.items() if kind == f"Optional[{name}]")


def _by(value: Any, other: Any) -> str:
    """Return how an argument differs, which is the same for calls with other values: by how much, or what it is."""
    if isinstance(value, (list, tuple)):
        return ", ".join(_by(a, b) for a, b in zip(value, other))
    numbers = all(type(v) in (int, float) for v in (value, other))
    return f"{other - value:+}" if numbers else f"{other}"


def _resized(argument: str, node: fx.Node, program: Program) -> Iterator[Edit]:
    if node.op != "get_attr" or len(node.users) != 1 or not is_tensor(node):
        return
    value = program.constants[node.target]
    for dim, size in enumerate(value.shape):
        named = {2 * size: "twice", size // 2: "half", size - 1: "one less", size + 2: "two more", size + 1: "one more"}
        for other, name in named.items():
            if other > 0:
                shape = [*value.shape[:dim], other, *value.shape[dim + 1 :]]
                sentence = f"{node.target} has shape {shape} instead of {list(value.shape)}"
                yield Edit(argument, sentence, _numbers(shape), f"{name} along dimension {dim} of {argument}")


def _numbers(shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------- shapes


def _first_tensor(node: fx.Node) -> fx.Node:
    return next((n for n in (node, *node.all_input_nodes) if is_tensor(n)), node)


def _first_shape(node: fx.Node) -> tuple[int, ...]:
    first = _first_tensor(node)
    return tuple(d for d in shape_of(first) if isinstance(d, int)) if is_tensor(first) else ()


def _result_shapes(node: fx.Node, changed: Sequence[Edit]) -> Any:
    """Return the shapes and dtypes of what the call, so changed, gives; None where it raises."""
    try:
        bound = {name: _without_numbers(value) for name, value in bound_arguments(node).items()}
        bound |= {edit.argument: _without_numbers(edit.value) for edit in changed}
        result = node.target(**bound)
    except Exception:  # whatever the operator says of them
        return None
    return [(r.shape, r.dtype) for r in (result if isinstance(result, (tuple, list)) else [result])]


def _without_numbers(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not all(isinstance(size, int) for size in value.shape):
            raise ValueError("a free size would be fixed")
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, fx.Node):
        return _without_numbers(value.meta["val"])
    return [_without_numbers(v) for v in value] if isinstance(value, (list, tuple)) else value
