"""The recurrent layers of ONNX, unrolled over the steps of their input: x [steps, batch, inputs] -> [steps, directions, batch, hidden].

w [directions, gates * hidden, inputs], r [directions, gates * hidden, hidden], b [directions, 2 * gates * hidden]: of the inputs, then of
the state. With ``layout`` 1 the batch comes first in x, in the states and in the results. A sample that is shorter than the others keeps
its state behind its end, where its output is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.frontend.onnx.rules import rule
from thresher.frontend.onnx.values import Unsupported

Activation = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]  # of one direction: the output of the layer comes first
#: Of each activation: the function of x, alpha and beta, and the defaults of alpha and beta; None where it has none.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor, float, float], Tensor], float | None, float | None]] = {
    "Relu": (lambda x, a, b: torch.relu(x), None, None), "Tanh": (lambda x, a, b: torch.tanh(x), None, None),
    "Sigmoid": (lambda x, a, b: torch.sigmoid(x), None, None), "Softsign": (lambda x, a, b: F.softsign(x), None, None),
    "Softplus": (lambda x, a, b: F.softplus(x), None, None), "Affine": (lambda x, a, b: a * x + b, 1.0, 0.0),
    "LeakyRelu": (lambda x, a, b: F.leaky_relu(x, a), 0.01, None), "ThresholdedRelu": (lambda x, a, b: F.threshold(x, a, 0.0), 1.0, None),
    "ScaledTanh": (lambda x, a, b: a * torch.tanh(b * x), 1.0, 1.0),
    "HardSigmoid": (lambda x, a, b: torch.clamp(a * x + b, 0.0, 1.0), 0.2, 0.5), "Elu": (lambda x, a, b: F.elu(x, a), 1.0, None),
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """The inputs and attributes that all recurrent layers have."""

    x: Tensor
    w: Tensor
    r: Tensor
    bias: Tensor | None
    lengths: Tensor | None
    states: Sequence[Tensor | None]
    direction: str
    batch_first: bool
    clip: float | None
    activations: Sequence[Sequence[Activation]]  # of each direction

    def clipped(self, x: Tensor) -> Tensor:
        """Return the input of an activation within the bounds of the layer."""
        return x if self.clip is None else x.clamp(-self.clip, self.clip)


@rule("LSTM")
def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    p: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str,
    hidden_size: int | None = None,
    input_forget: int,
    layout: int = 0,
    output_sequence: int = 0,
) -> Sequence[Tensor]:
    """Return a layer of four gates: input, output, forget, cell (Hochreiter and Schmidhuber 1997), with peepholes (Gers et al. 2000)."""
    functions = _activations(
        activations or ["Sigmoid", "Tanh", "Tanh"] * w.shape[0], activation_alpha, activation_beta, 3
    )
    layer = Layer(x, w, r, b, lengths, (h, c), direction, bool(layout), clip, functions)

    def step(d: int, of_input: Tensor, state: State, _: Tensor) -> State:
        gate, cell_input, cell_output = functions[d]
        size = state[0].shape[-1]
        i, o, f, new = (of_input + F.linear(state[0], r[d])).chunk(4, -1)
        peephole = (0.0, 0.0, 0.0) if p is None else p[d].split(size)
        i = gate(layer.clipped(i + peephole[0] * state[1]))
        f = 1 - i if input_forget else gate(layer.clipped(f + peephole[2] * state[1]))
        cell = f * state[1] + i * cell_input(layer.clipped(new))
        o = gate(layer.clipped(o + peephole[1] * cell))
        return o * cell_output(cell), cell

    return _unrolled(layer, 4, step)


@rule("GRU", since=3)
def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str,
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int,
    output_sequence: int = 0,
) -> Sequence[Tensor]:
    """Return a layer of three gates: update, reset, hidden (Cho et al. 2014)."""
    functions = _activations(activations or ["Sigmoid", "Tanh"] * w.shape[0], activation_alpha, activation_beta, 2)
    layer = Layer(x, w, r, b, lengths, (h,), direction, bool(layout), clip, functions)

    def step(d: int, of_input: Tensor, state: State, bias: Tensor) -> State:
        gate, hidden_function = functions[d]
        size = state[0].shape[-1]
        z, reset, hidden = of_input.chunk(3, -1)
        kernels, biases = r[d].split(size), bias.split(size)
        z = gate(layer.clipped(z + F.linear(state[0], kernels[0])))
        reset = gate(layer.clipped(reset + F.linear(state[0], kernels[1])))
        if linear_before_reset:
            hidden = hidden + reset * F.linear(state[0], kernels[2], biases[2])
        else:
            hidden = hidden + F.linear(reset * state[0], kernels[2], biases[2])
        return ((1 - z) * hidden_function(layer.clipped(hidden)) + z * state[0],)

    return _unrolled(layer, 3, step)


@rule("RNN")
def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str],
    clip: float | None = None,
    direction: str,
    hidden_size: int | None = None,
    layout: int = 0,
    output_sequence: int = 0,
) -> Sequence[Tensor]:
    """Return a layer of one gate."""
    functions = _activations(activations[: w.shape[0]], activation_alpha, activation_beta, 1)
    layer = Layer(x, w, r, b, lengths, (h,), direction, bool(layout), clip, functions)

    def step(d: int, of_input: Tensor, state: State, _: Tensor) -> State:
        return (functions[d][0](layer.clipped(of_input + F.linear(state[0], r[d]))),)

    return _unrolled(layer, 1, step)


def _activations(
    names: Sequence[str], alphas: Sequence[float] | None, betas: Sequence[float] | None, count: int
) -> list[list[Activation]]:
    """Return ``count`` activations for each direction; those that have an alpha or a beta take the next one of the lists."""
    remaining_alphas, remaining_betas = list(alphas or []), list(betas or [])
    functions = []
    for name in names:
        if name not in ACTIVATIONS:
            raise Unsupported(f"the activation {name}")
        function, alpha, beta = ACTIVATIONS[name]
        a = 0.0 if alpha is None else remaining_alphas.pop(0) if remaining_alphas else alpha
        b = 0.0 if beta is None else remaining_betas.pop(0) if remaining_betas else beta
        functions.append(_with_parameters(function, a, b))
    return [functions[i : i + count] for i in range(0, len(functions), count)]


def _with_parameters(function: Callable[[Tensor, float, float], Tensor], a: float, b: float) -> Activation:
    return lambda x: function(x, a, b)


def _unrolled(layer: Layer, gates: int, step: Callable[[int, Tensor, State, Tensor], State]) -> Sequence[Tensor]:
    """Return the outputs of all steps, and the last states.

    ``step(direction, gates of the input, state, bias of the state)`` returns the next state. The gates of the input have both biases in
    them, but that of the last gate of a GRU, whose state goes through the reset gate first.
    """
    x = layer.x.transpose(0, 1) if layer.batch_first else layer.x
    directions, hidden = layer.w.shape[0], layer.r.shape[-1]
    bias = x.new_zeros(directions, 2 * gates * hidden) if layer.bias is None else layer.bias
    states = [_initial(layer, s, (directions, x.shape[1], hidden)) for s in layer.states]
    runs, lasts = [], []
    for d in range(directions):
        backward = d == 1 or layer.direction == "reverse"
        of_input, of_state = bias[d].chunk(2)
        joint = of_input + of_state if gates != 3 else of_input + F.pad(of_state[: 2 * hidden], (0, hidden))
        gates_of_input = F.linear(x, layer.w[d], joint)
        state, outputs = tuple(s[d] for s in states), []
        for index in reversed(range(x.shape[0])) if backward else range(x.shape[0]):
            state, output = _masked(layer, index, step(d, gates_of_input[index], state, of_state), state)
            outputs.append(output)
        runs.append(torch.stack(outputs[::-1] if backward else outputs))
        lasts.append(state)
    stacked, last = torch.stack(runs, 1), [torch.stack(s) for s in zip(*lasts)]
    if layer.batch_first:
        return stacked.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in last)
    return stacked, *last


def _initial(layer: Layer, state: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Return an initial state [directions, batch, hidden], zeros without one."""
    if state is None:
        return layer.x.new_zeros(*shape)
    return state.transpose(0, 1) if layer.batch_first else state


def _masked(layer: Layer, index: int, new: State, old: State) -> tuple[State, Tensor]:
    """Return the state after a step and the output of it, of samples that are longer than ``index``: the others keep their state."""
    if layer.lengths is None:
        return new, new[0]
    within = (layer.lengths > index).unsqueeze(-1)
    return tuple(torch.where(within, n, o) for n, o in zip(new, old)), torch.where(within, new[0], 0.0)
