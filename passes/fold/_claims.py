"""The claims of fold-channels for its certificate: the facts it relied on, what it kept, and the reason for each index that went."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.slices.channels import ChannelAnalysis
from thresher.analysis.slices.facts import sizes, slices
from thresher.analysis.slices.operators import rule_of
from thresher.analysis.slices.transfer.base import is_constant
from thresher.analysis.slices.transfer.routing import positive_chain, taken_experts, unread_experts
from thresher.ir.program import Program
from thresher.verification.certificate import Reason, Step, indices_of


@dataclass
class Claims:
    """The claims of one fold: the values that were ``known`` at first, those that stand for others, and the experts whose rows are
    not read of a value (``unrouted``)."""

    known: dict[str, tuple[Tensor, Tensor]]
    stands_for: dict[str, str] = field(default_factory=dict)
    unrouted: dict[str, tuple[str, Tensor]] = field(default_factory=dict)

    def find_unrouted(self, analysis: ChannelAnalysis) -> None:
        """Note the rows of experts that nobody reads, of the program before its cut is carried out."""
        for node in analysis.program.calls(torch.ops.thresher.expert_linear.default):
            if taken_experts(node, analysis.facts) is not None and is_constant(node.args[2], analysis.facts):
                unread, between = unread_experts(node, analysis.facts)
                if bool(unread.any()):
                    self.unrouted |= {value.name: (node.args[1].name, unread) for value in between}

    def step(self, before: Program, analysis: ChannelAnalysis, renamed: dict[str, str]) -> Step:
        """Return the step from ``before`` to the analysed program, its cut carried out; ``renamed``: the new names of values."""
        kept: dict[str, tuple[str, dict[int, Tensor]]] = {}
        there = {n.name for n in analysis.program.graph.nodes}
        values = {n.name for n in before.graph.nodes if n.op in ("call_function", "placeholder")}
        read = {n.name: torch.tensor(True) for n in before.output.all_input_nodes}
        read |= {n.name: wanted for n, wanted in analysis.read.items() if n.name in values}
        for node in {node: None for node, _ in analysis.live}:
            name = renamed.get(node.name, node.name)
            if node.name in values and name in there:
                cut = [d for d in range(len(node.meta["val"].shape)) if not analysis.full(node, d)]
                kept[node.name] = (name, {d: analysis.keep[(node, d)].nonzero().reshape(-1) for d in cut})
        for name, other in self.stands_for.items():
            while other in self.stands_for:
                other = self.stands_for[other]
            if other in kept:
                kept[name], read[name] = kept[other], read.get(other, torch.tensor(False))
        choices = [n.args[0] for n in before.calls(torch.ops.aten.topk.default)]
        nonnegative = frozenset(n.name for x in choices for n in positive_chain(x))
        return Step(
            before,
            analysis.program,
            self.known,
            read,
            kept,
            list(self.reasons(before, kept)),
            nonnegative,
            self.unrouted,
        )

    def reasons(self, before: Program, kept: dict[str, tuple[str, dict[int, Tensor]]]) -> Iterator[Reason]:
        """Yield the reason for each index that is not kept: known from the arguments, or unread by the users."""
        for node in before.calls():
            for dim, indices in kept[node.name][1].items() if node.name in kept else ():
                size = sizes(node)[dim]
                gone = torch.ones(size, dtype=torch.bool).index_fill_(0, indices, False)
                mask, content = self.known.get(node.name, (torch.tensor([False]), torch.tensor([0.0])))
                constant = slices(mask, dim, size, every=True) if mask.dim() > dim else gone & False
                zero = constant & slices(mask & (content == 0), dim, size, every=True) if mask.dim() > dim else constant
                sources = tuple(n.name for n in node.all_input_nodes)
                users = tuple(n.name for n in node.users)
                rule = type(rule_of(node)).__name__
                for kind, which, names in (
                    ("zero", gone & zero, sources),
                    ("constant", gone & constant & ~zero, sources),
                    ("unread", gone & ~constant, users),
                ):
                    if bool(which.any()):
                        yield Reason(node.name, dim, indices_of(which), kind, str(node.target), rule, names)
