"""ONNX models of one node, and the tests that come with ONNX: their stored inputs and outputs as torch has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from benchmarks.conformance.suites.onnx_nodes import node_tests, stored_data
from thresher.errors import CaptureError
from thresher.frontend.onnx.dtypes import HOLDERS, torch_dtype
from thresher.frontend.onnx.model import OnnxModel
from thresher.frontend.onnx.values import Unsupported

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"


@dataclass(frozen=True)
class StoredTest:
    """A model, its inputs by name, the outputs that are stored with it, and the tolerance that the test states."""

    model: onnx.ModelProto
    inputs: dict[str, Any]
    outputs: list[Any]
    rtol: float


def one_node(
    op: str,
    values: list,
    constants: dict[int, np.ndarray],
    outputs: int,
    opset: int,
    domain: str = "",
    **attributes: Any,
) -> Any:
    """A model of one node; ``values`` are its inputs, None for what is left out; ``constants`` are among them by position."""
    names = ["" if v is None else f"x{i}" for i, v in enumerate(values)]
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], domain=domain, **attributes)
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for i, (n, v) in enumerate(zip(names, values))
        if n and i not in constants
    ]
    results = [onnx.ValueInfoProto(name=f"y{i}") for i in range(outputs)]
    initial = [numpy_helper.from_array(v, f"x{i}") for i, v in constants.items()]
    graph = helper.make_graph([node], "one", inputs, results, initial)
    opsets = [helper.make_opsetid(domain, opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def parsed(text: str, opset: int = 18) -> onnx.ModelProto:
    """A model written as a graph in ONNX's text format."""
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')


def run(model: onnx.ModelProto, *inputs: Any, **fixed: Any) -> Any:
    """Return what the torch module of a model returns."""
    with torch.no_grad():
        return OnnxModel(model, fixed)(*inputs)


def stored_node_test(name: str) -> StoredTest:
    """Return one of them. Raises :class:`Unsupported` for types that torch does not have."""
    test = node_tests()[name]
    inputs, outputs = stored_data(name)
    graph = test.model.graph
    return StoredTest(
        test.model,
        {spec.name: as_torch(value, spec.type) for spec, value in zip(graph.input, inputs)},
        [as_torch(value, spec.type) for spec, value in zip(graph.output, outputs)],
        test.rtol,
    )


def stored_model_tests(folder: Path) -> list[StoredTest]:
    """Return the tests of a model whose data is in the wheel of ONNX, one for each set of inputs."""
    model = onnx.load(folder / "model.onnx")
    constants = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in constants]
    return [
        StoredTest(
            model,
            {spec.name: value for spec, value in zip(inputs, _stored(data, "input", inputs))},
            _stored(data, "output", model.graph.output),
            1e-3,
        )
        for data in sorted(folder.glob("test_data_set_*"))
    ]


def light_model_test(path: Path) -> StoredTest:
    """Return the test of a large model with made-up weights: its input is a ramp from 0 to 1, its output lies beside it."""
    model = onnx.load(path)
    constants = {t.name for t in model.graph.initializer}
    (spec,) = (i for i in model.graph.input if i.name not in constants)
    sizes = [d.dim_value for d in spec.type.tensor_type.shape.dim]
    ramp = (np.arange(np.prod(sizes)).reshape(sizes) / np.prod(sizes)).astype(np.float32)
    output = TensorProto.FromString(path.with_name(f"{path.stem}_output_0.pb").read_bytes())
    return StoredTest(model, {spec.name: torch.from_numpy(ramp)}, [as_torch(output, model.graph.output[0].type)], 1e-3)


def _stored(folder: Path, kind: str, specs: Sequence[onnx.ValueInfoProto]) -> list[Any]:
    values = []
    for i, spec in enumerate(specs):
        data = (folder / f"{kind}_{i}.pb").read_bytes()
        if spec.type.HasField("sequence_type"):
            values.append(as_torch(numpy_helper.to_list(onnx.SequenceProto.FromString(data)), spec.type))
        else:
            values.append(as_torch(TensorProto.FromString(data), spec.type))
    return values


def as_torch(value: Any, proto: onnx.TypeProto) -> Any:
    """Return a stored value of a type: a tensor, a list of them, or None."""
    kind = proto.WhichOneof("value")
    if kind != "tensor_type":
        inner = getattr(proto, kind).elem_type
        return (
            [as_torch(v, inner) for v in value]
            if kind == "sequence_type"
            else value
            if value is None
            else as_torch(value, inner)
        )
    elem_type = proto.tensor_type.elem_type
    dtype = torch_dtype(elem_type)
    array = np.array(numpy_helper.to_array(value) if isinstance(value, TensorProto) else value)
    if elem_type in HOLDERS:
        return torch.from_numpy(array.astype(torch.empty((), dtype=dtype).numpy().dtype))
    if array.dtype.isbuiltin != 1:
        return torch.from_numpy(array.view({1: np.uint8, 2: np.int16}[array.itemsize])).view(dtype)
    return torch.from_numpy(array)


def with_constants(test: StoredTest) -> tuple[OnnxModel, list[Any], Any]:
    """Return the module of a test with those inputs as constants that its rules read as numbers, its other inputs, and its result."""
    fixed: dict[str, Any] = {}
    while True:
        model = OnnxModel(test.model, fixed)
        args = [test.inputs[spec.name] for spec in model.inputs]
        try:
            with torch.no_grad():
                return model, args, model(*args)
        except CaptureError as error:
            needed = error.__cause__.inputs if isinstance(error.__cause__, Unsupported) else frozenset()
            if not needed - fixed.keys():
                raise
            fixed |= {name: test.inputs[name] for name in needed}


def difference(expected: Any, actual: Any, rtol: float) -> str:
    """Return how two results differ, "" where they do not: floats by a part of each, and by a last bit of the largest one."""
    if isinstance(expected, list):
        if not isinstance(actual, list) or len(expected) != len(actual):
            return "another sequence"
        return next(filter(None, (difference(e, a, rtol) for e, a in zip(expected, actual))), "")
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return "" if expected is actual else f"{actual} instead of {expected}"
    if expected.dtype != actual.dtype or expected.shape != actual.shape:
        return f"{actual.dtype} {tuple(actual.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    if not expected.is_floating_point():
        return "" if torch.equal(expected, actual) else "other values"
    e, a = expected.double() if expected.element_size() > 1 else expected.float().double(), actual.float().double()
    a = actual.double() if actual.element_size() > 1 else a
    scale = float(e[e.isfinite()].abs().max()) if e.isfinite().any() else 0.0
    bound = 1e-7 + torch.finfo(expected.dtype).eps * scale
    if torch.allclose(a, e, rtol=rtol, atol=bound, equal_nan=True):
        return ""
    return f"off by {float((a - e).abs().nan_to_num(0).max()):.2g} of {scale:.2g}"
