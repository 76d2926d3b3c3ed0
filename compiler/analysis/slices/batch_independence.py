"""Batches whose samples are computed each for itself, and the program for a batch of a given size.

A program with a free first dimension is the same function for every size. Where no sample's result reads another sample, it can be computed
in pieces of sizes that there is code for, which is faster than code for any size. That is proven, not supposed:

1. the free size is the first dimension of inputs and results and nowhere else in them, and inside the program it is used for shapes only;
2. for each of the sizes every shape is what it is for any size: a ``squeeze`` means nothing until a batch has one sample;
3. backward from the results of each sample, by the transfer rules, nothing but that sample's inputs is read.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from thresher.analysis.slices.channels import read_facts
from thresher.analysis.slices.facts import reduce_to, sizes
from thresher.analysis.slices.operators import facts_of_constants
from thresher.analysis.slices.transfer.base import aten
from thresher.ir import fake_results
from thresher.ir.nodes import is_tensor, shape_of
from thresher.ir.program import Program

PROBED_SAMPLES = 3  # one between two others
#: Calls that may read sizes: the result has that shape, and does not depend on it otherwise.
SIZE_READERS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default, aten.repeat.default, aten.full.default,
    aten.zeros.default, aten.ones.default, aten.empty.memory_format, aten.sym_size.int, operator.mul, operator.add, operator.floordiv,
}  # fmt: skip


def free_batch(program: Program) -> str:
    """Return the symbol of the only free size, if it is the first dimension of some inputs and of all tensor results; else ""."""
    symbols = {s for n in program.placeholders if is_tensor(n) for s in free_symbols(n)}
    if len(symbols) != 1:
        return ""
    (symbol,) = symbols
    results = [n for n in program.output_nodes if isinstance(n, fx.Node)]
    if not results or not all(map(is_tensor, results)):
        return ""
    inputs = [n for n in program.placeholders if is_tensor(n) and free_symbols(n)]
    fits = all(
        len(shape_of(n)) > 0 and str(shape_of(n)[0]) == symbol and not free_symbols(n, 1) for n in (*results, *inputs)
    )
    return symbol if fits else ""


def free_symbols(node: fx.Node, start: int = 0) -> set[str]:
    """Return the free sizes among the dimensions of a tensor from ``start`` on."""
    return {str(d) for d in shape_of(node)[start:] if isinstance(d, torch.SymInt)}


def why_samples_interact(program: Program, sizes_of_pieces: Sequence[int] = ()) -> str:
    """Return the reason why a program with a :func:`free_batch` cannot be computed in pieces of the given sizes.

    The sentence names the node at which one sample may depend on another or on the size of the batch; "" where each is computed for itself.
    """
    for node in program.calls():
        batch_sizes = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.SymInt)]
        filled = node.target is aten.full.default and node.args[1] in batch_sizes
        if batch_sizes and (node.target not in SIZE_READERS or filled):
            return f"{node.name} ({node.target}) reads how large the batch is"
    for size in sizes_of_pieces:
        if other := _other_shape(program, size):
            return f"{other} has another shape for a batch of {size}"
    small = with_batch(program, PROBED_SAMPLES)
    batched = {a.name for a in program.placeholders if is_tensor(a) and free_symbols(a)}
    facts = facts_of_constants(small)
    for sample in range(PROBED_SAMPLES):
        only = torch.arange(PROBED_SAMPLES) == sample
        read = read_facts(small, facts, only)
        for node in small.placeholders:
            if node.name in batched and node in read:
                others = reduce_to(read[node], sizes(node)) & ~only.reshape(-1, *[1] * (len(sizes(node)) - 1))
                if others.any():
                    return f"a result of one sample may depend on {node.name} of another"
    return ""


def _other_shape(program: Program, size: int) -> str:
    """Return the first node whose shape for a batch of ``size`` is not its shape for any, with the number instead of the symbol."""
    fixed = {n.name: n for n in with_batch(program, size).graph.nodes if is_tensor(n)}

    def number(dim: int | torch.SymInt) -> int:
        return dim if isinstance(dim, int) else int(dim.node.expr.subs(dict.fromkeys(dim.node.expr.free_symbols, size)))

    for node in program.graph.nodes:
        if is_tensor(node) and [number(d) for d in shape_of(node)] != list(shape_of(fixed[node.name])):
            return f"{node.name} ({node.target})"
    return ""


def with_batch(program: Program, size: int) -> Program:
    """Return the program for a batch of ``size``: same names, same constants, every shape a number.

    Its probe is that of ``program``, repeated or cut to the size.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    numbers: dict[fx.Node, int] = {}
    probe = resized(program, program.probe, size)
    values = iter(probe)

    def number(node: fx.Node) -> Any:
        return numbers[node] if node in numbers else mapping[node]

    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), (int, torch.SymInt)):
            args = fx.map_arg((node.args, node.kwargs), lambda n: numbers.get(n, n.meta["val"]))
            numbers[node] = _evaluated(node, args, mapping)
            continue
        copy = graph.create_node(
            node.op, node.target, fx.map_arg(node.args, number), fx.map_arg(node.kwargs, number), node.name
        )
        copy.meta = dict(node.meta)
        mapping[node] = copy
        if node.op == "placeholder":
            value = next(values)
            if isinstance(value, Tensor):
                copy.meta["val"] = fake_results.empty(value.shape, value.dtype, mode)
        elif node.op == "get_attr":
            copy.meta["val"] = fake_results.empty(program.constants[node.target].shape, node.meta["val"].dtype, mode)
        elif node.op == "call_function":
            copy.meta["val"] = fake_results.result_of(copy, mode)
    fixed = program.clone()
    fixed.graph, fixed.probe = graph, probe
    return fixed


def _evaluated(node: fx.Node, args: Any, mapping: dict[fx.Node, fx.Node]) -> int:
    """Return a size as a number."""
    if node.target is aten.sym_size.int:
        source, dim = node.args
        return int(mapping[source].meta["val"].shape[dim])
    return int(node.target(*args[0], **args[1]))


def resized(program: Program, flat: Sequence[Any], size: int) -> tuple[Any, ...]:
    """Return flat inputs with ``size`` samples: repeated, or cut."""

    def one(value: Tensor) -> Tensor:
        return torch.cat([value] * -(-size // max(1, value.shape[0])))[:size].contiguous()

    pairs = zip(program.placeholders, flat, strict=True)
    return tuple(one(value) if is_tensor(node) and free_symbols(node) else value for node, value in pairs)
