"""Graphs one step off: a number that is another one, operands exchanged, a neighbour of the operator, a value that somebody else reads,
a constant that is shared, a zero that is none, a value that is expanded, an input that is transposed. What a pass takes for its pattern
there, it must still get right.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from thresher.ir import fake_results
from thresher.ir.nodes import dtype_of, is_tensor, same_size, shape_of
from thresher.ir.program import Program
from thresher.testing import call_edits
from thresher.verification.compare import compare

aten = torch.ops.aten
Change = Callable[[Program], None]
#: Operators that are easily taken for each other.
NEIGHBOURS: dict[Any, Sequence[Any]] = {
    aten.add.Tensor: (aten.sub.Tensor, aten.mul.Tensor), aten.sub.Tensor: (aten.add.Tensor,),
    aten.mul.Tensor: (aten.add.Tensor, aten.div.Tensor), aten.div.Tensor: (aten.mul.Tensor,),
    aten.relu.default: (aten.neg.default, aten.sigmoid.default, aten.relu6.default), aten.gelu.default: (aten.silu.default,),
    aten.silu.default: (aten.gelu.default,), aten.sigmoid.default: (aten.tanh.default, aten.relu.default),
    aten.tanh.default: (aten.sigmoid.default,), aten.neg.default: (aten.abs.default,), aten.abs.default: (aten.neg.default,),
    aten.exp.default: (aten.sin.default,), aten.maximum.default: (aten.minimum.default,), aten.minimum.default: (aten.maximum.default,),
    aten.gt.Scalar: (aten.ge.Scalar, aten.lt.Scalar), aten.lt.Scalar: (aten.le.Scalar, aten.gt.Scalar),
    aten.mean.dim: (aten.sum.dim_IntList,), aten.sum.dim_IntList: (aten.mean.dim,), aten.amax.default: (aten.amin.default,),
    aten.sqrt.default: (aten.exp.default,), aten.rsqrt.default: (aten.sqrt.default,),
}  # fmt: skip
INNER = 2  # inner results that are tried alone
HIDDEN = 40  # edits that are tried with each size of the inputs
REACH = 2  # steps from a rewritten node that are looked at


@dataclass(frozen=True)
class Step:
    """One way in which a graph may be another one; steps of a ``kind`` are much alike."""

    kind: str
    sentence: str
    change: Change


def near_misses(
    program: Program, around: Collection[str] = (), limit: int = 100, seed: int = 0
) -> Iterator[tuple[str, Program]]:
    """Up to ``limit`` well-formed programs, each one step away from ``program``, with a sentence that says which.

    A step changes one thing; or two, where one alone leaves no graph that runs: padding with dilation, a size of the input with a stride.
    All kinds of steps take turns, so that a kind with many does not crowd out the others. ``around`` names the nodes near which the steps
    are made; default: everywhere. Programs that cannot run are left out.
    """
    bases = [program, *(_up_to(program, name) for name in _inner(program, around))]
    streams = [_turns(base, around, seed) for base in bases]
    turns = (miss for several in itertools.zip_longest(*streams) for miss in several if miss is not None)
    return itertools.islice(turns, limit)


def _turns(program: Program, around: Collection[str], seed: int) -> Iterator[tuple[str, Program]]:
    """Yield the steps from one program, one of each kind in turn."""
    region = _region(program, around)
    nodes = [node for node in program.graph.nodes if node in region]
    kinds: dict[str, list[Step]] = {}
    steps = [step for node in nodes for step in _steps(program, node)]
    for step in (*steps, *_alike(program, nodes), *_siblings(program, nodes), *_sizes(program, nodes, seed)):
        kinds.setdefault(step.kind, []).append(step)
    for steps in kinds.values():
        random.Random(seed).shuffle(steps)
    for step in itertools.chain.from_iterable(itertools.zip_longest(*kinds.values())):
        if step is not None and (other := _changed(program, step.change)) is not None:
            yield step.sentence, other


def _inner(program: Program, around: Collection[str]) -> list[str]:
    """Return calls of ``around`` that other calls read: what they compute alone is a graph in which shapes may change more freely."""
    calls = [n for n in program.calls() if n.name in around and is_tensor(n)]
    return [n.name for n in calls if any(user.op != "output" for user in n.users)][:INNER]


def _up_to(program: Program, name: str) -> Program:
    part = program.clone()
    part.output.args = ((_find(part, name),),)
    part.out_spec = pytree.tree_flatten((0,))[1]
    part.state, part.writes = (), ()
    return part.clean()


def _changed(program: Program, change: Change) -> Program | None:
    """Return the program after a step; None where it cannot run, has no defined result, or draws random numbers."""
    changed, reports = program.clone(), logging.getLogger("torch._subclasses.fake_tensor")
    before, reports.disabled = reports.disabled, True  # it reports every call whose arguments do not fit
    try:
        change(changed)
        changed.clean().propagate().verify()
        if _reads_beyond(changed):
            return None
        results = changed.run(*changed.probe, dtype=torch.float64)
        if _is_random(changed) and compare(results, changed.run(*changed.probe, dtype=torch.float64)).exceeds(0.0):
            return None
    except Exception:  # whatever an operator says of them
        return None
    finally:
        reports.disabled = before
    return changed


def _reads_beyond(program: Program) -> bool:
    """Return whether a batch norm has more channels than its constants have numbers: it does not check that, and reads on."""
    norms = program.calls(aten._native_batch_norm_legit_no_training.default)
    return any(shape_of(v) != shape_of(n.args[0])[1:2] for n in norms for v in n.args[1:5] if v is not None)


def _is_random(program: Program) -> bool:
    return any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in program.calls())


def _region(program: Program, around: Collection[str]) -> set[fx.Node]:
    nodes = {n for n in program.graph.nodes if n.op != "output"}
    region = {n for n in nodes if n.name in around} or nodes
    for _ in range(REACH):
        region |= {m for n in region for m in (*n.all_input_nodes, *n.users) if m.op != "output"}
    return region


def _steps(program: Program, node: fx.Node) -> Iterator[Step]:
    if node.op == "get_attr":
        yield Step("computed", f"{node.target} is computed in the graph", partial(_computed, node.name))
        if program.constants[node.target].is_floating_point():
            yield from (Step("constant", *step) for step in _constants(node, program))
    if node.op != "get_attr" and is_tensor(node):
        yield from (Step("layout", *step) for step in _layouts(node))
    if node.op != "call_function":
        return
    for edit in call_edits.edits(node, program):
        yield Step("argument", edit.sentence, _edited(node.name, edit))
    for pair in call_edits.pairs(node, program):
        yield Step("two arguments", " and ".join(e.sentence for e in pair), _edited(node.name, *pair))
    if not is_tensor(node):
        return
    yield from (Step("operands", *step) for step in _operands(node))
    for other in NEIGHBOURS.get(node.target, ()):
        yield Step("operator", f"{node.name} is {other} instead of {node.target}", _replaced(node.name, other))
    yield Step("reader", f"{node.name} is an output, too", partial(_also_output, node.name))
    if dtype_of(node).is_floating_point:
        yield Step("reader", f"{node.name} is shifted before it is read", partial(_shifted, node.name))
    for source in node.all_input_nodes[:1]:
        if is_tensor(source) and shape_of(source) == shape_of(node) and dtype_of(source) == dtype_of(node):
            yield Step("reader", f"{node.name} is left out", _left_out(node.name, source.name))


def _find(program: Program, name: str) -> fx.Node:
    return next(n for n in program.graph.nodes if n.name == name)


# ---------------------------------------------------------------------- constants


def _constants(node: fx.Node, program: Program) -> Iterator[tuple[str, Change]]:
    value = program.constants[node.target]
    zeros = (value == 0).flatten().nonzero().flatten()
    if len(zeros):
        index = int(zeros[len(zeros) // 2])
        yield f"{node.target} has a number where it had a zero", _written(node.name, index, 0.75)
    if value.numel():
        yield f"one number of {node.target} is another one", _written(node.name, value.numel() // 2, -1.25)
    alike = [
        n
        for n in program.graph.nodes
        if n.op == "get_attr" and n is not node and shape_of(n) == shape_of(node) and dtype_of(n) == dtype_of(node)
    ]
    for other in alike[:1]:
        yield f"{node.target} is used in the place of {other.target}, too", _left_out(other.name, node.name)
    yield f"{node.target} is read by another call, too", partial(_read_twice, node.name)


def _written(name: str, index: int, number: float) -> Change:
    def change(program: Program) -> None:
        target = _find(program, name).target
        value = program.constants[target].detach().clone()
        value.view(-1)[index] = number
        program.constants[target] = value

    return change


def _computed(name: str, program: Program) -> None:
    """Let a constant depend on an input, for everybody that reads it."""
    node = _find(program, name)
    users, inputs = (
        list(node.users),
        [n for n in program.placeholders if is_tensor(n) and dtype_of(n).is_floating_point],
    )
    first = next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))
    with program.graph.inserting_before(first):
        number = program.graph.call_function(aten.sum.default, (inputs[0],))
        if dtype_of(node).is_floating_point:
            value = program.graph.call_function(aten.mul.Tensor, (node, number))
        else:
            positive = program.graph.call_function(aten.gt.Scalar, (number, 0))
            value = program.graph.call_function(aten.mul.Tensor, (node, positive))
    for user in users:
        user.replace_input_with(node, value)


# ---------------------------------------------------------------------- arguments


def _alike(program: Program, nodes: Sequence[fx.Node]) -> Iterator[Step]:
    """Yield the same edit of all calls of an operator: two grouped convolutions may still be a pattern where one is none."""
    calls = [n for n in nodes if n.op == "call_function"]
    for target in dict.fromkeys(n.target for n in calls):
        same = [n for n in calls if n.target == target]
        alike: dict[tuple[str, ...], list[tuple[fx.Node, tuple[call_edits.Edit, ...]]]] = {}
        for node in same if len(same) > 1 else ():
            for changed in (*((e,) for e in call_edits.edits(node, program)), *call_edits.pairs(node, program)):
                alike.setdefault(tuple(e.kind for e in changed), []).append((node, changed))
        for kinds, edited in alike.items():
            if len({node for node, _ in edited}) == len(same) == len(edited):
                sentence = f"all calls of {target} have {' and '.join(kinds)}"
                yield Step("all alike", sentence, _all(*(_edited(node.name, *changed) for node, changed in edited)))


def _all(*changes: Change) -> Change:
    def change(program: Program) -> None:
        for one in changes:
            one(program)

    return change


def _edited(name: str, *changed: call_edits.Edit) -> Change:
    return lambda program: call_edits.apply_edits(program, _find(program, name), changed)


def _operands(node: fx.Node) -> Iterator[tuple[str, Change]]:
    tensors = [i for i, a in enumerate(node.args) if is_tensor(a)]
    for i, j in itertools.pairwise(tensors):
        if node.args[i] is not node.args[j]:
            yield f"{node.name} has its operands {i} and {j} exchanged", _exchanged(node.name, i, j)


def _exchanged(name: str, i: int, j: int) -> Change:
    def change(program: Program) -> None:
        node = _find(program, name)
        args = list(node.args)
        args[i], args[j] = args[j], args[i]
        node.args = tuple(args)

    return change


# ---------------------------------------------------------------------- nodes


def _replaced(name: str, target: Any) -> Change:
    def change(program: Program) -> None:
        _find(program, name).target = target

    return change


def _left_out(name: str, by: str) -> Change:
    def change(program: Program) -> None:
        node, other = _find(program, name), _find(program, by)
        if other > node:
            raise ValueError("it comes later")
        node.replace_all_uses_with(other)

    return change


def _read_twice(name: str, program: Program) -> None:
    node = _find(program, name)
    inputs = [n for n in program.placeholders if is_tensor(n) and dtype_of(n).is_floating_point]
    with program.graph.inserting_before(program.output):
        factor = program.graph.call_function(aten.sum.default, (inputs[0],)) if inputs else 2.0  # not a constant
        twice = program.graph.call_function(aten.mul.Tensor, (node, factor))
    _also_output(twice.name, program)


def _also_output(name: str, program: Program) -> None:
    output = program.output
    values = [*output.args[0], _find(program, name)]
    output.args = (tuple(values),)
    program.out_spec = pytree.tree_flatten(tuple(values))[1]


def _shifted(name: str, program: Program) -> None:
    node = _find(program, name)
    users = list(node.users)
    with program.graph.inserting_after(node):
        moved = program.graph.call_function(aten.add.Tensor, (node, 0.25))
    for user in users:
        user.replace_input_with(node, moved)


def _layouts(node: fx.Node) -> Iterator[tuple[str, Change]]:
    """Yield the value with its numbers at other places in memory: of an expanded one, and of a transposed input."""
    shape = shape_of(node)
    for dim in [d for d, size in enumerate(shape) if isinstance(size, int) and size > 1][:1]:
        yield f"{node.name} is one slice along dimension {dim}, expanded", partial(_expanded, node.name, dim)
    if node.op == "placeholder" and len(shape) > 1 and all(isinstance(size, int) for size in shape):
        yield f"{node.name} is the transpose of an input", partial(_transposed, node.name)


def _expanded(name: str, dim: int, program: Program) -> None:
    node = _find(program, name)
    users, shape = list(node.users), list(shape_of(node))
    first = program.insert_call(node.next, aten.slice.Tensor, (node, dim, 0, 1), like=node)
    value = program.insert_call(first.next, aten.expand.default, (first, shape), like=node)
    for user in users:
        user.replace_input_with(node, value)


def _transposed(name: str, program: Program) -> None:
    node = _find(program, name)
    users, index = list(node.users), program.placeholders.index(node)
    values = list(program.probe)
    values[index] = values[index].transpose(-1, -2).contiguous()
    program.probe = tuple(values)
    node.meta["val"] = fake_results.empty(values[index].shape, dtype_of(node), program.fake_mode)
    first = next(n for n in program.graph.nodes if n.op == "call_function")
    value = program.insert_call(first, aten.transpose.int, (node, -2, -1), like=node)
    for user in users:
        user.replace_input_with(node, value)


# ---------------------------------------------------------------------- several calls


def _siblings(program: Program, nodes: Sequence[fx.Node]) -> Iterator[Step]:
    """Yield edits of two calls that one other call reads, which change the shape of both in the same way."""
    calls = [n for n in nodes if n.op == "call_function" and is_tensor(n)]
    reshaped = {n: list(call_edits.reshaping(n, program)) for n in calls}
    for a, b in itertools.combinations(calls, 2):
        if not a.users.keys() & b.users.keys() or shape_of(a) != shape_of(b):
            continue
        for (one, first), (other, second) in itertools.product(reshaped[a], reshaped[b]):
            if first is not None and first == second:
                yield Step(
                    "two calls",
                    f"{one.sentence} and {other.sentence}",
                    _all(_edited(a.name, one), _edited(b.name, other)),
                )


# ---------------------------------------------------------------------- sizes of inputs


def _sizes(program: Program, nodes: Sequence[fx.Node], seed: int) -> Iterator[Step]:
    """Yield other sizes of the inputs: alone, and with an edit that changes the shape of a call, which the other size may hide."""
    shapes = [shape_of(p) for p in program.placeholders if is_tensor(p)]
    places = [(d, s) for shape in shapes for d, s in enumerate(shape) if isinstance(s, int)]
    sizes = [(d, s, o) for d, s in dict.fromkeys(places) for o in (1, s + 1) if o != s and s]
    calls = [n for n in nodes if n.op == "call_function"]
    hidden = [(n.name, edit) for n in calls for edit, _ in call_edits.reshaping(n, program)]
    random.Random(seed).shuffle(hidden)
    for dim, size, other in sizes:
        sentence, resize = (
            f"inputs have size {other} instead of {size} along dimension {dim}",
            partial(_resize, dim, size, other),
        )
        yield Step("size", sentence, resize)
        for name, edit in hidden[:HIDDEN]:
            yield Step("size and argument", f"{sentence} and {edit.sentence}", _all(resize, _edited(name, edit)))


def _resize(dim: int, size: int, other: int, program: Program) -> None:
    probe = list(program.probe)
    for index, node in enumerate(program.placeholders):
        shape = list(shape_of(node)) if is_tensor(node) else []
        if len(shape) > dim and same_size(shape[dim], size):
            value, shape[dim] = probe[index], other
            kept = value.narrow(dim, 0, min(size, other))
            probe[index] = torch.cat([kept, value.narrow(dim, 0, other - size)], dim) if other > size else kept.clone()
            node.meta["val"] = fake_results.empty(shape, value.dtype, program.fake_mode)
    program.probe = tuple(probe)
