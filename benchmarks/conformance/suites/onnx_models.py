"""ONNX's backend tests of models: those whose data is in the wheel of ``onnx``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from thresher.models.families.sample import Case, Inputs, SampleExcluded

from ..sample import Suite
from .onnx_tensors import as_array, as_file, as_tensor, shape_like_inputs, with_constants

KINDS = ("pytorch-operator", "pytorch-converted", "simple", "real")
DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"


@cache
def _tests() -> dict[str, Any]:
    from onnx.backend.test.loader import load_model_tests

    return {f"{kind}/{test.name}": test for kind in KINDS for test in load_model_tests(kind=kind)}


def names() -> Iterator[str]:
    """Yield ``kind/test``."""
    yield from sorted(_tests(), key=lambda name: (KINDS.index(name.split("/")[0]), name))


def build(name: str) -> Case:
    """Return one test; what it has several sets of inputs for is judged on all of them."""
    test = _tests()[name]
    path, data = _ramp(test) if test.model_dir is None else _stored(Path(test.model_dir))
    return Case(path, data[0], data[1:], tolerance=test.rtol)


def _stored(folder: Path) -> tuple[Path, list[Inputs]]:
    path, sets = folder / "model.onnx", sorted(folder.glob("test_data_set_*"))
    graph = onnx.load(path, load_external_data=False).graph
    if any(not value.type.HasField("tensor_type") for value in (*graph.input, *graph.output)):
        raise SampleExcluded("it has sequences or optional values")
    given = [dict(zip((i.name for i in graph.input), _arrays(s, "input"))) for s in sets]
    constants = {name: given[0][name] for name in shape_like_inputs(graph) if name in given[0]}
    if any(not np.array_equal(arrays[name], value) for arrays in given for name, value in constants.items()):
        raise SampleExcluded("its shape-like inputs are not the same in all its sets of inputs")
    if constants:
        path = as_file(with_constants(onnx.load(path), constants), folder.name)
    args = [tuple(as_tensor(array) for name, array in arrays.items() if name not in constants) for arrays in given]
    return path, [Inputs(a, expected=[as_tensor(o) for o in _arrays(s, "output")]) for a, s in zip(args, sets)]


def _arrays(folder: Path, kind: str) -> list[np.ndarray]:
    files = sorted(folder.glob(f"{kind}_*.pb"), key=lambda path: int(path.stem.split("_")[1]))
    return [_array(file) for file in files]


def _ramp(test: Any) -> tuple[Path, list[Inputs]]:
    """Return a light model: the large one's graph with made-up weights. Its input is a ramp from 0 to 1, and its output is in the wheel."""
    path = DATA / "light" / Path(test.url).name
    graph = onnx.load(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    args = []
    for value in graph.input:
        if value.name not in constants:
            sizes = [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
            count = int(np.prod(sizes))
            args.append(as_tensor((np.arange(count).reshape(sizes) / count).astype(np.float32)))
    outputs = [path.with_name(f"{path.stem}_output_{i}.pb") for i in range(len(graph.output))]
    return path, [Inputs(tuple(args), expected=[as_tensor(_array(output)) for output in outputs])]


def _array(file: Path) -> np.ndarray:
    return as_array(onnx.TensorProto.FromString(file.read_bytes()))


MODELS = Suite(
    "onnx_models",
    "ONNX's models",
    "The model tests of ONNX whose data is in its wheel (`onnx/backend/test/data`), judged by their stored outputs. "
    "Inputs that say how an operator computes (sizes, axes, counts) are constants.",
    names,
    build,
    limit=300.0,
)
