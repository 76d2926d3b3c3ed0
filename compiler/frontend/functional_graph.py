"""A graph of Dynamo's -> a functional graph -> :class:`Program`, by AOTAutograd.

AOTAutograd removes writes and aliases: what a graph writes are outputs of the functional one, and torch's own wrapper copies them back,
makes the views anew that the user gets, and finds inputs that share memory. The operators of KEPT_WHOLE stay whole on the way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput, PlainAOTInput
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.exported_program import _override_composite_implicit_decomp as kept_whole
from torch.export.exported_program import _split_decomp_table_to_cia_and_python_decomp as split_table

from thresher.frontend.calls import copy_call, is_assertion, refuse_subgraphs
from thresher.frontend.decompositions import decomposition_table
from thresher.frontend.fast_decompositions import fast_decompositions
from thresher.frontend.layouts import refuse_sparse_values
from thresher.frontend.random_operators import refuse_random_numbers
from thresher.ir import fake_results
from thresher.ir.program import Original, Program, Role

SIZE = torch.ops.aten.sym_size.int
CONVERT = torch.ops.prims.convert_element_type.default  # AOTAutograd writes it where a Python number became a tensor
Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def functionalize(module: fx.GraphModule, inputs: Sequence[Any], compiler: Compiler) -> Callable[..., Any]:
    """Return the callable that torch makes around what ``compiler`` returns for the functional graph of ``module``, without gradients.

    Raises what torch raises of a graph that it cannot make functional.
    """
    with fast_decompositions():
        composite, table = split_table(decomposition_table())
        with kept_whole(composite):
            return aot_autograd(fw_compiler=compiler, inference_compiler=compiler, decompositions=table)(module, inputs)


@dataclass(frozen=True)
class FunctionalGraph:
    """A functional graph, with the roles of its inputs.

    The graph is not edited, so its inputs and outputs are listed once: every call asks for them. ``names`` has a name for each placeholder;
    ``constants`` are the indices of parameters and buffers that the graph does not write, and ``numbers`` those of sizes and other whole
    numbers.
    """

    module: fx.GraphModule
    names: Sequence[str]
    constants: Collection[int]
    numbers: Collection[int]

    @staticmethod
    def of(module: fx.GraphModule, names: Sequence[str], parameters: Collection[int]) -> FunctionalGraph:
        """Return the graph that AOTAutograd made of one whose inputs have these ``names``, of which some are ``parameters`` or buffers."""
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        sources = [n.meta.get("desc") for n in placeholders]
        indices = [s.idx if isinstance(s, PlainAOTInput) else -1 for s in sources]
        results = module.graph.output_node().meta.get("desc") or ()
        written = [r.mutated_input for r in results if isinstance(r, InputMutationAOTOutput)]
        return FunctionalGraph(
            module,
            [names[i] if 0 <= i < len(names) else node.name for i, node in zip(indices, placeholders)],
            {k for k, (i, s) in enumerate(zip(indices, sources)) if i in parameters and s not in written},
            {k for k, node in enumerate(placeholders) if not isinstance(node.meta["val"], Tensor)},
        )

    @cached_property
    def placeholders(self) -> list[fx.Node]:
        """The inputs."""
        return [n for n in self.module.graph.nodes if n.op == "placeholder"]

    @cached_property
    def outputs(self) -> list[Any]:
        """The flat outputs: nodes and literals."""
        return list(self.module.graph.output_node().args[0])

    def inputs(self, constants: Collection[int]) -> list[int]:
        """Return the indices of the tensors that are neither ``constants`` nor numbers: the inputs of the program."""
        count = len(self.placeholders)
        return [i for i in range(count) if i not in constants and i not in self.numbers]

    def loose_numbers(self, constants: Collection[int]) -> list[int]:
        """Return the indices of the free numbers that are read and are no size of an :meth:`inputs`, of counters for instance.

        A program with free sizes has an input [n, 0] for each of them: an array without elements, of so many rows.
        """
        placeholders = self.placeholders
        shapes = [placeholders[i].meta["val"].shape for i in self.inputs(constants)]
        sizes = {d.node.expr for shape in shapes for d in shape if isinstance(d, torch.SymInt)}
        free = [i for i in sorted(self.numbers) if isinstance(placeholders[i].meta["val"], torch.SymInt)]
        return [i for i in free if placeholders[i].users and placeholders[i].meta["val"].node.expr not in sizes]

    def depending(self, constants: Collection[int]) -> list[int]:
        """Return the indices of the outputs that depend on an input that is not among the ``constants``."""
        moved = {node for i, node in enumerate(self.placeholders) if i not in constants}
        for node in self.module.graph.nodes:
            if any(n in moved for n in node.all_input_nodes):
                moved.add(node)
        return [i for i, v in enumerate(self.outputs) if isinstance(v, fx.Node) and v in moved]

    def memory_of(self, outputs: Sequence[int]) -> list[fx.Node]:
        """Return for each of these outputs, nodes, the one to compute: the value that it and others are views of, else itself."""
        wanted = [self.outputs[i] for i in outputs]
        origins = [_viewed(node) for node in wanted]
        return [o if origins.count(o) > 1 and o.op != "placeholder" else n for n, o in zip(wanted, origins)]

    def program(
        self, values: Sequence[Any], constants: Collection[int], results: Sequence[fx.Node], free: bool
    ) -> Program:
        """Return the program of the graph.

        Args:
            values: a value for each placeholder: parameters and buffers, and examples of the inputs.
            constants: the indices of what is a constant now.
            results: the nodes whose values are wanted.
            free: sizes that are symbols stay free, and :meth:`loose_numbers` are inputs after the others; otherwise every size is that of
                ``values``.

        Raises :class:`CaptureError` for random numbers, sparse tensors and subgraphs.
        """
        refuse_random_numbers(self.module.graph)
        refuse_sparse_values(self.module.graph)
        refuse_subgraphs(self.module)
        return _Conversion(self, values, constants, free).run(results)


class _Conversion:
    """The conversion of one functional graph."""

    def __init__(self, source: FunctionalGraph, values: Sequence[Any], constants: Collection[int], free: bool):
        self.source, self.values, self.free = source, values, free
        self.constant_indices = [i for i in range(len(values)) if i in constants]
        self.input_indices = source.inputs(constants)
        self.loose = source.loose_numbers(constants) if free else []
        self.graph = fx.Graph()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.mapping: dict[fx.Node, Any] = {}
        self.constants: dict[str, Tensor] = {}
        self.roles: dict[str, Role] = {}

    def run(self, results: Sequence[fx.Node]) -> Program:
        placeholders = self.source.placeholders
        for i in self.input_indices:
            self._add_input(placeholders[i], self.source.names[i], self.values[i])
        rows = {i: self._add_rows(placeholders[i], self.source.names[i]) for i in self.loose}
        for i in self.constant_indices:
            value = self.values[i]
            role = Role.PARAMETER if isinstance(value, nn.Parameter) else Role.BUFFER
            self.mapping[placeholders[i]] = self._add_constant(self.source.names[i], value, role)
        for i in self.source.numbers:
            symbol, value = placeholders[i].meta["val"], self.values[i]
            self.mapping[placeholders[i]] = (
                self._size(rows[i], symbol) if i in rows else self._known_size(symbol, value)
            )
        for node in self.source.module.graph.nodes:
            self._convert(node)
        self.graph.output(tuple(self._value(v) for v in results))
        probe = tuple(_example(self.values[i]) for i in self.input_indices)
        probe += tuple(rows_of(self.values[i]) for i in self.loose)
        learned = {id(t): t.numel() for name, t in self.constants.items() if name not in self.roles}
        specs = pytree.tree_flatten((probe, {}))[1], pytree.tree_flatten(tuple(results))[1]
        original = Original({}, sum(learned.values()))
        program = Program(self.graph, self.constants, *specs, probe, "graph", original, self.roles)
        return program.clean().propagate().verify()

    def _value(self, source: Any) -> Any:
        return self.mapping[source] if isinstance(source, fx.Node) else source

    def _add_input(self, source: fx.Node, name: str, value: Tensor) -> None:
        node = self.graph.placeholder(name)
        fixed = fake_results.empty(value.shape, value.dtype, self.mode) if not self.free else source.meta["val"]
        node.meta["val"] = fixed
        self.mapping[source] = node

    def _add_rows(self, source: fx.Node, name: str) -> fx.Node:
        """Return a new input whose only size is a number."""
        node = self.graph.placeholder(name)
        node.meta["val"] = fake_results.empty((source.meta["val"], 0), torch.float32, self._mode())
        return node

    def _add_constant(self, name: str, value: Tensor, role: Role) -> fx.Node:
        target, k = name, 0
        while target in self.constants:
            target, k = f"{name}_{k}", k + 1
        node = self.graph.create_node("get_attr", target, name=target.replace(".", "_"))
        node.meta["val"] = fake_results.empty(value.shape, value.dtype, self._mode())
        self.constants[target] = value.detach()
        if role is not Role.PARAMETER:
            self.roles[target] = role
        return node

    def _mode(self) -> FakeTensorMode:
        """The mode that the inputs are in."""
        fakes = (self.source.placeholders[i].meta["val"] for i in self.input_indices) if self.free else ()
        return next((fake.fake_mode for fake in fakes), self.mode)

    def _known_size(self, symbol: Any, value: Any) -> Any:
        """Return the node that reads a free size off an input, or the number itself."""
        if self.free and isinstance(symbol, torch.SymInt):
            for i in self.input_indices:
                source = self.source.placeholders[i]
                for dim, size in enumerate(source.meta["val"].shape):
                    if isinstance(size, torch.SymInt) and size.node.expr == symbol.node.expr:
                        return self._size(self.mapping[source], symbol, dim)
        return value

    def _size(self, array: fx.Node, symbol: Any, dim: int = 0) -> fx.Node:
        node = self.graph.call_function(SIZE, (array, dim))
        node.meta["val"] = symbol
        return node

    def _convert(self, source: fx.Node) -> None:
        if source.op == "get_attr":
            value = getattr(self.source.module, str(source.target))
            self.mapping[source] = self._add_constant(str(source.target).strip("_"), value, Role.BUFFER)
        if source.op != "call_function" or is_assertion(source):
            return
        if not self.free and not _has_tensor(source.meta.get("val")):  # a number: it is known
            self.mapping[source] = self._number(source)
            return
        node = copy_call(self.graph, source, self._value)
        if node.target is CONVERT:
            node.target, node.args, node.kwargs = (
                torch.ops.aten._to_copy.default,
                node.args[:1],
                {"dtype": node.args[1]},
            )
        if not self.free:
            node.meta["val"] = fake_results.result_of(node, self.mode)
        self.mapping[source] = node

    def _number(self, source: fx.Node) -> Any:
        args, kwargs = fx.map_arg((source.args, source.kwargs), self._value)
        if source.target is SIZE:
            return int(args[0].meta["val"].shape[args[1]])
        return source.target(*args, **kwargs)


def views(results: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Return the module that makes ``outputs`` of ``results`` by views alone, and the placeholders that it takes after these: sizes."""
    graph, sizes = fx.Graph(), []
    copies = {node: graph.placeholder(node.name) for node in results}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies and node.op == "placeholder":
            sizes.append(node)
            copies[node] = graph.placeholder(node.name)
        elif node not in copies:
            for source in node.all_input_nodes:
                copied(source)
            copies[node] = graph.node_copy(node, copies.__getitem__)
        return copies[node]

    graph.output([copied(node) for node in outputs])
    return fx.GraphModule(torch.nn.Module(), graph), sizes


def _viewed(node: fx.Node) -> fx.Node:
    """Return the value whose memory that of ``node`` is."""
    while node.op == "call_function":
        call = node.args[0] if node.target is operator.getitem else node  # of a list of views
        if not isinstance(call, fx.Node) or not getattr(call.target, "is_view", False):
            break
        node = call.args[0]
    return node


def rows_of(number: int) -> Tensor:
    """Return the array [number, 0] that stands for a number among the inputs of a program."""
    return torch.empty(number, 0)


def _example(value: Tensor) -> Tensor:
    """A tensor of its own that is no part of a graph of gradients."""
    return value.detach().clone()


def _has_tensor(value: Any) -> bool:
    return any(isinstance(v, Tensor) for v in pytree.tree_leaves(value))
