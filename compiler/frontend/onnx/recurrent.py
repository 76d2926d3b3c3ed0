"""The recurrent layers of ONNX, unrolled over the steps of their input: x [steps, batch, inputs] -> [steps, directions, batch, hidden].

w [directions, gates * hidden, inputs], r [directions, gates * hidden, hidden], b [directions, 2 * gates * hidden]: of the inputs, then of
the state. The specification: https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.frontend.onnx.rules import Node, Unsupported, rule

State = tuple[Tensor, ...]  # of one direction: the output of the layer comes first
ACTIVATIONS = {"Tanh": torch.tanh, "Relu": torch.relu, "Sigmoid": torch.sigmoid}


@rule("LSTM")
def lstm(
    node: Node,
    x: Tensor,
    w: Any,
    r: Any,
    b: Any = None,
    lengths: Any = None,
    h: Any = None,
    c: Any = None,
    p: Any = None,
) -> Sequence[Tensor]:
    """Return a layer of four gates: input, output, forget, cell (Hochreiter and Schmidhuber 1997)."""
    if p is not None or node.get("activations"):
        raise Unsupported("peepholes or other activations")

    def step(gates: Tensor, state_gates: Tensor, state: State, *_: Any) -> State:
        i, o, f, g = (gates + state_gates).chunk(4, -1)
        cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell

    return _unrolled(node, x, (w, r, b), 4, lengths, (h, c), step)


@rule("GRU")
def gru(node: Node, x: Tensor, w: Any, r: Any, b: Any = None, lengths: Any = None, h: Any = None) -> Sequence[Tensor]:
    """Return a layer of three gates: update, reset, hidden (Cho et al. 2014)."""
    if node.get("activations"):
        raise Unsupported("other activations")
    after = bool(node.get("linear_before_reset", 0))

    def step(gates: Tensor, state_gates: Tensor, state: State, weight: Tensor, bias: Tensor) -> State:
        (z, reset, hidden), (sz, sreset, shidden) = gates.chunk(3, -1), state_gates.chunk(3, -1)
        z, reset = (z + sz).sigmoid(), (reset + sreset).sigmoid()
        if after:
            new = hidden + reset * shidden
        else:
            size = state[0].shape[-1]
            new = hidden + F.linear(reset * state[0], weight[2 * size :], bias[2 * size :])
        return ((1 - z) * new.tanh() + z * state[0],)

    return _unrolled(node, x, (w, r, b), 3, lengths, (h,), step)


@rule("RNN")
def rnn(node: Node, x: Tensor, w: Any, r: Any, b: Any = None, lengths: Any = None, h: Any = None) -> Sequence[Tensor]:
    """Return a layer of one gate, with tanh, relu or the sigmoid."""
    names = node.get("activations") or ["Tanh"]
    kinds = {n.decode() if isinstance(n, bytes) else n for n in names}
    if len(kinds) != 1 or not kinds <= ACTIVATIONS.keys():
        raise Unsupported(f"the activations {sorted(kinds)}")
    activation = ACTIVATIONS[kinds.pop()]
    return _unrolled(
        node, x, (w, r, b), 1, lengths, (h,), lambda gates, state_gates, *_: (activation(gates + state_gates),)
    )


def _unrolled(
    node: Node,
    x: Tensor,
    parameters: Sequence[Any],
    gates: int,
    lengths: Any,
    initial: Sequence[Any],
    step: Callable[..., State],
) -> Sequence[Tensor]:
    """Return the outputs of all steps, and the last states. ``step(gates of the input, gates of the state, state, weight and bias of the
    state)`` returns the next state."""
    if lengths is not None or node.get("clip") or node.get("layout", 0) or node.get("input_forget", 0):
        raise Unsupported("lengths, clipping, coupled gates or another layout")
    w, r = (node.tensor(v) for v in parameters[:2])
    directions, hidden = w.shape[0], node.get("hidden_size")
    bias = x.new_zeros(directions, 2 * gates * hidden) if parameters[2] is None else node.tensor(parameters[2])
    states = [x.new_zeros(directions, x.shape[1], hidden) if v is None else node.tensor(v) for v in initial]
    runs, lasts = [], []
    for d in range(directions):
        backwards = d == 1 or node.get("direction", "forward") == "reverse"
        of_input, of_state = bias[d].chunk(2)
        state, steps = tuple(s[d] for s in states), []
        for index in reversed(range(x.shape[0])) if backwards else range(x.shape[0]):
            both = F.linear(x[index], w[d], of_input), F.linear(state[0], r[d], of_state)
            state = step(*both, state, r[d], of_state)
            steps.append(state[0])
        runs.append(torch.stack(steps[::-1] if backwards else steps))
        lasts.append(state)
    return torch.stack(runs, 1), *(torch.stack(last) for last in zip(*lasts))
