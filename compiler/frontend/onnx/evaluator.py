"""Runs the graphs of an ONNX file with torch operators: each call by its rule, or by the function body that defines it.

What depends on no input, and what depends on shapes only, is computed at once on real tensors, also while torch.export traces: sizes that
exporters compute in the graph are plain numbers to the rules, and branches on them are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor, nn

from thresher.errors import CaptureError
from thresher.frontend.onnx.dtypes import ELEM_TYPES, HOLDERS, torch_dtype
from thresher.frontend.onnx.functions import Definitions, body_of
from thresher.frontend.onnx.graph import Call, Graph, defaults_of, schema_of
from thresher.frontend.onnx.operators import find_rule
from thresher.frontend.onnx.rules import Node, Rule
from thresher.frontend.onnx.unsigned import carried, restored
from thresher.frontend.onnx.values import Unsupported, Value, real_tensors

Inputs = Sequence[Value | None]
Scope = Mapping[str, Value | None]


class Evaluator:
    """Runs graphs whose parameters are those of ``module``, in a file of these definitions."""

    def __init__(self, module: nn.Module, definitions: Definitions):
        self.module = module
        self.definitions = definitions

    def run(self, graph: Graph, inputs: Inputs, outer: Scope) -> list[Value | None]:
        """Return the outputs of a graph; ``outer`` are the values of the graph in which it is an attribute."""
        if len(inputs) > len(graph.inputs):
            raise Unsupported(f"{len(inputs)} inputs for a graph that takes {len(graph.inputs)}")
        values: dict[str, Value | None] = {**outer, **dict.fromkeys(graph.inputs)}
        values |= {name: self._bound(value) for name, value in graph.constants.items()}
        values |= {name: value for name, value in zip(graph.inputs, inputs) if value is not None}
        for call in graph.calls:
            results = self._named(call, [values[name] if name else None for name in call.inputs], values)
            values |= {name: value for name, value in zip(call.outputs, results) if name}
        return [
            values.get(name) for name in graph.outputs
        ]  # a function may compute some outputs for some attributes only

    def _bound(self, value: Value) -> Value:
        """Return a constant that is a parameter so that computations read it from the module, as it is now."""
        name = value.parameter
        return value if name is None else replace(value, retrace=lambda: getattr(self.module, name))

    def _named(self, call: Call, inputs: Inputs, scope: Scope) -> Sequence[Value | None]:
        """Return the outputs of a call; what is raised names its node."""
        node = f"node {call.name!r} ({call.operator})"
        try:
            return self._call(call, inputs, scope)
        except Unsupported as reason:
            raise Unsupported(f"{node}: {reason}", reason.inputs) from reason
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, CaptureError):
                raise
            raise CaptureError(f"{node}: torch cannot compute it: {str(error)[:500]}") from error

    def _call(self, call: Call, inputs: Inputs, scope: Scope) -> Sequence[Value | None]:
        rule = find_rule(call.domain, call.op, call.opset)
        results = NotImplemented if rule is None else self._by_rule(rule, call, inputs, scope)
        if results is NotImplemented:
            with real_tensors():
                body = body_of(call, inputs, self.definitions)
            if body is None:
                raise Unsupported("there is no rule for this use, and no definition by other operators")
            results = self.run(body, inputs, {})
        for i, name in enumerate(call.outputs):
            if name and (i >= len(results) or results[i] is None):
                raise Unsupported(f"its output {name!r} is asked for, which is not computed")
        return results

    def _by_rule(self, rule: Rule, call: Call, inputs: Inputs, scope: Scope) -> Any:
        attributes = {**defaults_of(call.domain, call.op, call.opset), **call.attributes}
        if unread := sorted(attributes.keys() - rule.attributes):
            raise Unsupported(f"its attribute {unread[0]!r} is not known")
        if missing := sorted(rule.required - attributes.keys()):
            raise Unsupported(f"it lacks the attribute {missing[0]!r}")
        types = [_elem_type(v) for v in inputs]
        node = Node(len(call.outputs), types, lambda graph, values: self.run(graph, values, scope))
        known = all(v is None or v.constant for v in inputs)
        known = known and not any(isinstance(a, Graph) for a in attributes.values())

        def compute(read: Callable[[Value, str], Tensor]) -> Any:
            arguments = [
                _argument(v, form, name, read, rule) for v, (name, form) in zip(inputs, rule.inputs(len(inputs)))
            ]
            results = rule.function(*([node] if rule.takes_node else []), *arguments, **attributes)
            return results if isinstance(results, (tuple, list)) or results is NotImplemented else [results]

        if not known:
            results = compute(_traced)
            return results if results is NotImplemented else self._values(results, call, inputs, rule, known, None)
        with real_tensors():
            results = compute(Value.known)
            if results is NotImplemented:
                return results
            learned = any(v is not None and v.retrace for v in inputs)
            return self._values(
                results, call, inputs, rule, known, cache(lambda: compute(_traced)) if learned else None
            )

    def _values(
        self,
        results: Sequence[Any],
        call: Call,
        inputs: Inputs,
        rule: Rule,
        constant: bool,
        again: Callable[[], Any] | None,
    ) -> list[Value | None]:
        """Return the results of a rule as values, in the types of the specification; ``again`` computes them of the parameters."""
        declared = _declared(call, inputs)
        sources = frozenset().union(*(v.sources for v in inputs if v is not None))
        values: list[Value | None] = []
        for i, result in enumerate(results):
            elem_type = declared[i] if i < len(declared) else None
            if isinstance(result, Value) or result is None:
                values.append(result)
                continue
            dtype = None if elem_type is None else torch_dtype(elem_type)

            def finished(x: Tensor, dtype: torch.dtype | None = dtype) -> Tensor:
                y = restored(x, dtype, rule.unsigned)
                if dtype is not None and y.dtype != dtype:
                    raise Unsupported(f"it is computed in {y.dtype}, and the specification has {dtype}")
                return y

            def retrace(i: int = i, finished: Callable[[Tensor], Tensor] = finished) -> Tensor:
                return finished(again()[i])  # type: ignore[misc]

            narrow = elem_type if elem_type in HOLDERS else None
            values.append(Value(finished(result), constant, narrow, None, retrace if again else None, sources))
        return values


def _traced(value: Value, _: str) -> Tensor:
    return value.tensor()


def _argument(value: Value | None, form: str, name: str, read: Callable[[Value, str], Tensor], rule: Rule) -> Any:
    """Return an input in the form in which the rule takes it."""
    if form == "value" or value is None:
        return value
    if form == "tensors":
        if not isinstance(value.data, list):
            raise Unsupported(f"its {name} is no sequence")
        return [carried(read(v, name), rule.unsigned) for v in value.data]
    if form == "number" and value.constant and value.known(name).numel() == 1:
        with real_tensors():
            return carried(value.known(name), rule.unsigned).item()
    if form in ("tensor", "number"):
        return carried(read(value, name), rule.unsigned)
    with real_tensors():
        return carried(value.known(name), rule.unsigned).reshape(-1).tolist()


def _elem_type(value: Value | None) -> int | None:
    if value is None or not isinstance(value.data, Tensor):
        return None
    return value.elem_type or ELEM_TYPES[value.data.dtype]


def _declared(call: Call, inputs: Inputs) -> list[int | None]:
    """Return the types of the outputs, as ONNX numbers them, that follow from those of the inputs; None where the rule decides."""
    schema = schema_of(call.domain, call.op, call.opset)
    if schema is None:
        return []
    variables: dict[str, int | None] = {}
    for i, value in enumerate(inputs):
        formal = schema.inputs[min(i, len(schema.inputs) - 1)]
        if value is not None and formal.is_homogeneous:
            variables[formal.type_str] = _elem_type(value)
    types = []
    for i in range(len(call.outputs)):
        formal = schema.outputs[min(i, len(schema.outputs) - 1)]
        types.append(variables.get(formal.type_str, _fixed_type(formal.type_str, call)))
    return types


def _fixed_type(type_str: str, call: Call) -> int | None:
    """Return the type that ``tensor(int64)`` names, or for a type variable the one that an attribute names."""
    if type_str.startswith("tensor("):
        return TensorProto.DataType.Value(type_str[7:-1].upper())
    attribute = next((call.attributes[k] for k in ("to", "dtype", "output_dtype") if call.attributes.get(k)), None)
    return attribute if isinstance(attribute, int) else None
