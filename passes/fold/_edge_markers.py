"""Where one operator would keep channels that are dead everywhere else: let the two sides of that edge differ.

A residual sum keeps a channel that either side needs; the model's output, a reshape into heads or a layer norm keep what they
are given. The dead channels of one side need not be computed for that:

    x + f(y)  with f(y) = c on the indices D      ->      x + scatter(f_narrow(y), c)

and an operator that does not read all that is kept for others may be given what it reads. ``insert`` puts an :func:`edge_marker` on
every such edge, ``choose`` keeps those whose saving is worth the elements they move, by the target's figures, and ``realise``
writes the others away and these as padding, slice or gather.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from thresher.analysis.cost.cost import MachineModel, flops_of
from thresher.analysis.slices.channels import ChannelAnalysis
from thresher.analysis.slices.facts import sizes, slices
from thresher.analysis.slices.operators import rule_of
from thresher.analysis.slices.ties import Key, equal
from thresher.analysis.slices.transfer.edge_marker import edge_marker
from thresher.analysis.slices.transfer.weighted import Weighted
from thresher.ir.nodes import dtype_of, is_tensor
from thresher.ir.program import Program, Role

aten = torch.ops.aten
NARROWING = (aten.slice.Tensor, aten.index_select.default, aten.select.int)  # they take what they need themselves


Edge = tuple[fx.Node, fx.Node, int]  # (source, user, dimension)


def insert(analysis: ChannelAnalysis) -> tuple[ChannelAnalysis, list[fx.Node]]:
    """Put a marker on every edge that holds dead indices, and on every edge that carries more than its reader reads.

    After one holder there may be another: until nothing new is found.
    """
    done: set[Edge] = set()
    markers: list[fx.Node] = []
    while edges := [e for e in dict.fromkeys(_edges(analysis, first=not markers)) if e not in done]:
        done.update(edges)
        analysis, added = analysis.with_edge_markers(edges)
        markers += added
    return analysis, markers


def _edges(analysis: ChannelAnalysis, first: bool) -> Iterator[Edge]:
    for node in list(analysis.program.calls()):
        operator = rule_of(node)
        if not isinstance(operator, Weighted):
            continue
        channel, source = operator.channel(node), node.args[0]
        keys = [(node, channel), (source, channel)]
        if first and node in analysis.read and _may_have_marker(source, channel):
            needed = slices(analysis.needed(source, node), channel, sizes(source)[channel], every=False)
            if bool((analysis.keep[(source, channel)] & ~needed).any()):
                yield source, node, channel
        for key in keys:
            if bool(analysis.kept_dead(key).any()):
                yield from _edges_of(analysis.holders.get(key), analysis)


def _edges_of(holder: fx.Node | None, analysis: ChannelAnalysis) -> Iterator[Edge]:
    """Yield the edges into and out of ``holder`` that carry held indices."""
    if holder is None or holder.target is edge_marker:
        return
    pairs = [(source, holder) for source in holder.all_input_nodes]
    if holder.op == "call_function":
        pairs += [(holder, user) for user in holder.users]
    for source, user in pairs:
        if not is_tensor(source) or user.target in NARROWING or user.target is edge_marker:
            continue
        if source in analysis.facts and analysis.facts[source].all():
            continue  # a constant: narrowing it saves nothing, and what restores it would be a constant, too
        for dim in range(len(sizes(source))):
            if _may_have_marker(source, dim) and bool(analysis.kept_dead((source, dim)).any()):
                yield source, user, dim


def _may_have_marker(source: fx.Node, dim: int) -> bool:
    value = source.meta["val"]
    computed = source.op == "call_function" and source.target is not edge_marker and value.is_floating_point()
    return computed and not isinstance(value.shape[dim], torch.SymInt) and not _is_written_marker(source)


def _is_written_marker(source: fx.Node) -> bool:
    """Return whether an earlier fold made the value by an edge marker: another one after it would do the same again."""
    if source.target is aten.add.Tensor and isinstance(source.args[1], fx.Node) and source.args[1].op == "get_attr":
        source = source.args[0]
    return source.target in (aten.index_select.default, aten.constant_pad_nd.default)


# ---------------------------------------------------------------------- choosing


def choose(
    analysis: ChannelAnalysis, markers: list[fx.Node], machine: MachineModel, min_improvement: float
) -> ChannelAnalysis:
    """Return the analysis with the markers closed that do not save ``min_improvement`` times what they cost.

    Markers of one value stand or fall together. What one saves is seen with all others in place; closing some changes the others,
    so it is done in rounds.
    """
    shut: set[fx.Node] = set()
    while True:
        costs = _Costs(analysis, machine, min_improvement)
        groups: dict[Key, list[fx.Node]] = defaultdict(list)
        for marker in markers:
            if marker not in shut:
                groups[marker.args].append(marker)
        losing = [m for group in groups.values() for m in group if not costs.pays(group)]
        if not losing:
            return analysis
        shut.update(losing)
        analysis = analysis.with_ties([equal(m, m.args, (m, m.args[1]), sizes(m)[m.args[1]]) for m in losing])


class _Costs:
    """The seconds that each coupled set costs at its present width: the arithmetic of the weighted operators at its ends, and the traffic
    of the values in it."""

    def __init__(self, analysis: ChannelAnalysis, machine: MachineModel, min_improvement: float):
        self.analysis, self.machine, self.min_improvement = analysis, machine, min_improvement
        self.component = analysis.components()
        self.seconds: dict[int, float] = defaultdict(float)
        for node in analysis.program.calls():
            if not is_tensor(node) or node.target is edge_marker:
                continue
            shape = sizes(node)
            moved = self.bytes(node) / machine.bandwidth
            narrow = {self.component[(node, d)] for d in range(len(shape)) if not analysis.full(node, d)}
            for number in narrow:
                self.seconds[number] += moved
            operator = rule_of(node)
            if isinstance(operator, Weighted):
                ends = {self.component[(n, operator.channel(node))] for n in (node, node.args[0])}
                for number in ends:
                    self.seconds[number] += self.flops(node, operator) / machine.flops

    def bytes(self, node: fx.Node) -> float:
        kept = [self.analysis.count(node, d) for d in range(len(sizes(node)))]
        return math.prod(kept) * dtype_of(node).itemsize

    def flops(self, node: fx.Node, operator: Weighted) -> float:
        fraction = 1.0
        for value in (node, node.args[0]):
            size = sizes(value)[operator.channel(node)]
            fraction *= self.analysis.count(value, operator.channel(node)) / max(size, 1)
        return flops_of(node) * fraction

    def pays(self, group: list[fx.Node]) -> bool:
        """Return whether the markers of one value save more than they cost."""
        keep, (source, dim) = self.analysis.keep, group[0].args
        narrow = keep[(source, dim)]
        union, home = narrow.clone(), self.component[(source, dim)]
        readers: dict[int, Tensor] = {}
        for marker in group:
            union |= keep[(marker, dim)]
            number = self.component[(marker, dim)]
            readers[number] = readers.get(number, torch.zeros_like(narrow)) | keep[(marker, dim)]
        if home in readers:
            return False  # the two sides meet elsewhere
        if not all(bool((narrow & kept).any()) for kept in readers.values()):
            return False  # nothing would come through
        saved = self.grown(home, narrow, union)
        saved += sum(self.grown(number, kept, union) for number, kept in readers.items())
        variants = {tuple(keep[(m, dim)].nonzero().reshape(-1).tolist()): m for m in group}
        return saved > self.min_improvement * sum(self.marker_seconds(m) for m in variants.values())

    def grown(self, component: int, kept: Tensor, union: Tensor) -> float:
        """Return the seconds that the set would cost more if it kept all of ``union``."""
        return self.seconds[component] * (int(union.sum()) / max(int(kept.sum()), 1) - 1)

    def marker_seconds(self, marker: fx.Node) -> float:
        source, dim = marker.args
        here, there = self.analysis.keep[(source, dim)], self.analysis.keep[(marker, dim)]
        if torch.equal(here, there):
            return 0.0
        rate = self.machine.bandwidth if _run(_places(here, there)) is not None else self.machine.gathered
        return (self.bytes(source) + self.bytes(marker)) / rate + self.machine.launch


# ---------------------------------------------------------------------- writing


def _places(here: Tensor, there: Tensor) -> Tensor:
    """Return, for each index kept ``there``, its position among those kept ``here``, or -1."""
    position = torch.where(here, here.long().cumsum(0) - 1, -1)
    return position[there]


def _run(places: Tensor) -> tuple[int, int] | None:
    """Return (first, last + 1) of the filled positions, if they are one run of consecutive indices; else None."""
    filled = (places >= 0).nonzero().reshape(-1)
    if filled.numel() == 0:
        return 0, 0
    first, stop = int(filled[0]), int(filled[-1]) + 1
    run = torch.arange(stop - first) + places[first]
    return (first, stop) if stop - first == filled.numel() and bool((places[first:stop] == run).all()) else None


def realise(program: Program, analysis: ChannelAnalysis) -> None:
    """Replace every marker by padding, slice or gather, from the indices kept before it to those kept after it."""
    values: dict[tuple, fx.Node] = {}
    for marker in list(program.calls(edge_marker)):
        source, dim = marker.args
        here, there = analysis.keep[(source, dim)], analysis.keep[(marker, dim)]
        key = (source, dim, tuple(there.nonzero().reshape(-1).tolist()))
        if key not in values:
            values[key] = source if torch.equal(here, there) else _write(program, analysis, marker)
        if values[key] is not source:  # to a marker after it, what stands here now is what the marker was
            for d in range(len(sizes(marker))):
                analysis.keep[(values[key], d)] = analysis.keep[(marker, d)]
            if marker in analysis.facts:
                analysis.facts[values[key]] = analysis.facts[marker]
        marker.replace_all_uses_with(values[key])
        program.graph.erase_node(marker)


def _write(program: Program, analysis: ChannelAnalysis, marker: fx.Node) -> fx.Node:
    source, dim = marker.args
    places = _places(analysis.keep[(source, dim)], analysis.keep[(marker, dim)])
    count, run = analysis.count(source, dim), _run(places)
    pad, select, cut = aten.constant_pad_nd.default, aten.index_select.default, aten.slice.Tensor
    trailing = [0, 0] * (len(sizes(source)) - 1 - dim)

    def call(target, *args):
        with program.graph.inserting_before(marker):
            node = program.graph.call_function(target, args)
        node.meta = dict(marker.meta)
        return node

    value = source
    if run is not None:
        first, stop = run
        start = int(places[first]) if stop > first else 0
        if stop - first < count:
            value = call(cut, value, dim, start, start + stop - first)
        if stop - first < places.numel():
            value = call(pad, value, [*trailing, first, places.numel() - stop])
    else:
        if bool((places < 0).any()):  # the missing ones are read from one more channel, which is 0
            value = call(pad, value, [*trailing, 0, 1])
        index = torch.where(places < 0, count, places)
        value = call(select, value, dim, program.add_constant(index, f"{marker.name}_index", like=marker))
    fill = _fill(analysis, marker, places)
    if fill is not None:
        constant = program.add_constant(
            fill, f"bias_map.{marker.name}", dtype_of(marker), like=marker, role=Role.DERIVED
        )
        value = call(aten.add.Tensor, value, constant)
    return value


def _fill(analysis: ChannelAnalysis, marker: fx.Node, places: Tensor) -> Tensor | None:
    """Return the known values of the missing indices (narrow, 0 at the others); None where all are 0."""
    source, dim = marker.args
    if source not in analysis.facts or not bool((places < 0).any()):
        return None
    fact = analysis.facts[source]
    value = torch.where(fact.mask, fact.value, torch.zeros((), dtype=torch.float64))
    for d in range(value.dim()):
        if d != dim and value.shape[d] > 1 and not analysis.full(marker, d):
            value = value.index_select(d, analysis.keep[(marker, d)].nonzero().reshape(-1))
    there = analysis.keep[(marker, dim)].nonzero().reshape(-1)
    value = value.index_select(dim, there) if value.shape[dim] > 1 else value
    shape = [1] * value.dim()
    shape[dim] = -1
    value = torch.where((places < 0).reshape(shape), value, torch.zeros((), dtype=torch.float64))
    return value if bool(value.any()) else None
