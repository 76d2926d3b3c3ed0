"""Branches and loops of ONNX whose conditions and counts are constants: branches are taken, loops are unrolled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from thresher.frontend.onnx.rules import Ints, Node, rule
from thresher.frontend.onnx.values import Unsupported, Value, combined, constant

MAX_STEPS = 100_000


@rule("If")
def if_(node: Node, condition: Ints, *, then_branch: Any, else_branch: Any) -> Sequence[Value | None]:
    """Return the outputs of the branch that the condition selects."""
    return node.run(then_branch if condition[0] else else_branch, [])


@rule("Loop")
def loop(
    node: Node, count: Value | None = None, condition: Value | None = None, *states: Value, body: Any
) -> Sequence[Value | None]:
    """Return the last states, and what the other outputs of the body were in each step, stacked."""
    limit = MAX_STEPS if count is None else _first(count.numbers("trip count"))
    goes_on = condition is None or bool(_first(condition.numbers("condition")))
    current: list[Value | None] = list(states)
    steps: list[list[Value]] = []
    while goes_on and len(steps) < limit:
        index = constant(len(steps))
        again, *outputs = node.run(body, [index, constant(True, torch.bool), *current])
        current, scanned = outputs[: len(states)], outputs[len(states) :]
        steps.append([_present(v) for v in scanned])
        if condition is not None:  # without one the specification ignores what the body returns
            goes_on = bool(_first(_present(again).numbers("condition")))
    if len(steps) == MAX_STEPS:
        raise Unsupported(f"the loop takes {MAX_STEPS} steps or more")
    if not steps and node.outputs > len(states):
        raise Unsupported("a loop of no steps, whose stacked outputs have no shape")
    return [*current, *(combined(_stacked(0), *column) for column in zip(*steps))]


@rule("Scan", since=9)
def scan(
    node: Node,
    *values: Value,
    body: Any,
    num_scan_inputs: int,
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
) -> Sequence[Value | None]:
    """Return the last states, and the other outputs of the body for each slice of the inputs."""
    states, inputs = values[: len(values) - num_scan_inputs], values[len(values) - num_scan_inputs :]
    axes = scan_input_axes or [0] * num_scan_inputs
    backward = scan_input_directions or [0] * num_scan_inputs
    length = _length([int(v.data.shape[a]) for v, a in zip(inputs, axes)])
    current: list[Value | None] = list(states)
    columns: list[list[Value]] = []
    for t in range(length):
        slices = [combined(_slice(a, length - 1 - t if b else t), v) for v, a, b in zip(inputs, axes, backward)]
        outputs = node.run(body, [*current, *slices])
        current = outputs[: len(states)]
        columns.append([_present(v) for v in outputs[len(states) :]])
    scanned = [list(column) for column in zip(*columns)]
    out_axes = scan_output_axes or [0] * len(scanned)
    prepends = scan_output_directions or [0] * len(scanned)
    stacked = [combined(_stacked(a), *(c[::-1] if p else c)) for c, a, p in zip(scanned, out_axes, prepends)]
    return [*current, *stacked]


@rule("Scan", since=8)
def scan_of_batches(
    node: Node,
    lengths: Value | None,
    *values: Value,
    body: Any,
    num_scan_inputs: int,
    directions: Sequence[int] | None = None,
) -> Sequence[Value | None]:
    """Return the results of the scan of each sample of a batch, stacked; dimension 0 is that of the samples, 1 that of the steps."""
    if lengths is not None:
        raise Unsupported("sequences of different lengths")
    batch = _length([int(v.data.shape[0]) for v in values])
    samples = []
    for b in range(batch):
        sample = [combined(_slice(0, b), v) for v in values]
        results = scan(node, *sample, body=body, num_scan_inputs=num_scan_inputs, scan_input_directions=directions)
        samples.append([_present(v) for v in results])
    return [combined(_stacked(0), *column) for column in zip(*samples)]


def _slice(axis: int, index: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.select(axis, index)


def _stacked(axis: int) -> Callable[..., Tensor]:
    return lambda *tensors: torch.stack(tensors, axis)


def _length(sizes: Sequence[int]) -> int:
    """Return the size that all inputs have in common; raise :class:`Unsupported` where there is none, or it is 0."""
    if len(set(sizes)) != 1 or sizes[0] == 0:
        raise Unsupported(f"a scan over {sorted(set(sizes))} steps")
    return sizes[0]


def _first(numbers: Any) -> Any:
    """Return the number of a tensor of one, with or without a dimension."""
    return numbers[0] if isinstance(numbers, list) else numbers


def _present(value: Value | None) -> Value:
    if value is None:
        raise Unsupported("a body whose output is left out")
    return value
