"""What a program costs: operations (a multiply-add counts two, as in ``torch.utils.flop_counter``) and bytes of constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.facts import sizes
from thresher.program import Program, dtype_of, is_tensor

aten, ops = torch.ops.aten, torch.ops.thresher


def _linear(node: fx.Node) -> int:
    return 2 * math.prod(sizes(node)) * sizes(node.args[1])[1]


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
    ops.conv2d_nhwc.default: _convolution,
    ops.conv3d_ndhwc.default: _convolution,
    ops.conv_transpose2d_nhwc.default: _transposed,
    ops.conv_transpose3d_ndhwc.default: _transposed,
}


@dataclass(frozen=True)
class Machine:
    """What a target does in a second: enough to compare arithmetic that is saved with elements that are moved for it."""

    flops: float  # multiply-adds count two
    bandwidth: float  # bytes read or written by a plain elementwise operator
    gathered: float  # bytes written by a gather of single elements
    launch: float  # seconds that one more operator costs
    width: int  # channels in a tile: what does not fill its last one pays for it all the same


MACHINES = {"cpu": Machine(1e11, 1.2e10, 4e9, 3e-6, 16), "cuda": Machine(3e13, 2e12, 1e12, 4e-6, 8)}


def machine_of(target: str) -> Machine:
    return MACHINES[target.partition(":")[0]]


def flops_of(node: fx.Node) -> int:
    """Operations of one call; 0 for what the field does not count (elementwise, movement, norms)."""
    counter = COUNTERS.get(node.target)
    return counter(node) if counter is not None else 0


def count_flops(program: Program) -> int:
    """Operations of one run on inputs of the example's shapes."""
    return sum(flops_of(node) for node in program.calls() if is_tensor(node))


def constant_bytes(program: Program) -> int:
    """Bytes of all constants at their declared dtypes."""
    return sum(
        program.constants[n.target].numel() * dtype_of(n).itemsize for n in program.graph.nodes if n.op == "get_attr"
    )
