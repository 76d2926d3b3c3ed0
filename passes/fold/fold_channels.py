"""Remove every slice that is constant or that nobody reads, exactly.

For a value ``v`` and a dimension ``d``, index ``i`` can go when each element of the slice ``v[.., i, ..]`` is *known* (does not depend on
an input) or *unread* (no output depends on it). With ``y = W x + b`` and ``x`` split into kept and cut channels,

    y = W_kept x_kept + (b + W_cut c)        c the known content of the cut channels, 0 where they are unread

so narrower tensors give the same function. Which indices must go together (residual adds, concatenations, heads, groups) is decided by the
ties of ``thresher.analysis`` (coupled structures: DepGraph, Fang et al., CVPR 2023). A layer of experts loses those that no row takes,
because ``topk`` never chooses them (their score is -inf, or 0 where the others are positive), and those whose weights are 0; the others are
looked up at their new places.

Refused: a dead channel that a tie keeps alive, which is reported with the operator that holds it; a route that is never the largest where
fewer than k would be left; an expert without weights where it is not known which experts the rows take.

Zero times anything counts as zero, also for NaN and infinity, where the unpruned product would be NaN, and minus infinity plus anything
as minus infinity (a closed attention mask, a route to an expert that no input takes); ``strict=True`` refuses to fold for models with
floating inputs, because any of them could be infinite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from thresher.analysis.slices.channels import ChannelAnalysis, constants_of, known_facts
from thresher.analysis.slices.facts import sizes, take
from thresher.analysis.slices.operators import rule_of
from thresher.analysis.slices.transfer.base import Facts, argument
from thresher.analysis.slices.transfer.edge_marker import edge_marker
from thresher.analysis.slices.transfer.elementwise import Elementwise
from thresher.analysis.slices.transfer.weighted import Weighted
from thresher.ir.lineage import Restore, computed, moved
from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.ir.program import Program, Role
from thresher.passes.fold import _edge_markers
from thresher.passes.fold._claims import Claims
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.registry import register_pass
from thresher.verification.certificate import Certificate, Step

aten = torch.ops.aten
MAX_ROUNDS = 6


@register_pass
@dataclass(frozen=True)
class FoldChannels(Pass):
    """Cut known and unread channels, heads, hidden units and dead branches out of the weights and the graph."""

    name: ClassVar[str] = "fold-channels"
    keeps_copies: ClassVar[bool] = True
    strict: bool = False
    round_to: int = 0  # keep dead channels up to a multiple of this (0: the target's tile, 1: never) ...
    slack: float = 0.125  # ... where that is at most this fraction more: a part-filled tile costs as much as a full one
    #: Two sides of an edge keep different channels where that saves this many times what it costs; inf: never.
    min_improvement: float = 1.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.round_to >= 0, "round_to", "a number of channels, or 0 for the target's tile")
        self.require(self.slack >= 0, "slack", "a fraction of the channels, from 0 on")
        self.require(self.min_improvement >= 0, "min_improvement", "a factor from 0 on")

    def apply(self, program: Program, context: Context) -> PassResult:
        result = PassResult(program)
        if self.strict and any(is_tensor(n) and dtype_of(n).is_floating_point for n in program.placeholders):
            first = program.placeholders[0]
            result.refusals.append(Note.at(first, "strict: an input may be NaN or infinite, and 0 * NaN is not 0"))
            return result
        proof: list[Step] = []
        for _ in range(MAX_ROUNDS):
            step = self.fold_once(result.program, context)
            result.refusals = result.refusals or step.refusals  # of the program as it was given
            if not step.rewrites:
                break
            result.program, result.rewrites = step.program, result.rewrites + step.rewrites
            proof += step.proof
            if not step.again:
                break
        if proof:
            result.certificate = Certificate(proof)
        return result

    def fold_once(self, program: Program, context: Context) -> _Round:
        """Analyse the program once and carry the cut out."""
        work = program.clone()
        facts, constants, claims = _replace_known_values(work)
        analysis, machine = ChannelAnalysis.of(work, facts), context.machine
        markers: list[fx.Node] = []
        if self.min_improvement < float("inf"):
            analysis, markers = _edge_markers.insert(analysis)
            analysis = _edge_markers.choose(analysis, markers, machine, self.min_improvement)
        refusals = _refusals(analysis)
        outputs = [(n, r.channel(n)) for n in work.calls() if isinstance(r := rule_of(n), Weighted)]
        multiples = (
            [self.round_to] if self.round_to else [machine.width, machine.width // 2]
        )  # a tile, else half of one
        analysis = analysis.padded(outputs, multiples, self.slack)
        rewrites = constants + _describe(analysis)
        if not rewrites:
            return _Round(program, [], refusals, [], False)
        marked = any(not analysis.full(m, m.args[1]) for m in markers)
        claims.find_unrouted(analysis)
        plan = _Plan(work, analysis)
        plan.carry_out()
        zeros = any(_without_zero_addend(work, node) for node in work.calls(aten.add.Tensor))
        again = analysis.vanished or plan.restructured or marked or zeros
        return _Round(work, rewrites, refusals, [claims.step(program, analysis, plan.stands_for)], again)


@dataclass
class _Round:
    """One cut; ``again``: a vanished dimension, an argument less or an edge marker may let the next round cut more."""

    program: Program
    rewrites: list[Note]
    refusals: list[Note]
    proof: list[Step]
    again: bool


# ---------------------------------------------------------------------- values that are constant as a whole


def _replace_known_values(program: Program) -> tuple[Facts, list[Note], Claims]:
    """Make a constant of every computed value all of whose elements are known (dead branches).

    Returns the facts of the result, notes, and the claims on the program as it was.
    """
    notes = []
    facts = known_facts(program)
    claims = Claims({n.name: (f.mask, f.content) for n, f in facts.items() if n.op == "call_function"})
    for node in list(program.calls()):
        fact = facts.get(node)
        if fact is None or not fact.all() or not any(_needs(user, facts) for user in node.users):
            continue
        if node.target is aten.expand.default and program.constant(node.args[0]) is not None:
            continue  # a constant already
        value = fact.value
        sources = {str(n.target): program.constants[n.target] for n in constants_of(node, facts)}
        constant = program.add_constant(value, f"{node.name}_known", dtype_of(node), like=node)
        program.lineage.append(computed(str(constant.target), sources))
        for user in list(node.users):
            replacement = constant
            if not _broadcasts(user, node) and tuple(value.shape) != shape_of(node):
                shape = list(shape_of(node))
                if any(isinstance(d, torch.SymInt) for d in shape):
                    continue
                replacement = program.insert_call(user, aten.expand.default, (constant, shape), like=node)
            user.replace_input_with(node, replacement)
        notes.append(Note.at(node, "the value is constant: its computation is removed"))
    for node in list(program.calls(aten.add.Tensor)):
        if other := _without_zero_addend(program, node):
            node.replace_all_uses_with(other)
            claims.stands_for[node.name] = other.name
            notes.append(Note.at(node, "adds a branch that is always zero: removed"))
    program.clean()
    if notes:
        program.propagate()
        facts = known_facts(program)
    return facts, notes, claims


def _needs(user: fx.Node, facts: dict) -> bool:
    """Return whether ``user`` computes something that is not itself constant."""
    return user not in facts or not facts[user].all()


def _broadcasts(user: fx.Node, node: fx.Node) -> bool:
    """Return whether ``user`` gives the same result when ``node`` is narrow: another operand already has the full shape."""
    if not isinstance(rule_of(user), Elementwise):
        return False
    return any(is_tensor(n) and n is not node and shape_of(n) == shape_of(user) for n in user.all_input_nodes)


def _without_zero_addend(program: Program, node: fx.Node) -> fx.Node | None:
    """Return what ``node`` adds a constant zero to, or None."""
    for zero, other in (node.args[:2], node.args[1::-1]):
        constant = program.constant(zero)
        if constant is None or bool(constant.any()) or not is_tensor(other) or argument(node, 2, "alpha", 1) != 1:
            continue
        if shape_of(other) == shape_of(node) and dtype_of(other) == dtype_of(node):
            return other
    return None


# ---------------------------------------------------------------------- carrying out a cut


class _Plan:
    """The editor handed to ``TransferRule.narrow``: the analysis, and the edits that a rule may ask for."""

    def __init__(self, program: Program, analysis: ChannelAnalysis):
        self.program, self.analysis = program, analysis
        self.facts, self.keep, self.full, self.count = analysis.facts, analysis.keep, analysis.full, analysis.count
        self.stands_for: dict[str, str] = {}  # a value with its bias map, under the name of the value
        self.restructured = False  # an operator has other arguments than before

    def carry_out(self) -> None:
        shapes = {n: sizes(n) for n in self.program.graph.nodes if is_tensor(n)}
        for node in list(self.program.calls()):
            if any(
                not self.full(n, d) for n in (node, *node.all_input_nodes) if n in shapes for d in range(len(shapes[n]))
            ):
                rule_of(node).narrow(node, self)
        _edge_markers.realise(self.program, self.analysis)
        for node in list(self.program.graph.nodes):
            if (
                node.op == "get_attr"
                and node in shapes
                and any(not self.full(node, d) for d in range(len(shapes[node])))
            ):
                name, old = str(node.target), self.program.constants[node.target]
                self.program.lineage.append(moved(name, name, old, partial(self.cut, node)))
                self.program.constants[name] = self.narrowed(node)
        self.program.clean().propagate()

    def narrowed(self, node: fx.Node) -> Tensor:
        """Return the kept elements of a constant."""
        return self.cut(node, self.program.constants[node.target])

    def cut(self, node: fx.Node, tensor: Tensor) -> Tensor:
        """Return the elements of a tensor of the shape of ``node`` that are kept of ``node``."""
        cut = [dim for dim in range(tensor.dim()) if not self.full(node, dim)]
        return take(tensor, {dim: self.keep[(node, dim)].nonzero().reshape(-1) for dim in cut})

    def leave_out(self, node: fx.Node, operands: set[fx.Node]) -> None:
        """Drop arguments of a concatenation."""
        node.update_arg(0, [n for n in node.args[0] if n not in operands])
        self.restructured = True

    def replace_constant(self, node: fx.Node, index: int, move: Callable[[Tensor], Tensor]) -> None:
        """Give ``node`` another constant argument, made by moving elements of the old; one that others use too stays for them."""
        old: fx.Node = node.args[index]
        name, original = str(old.target), self.program.constants[old.target]
        value = move(original).contiguous()
        if len(old.users) == 1:
            self.program.constants[name] = value
        else:
            new = self.program.add_constant(value, name, dtype_of(old), like=old)
            node.update_arg(index, new)
        self.program.lineage.append(moved(str(node.args[index].target), name, original, move))

    def add_to_bias(self, node: fx.Node, term: Tensor) -> None:
        """``bias + term`` (already narrow) as the new bias of a linear or a convolution."""
        old: fx.Node | None = argument(node, 2, "bias")
        value = term if old is None else self.narrowed(old).double() + term
        bias = self.program.add_constant(value, f"{node.name}_bias", dtype_of(node), like=node)
        if old is not None:
            name, new_name = str(old.target), str(bias.target)
            self.program.lineage.append(moved(name, name, self.program.constants[name], partial(self.cut, old)))
            self.program.lineage.append(Restore((new_name,), lambda values: {name: values[new_name] - term}))
        if len(node.args) > 2:
            node.update_arg(2, bias)
        else:
            node.update_kwarg("bias", bias)
            node.args, node.kwargs = (*node.args, bias), {k: v for k, v in node.kwargs.items() if k != "bias"}

    def add_after(self, node: fx.Node, term: Tensor) -> None:
        """Add a bias map after ``node``: what padding lets through differs at the border."""
        self._add(node, self._derived(node, term))

    def add_border(self, node: fx.Node, weight: Tensor) -> None:
        """Add after the convolution ``node`` what it makes of one channel of ones with this weight: a bias map of the size of its input."""
        insert = partial(self.program.insert_call, node, like=node)
        corner = insert(aten.slice.Tensor, (insert(aten.slice.Tensor, (node.args[0], 0, 0, 1)), 1, 0, 1))
        operands = (insert(aten.ones_like.default, (corner,)), self._derived(node, weight), None)
        kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}
        self._add(node, insert(node.target, (*operands, *node.args[3:]), kwargs))

    def _derived(self, node: fx.Node, value: Tensor) -> fx.Node:
        return self.program.add_constant(value, f"bias_map.{node.name}", dtype_of(node), like=node, role=Role.DERIVED)

    def _add(self, node: fx.Node, term: fx.Node) -> None:
        with self.program.graph.inserting_after(node):
            total = self.program.graph.call_function(aten.add.Tensor, (node, term))
        total.meta = dict(node.meta)
        for dim in range(len(sizes(node))):  # to what comes later the sum is what the operator was
            self.keep[(total, dim)] = self.keep[(node, dim)]
        if node in self.facts:
            self.facts[total] = self.facts[node]
        self.stands_for[node.name] = total.name
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)

    def looked_up(self, user: fx.Node, numbers: fx.Node, table: Tensor) -> fx.Node:
        """Return what ``table`` has for each element of ``numbers``, computed before ``user``."""
        constant = self.program.add_constant(table, f"{user.name}_table", like=numbers, role=Role.BUFFER)
        return self.program.insert_call(user, aten.index.Tensor, (constant, [numbers]), like=user)

    def look_up(self, node: fx.Node, table: Tensor) -> None:
        """Let all users of ``node``, numbers of what is kept, read what ``table`` has for them: the numbers from before."""
        constant = self.program.add_constant(table, f"{node.name}_table", like=node, role=Role.BUFFER)
        with self.program.graph.inserting_after(node):
            before = self.program.graph.call_function(aten.index.Tensor, (constant, [node]))
        before.meta = dict(node.meta)
        for dim in range(len(sizes(node))):
            if (node, dim) in self.keep:
                self.keep[(before, dim)] = self.keep[(node, dim)]
        self.stands_for[node.name] = before.name
        node.replace_all_uses_with(before, delete_user_cb=lambda user: user is not before)


# ---------------------------------------------------------------------- telling


def _describe(analysis: ChannelAnalysis) -> list[Note]:
    """Return one note per operator with weights of which some go; without any, one for the first other narrowed value."""
    notes = []
    for node in analysis.program.calls():
        widths = [(label, key) for label, key in rule_of(node).widths(node) if not analysis.full(*key)]
        if widths:
            parts = [f"{label} {analysis.keep[key].numel()} -> {analysis.count(*key)}" for label, key in widths]
            notes.append(Note.at(node, ", ".join(parts)))
    if not notes and analysis.cuts:
        notes = [Note.at(node, f"dimension {dim} narrowed") for node, dim in analysis.cuts[:1]]
    return notes


def _refusals(analysis: ChannelAnalysis) -> list[Note]:
    """Return a refusal for the dead outputs of weighted operators that a tie keeps, and for what rules refuse themselves."""
    held: dict[tuple[fx.Node, fx.Node | None], tuple[int, int]] = {}
    for node in analysis.program.calls():
        operator = rule_of(node)
        if isinstance(operator, Weighted):
            key = (node, operator.channel(node))
            count = int(analysis.kept_dead(key).sum())
            if count:
                held[node, analysis.holders.get(key)] = count, analysis.keep[key].numel()
    notes = [
        Note.at(node, reason)
        for node in analysis.program.calls()
        if (reason := rule_of(node).refusal(node, analysis.facts))
    ]
    for (node, holder), (count, total) in held.items():
        notes.append(Note.at(node, f"{count} of {total} dead outputs kept: held by {_holder(holder)}"))
    return notes


def _holder(node: fx.Node | None) -> str:
    if node is None:
        return "another use of the value"
    while node.target is edge_marker:  # closed: what it would move costs more than the dead channels
        node = next(iter(node.users))
    return f"{node.name} ({node.target})"
