"""Sparse conditional constant propagation and dead-code elimination, per channel, on a whole program.

Forward, :func:`known_facts` finds the elements that are constant; backward, :func:`read_facts` those that no output depends on.
:class:`ChannelAnalysis` adds which indices must go together and yields the largest cut: ``keep`` of every (value, dimension).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import networkx as nx
import torch
from torch import Tensor, fx

from thresher.analysis.slices.facts import reduce_to, sizes, slices
from thresher.analysis.slices.operators import facts_of_constants, rule_of
from thresher.analysis.slices.ties import Key, Tie, close_all, coupling_graph
from thresher.analysis.slices.transfer.base import Facts
from thresher.analysis.slices.transfer.edge_marker import edge_marker
from thresher.ir.nodes import is_tensor, shape_of
from thresher.ir.program import Program


def known_facts(program: Program) -> Facts:
    """What is constant, per node; nodes without an entry have no constant element."""
    facts = facts_of_constants(program)
    for node in program.calls():
        if is_tensor(node):
            found = rule_of(node).forward(node, facts)
            if found is not None:
                facts[node] = found
    return facts


def read_facts(program: Program, facts: Facts, rows: Tensor | None = None) -> dict[fx.Node, Tensor]:
    """For each tensor node, which of its elements some output depends on. Elements that are known are not computed, so what they
    depend on is not read for their sake. ``rows``: of the outputs' first dimension, those that count (boolean; default: all)."""
    read: dict[fx.Node, Tensor] = {}

    def add(node: fx.Node, wanted: Tensor) -> None:
        wanted = reduce_to(wanted, sizes(node))
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
            for source, part in rule_of(node).backward(node, wanted, facts).items():
                add(source, part)
    return read


@dataclass
class ChannelAnalysis:
    """The facts of a program, the ties between its dimensions, and the largest cut that both allow."""

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
    blame: dict[Key, fx.Node] = field(default_factory=dict)
    vanished: bool = False  # some dimension is dead as a whole; one index of it stays

    @staticmethod
    def of(program: Program, facts: Facts | None = None) -> ChannelAnalysis:
        """``facts``: those of the program, where they are known already."""
        facts = known_facts(program) if facts is None else facts
        analysis = ChannelAnalysis(program, facts, read_facts(program, facts))
        for node in program.graph.nodes:
            if is_tensor(node):
                analysis._find_live(node)
        for node in program.graph.nodes:
            analysis._ask(node)
        analysis._choose()
        return analysis

    def with_adapters(self, edges: list[tuple[fx.Node, fx.Node, int]]) -> tuple[ChannelAnalysis, list[fx.Node]]:
        """Put a marker on each edge ``(source, user, dim)`` of the program, and what is found anew then."""
        found = ChannelAnalysis(
            self.program,
            dict(self.facts),
            dict(self.read),
            dict(self.live),
            set(self.whole),
            dict(self.ties),
            dict(self.rigid),
            dict(self.pins),
        )
        made: list[fx.Node] = []
        ends: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        for source, user, dim in edges:
            end = ends.get((source, user), source)
            with self.program.graph.inserting_before(user):
                marker = self.program.graph.call_function(edge_marker, (end, dim))
            marker.meta = dict(source.meta)
            if source in found.facts:
                found.facts[marker] = found.facts[source]
            found.read[marker] = self.needed(source, user) if end is source else found.read[end]
            user.replace_input_with(end, marker)
            ends[source, user] = marker
            made.append(marker)
            found._find_live(marker)
            found._ask(marker)
        for user in dict.fromkeys(user for _, user, _ in edges):
            found._ask(user)
        found._choose()
        return found, made

    def with_ties(self, more: list[Tie]) -> ChannelAnalysis:
        """The same facts with further ties: a smaller cut."""
        ties = dict(self.ties)
        for tie in more:
            ties[tie.node] = [*ties.get(tie.node, []), tie]
        found = replace(self, ties=ties, keep=dict(self.keep), blame=dict(self.blame))
        if self.vanished:  # the one index that stayed may not be needed any more
            found.vanished, found.blame = False, {}
            found._choose()
        else:  # what was kept is kept
            close_all(found._open_ties(), found.keep, found.blame, more)
        return found

    def padded(self, keys: Iterable[Key], multiples: Sequence[int], slack: float) -> ChannelAnalysis:
        """A smaller cut: each of ``keys`` keeps dead indices up to the next multiple, where these are at most ``slack`` times the live;
        of the first of ``multiples`` for which that holds."""
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
        analysis = replace(self, keep=self.keep | wanted, blame=dict(self.blame))
        ties = analysis._open_ties()
        close_all(ties, analysis.keep, analysis.blame, [t for t in ties if any(k in wanted for k in t.keys)])
        return analysis

    def needed(self, source: fx.Node, user: fx.Node) -> Tensor:
        """Which elements of ``source`` (narrow) ``user`` needs for what is read of it."""
        if user.op == "output" or not is_tensor(user):
            return torch.ones([1] * len(sizes(source)), dtype=torch.bool)
        if user not in self.read:
            return torch.zeros([1] * len(sizes(source)), dtype=torch.bool)
        wanted = self.read[user] & ~self.facts[user].mask if user in self.facts else self.read[user]
        return reduce_to(rule_of(user).backward(user, wanted, self.facts)[source], sizes(source))

    def kept_dead(self, key: Key) -> Tensor:
        """The indices that could go but for a tie."""
        return ~self.live[key] & self.keep[key]

    def components(self) -> dict[Key, int]:
        """The coupled set of every key, by number."""
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
        """Nothing is cut from this dimension."""
        key = (node, dim)
        return key in self.whole or key not in self.keep or bool(self.keep[key].all())

    def count(self, node: fx.Node, dim: int | str) -> int:
        """How many indices of this dimension are kept."""
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
        return (tie for ties in self.ties.values() for tie in ties)

    def coupling(self) -> nx.Graph:
        return coupling_graph(self.all_ties())

    # ------------------------------------------------------------------ what the nodes want

    def _find_live(self, node: fx.Node) -> None:
        """The dimensions of a value: which indices cannot go, whatever the ties allow."""
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

    def _ask(self, node: fx.Node) -> None:
        """The ties of an operator, and the dimensions of its arguments and its result that it does not tie."""
        if node.op not in ("call_function", "output"):
            return
        values = [n for n in node.all_input_nodes if is_tensor(n)]
        tied: set[Key] = set()
        if is_tensor(node) and node.op == "call_function":
            values.append(node)
            self.ties[node] = rule_of(node).constraints(node, self.facts)
            self.pins[node] = rule_of(node).pins(node, self.facts)
            tied = {key for tie in self.ties[node] for key in tie.keys}
        self.rigid[node] = [(v, d) for v in values for d in range(len(shape_of(v))) if (v, d) not in tied]

    # ------------------------------------------------------------------ choosing the cut

    def _open_ties(self) -> list[Tie]:
        """The ties that have something to say: some index of a dimension of theirs could go."""
        return [tie for tie in self.all_ties() if not all(key in self.whole for key in tie.keys)]

    def _choose(self) -> None:
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
                    self.blame[key] = node
        for wanted in self.pins.values():
            for key, indices in wanted:
                self.keep[key] = self.keep[key] | indices
        close_all(ties, self.keep, self.blame)
        open_keys = [key for key, vector in self.keep.items() if key not in self.whole and vector.numel()]
        while empty := [key for key in open_keys if not bool(self.keep[key].any())]:
            self.vanished = True
            for key in empty:  # a dimension never vanishes: one index stays
                self.keep[key] = torch.arange(self.keep[key].numel()) == 0
            close_all(ties, self.keep, self.blame)
