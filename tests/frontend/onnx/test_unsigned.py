"""Unsigned integers of 16 to 64 bits against NumPy, numbers above the largest signed one among them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.onnx_cases import one_node, run

TYPES = [np.uint16, np.uint32, np.uint64]
BINARY: dict[str, tuple[Callable, dict]] = {
    "Add": (np.add, {}), "Sub": (np.subtract, {}), "Mul": (np.multiply, {}), "Div": (np.floor_divide, {}), "Mod": (np.remainder, {}),
    "Max": (np.maximum, {}), "Min": (np.minimum, {}), "Greater": (np.greater, {}), "Less": (np.less, {}),
    "GreaterOrEqual": (np.greater_equal, {}), "LessOrEqual": (np.less_equal, {}), "Equal": (np.equal, {}),
    "BitwiseAnd": (np.bitwise_and, {}), "BitwiseOr": (np.bitwise_or, {}), "BitwiseXor": (np.bitwise_xor, {}),
}  # fmt: skip


def numbers(dtype: type, least: int = 0) -> st.SearchStrategy[list[int]]:
    largest = int(np.iinfo(dtype).max)
    near = st.sampled_from([least, 1, largest, largest - 1, largest // 2, largest // 2 + 1, largest // 2 + 2])
    return st.lists(st.one_of(near, st.integers(least, largest)), min_size=4, max_size=4)


def computed(
    op: str, values: list[np.ndarray], constants: dict | None = None, outputs: int = 1, **attributes: object
) -> list:
    model = one_node(op, values, constants or {}, outputs, 24, **attributes)
    result = run(model, *(torch.from_numpy(v) for i, v in enumerate(values) if i not in (constants or {})))
    return [r.numpy() for r in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("dtype", TYPES)
@given(data=st.data())
@settings(max_examples=20)
def test_two_inputs(op: str, dtype: type, data: st.DataObject) -> None:
    a = np.array(data.draw(numbers(dtype)), dtype)
    b = np.array(data.draw(numbers(dtype, int(op in ("Div", "Mod")))), dtype)
    function, attributes = BINARY[op]
    (result,) = computed(op, [a, b], **attributes)
    np.testing.assert_array_equal(result, function(a, b), strict=True)


@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
@pytest.mark.parametrize("dtype", TYPES)
@given(data=st.data())
@settings(max_examples=20)
def test_shifts(direction: str, dtype: type, data: st.DataObject) -> None:
    x = np.array(data.draw(numbers(dtype)), dtype)
    amounts = st.lists(st.integers(0, 8 * x.itemsize - 1), min_size=4, max_size=4)
    amount = np.array(data.draw(amounts), dtype)
    (result,) = computed("BitShift", [x, amount], direction=direction)
    np.testing.assert_array_equal(result, x << amount if direction == "LEFT" else x >> amount, strict=True)


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@given(data=st.data())
@settings(max_examples=20)
def test_orders(dtype: type, data: st.DataObject) -> None:
    x = np.array(data.draw(numbers(dtype)), dtype)
    np.testing.assert_array_equal(computed("ReduceMax", [x], keepdims=0)[0], x.max(), strict=True)
    np.testing.assert_array_equal(computed("ReduceMin", [x], keepdims=0)[0], x.min(), strict=True)
    np.testing.assert_array_equal(computed("ArgMax", [x], axis=0, keepdims=0)[0], x.argmax())
    values, indices = computed("TopK", [x, np.array([2])], {1: np.array([2])}, 2, axis=0)
    order = np.argsort(-x.astype(object), kind="stable")[:2]
    np.testing.assert_array_equal(values, x[order], strict=True)
    np.testing.assert_array_equal(indices, order)
    low, high = np.sort(np.array(data.draw(numbers(dtype)), dtype))[[0, 2]]
    clipped = computed("Clip", [x, low, high], {1: np.array(low), 2: np.array(high)})[0]
    np.testing.assert_array_equal(clipped, np.clip(x, low, high), strict=True)


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@given(data=st.data())
@settings(max_examples=20)
def test_sums_are_modulo_the_size_of_the_type(dtype: type, data: st.DataObject) -> None:
    x = np.array(data.draw(numbers(dtype)), dtype)
    np.testing.assert_array_equal(computed("ReduceSum", [x], keepdims=0)[0], x.sum(dtype=dtype), strict=True)
    np.testing.assert_array_equal(
        computed("CumSum", [x, np.array(0)], {1: np.array(0)})[0], x.cumsum(dtype=dtype), strict=True
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_moves(dtype: type) -> None:
    x = np.array([[0, np.iinfo(dtype).max], [5, np.iinfo(dtype).max // 2 + 1]], dtype)
    index = np.array([1, 0])
    np.testing.assert_array_equal(computed("Gather", [x, index], {1: index})[0], x[[1, 0]], strict=True)
    np.testing.assert_array_equal(computed("Transpose", [x])[0], x.T, strict=True)
    pads = np.array([0, 1, 0, 0])
    np.testing.assert_array_equal(computed("Pad", [x, pads], {1: pads})[0], np.pad(x, ((0, 0), (1, 0))), strict=True)
    scattered = computed("ScatterElements", [x, np.array([[0, 0]]), x[1:]], axis=0, reduction="max")[0]
    np.testing.assert_array_equal(scattered, [np.maximum(x[0], x[1]), x[1]])
