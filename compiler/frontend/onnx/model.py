"""The torch module of an ONNX file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from thresher.errors import CaptureError
from thresher.frontend.onnx.dtypes import torch_dtype
from thresher.frontend.onnx.evaluator import Evaluator
from thresher.frontend.onnx.functions import Definitions, undefined
from thresher.frontend.onnx.graph import Reading
from thresher.frontend.onnx.operators import find_rule
from thresher.frontend.onnx.values import Unsupported, Value
from thresher.ir.examples import random_example


class OnnxModel(nn.Module):
    """A graph of ONNX as a module. It takes its inputs in order, without those that have a default, and returns a tuple or the only output.

    A sequence is a list of tensors, an empty optional None. Floating constants are parameters, under the names that the file has for
    them; the statistics of batch norms are buffers.
    """

    def __init__(self, proto: onnx.ModelProto, fixed: Mapping[str, Any]):
        """Raise :class:`CaptureError` for operators that are not known, for types that torch does not have, and for a wrong ``fixed``."""
        super().__init__()
        self.definitions = Definitions.of(proto)
        batch_norms = [n for n in _nodes(proto.graph) if n.op_type == "BatchNormalization"]
        self._statistics = {name for n in batch_norms for name in n.input[3:5]}
        try:
            self.graph = Reading(self.definitions.opsets, self._keep).graph(proto.graph)
            calls = self.graph.all_calls()
            missing = undefined(calls, self.definitions, lambda c: find_rule(c.domain, c.op, c.opset) is not None)
            if missing:
                raise Unsupported(f"it has operators that are not known here: {', '.join(sorted(missing))}")
            self.fixed = _fixed_values(proto.graph.input, fixed)
            self.inputs = [i for i in proto.graph.input if i.name not in {**self.graph.constants, **fixed}]
            for value in self.inputs:
                _tensor_type(value.type)
        except Unsupported as reason:
            raise CaptureError(str(reason)) from reason
        self.eval()

    def _keep(self, name: str, tensor: Tensor) -> Value:
        """Return a constant of the file as a value: as a parameter or a buffer where it is floating-point and no single number."""
        if not tensor.is_floating_point() or tensor.numel() <= 1 or tensor.element_size() == 1:
            return Value(tensor, constant=True)
        label = re.sub(r"\W", "_", name) or "constant"
        while hasattr(self, label):
            label += "_"
        if name in self._statistics:
            self.register_buffer(label, tensor)
        else:
            tensor = nn.Parameter(tensor)
            self.register_parameter(label, tensor)
        return Value(tensor, constant=True, parameter=label)

    def example(self) -> tuple[Tensor, ...] | None:
        """Return random inputs of the shapes in the file, or None where a size is free there."""
        inputs = []
        for value in self.inputs:
            kind = value.type.tensor_type
            sizes = [d.dim_value for d in kind.shape.dim]
            if not kind.HasField("shape") or any(s <= 0 for s in sizes):
                return None
            inputs.append(random_example(sizes, torch_dtype(kind.elem_type)))
        return tuple(inputs)

    def described(self) -> list[str]:
        """Return the inputs with their shapes as the file has them: ``x[batch, 3, 48, ?]``."""
        texts = []
        for value in self.inputs:
            sizes = [
                d.dim_param or (str(d.dim_value) if d.dim_value > 0 else "?") for d in value.type.tensor_type.shape.dim
            ]
            texts.append(f"{value.name}[{', '.join(sizes)}]")
        return texts

    def forward(self, *inputs: Any) -> Any:
        if len(inputs) != len(self.inputs):
            names = ", ".join(i.name for i in self.inputs)
            raise CaptureError(f"the model takes {len(self.inputs)} inputs ({names}), and got {len(inputs)}")
        values = {spec.name: _input_value(spec, value) for spec, value in zip(self.inputs, inputs)} | self.fixed
        evaluator = Evaluator(self, self.definitions)
        try:
            results = evaluator.run(self.graph, [values.get(name) for name in self.graph.inputs], {})
            outputs = tuple(None if v is None else _output(v) for v in results)
        except Unsupported as reason:
            raise CaptureError(f"{reason}{_cure(reason.inputs)}") from reason
        return outputs if len(outputs) > 1 else outputs[0]


def _cure(inputs: frozenset[str]) -> str:
    """Return what the user can do where inputs would have to be constants."""
    if not inputs:
        return ""
    fixed = ", ".join(f"{name!r}: ..." for name in sorted(inputs))
    options = " ".join(f"--fixed {name}=..." for name in sorted(inputs))
    return f". If they are always the same: read_onnx(path, fixed={{{fixed}}}), or {options}"


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return all nodes, those of branches too."""
    inner = [a.g for n in graph.node for a in n.attribute if a.HasField("g")]
    return [*graph.node, *(n for g in inner for n in _nodes(g))]


def _tensor_type(proto: onnx.TypeProto) -> int:
    """Return the type of the tensors of an input; raise :class:`Unsupported` where torch does not have it."""
    kind = proto.WhichOneof("value")
    if kind in ("sequence_type", "optional_type"):
        return _tensor_type(getattr(proto, kind).elem_type)
    if kind != "tensor_type":
        raise Unsupported(f"an input is a {str(kind).removesuffix('_type')}")
    torch_dtype(proto.tensor_type.elem_type)
    return proto.tensor_type.elem_type


def _input_value(spec: onnx.ValueInfoProto, value: Any) -> Value:
    """Return what the caller gave for an input as a value; raise :class:`CaptureError` where its type is another one."""
    if value is None:
        return Value(None, constant=True)
    if isinstance(value, (list, tuple)):
        return Value([_input_value(spec, v) for v in value], sources=frozenset([spec.name]))
    elem_type = _tensor_type(spec.type)
    if not isinstance(value, Tensor) or value.dtype != torch_dtype(elem_type):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise CaptureError(f"the input {spec.name!r} is of type {torch_dtype(elem_type)}, and got {kind}")
    return Value(value, elem_type=elem_type, sources=frozenset([spec.name]))


def _output(value: Value) -> Any:
    if isinstance(value.data, list):
        return [_output(v) for v in value.data]
    return value.tensor() if isinstance(value.data, Tensor) else value.data


def _fixed_values(inputs: Sequence[onnx.ValueInfoProto], fixed: Mapping[str, Any]) -> dict[str, Value]:
    specs = {i.name: i for i in inputs}
    if unknown := sorted(fixed.keys() - specs.keys()):
        raise CaptureError(f"the model has no input {unknown[0]!r}; its inputs: {', '.join(specs)}")
    return {name: _fixed_value(specs[name], value) for name, value in fixed.items()}


def _fixed_value(spec: onnx.ValueInfoProto, value: Any) -> Value:
    """Return the constant that an input always is, in the type of the input; raise where that type cannot represent it."""
    kind = spec.type.WhichOneof("value")
    if value is None:
        return Value(None, constant=True)
    if kind != "tensor_type" and isinstance(value, (list, tuple)):
        return Value([_fixed_value(spec, v) for v in value], constant=True)
    elem_type = _tensor_type(spec.type)
    stated = torch.as_tensor(value).detach()
    tensor = stated.to(torch_dtype(elem_type))
    if not torch.equal(tensor.to(torch.float64), stated.to(torch.float64)) and not tensor.is_floating_point():
        raise CaptureError(f"the input {spec.name!r} is of type {tensor.dtype}, which does not have {value}")
    return Value(tensor, constant=True, elem_type=elem_type)
