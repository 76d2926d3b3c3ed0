"""ONNX's backend tests of its operators, judged by the outputs that the tests themselves have."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from thresher.models.families.sample import Case, Inputs

from ..sample import Suite
from .onnx_tensors import as_array, as_file, as_tensor, shape_like_inputs, with_constants

#: Conversions of floating-point numbers to integers of few bits: what a number beyond their range becomes is undefined, and another
#: number with each version of ml_dtypes.
NARROWED = re.compile(r"test_cast(like)?_FLOAT(16)?_to_(?P<type>U?INT[24])(_expanded)?")


@cache
def node_tests() -> dict[str, Any]:
    """Return all tests of operators that ONNX has, by name."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tests compute with infinities on purpose
        return {test.name: test for test in load_model_tests(kind="node")}


def stored_data(name: str) -> tuple[list[Any], list[Any]]:
    """Return the inputs and the outputs of a test; numbers for which ONNX defines no output are 0 in both."""
    inputs, outputs = node_tests()[name].data_sets[0]
    if not (match := NARROWED.fullmatch(name)):
        return list(inputs), list(outputs)
    info = ml_dtypes.iinfo(match["type"].lower())
    x, y = as_array(inputs[0]), as_array(outputs[0])
    defined = (x >= int(info.min)) & (x <= int(info.max))
    return [np.where(defined, x, 0).astype(x.dtype), *inputs[1:]], [np.where(defined, y, np.zeros_like(y))]


def names() -> Iterator[str]:
    """Yield every node test."""
    yield from node_tests()


def build(name: str) -> Case:
    """Return one test: the file of its model, and its stored inputs and outputs."""
    test = node_tests()[name]
    inputs, outputs = stored_data(name)
    arrays = {spec.name: as_array(value) for spec, value in zip(test.model.graph.input, inputs)}
    expected = [as_tensor(as_array(value)) for value in outputs]
    constants = {key: arrays.pop(key) for key in shape_like_inputs(_unexpanded(name)) if key in arrays}
    args = tuple(as_tensor(array) for array in arrays.values())
    path = as_file(with_constants(test.model, constants), name)
    return Case(path, Inputs(args, expected=expected), tolerance=test.rtol)


def _unexpanded(name: str) -> onnx.GraphProto:
    """Return the graph of a test; where the test is the body of a function, that of the function's test."""
    tests = node_tests()
    return tests.get(re.sub(r"_expanded.*$", "", name), tests[name]).model.graph


NODES = Suite(
    "onnx_nodes",
    "ONNX's operators",
    'The node tests of `onnx.backend.test.loader.load_model_tests(kind="node")`, judged by their stored outputs. Inputs that say how an '
    "operator computes (sizes, axes, counts) are constants.",
    names,
    build,
)
