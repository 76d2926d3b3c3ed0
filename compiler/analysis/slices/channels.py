"""Sparse conditional constant propagation and dead-code elimination, per channel, on a whole program.

Forward, :func:`known_facts` finds the elements that are constant; backward, :func:`read_facts` those that no output depends on.
:class:`ChannelAnalysis` adds which indices must go together and yields the largest cut: ``keep`` of every (value, dimension).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from thresher.analysis.slices.facts import Known, along_free, assuming, for_any_size, reduce_to, sizes, slices
from thresher.analysis.slices.operators import facts_of_constants, rule_of
from thresher.analysis.slices.ties import Key, Tie, close_all, coupling_graph
from thresher.analysis.slices.transfer.base import Facts
from thresher.analysis.slices.transfer.edge_marker import edge_marker
from thresher.ir.nodes import is_tensor, shape_of
from thresher.ir.program import Program
from thresher.ir.sizes import Numbers, number, other_sizes, symbols_of

BORDER = 8  # a dimension that is longer has, for most kernels, an inside that no padding reaches


def known_facts(program: Program) -> Facts:
    """Return the elements that are constant, by node; a node without an entry has no constant element.

    Where sizes are free they are constant whatever the sizes are.
    """
    facts = facts_of_constants(program)
    for node in program.calls():
        if is_tensor(node):
            fact = rule_of(node).forward(node, facts)
            if fact is not None and (values := _with_free_sizes(node)):
                fact = for_any_size(node, fact, _at_other_sizes(node, facts, values))
            if fact is not None:
                facts[node] = fact
    return facts


def _with_free_sizes(node: fx.Node) -> list[Any]:
    """Return the result of a call and its arguments, if some size among them is free; else nothing."""
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    return values if symbols_of(values) else []


def _other_sizes(values: list[Any]) -> Numbers | None:
    """Return other sizes for a call, large enough for a border and what is inside of it; None where there are no others."""
    free = [d for v in values if isinstance(v, Tensor) for d in v.shape if isinstance(d, torch.SymInt)]
    choices = list(other_sizes(values))
    return next((c for c in choices if all(number(d, c) > BORDER for d in free)), next(iter(choices), None))


def _at_other_sizes(node: fx.Node, facts: Facts, values: list[Any]) -> Known | None:
    numbers = _other_sizes(values)
    if numbers is None:
        return None
    with assuming(numbers):
        return rule_of(node).forward(node, facts)


def read_facts(program: Program, facts: Facts, rows: Tensor | None = None) -> dict[fx.Node, Tensor]:
    """Return for each tensor node which of its elements (narrow, bool) some output depends on; nodes without an entry are not read.

    Elements that are known are not computed, so what they depend on is not read for their sake. ``rows``: the indices of the outputs' first
    dimension that count (bool; default: all).
    """
    read: dict[fx.Node, Tensor] = {}

    def add(node: fx.Node, wanted: Tensor) -> None:
        wanted = reduce_to(wanted, sizes(node))
        for dim in along_free(wanted, node):
            wanted = wanted.any(dim, keepdim=True)
        read[node] = read[node] | wanted if node in read else wanted

    for node in reversed(program.graph.nodes):
        if node.op == "output":
            for source in node.all_input_nodes:
                if is_tensor(source):
                    others = [1] * (len(sizes(source)) - 1)
                    wanted = torch.ones([1, *others]) if rows is None else rows.reshape(-1, *others)
                    add(source, wanted.bool() if sizes(source) else torch.ones([], dtype=torch.bool))
        elif node.op == "call_function" and not is_tensor(node):
            for source in node.all_input_nodes:  # several results: everything is read
                if is_tensor(source):
                    add(source, torch.ones([1] * len(sizes(source)), dtype=torch.bool))
        elif node.op == "call_function" and node in read:
            wanted = read[node] & ~facts[node].mask if node in facts else read[node]
            for source, fact in rule_of(node).backward(node, wanted, facts).items():
                add(source, fact)
            numbers = _other_sizes(values) if (values := _with_free_sizes(node)) else None
            if numbers is not None:
                with assuming(numbers):
                    for source, fact in rule_of(node).backward(node, wanted, facts).items():
                        add(source, fact)
    return read


def constants_of(value: fx.Node, facts: Facts) -> list[fx.Node]:
    """Return the constants that a known value depends on, as far as transfer rules tell: a factor of 0 hides what it is multiplied with."""
    read = {value: torch.ones([1] * len(sizes(value)), dtype=torch.bool)}
    for node in reversed(value.graph.nodes):
        wanted = read.get(node)
        if node.op != "call_function" or wanted is None or not wanted.any():
            continue
        everything = {
            n: torch.ones([1] * len(sizes(n)), dtype=torch.bool) for n in node.all_input_nodes if is_tensor(n)
        }
        for source, fact in (rule_of(node).backward(node, wanted, facts) if is_tensor(node) else everything).items():
            fact = reduce_to(fact, sizes(source))
            read[source] = read[source] | fact if source in read else fact
    return [n for n, wanted in read.items() if n.op == "get_attr" and wanted.any()]


@dataclass
class ChannelAnalysis:
    """The facts of a program, the ties between its dimensions, and the largest cut that both allow.

    ``keep`` holds for each key the indices that stay (bool), ``holders`` the operator that holds a key's dead indices. A key that is
    missing in ``keep`` loses nothing.
    """

    program: Program
    facts: Facts
    read: dict[fx.Node, Tensor]
    live: dict[Key, Tensor] = field(default_factory=dict)  # indices that are read and not known
    whole: set[Key] = field(default_factory=set)  # of these dimensions that is every index: nothing can go
    ties: dict[fx.Node, list[Tie]] = field(default_factory=dict)  # of each call
    rigid: dict[fx.Node, list[Key]] = field(default_factory=dict)  # what each node does not tie, and so wants whole
    pins: dict[fx.Node, list[tuple[Key, Tensor]]] = field(
        default_factory=dict
    )  # what each call wants although it is dead
    keep: dict[Key, Tensor] = field(default_factory=dict)
    holders: dict[Key, fx.Node] = field(default_factory=dict)
    vanished: bool = False  # some dimension is dead as a whole; one index of it stays

    @staticmethod
    def of(program: Program, facts: Facts | None = None) -> ChannelAnalysis:
        """Analyse a program; ``facts`` are its known facts, where they have been computed."""
        facts = known_facts(program) if facts is None else facts
        analysis = ChannelAnalysis(program, facts, read_facts(program, facts))
        for node in program.graph.nodes:
            if is_tensor(node):
                analysis._find_live(node)
        for node in program.graph.nodes:
            analysis._collect_ties(node)
        analysis._choose_cut()
        return analysis

    def with_edge_markers(self, edges: list[tuple[fx.Node, fx.Node, int]]) -> tuple[ChannelAnalysis, list[fx.Node]]:
        """Put a marker on each edge ``(source, user, dim)`` of the program, in place.

        Returns the analysis of the program with the markers, and the markers; only what they change is analysed again.
        """
        analysis = ChannelAnalysis(
            self.program,
            dict(self.facts),
            dict(self.read),
            dict(self.live),
            set(self.whole),
            dict(self.ties),
            dict(self.rigid),
            dict(self.pins),
        )
        markers: list[fx.Node] = []
        ends: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        for source, user, dim in edges:
            end = ends.get((source, user), source)
            with self.program.graph.inserting_before(user):
                marker = self.program.graph.call_function(edge_marker, (end, dim))
            marker.meta = dict(source.meta)
            if source in analysis.facts:
                analysis.facts[marker] = analysis.facts[source]
            analysis.read[marker] = self.needed(source, user) if end is source else analysis.read[end]
            user.replace_input_with(end, marker)
            ends[source, user] = marker
            markers.append(marker)
            analysis._find_live(marker)
            analysis._collect_ties(marker)
        for user in dict.fromkeys(user for _, user, _ in edges):
            analysis._collect_ties(user)
        analysis._choose_cut()
        return analysis, markers

    def with_ties(self, more: list[Tie]) -> ChannelAnalysis:
        """Return the analysis with the same facts and further ties: a smaller cut."""
        ties = dict(self.ties)
        for tie in more:
            ties[tie.node] = [*ties.get(tie.node, []), tie]
        analysis = replace(self, ties=ties, keep=dict(self.keep), holders=dict(self.holders))
        if self.vanished:  # the one index that stayed may not be needed any more
            analysis.vanished, analysis.holders = False, {}
            analysis._choose_cut()
        else:  # what was kept is kept
            close_all(analysis._open_ties(), analysis.keep, analysis.holders, more)
        return analysis

    def padded(self, keys: Iterable[Key], multiples: Sequence[int], slack: float) -> ChannelAnalysis:
        """Return an analysis with a smaller cut, in which sizes are multiples.

        Each of ``keys`` keeps dead indices up to the next multiple, where these are at most ``slack`` times the live ones; it is a
        multiple of the first of ``multiples`` for which that holds.
        """
        wanted: dict[Key, Tensor] = {}
        component = self.components()
        for key in {component[key]: key for key in keys if not self.full(*key)}.values():
            keep = self.keep[key]
            count = int(keep.sum())
            steps = [min(-(-count // m) * m, keep.numel()) - count for m in multiples]
            missing = next((step for step in steps if step <= slack * count), 0)
            if missing:
                wanted[key] = keep.clone().index_fill_(0, (~keep).nonzero().reshape(-1)[:missing], True)
        if not wanted:
            return self
        analysis = replace(self, keep=self.keep | wanted, holders=dict(self.holders))
        ties = analysis._open_ties()
        close_all(ties, analysis.keep, analysis.holders, [t for t in ties if any(k in wanted for k in t.keys)])
        return analysis

    def needed(self, source: fx.Node, user: fx.Node) -> Tensor:
        """Return which elements of ``source`` (narrow) ``user`` needs for what is read of it."""
        if user.op == "output" or not is_tensor(user):
            return torch.ones([1] * len(sizes(source)), dtype=torch.bool)
        if user not in self.read:
            return torch.zeros([1] * len(sizes(source)), dtype=torch.bool)
        wanted = self.read[user] & ~self.facts[user].mask if user in self.facts else self.read[user]
        return reduce_to(rule_of(user).backward(user, wanted, self.facts)[source], sizes(source))

    def kept_dead(self, key: Key) -> Tensor:
        """Return the indices (bool) that nothing needs and a tie keeps."""
        return ~self.live[key] & self.keep[key]

    def components(self) -> dict[Key, int]:
        """Return the number of the coupled set of every key."""
        parent: dict[Key, Key] = {key: key for key in self.keep}

        def find(key: Key) -> Key:
            while parent[key] is not key:
                parent[key] = parent[parent[key]]
                key = parent[key]
            return key

        for tie in (t for t in self.all_ties() if t.joins):
            first = find(tie.keys[0])
            for other in tie.keys[1:]:
                parent[find(other)] = first
        numbers: dict[Key, int] = {}
        return {key: numbers.setdefault(find(key), len(numbers)) for key in parent}

    def full(self, node: object, dim: int | str) -> bool:
        """Return whether this dimension keeps all its indices."""
        key = (node, dim)
        return key in self.whole or key not in self.keep or bool(self.keep[key].all())

    def count(self, node: fx.Node, dim: int | str) -> int:
        """Return the number of indices of this dimension that are kept."""
        key = (node, dim)
        return self.keep[key].numel() if key in self.whole else int(self.keep[key].sum())

    @property
    def cuts(self) -> list[Key]:
        """The dimensions of real values that lose indices."""
        return [
            (node, dim)
            for node, dim in self.keep
            if isinstance(dim, int) and node.target is not edge_marker and not self.full(node, dim)
        ]

    def all_ties(self) -> Iterator[Tie]:
        """Return the ties of all calls."""
        return (tie for ties in self.ties.values() for tie in ties)

    def coupling(self) -> nx.Graph:
        """Return the coupled sets as a graph (:func:`~thresher.analysis.slices.ties.coupling_graph`)."""
        return coupling_graph(self.all_ties())

    # ------------------------------------------------------------------ ties and pins

    def _find_live(self, node: fx.Node) -> None:
        """Find the indices of each dimension of a value that cannot go, whatever the ties allow."""
        shape, computed = shape_of(node), node.op == "call_function" and node in self.read
        wanted = torch.zeros([1] * len(shape), dtype=torch.bool)  # a constant has nothing to say for itself
        if computed:
            wanted = self.read[node] & ~self.facts[node].mask if node in self.facts else self.read[node]
        some = bool(wanted.any())
        for dim, size in enumerate(sizes(node)):
            if node.op == "placeholder" or isinstance(shape[dim], torch.SymInt) or (some and wanted.shape[dim] == 1):
                live, whole = torch.ones(size, dtype=torch.bool), True
            elif not some:
                live, whole = torch.zeros(size, dtype=torch.bool), size == 0
            else:
                live = slices(wanted, dim, size, every=False)
                whole = bool(live.all())
            self.live[(node, dim)] = live
            if whole:
                self.whole.add((node, dim))

    def _collect_ties(self, node: fx.Node) -> None:
        """Collect the ties and pins of an operator, and the dimensions of its arguments and its result that it does not tie."""
        if node.op not in ("call_function", "output"):
            return
        values = [n for n in node.all_input_nodes if is_tensor(n)]
        tied: set[Key] = set()
        if node.op == "call_function":
            values += [node] if is_tensor(node) else []
            self.ties[node] = rule_of(node).constraints(node, self.facts)
            self.pins[node] = rule_of(node).pins(node, self.facts)
            tied = {key for tie in self.ties[node] for key in tie.keys}
        self.rigid[node] = [(v, d) for v in values for d in range(len(shape_of(v))) if (v, d) not in tied]

    # ------------------------------------------------------------------ the cut

    def _open_ties(self) -> list[Tie]:
        """Return the ties that can ask for something: some index of one of their dimensions could go."""
        return [tie for tie in self.all_ties() if not all(key in self.whole for key in tie.keys)]

    def _choose_cut(self) -> None:
        ties = self._open_ties()
        self.keep = dict(self.live)
        for tie in ties:  # virtual dimensions start empty: only real ones ask for something
            for key, size in zip(tie.keys, tie.left_sizes + tie.right_sizes):
                if key not in self.keep:
                    self.keep[key] = torch.zeros(size, dtype=torch.bool)
        for node, keys in self.rigid.items():
            for key in keys:
                if key not in self.whole:
                    self.keep[key] = torch.ones_like(self.keep[key])
                    self.holders[key] = node
        for wanted in self.pins.values():
            for key, indices in wanted:
                self.keep[key] = self.keep[key] | indices
        close_all(ties, self.keep, self.holders)
        open_keys = [key for key, vector in self.keep.items() if key not in self.whole and vector.numel()]
        while empty := [key for key in open_keys if not bool(self.keep[key].any())]:
            self.vanished = True
            for key in empty:  # a dimension never vanishes: one index stays
                self.keep[key] = torch.arange(self.keep[key].numel()) == 0
            close_all(ties, self.keep, self.holders)
