"""An ``.onnx`` file as a torch module, which is then captured like any other.

    model = read_onnx("model.onnx");  thresher.compile(model, args)      or   thresher.compile("model.onnx", args)

The graph is walked with torch operators (:mod:`thresher.frontend.onnx.operators`). What depends on no input, and what depends on
shapes only, is kept as NumPy arrays and evaluated by onnx's own reference: sizes that exporters compute in the graph are plain numbers
when torch.export sees them, and branches on them are taken. Needs ``pip install onnx``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thresher.errors import CaptureError
from thresher.frontend.onnx.operators import RULES
from thresher.frontend.onnx.rules import Node, Unsupported
from thresher.ir.examples import random_example

STANDARD = ("", "ai.onnx")  # domains whose operators are those of the specification


def read_onnx(path: str | os.PathLike, fixed: Mapping[str, Any] | None = None) -> OnnxModel:
    """Return the model in a file.

    ``fixed``: values of inputs that become constants, by name (a sampling rate that branches depend on).

    Raises :class:`CaptureError` where it is no model, or has operators that are not known here, naming them.
    """
    try:
        import onnx
    except ImportError as error:
        raise CaptureError(f"reading {path} needs the package onnx: pip install 'thresher[onnx]'") from error
    if not Path(path).exists():
        raise CaptureError(f"{path} does not exist")
    try:
        proto = onnx.load(str(path))
        onnx.checker.check_model(proto)
    except Exception as error:  # of protobuf's, of the checker's
        raise CaptureError(f"{path} is no ONNX model: {str(error)[:500]}") from error
    used = {n.op_type if n.domain in STANDARD else f"{n.domain}.{n.op_type}" for n in _nodes(proto.graph)}
    missing = sorted(used - RULES.keys() - {"Constant", "If", "Identity"})
    if missing:
        raise CaptureError(f"{path} has operators that are not known here: {', '.join(missing)}")
    if unknown := sorted((fixed or {}).keys() - {i.name for i in proto.graph.input}):
        raise CaptureError(
            f"{path} has no input {unknown[0]!r}; its inputs: {', '.join(i.name for i in proto.graph.input)}"
        )
    return OnnxModel(proto, fixed or {})


def _nodes(graph: Any) -> list[Any]:
    """Return all nodes, those of branches too."""
    inner = [a.g for n in graph.node for a in n.attribute if a.HasField("g")]
    return [*graph.node, *(n for g in inner for n in _nodes(g))]


class OnnxModel(nn.Module):
    """A graph of ONNX as a module. It takes its inputs in order, without those that have a default, and returns a tuple or the only output.

    Floating constants are parameters, under the names that the file has for them.
    """

    def __init__(self, proto: Any, fixed: Mapping[str, Any]):
        super().__init__()
        from onnx import helper, numpy_helper

        self.graph = proto.graph
        self.opset = max((o.version for o in proto.opset_import if o.domain in STANDARD), default=1)
        self.arrays = {t.name: numpy_helper.to_array(t) for t in _tensors(proto.graph)}
        for value in proto.graph.input:
            if value.name in fixed:
                dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                self.arrays[value.name] = np.asarray(fixed[value.name], dtype)
        self.inputs = [i for i in proto.graph.input if i.name not in self.arrays]
        self.parameter_names: dict[int, str] = {}
        statistics = {n.input[i] for n in _nodes(proto.graph) if n.op_type == "BatchNormalization" for i in (3, 4)}
        for name, array in self.arrays.items():
            if array.dtype.kind == "f" and array.size > 1:
                self._add(name, array, learned=name not in statistics)
        self.eval()

    def _add(self, name: str, array: np.ndarray, learned: bool) -> None:
        label = re.sub(r"\W", "_", name) or "constant"
        while hasattr(self, label):
            label += "_"
        value = torch.from_numpy(array.copy())
        if learned:
            self.register_parameter(label, nn.Parameter(value))
        else:
            self.register_buffer(label, value)
        self.parameter_names[id(array)] = label

    def example(self) -> tuple[Tensor, ...] | None:
        """Return random inputs of the shapes in the file, or None where a size is free there."""
        from onnx import helper

        inputs = []
        for value in self.inputs:
            kind = value.type.tensor_type
            sizes = [d.dim_value for d in kind.shape.dim]
            if not kind.HasField("shape") or any(s <= 0 for s in sizes):
                return None
            dtype = torch.from_numpy(np.zeros((), helper.tensor_dtype_to_np_dtype(kind.elem_type))).dtype
            inputs.append(random_example(sizes, dtype))
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

    def forward(self, *inputs: Tensor) -> Any:
        if len(inputs) != len(self.inputs):
            names = ", ".join(i.name for i in self.inputs)
            raise CaptureError(f"the model takes {len(self.inputs)} inputs ({names}), and got {len(inputs)}")
        values: dict[str, Any] = dict(self.arrays)
        values.update({spec.name: value for spec, value in zip(self.inputs, inputs)})
        self._run(self.graph, values)
        outputs = tuple(self.tensor(values[o.name]) for o in self.graph.output)
        return outputs if len(outputs) > 1 else outputs[0]

    def tensor(self, value: Any) -> Any:
        """Return ``value`` as a tensor, a constant as the parameter that it is."""
        if not isinstance(value, np.ndarray):
            return value
        label = self.parameter_names.get(id(value))
        return torch.from_numpy(value.copy()) if label is None else getattr(self, label)

    def _run(self, graph: Any, values: dict[str, Any]) -> None:
        for proto in graph.node:
            if proto.op_type == "Constant":
                continue  # among the arrays
            node = Node.of(proto, self.opset, self.tensor)
            inputs = [values[name] if name else None for name in proto.input]
            try:
                outputs = (
                    self._branch(node, inputs, values) if proto.op_type == "If" else self._call(node, inputs, proto)
                )
            except Unsupported as reason:
                raise CaptureError(f"node {proto.name or proto.output[0]!r} ({proto.op_type}): {reason}") from reason
            values.update((name, v) for name, v in zip(proto.output, outputs) if name)

    def _call(self, node: Node, inputs: Sequence[Any], proto: Any) -> Sequence[Any]:
        if proto.op_type == "Identity":
            return [inputs[0]]
        if inputs and all(v is None or isinstance(v, np.ndarray) for v in inputs):
            return self._evaluated(proto, inputs)
        result = RULES[proto.op_type](node, *inputs)
        outputs = result if isinstance(result, (tuple, list)) else [result]
        if len(outputs) < len(proto.output):
            raise Unsupported(f"its output {proto.output[len(outputs)]!r} is asked for")
        return outputs

    def _branch(self, node: Node, inputs: Sequence[Any], values: dict[str, Any]) -> Sequence[Any]:
        if not isinstance(inputs[0], np.ndarray):
            raise Unsupported("its condition depends on values, not on shapes")
        graph = node.attributes["then_branch" if bool(inputs[0]) else "else_branch"]
        inner = dict(values)
        self._run(graph, inner)
        return [inner[o.name] for o in graph.output]

    def _evaluated(self, proto: Any, inputs: Sequence[Any]) -> Sequence[Any]:
        """Return the results of onnx's reference: NumPy in, NumPy out."""
        from onnx.reference import ReferenceEvaluator

        feeds = {name: value for name, value in zip(proto.input, inputs) if name}
        outputs = ReferenceEvaluator(proto, opsets={"": self.opset}).run(None, feeds)
        return [np.asarray(v) for v in outputs]


def _tensors(graph: Any) -> list[Any]:
    """Return initialisers and constants, those of branches too, each named after its value."""
    from onnx import TensorProto, helper, numpy_helper

    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                tensors += _tensors(attribute.g)
            if node.op_type != "Constant":
                continue
            value = helper.get_attribute_value(attribute)
            if attribute.name != "value":
                value = numpy_helper.from_array(np.asarray(value))
            tensor = TensorProto()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
            tensors.append(tensor)
    return tensors
