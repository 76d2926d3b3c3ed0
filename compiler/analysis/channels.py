"""Sparse conditional constant propagation and dead-code elimination, per channel, on a whole program.

Forward, :func:`known_facts` finds the elements that are constant; backward, :func:`read_facts` those that no output depends on.
:class:`ChannelAnalysis` adds which indices must go together and yields the largest cut: ``keep`` of every (value, dimension).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import networkx as nx
import torch
from torch import Tensor, fx

from thresher.analysis.facts import reduce_to, sizes, slices
from thresher.analysis.operators import facts_of_constants, row
from thresher.analysis.rows.adapter import adapter
from thresher.analysis.rows.base import Facts
from thresher.analysis.ties import Key, Tie, close_all, coupling_graph
from thresher.program import Program, is_tensor, shape_of


def known_facts(program: Program) -> Facts:
    """What is constant, per node; nodes without an entry have no constant element."""
    facts = facts_of_constants(program)
    for node in program.calls():
        if is_tensor(node):
            found = row(node).known(node, facts)
            if found is not None:
                facts[node] = found
    return facts


def read_facts(program: Program, facts: Facts) -> dict[fx.Node, Tensor]:
    """For each tensor node, which of its elements some output depends on. Elements that are known are not computed, so what they
    depend on is not read for their sake."""
    read: dict[fx.Node, Tensor] = {}

    def add(node: fx.Node, wanted: Tensor) -> None:
        wanted = reduce_to(wanted, sizes(node))
        read[node] = read[node] | wanted if node in read else wanted

    for node in reversed(program.graph.nodes):
        if node.op == "output":
            for source in node.all_input_nodes:
                if is_tensor(source):
                    add(source, torch.ones([1] * len(sizes(source)), dtype=torch.bool))
        elif node.op == "call_function" and not is_tensor(node):
            for source in node.all_input_nodes:  # several results: everything is read
                if is_tensor(source):
                    add(source, torch.ones([1] * len(sizes(source)), dtype=torch.bool))
        elif node.op == "call_function" and node in read:
            wanted = read[node] & ~facts[node].mask if node in facts else read[node]
            for source, part in row(node).read(node, wanted, facts).items():
                add(source, part)
    return read


@dataclass
class ChannelAnalysis:
    """The facts of a program, the ties between its dimensions, and the largest cut that both allow."""

    program: Program
    facts: Facts
    read: dict[fx.Node, Tensor]
    ties: dict[fx.Node, list[Tie]]  # of each call
    keep: dict[Key, Tensor]
    cuttable: dict[Key, Tensor]
    blame: dict[Key, fx.Node] = field(default_factory=dict)
    vanished: bool = False  # some dimension is dead as a whole; one index of it stays

    @staticmethod
    def of(program: Program, facts: Facts | None = None) -> ChannelAnalysis:
        """``facts``: those of the program, where they are known already."""
        facts = known_facts(program) if facts is None else facts
        read = read_facts(program, facts)
        ties = {node: row(node).ties(node, facts) for node in program.calls() if is_tensor(node)}
        analysis = ChannelAnalysis(program, facts, read, ties, {}, {})
        analysis._find_cuttable(node for node in program.graph.nodes if is_tensor(node))
        analysis._choose()
        return analysis

    def with_adapters(self, edges: Iterable[tuple[fx.Node, fx.Node, int]]) -> tuple[ChannelAnalysis, list[fx.Node]]:
        """Put an adapter on each edge ``(source, user, dim)`` of the program, and what is found anew then."""
        facts, read, ties, made = dict(self.facts), dict(self.read), dict(self.ties), []
        ends: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        users: dict[fx.Node, None] = {}
        for source, user, dim in edges:
            end = ends.get((source, user), source)
            with self.program.graph.inserting_before(user):
                marker = self.program.graph.call_function(adapter, (end, dim))
            marker.meta = dict(source.meta)
            if source in facts:
                facts[marker] = facts[source]
            read[marker] = self.needed(source, user) if end is source else read[end]
            user.replace_input_with(end, marker)
            ties[marker] = row(marker).ties(marker, facts)
            ends[source, user] = marker
            users[user] = None
            made.append(marker)
        ties |= {user: row(user).ties(user, facts) for user in users if user in ties}
        analysis = ChannelAnalysis(self.program, facts, read, ties, {}, dict(self.cuttable))
        analysis._find_cuttable(made)
        analysis._choose()
        return analysis, made

    def with_ties(self, more: Iterable[Tie]) -> ChannelAnalysis:
        """The same facts with further ties: a smaller cut."""
        ties = dict(self.ties)
        for tie in more:
            ties[tie.node] = [*ties.get(tie.node, []), tie]
        analysis = ChannelAnalysis(self.program, self.facts, self.read, ties, {}, self.cuttable)
        analysis._choose()
        return analysis

    def padded(self, keys: Iterable[Key], multiple: int, slack: float) -> ChannelAnalysis:
        """A smaller cut: each of ``keys`` keeps dead indices up to the next multiple, where these are at most ``slack`` times the live."""
        wanted: dict[Key, Tensor] = {}
        component = self.components()
        for key in {component[key]: key for key in keys if not self.full(*key)}.values():
            keep = self.keep[key]
            count = int(keep.sum())
            missing = min(-(-count // multiple) * multiple, keep.numel()) - count
            if 0 < missing <= slack * count:
                wanted[key] = keep.clone().index_fill_(0, (~keep).nonzero().reshape(-1)[:missing], True)
        if not wanted:
            return self
        analysis = replace(self, keep=self.keep | wanted, blame=dict(self.blame))
        close_all(analysis.all_ties(), analysis.keep, analysis.blame)
        return analysis

    def needed(self, source: fx.Node, user: fx.Node) -> Tensor:
        """Which elements of ``source`` (narrow) ``user`` needs for what is read of it."""
        if user.op == "output" or not is_tensor(user):
            return torch.ones([1] * len(sizes(source)), dtype=torch.bool)
        if user not in self.read:
            return torch.zeros([1] * len(sizes(source)), dtype=torch.bool)
        wanted = self.read[user] & ~self.facts[user].mask if user in self.facts else self.read[user]
        return reduce_to(row(user).read(user, wanted, self.facts)[source], sizes(source))

    def held(self, key: Key) -> Tensor:
        """The indices that could go but for a tie."""
        return self.cuttable[key] & self.keep[key]

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
        vector = self.keep.get((node, dim))
        return vector is None or bool(vector.all())

    def count(self, node: fx.Node, dim: int | str) -> int:
        """How many indices of this dimension are kept."""
        return int(self.keep[(node, dim)].sum())

    @property
    def cuts(self) -> list[Key]:
        """The dimensions of real values that lose indices."""
        return [
            (node, dim)
            for (node, dim), vector in self.keep.items()
            if isinstance(dim, int) and node.target is not adapter and not bool(vector.all())
        ]

    def all_ties(self) -> Iterator[Tie]:
        return (tie for ties in self.ties.values() for tie in ties)

    def coupling(self) -> nx.Graph:
        return coupling_graph(self.all_ties())

    # ------------------------------------------------------------------ choosing the cut

    def _choose(self) -> None:
        mentioned = {node: {key for tie in ties for key in tie.keys} for node, ties in self.ties.items()}
        self.keep = {key: ~vector for key, vector in self.cuttable.items()}
        for tie in self.all_ties():  # virtual dimensions start empty: only real ones ask for something
            for key, size in zip(tie.keys, tie.left_sizes + tie.right_sizes):
                self.keep.setdefault(key, torch.zeros(size, dtype=torch.bool))
        for node in self.program.graph.nodes:
            if node.op in ("call_function", "output"):
                self._pin_rigid(node, mentioned.get(node, set()))
        for node in self.program.calls():
            if is_tensor(node):
                for key, indices in row(node).pins(node, self.facts):
                    self.keep[key] = self.keep[key] | indices
        close_all(self.all_ties(), self.keep, self.blame)
        while empty := [key for key, vector in self.keep.items() if not bool(vector.any()) and vector.numel()]:
            self.vanished = True
            for key in empty:  # a dimension never vanishes: one index stays
                self.keep[key] = torch.arange(self.keep[key].numel()) == 0
            close_all(self.all_ties(), self.keep, self.blame)

    def _find_cuttable(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            shape = shape_of(node)
            fixed = node.op == "placeholder"
            dead = torch.ones([1] * len(shape), dtype=torch.bool)  # a constant has nothing to say for itself
            if node.op == "call_function" and node in self.read:
                dead = ~self.read[node]
                if node in self.facts:
                    dead = dead | self.facts[node].mask
            for dim, size in enumerate(sizes(node)):
                stays = fixed or isinstance(shape[dim], torch.SymInt)
                cut = slices(dead, dim, size, every=True) if not stays else torch.zeros(size, dtype=torch.bool)
                self.cuttable[(node, dim)] = cut

    def _pin_rigid(self, node: fx.Node, mentioned: set[Key]) -> None:
        """Dimensions that the operator does not tie stay whole, in its arguments and in its result."""
        values = [n for n in node.all_input_nodes if is_tensor(n)] + (
            [node] if is_tensor(node) and node.op != "output" else []
        )
        for value in values:
            for dim, size in enumerate(sizes(value)):
                key = (value, dim)
                if key not in mentioned and not bool(self.keep[key].all()):
                    self.keep[key] = torch.ones(size, dtype=torch.bool)
                    self.blame[key] = node
