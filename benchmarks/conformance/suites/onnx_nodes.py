"""ONNX's backend tests of its operators, judged by the outputs that the tests themselves have."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import onnx

from ..sample import Case, Inputs, Suite
from .onnx_tensors import as_array, as_file, as_tensor, shape_like_inputs, with_constants


@cache
def _tests() -> dict[str, Any]:
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tests compute with infinities on purpose
        return {test.name: test for test in load_model_tests(kind="node")}


def names() -> Iterator[str]:
    """Yield every node test."""
    yield from _tests()


def build(name: str) -> Case:
    """Return one test: the file of its model, and its stored inputs and outputs."""
    test = _tests()[name]
    inputs, outputs = test.data_sets[0]
    arrays = {spec.name: as_array(value) for spec, value in zip(test.model.graph.input, inputs)}
    expected = [as_tensor(as_array(value)) for value in outputs]
    constants = {key: arrays.pop(key) for key in shape_like_inputs(_unexpanded(name)) if key in arrays}
    args = tuple(as_tensor(array) for array in arrays.values())
    path = as_file(with_constants(test.model, constants), name)
    return Case(path, Inputs(args, expected=expected), tolerance=test.rtol)


def _unexpanded(name: str) -> onnx.GraphProto:
    """Return the graph of a test; where the test is the body of a function, that of the function's test."""
    tests = _tests()
    return tests.get(re.sub(r"_expanded.*$", "", name), tests[name]).model.graph


NODES = Suite(
    "onnx_nodes",
    "ONNX's operators",
    'The node tests of `onnx.backend.test.loader.load_model_tests(kind="node")`, judged by their stored outputs. Inputs that say how an '
    "operator computes (sizes, axes, counts) are constants.",
    names,
    build,
)
