"""Activations that could have zeros: what linear layers read, and what gates them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from thresher.analysis.cost.break_even import Kind, Layer
from thresher.ir.nodes import module_path, shape_of
from thresher.ir.program import Program
from thresher.passes.sparsity._densities import sites_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Target:
    """An activation ``value``, which ``readers`` read: linear layers, or the product that it gates.

    Zeros of it save time in ``linears``, by their kinds; ``measured`` are the layers after which a change of it counts.
    """

    kind: Kind
    value: fx.Node
    readers: tuple[fx.Node, ...]
    linears: tuple[tuple[Kind, fx.Node], ...]
    measured: tuple[fx.Node, ...]
    other: fx.Node | None = None  # what a gate is multiplied with

    @property
    def module(self) -> str:
        """The dotted path of the module of the first layer."""
        return module_path(self.linears[0][1])

    def layers(self, cold: bool) -> list[Layer]:
        """Return the layers whose time zeros save; ``cold``: their weights do not stay in the cache."""
        layers = []
        for kind, node in self.linears:
            outputs, inputs = (int(d) for d in shape_of(node.args[1]))
            layers.append(Layer(kind, math.prod(int(d) for d in shape_of(node)[:-1]), inputs, outputs, cold))
        return layers

    def read_by_measured(self, value: Tensor, values: dict[fx.Node, Any]) -> Tensor:
        """Return what the measured layers read where the target is ``value``; ``values`` are those of a run."""
        return value if self.other is None else value * values[self.other]


def targets_of(program: Program) -> list[Target]:
    """Return the targets in order: one for all layers that read a value; for a gated layer the gate, and not its product too."""
    sites = sites_of(program)
    gates = {s.product: s for s in sites if s.kind == "gate"}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for site in (s for s in sites if s.kind == "input"):
        readers.setdefault(site.linear.args[0], []).append(site.linear)
    targets = []
    for value, linears in readers.items():
        gate = gates.get(value)
        if gate is None or set(value.users) != set(linears):
            targets.append(Target("input", value, tuple(linears), tuple(("input", n) for n in linears), tuple(linears)))
        else:
            saved: tuple[tuple[Kind, fx.Node], ...] = (("gate", gate.linear), *(("input", n) for n in linears))
            assert gate.gate is not None and gate.product is not None
            targets.append(Target("gate", gate.gate, (gate.product,), saved, tuple(linears), gate.linear))
    return targets
