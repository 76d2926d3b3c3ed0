"""The cost of a program: operations, bytes of constants, and an estimate of its time on a machine.

A multiply-add counts as two operations, as in ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.slices.facts import sizes
from thresher.errors import InputError
from thresher.ir.nodes import dtype_of, is_tensor
from thresher.ir.program import Program
from thresher.ops.sparse_attention import arguments

aten, ops = torch.ops.aten, torch.ops.thresher


def _linear(node: fx.Node) -> int:
    return 2 * math.prod(sizes(node)) * sizes(node.args[1])[1]


def _by_expert(node: fx.Node) -> int:
    return 2 * math.prod(sizes(node)) * sizes(node.args[2])[2]


def _matmul(node: fx.Node) -> int:
    return 2 * math.prod(sizes(node)) * sizes(node.args[0])[-1]


def _addmm(node: fx.Node) -> int:
    return 2 * math.prod(sizes(node)) * sizes(node.args[1])[-1]


def _convolution(node: fx.Node) -> int:
    return 2 * math.prod(sizes(node)) * math.prod(sizes(node.args[1])[1:])


def _transposed(node: fx.Node) -> int:
    return 2 * math.prod(sizes(node.args[0])) * math.prod(sizes(node.args[1])[1:])


def _attention(node: fx.Node) -> int:
    q, k = (sizes(n) for n in node.args[:2])
    return 2 * math.prod(q) * k[-2] + 2 * math.prod(sizes(node)) * k[-2]


COUNTERS: dict[Any, Callable[[fx.Node], int]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv2d.padding: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv_transpose1d.default: _transposed,
    aten.conv_transpose2d.input: _transposed,
    aten.conv_transpose3d.input: _transposed,
    aten.scaled_dot_product_attention.default: _attention,
    ops.sparse_attention.default: _attention,
    ops.sparse_linear.default: _linear,
    ops.gated_linear.default: _linear,
    ops.pruned_linear.default: _linear,
    ops.expert_linear.default: _by_expert,
    ops.conv2d_nhwc.default: _convolution,
    ops.conv3d_ndhwc.default: _convolution,
    ops.conv_transpose2d_nhwc.default: _transposed,
    ops.conv_transpose3d_ndhwc.default: _transposed,
}


@dataclass(frozen=True)
class MachineModel:
    """The speed of a target, as far as it takes to compare arithmetic that is saved with elements that are moved for it.

    ``MACHINES`` are typical ones; :mod:`thresher.driver.measure_machine` measures the one that is here.
    """

    flops: float  # multiply-adds count two
    bandwidth: float  # bytes read or written by a plain elementwise operator
    gathered: float  # bytes written by a gather of single elements
    launch: float  # seconds that one more operator costs
    width: int  # channels in a tile: what does not fill its last one pays for it all the same


MACHINES = {"cpu": MachineModel(1e11, 1.2e10, 4e9, 3e-6, 16), "cuda": MachineModel(3e13, 2e12, 1e12, 4e-6, 8)}


def machine_model(target: str) -> MachineModel:
    """Return the typical machine of a target. Raises :class:`InputError` for an unknown kind."""
    kind = target.partition(":")[0]
    if kind not in MACHINES:
        raise InputError(
            f"unknown target {target!r}: 'cpu', 'cpu:<llvm cpu name>' or 'cuda:sm_NN' (for instance cuda:sm_90)"
        )
    return MACHINES[kind]


def flops_of(node: fx.Node, program: Program | None = None) -> int:
    """Return the operations of one call; 0 for what the field does not count (elementwise, movement, norms).

    Of attention over lists only what is listed counts: with its ``program`` as it is where the lists are constants, else the most that
    can be.
    """
    counter = COUNTERS.get(node.target)
    if counter is None:
        return 0
    return (
        round(counter(node) * listed_fraction(node, program))
        if node.target is ops.sparse_attention.default
        else counter(node)
    )


def listed_fraction(node: fx.Node, program: Program | None) -> float:
    """Return the fraction of the scores that attention over lists computes."""
    _, k, _, _, blocks, counts, _, block_k, *_ = arguments(node)
    if blocks is None:
        return 1.0
    columns = -(-sizes(k)[2] // block_k)
    known = program.constant(counts) if program is not None else None
    listed = sizes(blocks)[3] if known is None else float(known.double().mean())
    return min(1.0, listed / columns)


def count_flops(program: Program) -> int:
    """Return the operations of one run on inputs of the example's shapes."""
    return sum(flops_of(node, program) for node in program.calls() if is_tensor(node))


def constant_bytes(program: Program) -> int:
    """Return the bytes of all constants at their declared dtypes."""
    return sum(
        program.constants[n.target].numel() * dtype_of(n).itemsize for n in program.graph.nodes if n.op == "get_attr"
    )


def seconds_of(node: fx.Node, machine: MachineModel, program: Program | None = None) -> float:
    """Return the estimated time of one call: its arithmetic or what it moves, whichever takes longer, and a launch.

    A pointwise operator after a value that only it reads becomes part of that kernel: only its other operands have to be read.
    """
    if not is_tensor(node) or node.target in FREE_OPERATORS:
        return 0.0
    if _is_fused(node):
        return sum(_bytes(n) for n in node.all_input_nodes[1:]) / machine.bandwidth
    moved = _bytes(node) + sum(_bytes(n) for n in node.all_input_nodes)
    return max(flops_of(node, program) / machine.flops, moved / machine.bandwidth) + machine.launch


def seconds(program: Program, machine: MachineModel) -> float:
    """Return the estimated time of one run on inputs of the example's shapes."""
    return sum(seconds_of(node, machine, program) for node in program.calls())


FREE_OPERATORS = {
    getattr(aten, name).default
    for name in ("view", "reshape", "unsqueeze", "squeeze", "detach", "alias", "lift_fresh_copy", "contiguous")
    if hasattr(getattr(aten, name), "default")
}


def _is_fused(node: fx.Node) -> bool:
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target is ops.shrink.default
    before = node.all_input_nodes[0] if node.all_input_nodes else None
    return pointwise and before is not None and before.op == "call_function" and len(before.users) == 1


def _bytes(node: fx.Node) -> int:
    return math.prod(sizes(node)) * dtype_of(node).itemsize if is_tensor(node) else 0
