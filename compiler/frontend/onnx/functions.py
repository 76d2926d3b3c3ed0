"""Operators as the graphs of simpler ones that ONNX, or the file itself, defines them by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, TypeProto, helper

from thresher.frontend.onnx.dtypes import ELEM_TYPES
from thresher.frontend.onnx.graph import STANDARD, Call, Graph, Reading, schema_of
from thresher.frontend.onnx.values import Value


@dataclass(frozen=True)
class Definitions:
    """The functions that a file defines, by domain, name and overload, and the opsets that it uses."""

    functions: Mapping[tuple[str, str, str], FunctionProto]
    opsets: Mapping[str, int]

    @staticmethod
    def of(model: onnx.ModelProto) -> Definitions:
        """Return those of a model."""
        opsets = {("" if o.domain == STANDARD else o.domain): o.version for o in model.opset_import}
        return Definitions({(f.domain, f.name, f.overload): f for f in model.functions}, opsets)

    def function(self, call: Call) -> FunctionProto | None:
        """Return the function of the file that a call calls, or None."""
        return self.functions.get((call.domain, call.op, call.proto.overload))


def has_body(call: Call, definitions: Definitions) -> bool:
    """Say whether there is a definition of the operator of a call."""
    if definitions.function(call) is not None:
        return True
    schema = schema_of(call.domain, call.op, call.opset)
    return schema is not None and (schema.has_function or schema.has_context_dependent_function)


def body_of(call: Call, inputs: Sequence[Value | None], definitions: Definitions) -> Graph | None:
    """Return the definition of the operator of a call with inputs of the types that they have, or None where it has none."""
    function = definitions.function(call) or _of_standard(call, inputs)
    if function is None:
        return None
    attributes = {a.name: a for a in _defaults(call)} | {a.name: a for a in function.attribute_proto}
    attributes |= {a.name: a for a in call.proto.attribute}
    reading = Reading({**definitions.opsets, **{o.domain: o.version for o in function.opset_import}})
    calls, constants = reading.calls([_filled(n, attributes) for n in function.node])
    return Graph(function.input, function.output, constants, calls)


def _of_standard(call: Call, inputs: Sequence[Value | None]) -> FunctionProto | None:
    schema = schema_of(call.domain, call.op, call.opset)
    if schema is None:
        return None
    if schema.has_function:
        return _parsed(schema.get_function_with_opset_version(_nearest(schema.function_opset_versions, call.opset)))
    if not schema.has_context_dependent_function:
        return None
    version = _nearest(schema.context_dependent_function_opset_versions, call.opset)
    types = [_type_of(v).SerializeToString() for v in inputs]
    return _parsed(
        schema.get_context_dependent_function_with_opset_version(version, call.proto.SerializeToString(), types)
    )


def _nearest(versions: Sequence[int], opset: int) -> int:
    """Return the version for an opset: the newest that is not newer, else the oldest; each names the opset of its own operators."""
    return max((v for v in versions if v <= opset), default=min(versions))


def _parsed(body: bytes) -> FunctionProto | None:
    function = FunctionProto()
    function.ParseFromString(body)
    return function if body else None


def _type_of(value: Value | None) -> TypeProto:
    """Return the type of a value as ONNX writes it, empty for one that is left out."""
    if value is None or value.data is None:
        return TypeProto()
    if isinstance(value.data, list):
        inner = _type_of(value.data[0]) if value.data else TypeProto()
        return helper.make_sequence_type_proto(inner)
    elem_type = value.elem_type or ELEM_TYPES[value.data.dtype]
    return helper.make_tensor_type_proto(elem_type, [int(s) for s in value.data.shape])


def _defaults(call: Call) -> Iterable[AttributeProto]:
    schema = schema_of(call.domain, call.op, call.opset)
    attributes = {} if schema is None else schema.attributes
    return [a.default_value for a in attributes.values() if a.default_value.type]


def _filled(node: NodeProto, attributes: Mapping[str, AttributeProto]) -> NodeProto:
    """Return a node of a function with the attributes of the call where it refers to them; those that the call lacks are left out."""
    result = NodeProto()
    result.CopyFrom(node)
    del result.attribute[:]
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            if attribute.ref_attr_name in attributes:
                value = AttributeProto()
                value.CopyFrom(attributes[attribute.ref_attr_name])
                value.name = attribute.name
                result.attribute.append(value)
        elif attribute.HasField("g"):
            result.attribute.append(_filled_graph(attribute, attributes))
        else:
            result.attribute.append(attribute)
    return result


def _filled_graph(attribute: AttributeProto, attributes: Mapping[str, AttributeProto]) -> AttributeProto:
    result = AttributeProto()
    result.CopyFrom(attribute)
    nodes = [_filled(n, attributes) for n in attribute.g.node]
    del result.g.node[:]
    result.g.node.extend(nodes)
    return result


def undefined(calls: Iterable[Call], definitions: Definitions, known: Callable[[Call], bool]) -> set[str]:
    """Return the names of operators among ``calls`` that are neither known nor defined; ``known(call)`` says whether it has a rule."""
    names = set()
    for call in calls:
        if known(call):
            continue
        if not has_body(call, definitions):
            names.add(call.operator)
            continue
        schema = schema_of(call.domain, call.op, call.opset)
        if schema is None or not schema.has_context_dependent_function:
            body = body_of(call, [], definitions)
            names |= undefined(body.all_calls(), definitions, known) if body else {call.operator}
    return names
