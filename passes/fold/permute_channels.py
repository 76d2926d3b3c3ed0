"""Put the dead channels of one side of a residual sum at the end, so that the other side is a plain narrow add.

The order of the channels of a coupled set is free: permuting the rows of everything that writes them and the columns of everything that
reads them changes nothing,

    W2 f(W1 x) = (W2 P^T) f((P W1) x)        for any permutation P and any f that treats channels alike.

A branch that is dead on a set D of channels may be computed without them (``fold-channels``, edge markers); where D is a range, what is
left is added to a part of the sum by a slice or a padding instead of a gather by index. Of several branches the one that saves most
decides first, then the next within what the first leaves equal. (Permutations for structure: Pool & Yu, NeurIPS 2021.)

A coupled set keeps its order if an input, an output or an operator that does not treat its channels alike (a reshape into heads, groups,
a concatenation) is in it, or if the edge marker would cost more than it saves.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from thresher.analysis.cost.cost import MachineModel, flops_of
from thresher.analysis.slices.channels import ChannelAnalysis
from thresher.analysis.slices.facts import sizes, slices, take
from thresher.analysis.slices.operators import rule_of
from thresher.analysis.slices.ties import Equal, Key
from thresher.analysis.slices.transfer.weighted import Weighted
from thresher.ir.lineage import moved
from thresher.ir.nodes import dtype_of, is_tensor, same_size
from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.registry import register_pass


@register_pass
@dataclass(frozen=True)
class PermuteChannels(Pass):
    """Order coupled channels so that those dead on one side form a range."""

    name: ClassVar[str] = "permute-channels"
    requires: ClassVar[tuple[str, ...]] = ("fold-batch-norm",)
    #: Only for what would save this many times what adding or taking a range costs; inf: never.
    min_improvement: float = 1.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.min_improvement >= 0, "min_improvement", "a factor from 0 on")

    def apply(self, program: Program, context: Context) -> PassResult:
        if self.min_improvement == float("inf"):
            return PassResult(program)
        analysis = ChannelAnalysis.of(program)
        sets = _coupled_sets(analysis)
        orders: dict[int, Tensor] = {}
        for number, partial_dead in _one_sided(analysis, context.machine, self.min_improvement).items():
            if number in sets:
                order = _order(partial_dead)
                if not torch.equal(order, torch.arange(order.numel())):
                    orders[number] = order
        if not orders:
            return PassResult(program)
        work, notes = program.clone(), []
        moves: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for number, order in orders.items():
            constants = [(node, dim) for node, dim in sets[number] if node.op == "get_attr" and isinstance(dim, int)]
            for node, dim in constants:
                moves[str(node.target)][dim] = order
            first = next(node for node, _ in sets[number] if node.op == "call_function")
            notes.append(Note.at(first, f"{order.numel()} coupled channels permuted in {len(constants)} constants"))
        for name, indices in moves.items():
            old, move = work.constants[name], partial(take, indices=indices)
            work.constants[name] = move(old)
            work.lineage.append(moved(name, name, old, move))
        return PassResult(work, notes)


def _coupled_sets(analysis: ChannelAnalysis) -> dict[int, list[Key]]:
    """Return the sets whose order is free: every operator on the way treats their indices alike, and no input or output is in them."""
    component = analysis.components()
    rigid: set[int] = set()
    members: dict[int, list[Key]] = defaultdict(list)
    for key, number in component.items():
        members[number].append(key)
    for tie in analysis.all_ties():
        if type(tie) is not Equal:
            rigid |= {component[key] for key in tie.keys}
    for node in analysis.program.graph.nodes:
        if not is_tensor(node):
            values = [n for n in node.all_input_nodes if is_tensor(n)]
            mentioned: set[Key] = set()
        else:
            values = [node, *(n for n in node.all_input_nodes if is_tensor(n))] if node.op != "get_attr" else []
            mentioned = {key for tie in analysis.ties.get(node, ()) for key in tie.keys}
        for value in values:
            for dim, size in enumerate(value.meta["val"].shape):
                if not same_size(size, 1) and (value, dim) not in mentioned:
                    rigid.add(component[(value, dim)])
    return {number: keys for number, keys in members.items() if number not in rigid}


def _one_sided(analysis: ChannelAnalysis, machine: MachineModel, min_improvement: float) -> dict[int, list[Tensor]]:
    """Return per coupled set the indices that single operators could do without, those that save most first, if worth an edge marker."""
    component = analysis.components()
    savings: dict[int, list[tuple[float, Tensor]]] = defaultdict(list)
    for node in analysis.program.calls():
        operator = rule_of(node)
        if not isinstance(operator, Weighted) or node not in analysis.read:
            continue
        channel, source = operator.channel(node), node.args[0]
        needed = slices(analysis.needed(source, node), channel, analysis.keep[(source, channel)].numel(), every=False)
        unread = analysis.keep[(source, channel)] & ~needed
        for key, dead in (((node, channel), analysis.kept_dead((node, channel))), ((source, channel), unread)):
            if bool(dead.any()):
                seconds = flops_of(node) * float(dead.float().mean()) / machine.flops
                moved_bytes = 2 * math.prod(sizes(key[0])) * dtype_of(key[0]).itemsize
                if seconds > min_improvement * (moved_bytes / machine.bandwidth + machine.launch):
                    savings[component[key]].append((seconds, dead))
    return {number: [d for _, d in sorted(sets, key=lambda s: -s[0])] for number, sets in savings.items()}


def _order(dead: list[Tensor]) -> Tensor:
    """Return the order by the first set (live before dead), within it by the second, and so on; otherwise as it was."""
    order = torch.arange(dead[0].numel())
    for which in reversed(dead):
        order = order[which[order].to(torch.uint8).argsort(stable=True)]
    return order
