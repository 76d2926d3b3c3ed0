"""ONNX's backend tests of its operators, judged by the outputs that the tests themselves have."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

from ..sample import Case, Inputs, Suite
from .onnx_tensors import as_array, as_file, as_tensor, with_constants

REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()
#: Inputs that say how, and not on what, an operator computes: sizes, axes, counts. The tests have them as inputs; they become constants.
SHAPE_LIKE: dict[str, tuple[int, ...]] = {
    **{f"Reduce{name}": (1,) for name in REDUCTIONS},
    **{f"{name}Window": (0,) for name in ("Blackman", "Hamming", "Hann")},
    **{name: (1,) for name in "AffineGrid CenterCropPad CumProd CumSum Expand OneHot Reshape Split SplitToSequence Squeeze".split()},
    **{name: (1,) for name in "Tile TopK Trilu Unsqueeze Upsample".split()},
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "DFT": (1, 2),
    "Dropout": (1, 2),
    "Loop": (0, 1),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
    "NonMaxSuppression": (2, 3, 4),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "Slice": (1, 2, 3, 4),
}  # fmt: skip


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
    constants = {key: arrays.pop(key) for key in shape_like_inputs(name) if key in arrays}
    args = tuple(as_tensor(array) for array in arrays.values())
    path = as_file(with_constants(test.model, constants), name)
    return Case(path, Inputs(args, expected=expected), tolerance=test.rtol)


def shape_like_inputs(name: str) -> set[str]:
    """Return the inputs of a test that become constants. Where a test is the body of a function, they are those of the function's test."""
    tests = _tests()
    graph = tests.get(re.sub(r"_expanded.*$", "", name), tests[name]).model.graph
    return {n.input[i] for n in graph.node for i in SHAPE_LIKE.get(n.op_type, ()) if i < len(n.input) and n.input[i]}


NODES = Suite(
    "onnx_nodes",
    "ONNX's operators",
    'The node tests of `onnx.backend.test.loader.load_model_tests(kind="node")`, judged by their stored outputs. Inputs that say how an '
    "operator computes (sizes, axes, counts) are constants.",
    names,
    build,
)
