"""Channels that always hold the same value are computed once.

Two outputs of a layer are duplicates where their weights and biases are equal; whatever treats both alike keeps them so. For x_i = x_j

    W x = sum_k W[:, k] x_k = (W[:, i] + W[:, j]) x_i + the others

so each reader adds the columns up and reads one of the two. The other is then unread, and ``fold-channels`` removes it where nothing else
holds it. (Srinivas & Babu, BMVC 2015, with equality instead of similarity: exact.)

Weights and biases must be constants. Grouped and transposed convolutions neither give duplicates nor take them together, and an operator
that does not treat all channels alike ends them. Rows that are all zero are left to ``fold-channels``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from thresher.analysis.slices.facts import sizes
from thresher.analysis.slices.operators import TABLE
from thresher.analysis.slices.transfer.base import argument
from thresher.analysis.slices.transfer.elementwise import Elementwise
from thresher.analysis.slices.transfer.mixing import Mixing
from thresher.analysis.slices.transfer.weighted import Convolution, Linear, Weighted
from thresher.ir.lineage import Restore
from thresher.ir.nodes import dtype_of, is_tensor
from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.registry import register_pass

Classes = tuple[int, Tensor]  # a dimension, and for each index of it the first index with the same values


@register_pass
@dataclass(frozen=True)
class MergeDuplicates(Pass):
    """Let every layer read one of several equal channels."""

    name: ClassVar[str] = "merge-duplicates"
    keeps_copies: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("fold-batch-norm",)

    def apply(self, program: Program, context: Context) -> PassResult:
        work, notes = program.clone(), []
        classes: dict[fx.Node, Classes] = {}
        for node in list(work.calls()):
            if not is_tensor(node):
                continue
            if merged := _add_columns(work, node, classes):
                notes.append(Note.at(node, f"{merged} inputs are copies of others: their weights added up"))
            duplicates = _classes(work, node, classes)
            if duplicates is not None and bool((duplicates[1] != torch.arange(duplicates[1].numel())).any()):
                classes[node] = duplicates
        return PassResult(work.clean().propagate(), notes) if notes else PassResult(program)


def _weights(program: Program, node: fx.Node) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of a call that has them as constants, the bias with a number for each channel; else None."""
    weight, bias = program.constant(node.args[1]), program.constant(argument(node, 2, "bias"))
    if weight is None or (argument(node, 2, "bias") is not None and (bias is None or bias.shape != weight.shape[:1])):
        return None
    return weight, bias


def _plain(node: fx.Node) -> Weighted | None:
    """Return the transfer rule of a linear layer, or of a convolution that is neither grouped nor transposed; else None."""
    operator = TABLE.get(node.target)
    if isinstance(operator, Convolution) and (operator.transposed or operator.groups(node) != 1):
        return None
    return operator if isinstance(operator, (Linear, Convolution)) else None


def _classes(program: Program, node: fx.Node, classes: dict[fx.Node, Classes]) -> Classes | None:
    operator = TABLE.get(node.target)
    plain = _plain(node)
    if plain is not None:
        weights = _weights(program, node)
        return (plain.channel(node), equal_rows(*weights)) if weights is not None else None
    sources = [n for n in node.all_input_nodes if is_tensor(n)]
    if isinstance(operator, Mixing) and sources[0] in classes:
        dim, first = classes[sources[0]]
        mixed, removed = operator.dims(node)
        return None if dim in mixed else (dim - sum(d < dim for d in mixed) * removed, first)
    return _through_elementwise(program, node, classes) if isinstance(operator, Elementwise) else None


def _through_elementwise(program: Program, node: fx.Node, classes: dict[fx.Node, Classes]) -> Classes | None:
    """Return the classes after an elementwise operator: duplicates stay so where every operand has the same values for both."""
    rank, common, dim = len(sizes(node)), None, -1
    sources = [n for n in node.all_input_nodes if is_tensor(n)]
    for source in sources:
        if source in classes:
            dim = classes[source][0] + rank - len(sizes(source))
    for source in sources if dim >= 0 else ():
        shape = sizes(source)
        source_dim = dim - (rank - len(shape))
        if source_dim < 0 or shape[source_dim] == 1:
            continue
        constant = program.constant(source)
        if constant is not None:
            first = equal_rows(constant.movedim(source_dim, 0), None)
        elif source in classes and classes[source][0] == source_dim:
            first = classes[source][1]
        else:
            return None
        common = first if common is None else _refined(common, first)
    return (dim, common) if common is not None and common.numel() == sizes(node)[dim] else None


def _refined(a: Tensor, b: Tensor) -> Tensor:
    """Return the classes that are equal in both."""
    return _first(torch.stack([a, b], 1))


def _first(rows: Tensor) -> Tensor:
    """Return for each row the index of the first row that is equal to it."""
    _, group = rows.unique(dim=0, return_inverse=True)
    count = int(group.max()) + 1
    number = torch.arange(len(group))
    return torch.full((count,), len(group)).scatter_reduce(0, group, number, "amin")[group]


def equal_rows(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return for each row the first equal one. A random projection finds candidates, a comparison decides; zero rows are the fold's."""
    rows, count = weight.reshape(len(weight), -1), len(weight)
    probe = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows.dtype)
    keys = (rows @ probe if rows.is_floating_point() else rows.double() @ probe.double()).reshape(-1, 1)
    if bias is not None:
        keys = torch.cat([keys, bias.reshape(-1, 1).to(keys.dtype)], 1)
    first = _first(keys)
    number = torch.arange(count)
    candidates = (first != number).nonzero().reshape(-1)
    same = (rows[candidates] == rows[first[candidates]]).all(1) & (rows[candidates] != 0).any(1)
    return number.index_copy(0, candidates, torch.where(same, first[candidates], candidates))


def _add_columns(program: Program, node: fx.Node, classes: dict[fx.Node, Classes]) -> int:
    """Add the columns of duplicates to the column of the first; returns how many were not empty."""
    operator = _plain(node)
    if operator is None or node.args[0] not in classes or _weights(program, node) is None:
        return 0
    dim, first = classes[node.args[0]]
    old: fx.Node = node.args[1]
    weight = program.constants[old.target]
    copies = first != torch.arange(first.numel())
    used = (weight != 0).transpose(0, 1).flatten(1).any(1) & copies
    if dim != operator.channel(node) or not bool(used.any()):
        return 0
    merged = torch.zeros_like(weight, dtype=torch.float64).index_add_(1, first, weight.double())
    if len(old.users) == 1:
        program.constants[str(old.target)] = merged
    else:
        new = program.add_constant(merged, str(old.target), dtype_of(old), like=old)
        node.update_arg(1, new)
        name, copy = str(old.target), str(new.target)
        program.lineage.append(Restore((copy,), lambda values: {name: values[copy]}))
    return int(used.sum())
