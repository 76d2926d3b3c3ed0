"""Run a graph in torch, node by node: the reference that everything else is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from thresher.errors import ProgramError
from thresher.ir.nodes import dtype_of


class Interpreter:
    """Runs a graph on flat inputs, node by node; each value is freed after its last use.

    Args:
        graph: the calls; its output node holds the flat results.
        constants: the tensor of each ``get_attr`` node, by its target.
        dtype: evaluate everything floating in this dtype, and complex numbers in the one that has it as parts (inputs, constants, dtype
            literals); None: as the nodes declare.
        watch: called with every node and its value as soon as it is computed.
    """

    def __init__(
        self,
        graph: fx.Graph,
        constants: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        watch: Callable[[fx.Node, Any], None] | None = None,
    ):
        self.graph, self.constants, self.dtype, self.watch = graph, constants, dtype, watch

    def _convert(self, value: Any) -> Any:
        if self.dtype is None:
            return value
        kind = value.dtype if isinstance(value, Tensor) else value
        if not isinstance(kind, torch.dtype) or not (kind.is_floating_point or kind.is_complex):
            return value
        dtype = self.dtype.to_complex() if kind.is_complex else self.dtype
        return value.to(dtype) if isinstance(value, Tensor) else dtype

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """Return the flat results for one flat input per placeholder. Raises :class:`ProgramError` for a graph without an output node."""
        environment: dict[fx.Node, Any] = {}
        last_use: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            for source in node.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    last_use.setdefault(node, []).append(source)
        inputs = iter(flat)
        for node in self.graph.nodes:
            if node.op == "output":
                return [environment[a] if isinstance(a, fx.Node) else a for a in node.args[0]]
            environment[node] = value = self._step(node, environment, inputs)
            if self.watch is not None:
                self.watch(node, value)
            for dead in last_use.get(node, ()):
                environment.pop(dead, None)
        raise ProgramError("the graph has no output node")

    def _step(self, node: fx.Node, environment: dict[fx.Node, Any], inputs: Iterator[Any]) -> Any:
        if node.op == "placeholder":
            return self._convert(next(inputs))
        if node.op == "get_attr":
            constant = self.constants[node.target]
            return constant.to(dtype_of(node)) if self.dtype is None else self._convert(constant)
        args, kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: environment[a] if isinstance(a, fx.Node) else self._convert(a)
        )
        return self._convert(node.target(*args, **kwargs))  # arange and the like make torch's default dtype
