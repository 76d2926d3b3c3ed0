"""The operator table: which row says how facts about slices pass through an operator.

To support an operator, add it here; a new kind of operator gets a row in ``thresher.analysis.slices.transfer``. An operator that is
defined elsewhere is added by :func:`register_rule`. What is not in the table is never cut through, and the report says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.slices.facts import known_constant
from thresher.analysis.slices.transfer.attention import Attention, Matmul
from thresher.analysis.slices.transfer.base import Facts, TransferRule, aten
from thresher.analysis.slices.transfer.edge_marker import EdgeMarker, edge_marker
from thresher.analysis.slices.transfer.elementwise import Elementwise, Filled, Product, Quotient, Sum, Where
from thresher.analysis.slices.transfer.mixing import Mixing, Softmax, along, normed, reduced, spatial
from thresher.analysis.slices.transfer.movement import (
    Concat,
    Gather,
    Movement,
    Pad,
    PixelShuffle,
    Roll,
    Slice,
    Written,
    fix_select,
    fix_sizes,
    fix_slice,
    fix_squeeze,
)
from thresher.analysis.slices.transfer.norms import GroupNorm, LayerNorm
from thresher.analysis.slices.transfer.routing import ExpertLinear, TopK
from thresher.analysis.slices.transfer.weighted import Bilinear, Convolution, Embedding, Linear
from thresher.errors import ThresherError
from thresher.ir.program import Program

ELEMENTWISE = """abs acos asin atan atanh ceil clamp clamp_max clamp_min clone contiguous cos cosh detach alias elu erf erfc exp
    expm1 floor gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu log log10 log1p log2 log_sigmoid logical_not mish neg
    reciprocal relu relu6 round rsqrt selu celu sigmoid sign silu sin sinh softplus softshrink sqrt square tan tanh threshold
    trunc bitwise_not isnan isinf lift_fresh_copy _to_copy to masked_fill add sub rsub maximum minimum eq ne lt le gt ge
    logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor remainder fmod atan2 pow""".split()
FILLED = "zeros_like ones_like full_like zeros ones full".split()
MOVEMENT = "permute transpose t unsqueeze flip repeat movedim".split()
POOLS = """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    _adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d""".split()
SOFTMAX, ROWS = ("softmax", "_softmax"), ("log_softmax", "_log_softmax", "cumsum")
REDUCTIONS = [
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.logsumexp.default, aten.argmax.default,
    aten.argmin.default, aten.any.dim, aten.all.dim, aten.prod.dim_int, aten.var.correction,
]  # fmt: skip


def overloads(*names: str) -> list[Any]:
    """Every overload of the named ATen operators, but for in-place and out variants."""
    packets = [getattr(aten, name) for name in names if hasattr(aten, name)]
    return [getattr(packet, o) for packet in packets for o in packet.overloads() if "out" not in o]


def _table() -> dict[Any, TransferRule]:
    table: dict[Any, TransferRule] = {
        torch.ops.thresher.shrink.default: Elementwise(),
        torch.ops.thresher.group_shrink.default: Mixing(along(1)),
        aten.where.self: Where(),
        aten.index_select.default: Gather(),
        aten.index_put.default: Written(),
        edge_marker: EdgeMarker(),
        aten.topk.default: TopK(),
        torch.ops.thresher.expert_linear.default: ExpertLinear(),
        torch.ops.thresher.layer_norm.default: LayerNorm(),
        torch.ops.thresher.group_norm.default: GroupNorm(),
    }

    def add(rule: TransferRule, *names: str) -> None:
        table.update(dict.fromkeys(overloads(*names), rule))

    add(Elementwise(), *ELEMENTWISE)
    add(Filled(), *FILLED)
    add(Product(), "mul")
    add(Sum(), "add")
    add(Quotient(), "div")
    add(Movement(), *MOVEMENT)
    add(Movement(fix_sizes(1)), "reshape", "view", "expand")
    add(Movement(fix_select), "select")
    add(Movement(fix_squeeze), "squeeze")
    add(Roll(), "roll")
    add(Concat(), "cat", "stack")
    add(PixelShuffle(), "pixel_shuffle", "pixel_unshuffle")
    add(Slice(fix_slice), "slice")
    add(Pad(), "constant_pad_nd")
    add(Mixing(spatial), *POOLS)
    add(Softmax(along(1)), *SOFTMAX)
    add(Mixing(along(1)), *ROWS)
    table.update(dict.fromkeys(REDUCTIONS, Mixing(reduced)))
    table[aten.linalg_vector_norm.default] = Mixing(normed)
    add(LayerNorm(), "layer_norm", "rms_norm")
    add(GroupNorm(), "group_norm")
    add(Linear(), "linear")
    for dims, suffix in ((1, "1d"), (2, "2d"), (3, "3d")):
        add(Convolution(dims), f"conv{suffix}")
        add(Convolution(dims, transposed=True), f"conv_transpose{suffix}")
    add(Embedding(), "embedding")
    add(Bilinear(), "bilinear")
    add(Matmul(), "matmul", "bmm")
    add(Attention(), "scaled_dot_product_attention")
    return table


TABLE = _table()
BUILT_IN = frozenset(TABLE)
DEFAULT = TransferRule()


def register_rule(operator: Any, rule: TransferRule | None = None, *, like: Any = None) -> None:
    """Add an operator to the table, with a rule of its own or with the rule of another operator.

    Args:
        operator: an overload (``torch.ops.mine.squared_relu.default``).
        rule: an instance, which serves all calls of the operator.
        like: an operator of the table whose rule holds for this one, too: both take their tensors in the same arguments.

    Raises :class:`ThresherError` for an operator that is no overload or has a built-in rule, for ``like`` without a rule, and unless there
    is one of ``rule`` and ``like``. A rule that was registered before is replaced.
    """
    if not isinstance(operator, torch._ops.OpOverload):
        raise ThresherError(f"register_rule(operator=): {operator} is no overload; write torch.ops.mine.f.default")
    if operator in BUILT_IN:
        raise ThresherError(f"register_rule(operator=): {operator} has a built-in rule, which other passes rely on")
    if (rule is None) == (like is None):
        raise ThresherError(f"register_rule({operator}): give either rule= or like=")
    if like is not None and like not in TABLE:
        raise ThresherError(
            f"register_rule(like=): {like} has no rule; docs/operators.md lists the operators that have one"
        )
    if rule is not None and not isinstance(rule, TransferRule):
        raise ThresherError(f"register_rule(rule=): {rule} is no TransferRule; give an instance of a subclass")
    TABLE[operator] = TABLE[like] if rule is None else rule


def rule_of(node: fx.Node) -> TransferRule:
    """Return the transfer rule of a call: that of its operator, or the safe default."""
    return TABLE.get(node.target, DEFAULT)


def facts_of_constants(program: Program) -> Facts:
    """Return the facts before anything runs: every constant is known whole."""
    return {n: known_constant(program.constants[n.target]) for n in program.graph.nodes if n.op == "get_attr"}
