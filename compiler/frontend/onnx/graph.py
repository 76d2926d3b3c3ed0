"""A graph of an ONNX file, read once: constants as tensors, attributes as Python values, each node with its opset."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from onnx import AttributeProto, GraphProto, NodeProto, defs, helper

from thresher.frontend.onnx.dtypes import HOLDERS, dense_of, tensor_of
from thresher.frontend.onnx.values import Unsupported, Value

Opsets = Mapping[str, int]
Keep = Callable[[str, torch.Tensor], Value]  # makes a constant of the file a value, by its name

STANDARD = "ai.onnx"  # a second name of the domain ""


@dataclass(frozen=True)
class Call:
    """A node: its operator, the names of its inputs and outputs ("" for those left out), and its attributes as Python values."""

    name: str
    domain: str
    op: str
    opset: int
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Any]
    proto: NodeProto

    @property
    def operator(self) -> str:
        """The name of the operator, with its domain where that is not the standard one."""
        return f"{self.domain}.{self.op}" if self.domain else self.op


@dataclass(frozen=True)
class Graph:
    """Names of inputs and outputs, constants by name, and the calls in order."""

    inputs: Sequence[str]
    outputs: Sequence[str]
    constants: Mapping[str, Value]
    calls: Sequence[Call]

    def all_calls(self) -> list[Call]:
        """Return the calls of this graph and of those that are attributes in it."""
        inner = [v for c in self.calls for v in c.attributes.values() if isinstance(v, Graph)]
        return [*self.calls, *(c for g in inner for c in g.all_calls())]


@dataclass(frozen=True)
class Reading:
    """Reads the graphs of one file: by its opsets, its constants as ``keep`` makes values of them."""

    opsets: Opsets
    keep: Keep = field(default=lambda _, tensor: Value(tensor, constant=True))

    def graph(self, proto: GraphProto) -> Graph:
        """Return a graph; raise :class:`Unsupported` where it has constants of types that torch does not have."""
        constants = {t.name: self._constant(t.name, t) for t in proto.initializer}
        constants |= {t.values.name: self._dense(t.values.name, t) for t in proto.sparse_initializer}
        calls, more = self.calls(proto.node)
        return Graph([i.name for i in proto.input], [o.name for o in proto.output], {**constants, **more}, calls)

    def calls(self, nodes: Sequence[NodeProto]) -> tuple[list[Call], dict[str, Value]]:
        """Return the nodes as calls, and the constants among them."""
        calls, constants = [], {}
        for node in nodes:
            call = self._call(node)
            if call.operator == "Constant" and isinstance(call.attributes.get("value"), Value):
                constants[node.output[0]] = call.attributes["value"]
            else:
                calls.append(call)
        return calls, constants

    def _call(self, node: NodeProto) -> Call:
        domain = "" if node.domain == STANDARD else node.domain
        opset = self.opsets.get(domain) or self.opsets.get(node.domain) or 0
        stored = node.output[0] if node.op_type == "Constant" and not domain else ""
        attributes = {a.name: self._attribute(a, stored) for a in node.attribute}
        name = node.name or next((o for o in node.output if o), "")
        return Call(name, domain, node.op_type, opset, node.input, node.output, attributes, node)

    def _attribute(self, attribute: AttributeProto, stored: str) -> Any:
        """Return the value of an attribute; ``stored`` names the value of a Constant node, for one that is kept under this name."""
        value = helper.get_attribute_value(attribute)
        if attribute.type == AttributeProto.GRAPH:
            return self.graph(value)
        if attribute.type == AttributeProto.GRAPHS:
            return [self.graph(g) for g in value]
        if attribute.type == AttributeProto.TENSOR:
            return self._constant(stored, value) if stored else tensor_of(value)
        if attribute.type == AttributeProto.SPARSE_TENSOR:
            return dense_of(value)
        if attribute.type == AttributeProto.STRING:
            return value.decode()
        if attribute.type == AttributeProto.STRINGS:
            return [v.decode() for v in value]
        return list(value) if isinstance(value, Sequence) else value

    def _constant(self, name: str, proto: Any) -> Value:
        value = self.keep(name, self._read(name, tensor_of, proto))
        if proto.data_type not in HOLDERS:
            return value
        return Value(value.data, constant=True, elem_type=proto.data_type)

    def _dense(self, name: str, proto: Any) -> Value:
        return self.keep(name, self._read(name, dense_of, proto))

    def _read(self, name: str, function: Callable[[Any], torch.Tensor], proto: Any) -> torch.Tensor:
        try:
            return function(proto)
        except Unsupported as reason:
            raise Unsupported(f"the constant {name!r} has {reason}") from reason


@cache
def schema_of(domain: str, op: str, opset: int) -> Any:
    """Return the specification of an operator in an opset, or None where it has none."""
    try:
        return defs.get_schema(op, opset, domain)
    except defs.SchemaError:
        return None


@cache
def defaults_of(domain: str, op: str, opset: int) -> Mapping[str, Any]:
    """Return the attributes of an operator that have a default, with it."""
    schema = schema_of(domain, op, opset)
    if schema is None:
        return {}
    reading = Reading({})
    attributes = {k: a.default_value for k, a in schema.attributes.items() if a.default_value.type}
    return {name: reading._attribute(value, "") for name, value in attributes.items()}
