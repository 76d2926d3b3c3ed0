"""Recurrent layers with every attribute, against onnxruntime: ONNX's own reference has one direction of them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from helpers.onnx_cases import one_node, run
from thresher.errors import CaptureError
from thresher.frontend.onnx.recurrent import ACTIVATIONS

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
FUNCTIONS = {"RNN": 1, "GRU": 2, "LSTM": 3}
STEPS, BATCH, INPUTS, HIDDEN = 5, 3, 4, 6


def inputs_of(op: str, directions: int) -> list:
    random = np.random.default_rng(0)
    gates, states = GATES[op] * HIDDEN, 2 if op == "LSTM" else 1

    def normal(*shape: int) -> np.ndarray:
        return (0.5 * random.standard_normal(shape)).astype(np.float32)

    first = [normal(STEPS, BATCH, INPUTS), normal(directions, gates, INPUTS), normal(directions, gates, HIDDEN)]
    bias, lengths = normal(directions, 2 * gates), np.array([5, 2, 3], np.int32)
    initial = [normal(directions, BATCH, HIDDEN) for _ in range(states)]
    peepholes = [normal(directions, 3 * HIDDEN)] if op == "LSTM" else []
    return [*first, bias, lengths, *initial, *peepholes]


def check(op: str, direction: str, drop: tuple[int, ...] = (), **attributes: object) -> None:
    inputs = inputs_of(op, 2 if direction == "bidirectional" else 1)
    inputs = [None if i in drop else v for i, v in enumerate(inputs)]
    outputs = 3 if op == "LSTM" else 2
    model = one_node(op, inputs, {}, outputs, 14, hidden_size=HIDDEN, direction=direction, **attributes)
    feeds = {f"x{i}": v for i, v in enumerate(inputs) if v is not None}
    session = onnxruntime.InferenceSession(onnx.shape_inference.infer_shapes(model).SerializeToString())
    result = run(model, *(torch.from_numpy(v) for v in feeds.values()))
    for expected, actual in zip(session.run(None, feeds), result, strict=True):
        torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op", GATES)
def test_all_inputs(op: str, direction: str) -> None:
    """Lengths, initial states, and the peepholes of an LSTM; then without lengths, and without states."""
    check(op, direction)
    check(op, direction, drop=(4,))
    check(op, direction, drop=(3, 4, 5, 6))


@pytest.mark.parametrize("op", GATES)
def test_clipped(op: str) -> None:
    check(op, "bidirectional", clip=0.3)


@pytest.mark.parametrize("before", [0, 1])
def test_the_reset_of_a_gru(before: int) -> None:
    check("GRU", "bidirectional", linear_before_reset=before)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("op", GATES)
def test_activations(op: str, name: str) -> None:
    parameters = ACTIVATIONS[name][1:]
    lists = {
        key: [0.3] * FUNCTIONS[op]
        for key, default in zip(("activation_alpha", "activation_beta"), parameters)
        if default is not None
    }
    # bounded: cells that Softplus lets grow to 1e6 overflow in onnxruntime
    check(op, "forward", activations=[name] * FUNCTIONS[op], clip=1.0, **lists)


def test_batches_first() -> None:
    """``layout`` 1 is ``layout`` 0 with other dimensions first; onnxruntime does not have it."""
    values = [v for i, v in enumerate(inputs_of("LSTM", 2)) if i not in (4, 7)]
    names = [*values[:4], None, *values[4:]]
    steps_first = run(
        one_node("LSTM", names, {}, 3, 14, hidden_size=HIDDEN, direction="bidirectional"),
        *map(torch.from_numpy, values),
    )
    batched = [np.ascontiguousarray(v.swapaxes(0, 1)) if i in (0, 4, 5) else v for i, v in enumerate(values)]
    names = [*batched[:4], None, *batched[4:]]
    model = one_node("LSTM", names, {}, 3, 14, hidden_size=HIDDEN, direction="bidirectional", layout=1)
    y, h, c = run(model, *map(torch.from_numpy, batched))
    torch.testing.assert_close(y, steps_first[0].permute(2, 0, 1, 3))
    torch.testing.assert_close(h, steps_first[1].transpose(0, 1))
    torch.testing.assert_close(c, steps_first[2].transpose(0, 1))


def test_an_unknown_activation_is_refused() -> None:
    values = [v for i, v in enumerate(inputs_of("RNN", 1)) if i < 3]
    model = one_node("RNN", values, {}, 1, 14, hidden_size=HIDDEN, activations=["Step"])
    with pytest.raises(CaptureError, match=r"\(RNN\): the activation Step"):
        run(model, *map(torch.from_numpy, values))
