"""How facts about slices pass through each operator: one row of a table per family.

A row answers four questions about a call:

* ``known(node, facts)``           which elements of the result are constant, given those of the arguments;
* ``read(node, wanted, facts)``    which elements of each argument the wanted elements of the result depend on;
* ``ties(node, facts)``            which dimensions of arguments and result are cut together; a dimension that no tie of an
                                   operator mentions is never cut by it;
* ``shrink(node, plan)``           how the call changes when its arguments got narrower (literals, groups, bias).

To support an operator, add it to ``TABLE`` at the end. What is not in the table is never cut through, and says so in the report.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

import thresher.ops.shrink  # noqa: F401  (registers the operator)
from thresher.analysis.facts import Known, compress, hint, known, of_constant, reduce_to, sizes, slices
from thresher.analysis.ties import Key, Tie, equal, split
from thresher.program import is_tensor

aten = torch.ops.aten
Facts = dict[fx.Node, Known]


def tensors(node: fx.Node) -> list[fx.Node]:
    """The tensor arguments of a call, lists flattened, in order and without repetition."""
    return [n for n in node.all_input_nodes if is_tensor(n)]


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or by name, or its default."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def concrete(value: Any) -> Any:
    """Literals of a call with the example's numbers for symbolic ones, and float64 for every floating dtype."""

    def one(v: Any) -> Any:
        if isinstance(v, fx.Node):
            v = v.meta["val"]
        if isinstance(v, torch.SymInt):
            return hint(v)
        return torch.float64 if isinstance(v, torch.dtype) and v.is_floating_point else v

    return fx.node.map_aggregate(value, one)


def evaluate(node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor:
    """Run the call on the given tensors."""
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda a: values[a] if isinstance(a, fx.Node) and a in values else concrete(a)
    )
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


class Row:
    """The safe default: nothing is known, everything is read, nothing is cut."""

    supported = False

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        return None

    def read(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        everything = bool(wanted.any())
        return {n: torch.full([1] * len(sizes(n)), everything) for n in tensors(node)}

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        return []

    def pins(self, node: fx.Node, facts: Facts) -> list[tuple[Key, Tensor]]:
        """Indices that must stay although nothing reads or varies them."""
        return []

    def shrink(self, node: fx.Node, plan: Any) -> None:
        return None


class Elementwise(Row):
    """Each element of the result depends on the elements at the same place of the (broadcast) operands."""

    supported = True

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        operands = tensors(node)
        if not any(n in facts for n in operands):
            return None
        values = {n: facts[n].value if n in facts else _nothing(n) for n in operands}
        masks = [facts[n].mask if n in facts else torch.zeros([1] * len(sizes(n)), dtype=torch.bool) for n in operands]
        mask = masks[0]
        for other in masks[1:]:
            mask = mask & other
        rank = len(sizes(node))
        mask = mask.reshape([1] * (rank - mask.dim()) + list(mask.shape))
        zero = self.absorbed(node, facts)
        if zero is None and not bool(mask.any()):
            return None
        value = torch.zeros([1] * rank, dtype=torch.float64)
        if bool(mask.any()):
            value = evaluate(node, values)
        if zero is not None:
            value = torch.where(zero, torch.zeros((), dtype=value.dtype), value)
            mask = mask | zero
        return known(mask, value)

    def absorbed(self, node: fx.Node, facts: Facts) -> Tensor | None:
        """Where the result is 0 whatever the unknown operands are."""
        return None

    def relevant(self, node: fx.Node, operand: fx.Node, facts: Facts) -> Tensor | None:
        """Where the result depends on ``operand`` at all (None: everywhere)."""
        return None

    def read(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        result = {}
        for operand in tensors(node):
            relevant = self.relevant(node, operand, facts)
            result[operand] = reduce_to(wanted if relevant is None else wanted & relevant, sizes(operand))
        return result

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        out, found = sizes(node), []
        for operand in tensors(node):
            shape = sizes(operand)
            shift = len(out) - len(shape)
            for dim, size in enumerate(shape):
                if size == out[dim + shift]:
                    found.append(equal(node, (node, dim + shift), (operand, dim), size))
        return found


class Filled(Elementwise):
    """zeros_like, full_like, zeros, full ...: constant, and only the shape of an argument matters."""

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        value = evaluate(node, {n: torch.empty(sizes(n)) for n in tensors(node)})
        return known(torch.ones([1] * value.dim(), dtype=torch.bool), compress(value))

    def read(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        return {n: torch.zeros([1] * len(sizes(n)), dtype=torch.bool) for n in tensors(node)}


class Product(Elementwise):
    """``a * b``: zero on either side decides."""

    def absorbed(self, node: fx.Node, facts: Facts) -> Tensor | None:
        zeros = [facts[n].zero() for n in tensors(node) if n in facts]
        if not zeros:
            return None
        zero = zeros[0] | zeros[1] if len(zeros) == 2 else zeros[0]
        return zero.reshape([1] * (len(sizes(node)) - zero.dim()) + list(zero.shape))

    def relevant(self, node: fx.Node, operand: fx.Node, facts: Facts) -> Tensor | None:
        others = [n for n in tensors(node) if n is not operand]
        return ~facts[others[0]].zero() if others and others[0] in facts else None


class Quotient(Elementwise):
    """``a / b``: a zero numerator decides."""

    def absorbed(self, node: fx.Node, facts: Facts) -> Tensor | None:
        numerator = node.args[0]
        if numerator not in facts:
            return None
        zero = facts[numerator].zero()  # type: ignore[index]
        return zero.reshape([1] * (len(sizes(node)) - zero.dim()) + list(zero.shape))

    def relevant(self, node: fx.Node, operand: fx.Node, facts: Facts) -> Tensor | None:
        numerator = node.args[0]
        return ~facts[numerator].zero() if operand is not numerator and numerator in facts else None  # type: ignore[index]


class Choice(Elementwise):
    """``where(condition, a, b)``: a known condition picks the operand that matters."""

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        condition, a, b = node.args
        if condition not in facts or not facts[condition].all():  # type: ignore[index]
            return super().known(node, facts)
        picked = facts[condition].value  # type: ignore[index]
        parts = [(facts[n].mask, facts[n].value) if n in facts else (torch.tensor(False), torch.zeros((), dtype=torch.float64)) for n in (a, b)]  # type: ignore[index]
        mask = torch.where(picked, parts[0][0], parts[1][0])
        value = torch.where(picked, parts[0][1].double(), parts[1][1].double())
        rank = len(sizes(node))
        return known(mask.reshape([1] * (rank - mask.dim()) + list(mask.shape)), value.reshape([1] * (rank - value.dim()) + list(value.shape)))

    def relevant(self, node: fx.Node, operand: fx.Node, facts: Facts) -> Tensor | None:
        condition, a, b = node.args
        if a is b or operand is condition or condition not in facts or not facts[condition].all():  # type: ignore[index]
            return None
        return facts[condition].value if operand is a else ~facts[condition].value  # type: ignore[index]


class Movement(Row):
    """Operators that only move elements: every element of the result is one element of one argument.

    All questions are answered by running the operator itself: on the facts (forward), and on a tensor of element numbers
    (backward, ties). So a row needs only say how its literals change.
    """

    supported = True

    def __init__(self, fix: Callable[[fx.Node, Any], None] | None = None):
        self.fix = fix

    def sources(self, node: fx.Node) -> Tensor:
        """For each element of the result the number of the argument's element it is; arguments are numbered one after the other."""
        values, start = {}, 0
        for operand in tensors(node):
            shape = sizes(operand)
            values[operand] = torch.arange(start, start + math.prod(shape)).reshape(shape)
            start += math.prod(shape)
        return evaluate(node, values)

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        operands = tensors(node)
        if not any(n in facts for n in operands):
            return None
        masks = {n: _mask(n, facts).expand(sizes(n)) for n in operands}
        values = {n: (facts[n].value if n in facts else _nothing(n)).expand(sizes(n)) for n in operands}
        return known(evaluate(node, masks), evaluate(node, values))

    def read(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        operands = tensors(node)
        source = self.sources(node)
        total = sum(math.prod(sizes(n)) for n in operands)
        if bool(wanted.all()) and source.numel() == total:
            return {n: torch.ones([1] * len(sizes(n)), dtype=torch.bool) for n in operands}
        flat = torch.zeros(total, dtype=torch.bool)
        flat[source[wanted.expand(source.shape)]] = True
        parts = flat.split([math.prod(sizes(n)) for n in operands])
        return {n: compress(part.reshape(sizes(n))) for n, part in zip(operands, parts)}

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        found: list[Tie] = []
        source, start = self.sources(node), 0
        for operand in tensors(node):
            shape = sizes(operand)
            count = math.prod(shape)
            inside = (source >= start) & (source < start + count)
            found += _movement_ties(node, operand, shape, source - start, inside)
            start += count
        return found

    def shrink(self, node: fx.Node, plan: Any) -> None:
        if self.fix is not None:
            self.fix(node, plan)


def _movement_ties(node: fx.Node, operand: fx.Node, shape: tuple[int, ...], source: Tensor, inside: Tensor) -> list[Tie]:
    """Ties between the dimensions of one argument and those of the result, from the element numbers in ``source``."""
    if not bool(inside.any()):
        return []
    lows, highs = [], []
    for dim in range(source.dim()):
        present = slices(inside, dim, source.shape[dim], every=False).nonzero().reshape(-1)
        lows.append(int(present[0]))
        highs.append(int(present[-1]) + 1)
    box = source[tuple(slice(a, b) for a, b in zip(lows, highs))]
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    places = {d: (box // strides[d]) % shape[d] for d in range(len(shape)) if shape[d] > 1}
    depends = {d: {e for e in range(box.dim()) if bool((place != place.narrow(e, 0, 1)).any())} for d, place in places.items()}
    found = []
    for dims, outs in _groups(depends):
        corner = tuple(slice(None) if e in outs else 0 for e in range(box.dim()))
        left_sizes = tuple(shape[d] for d in dims)
        index = torch.zeros(tuple(box.shape[e] for e in outs), dtype=torch.long)
        for d in dims:
            index = index * shape[d] + places[d][corner]
        out_sizes = tuple(source.shape[e] for e in outs)
        if len(outs) == 1 and out_sizes[0] != box.shape[outs[0]]:  # a part of a concatenation
            found.append(_Segment(node, tuple((operand, d) for d in dims), ((node, outs[0]),), left_sizes, out_sizes, index, lows[outs[0]]))
        elif out_sizes == tuple(index.shape):
            found.append(Tie(node, tuple((operand, d) for d in dims), tuple((node, e) for e in outs), left_sizes, out_sizes, index))
    return found


class _Segment(Tie):
    """A tie in which the result's dimension holds the left side as one of its segments, from ``start`` on."""

    def __init__(self, node, left, right, left_sizes, right_sizes, index, start):  # type: ignore[no-untyped-def]
        super().__init__(node, left, right, left_sizes, right_sizes, index)
        self.start = start

    def close(self, keep: dict[Key, Tensor]) -> list[Key]:
        key, stop = self.right[0], self.start + self.index.shape[0]
        inner = Tie(self.node, self.left, self.right, self.left_sizes, (stop - self.start,), self.index)
        part = {**{k: keep[k] for k in self.left}, key: keep[key][self.start : stop]}
        grown = inner.close(part)
        for changed in grown:
            if changed == key:
                whole = keep[key].clone()
                whole[self.start : stop] = part[key]
                keep[key] = whole
            else:
                keep[changed] = part[changed]
        return grown


def _groups(depends: dict[int, set[int]]) -> list[tuple[list[int], list[int]]]:
    """Connected components of "argument dimension d depends on result dimensions E"."""
    groups: list[tuple[set[int], set[int]]] = []
    for d, outs in depends.items():
        dims, joined = {d}, set(outs)
        rest = []
        for other_dims, other_outs in groups:
            if other_outs & joined:
                dims |= other_dims
                joined |= other_outs
            else:
                rest.append((other_dims, other_outs))
        groups = [*rest, (dims, joined)]
    return [(sorted(a), sorted(b)) for a, b in groups]


def _nothing(node: fx.Node) -> Tensor:
    dtype = node.meta["val"].dtype
    return torch.zeros([1] * len(sizes(node)), dtype=torch.float64 if dtype.is_floating_point else dtype)


def _mask(node: fx.Node, facts: Facts) -> Tensor:
    return facts[node].mask if node in facts else torch.zeros([1] * len(sizes(node)), dtype=torch.bool)


def fix_sizes(position: int) -> Callable[[fx.Node, Any], None]:
    """view, reshape, expand: the size literals of cut dimensions."""

    def fix(node: fx.Node, plan: Any) -> None:
        old = list(node.args[position])  # type: ignore[arg-type]
        new = [s if isinstance(s, fx.Node) or s == -1 or plan.full(node, d) else plan.count(node, d) for d, s in enumerate(old)]
        node.update_arg(position, new)

    return fix


def fix_slice(node: fx.Node, plan: Any) -> None:
    """slice: its bounds among the kept indices."""
    operand = node.args[0]
    dim = argument(node, 1, "dim", 0) % len(sizes(node))
    if plan.full(operand, dim):
        return
    size = sizes(operand)[dim]  # type: ignore[arg-type]
    start, stop, _ = slice(*(concrete(argument(node, i, k)) for i, k in ((2, "start"), (3, "end")))).indices(size)
    keep = plan.keep[(operand, dim)]
    first = int(keep[:start].sum())
    node.args = (operand, dim, first, first + int(keep[start:stop].sum()))
    node.kwargs = {}


def fix_select(node: fx.Node, plan: Any) -> None:
    """select: its index among the kept ones."""
    operand, dim, index = node.args
    dim = dim % len(sizes(operand))  # type: ignore[operator,arg-type]
    if not plan.full(operand, dim):
        index = index % sizes(operand)[dim]  # type: ignore[operator,arg-type]
        node.args = (operand, dim, int(plan.keep[(operand, dim)][:index].sum()))


class Slice(Movement):
    """slice with a step other than 1 is not cut along its dimension."""

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        found = super().ties(node, facts)
        if argument(node, 4, "step", 1) == 1:
            return found
        dim = argument(node, 1, "dim", 0) % len(sizes(node))
        return [t for t in found if (node, dim) not in t.keys]


class Pad(Movement):
    """constant_pad_nd: padded dimensions are never cut, the others pass."""

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        operand = node.args[0]
        if operand not in facts:
            return None
        fill = argument(node, 2, "value", 0) or 0
        shape = sizes(operand)  # type: ignore[arg-type]
        mask = torch.nn.functional.pad(facts[operand].mask.expand(shape), node.args[1], value=True)  # type: ignore[index,arg-type]
        value = torch.nn.functional.pad(facts[operand].value.expand(shape).contiguous(), node.args[1], value=fill)  # type: ignore[index,arg-type]
        return known(mask, value)

    def padded(self, node: fx.Node) -> set[int]:
        amounts, rank = list(node.args[1]), len(sizes(node))  # type: ignore[arg-type]
        return {rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}

    def read(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        operand: fx.Node = node.args[0]  # type: ignore[assignment]
        for dim in self.padded(node):
            wanted = wanted.any(dim, keepdim=True)
        return {operand: wanted}

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        operand: fx.Node = node.args[0]  # type: ignore[assignment]
        padded = self.padded(node)
        return [equal(node, (node, d), (operand, d), s) for d, s in enumerate(sizes(operand)) if d not in padded]


class Mixing(Row):
    """Operators that mix the elements along some dimensions of their first argument and treat the others alike.

    ``dims(node)`` names the mixed ones; ``removed`` says whether they are gone from the result (a reduction without keepdim).
    """

    supported = True

    def __init__(self, dims: Callable[[fx.Node], tuple[list[int], bool]]):
        self.dims = dims

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        operand: fx.Node = node.args[0]  # type: ignore[assignment]
        if operand not in facts:
            return None
        mixed, removed = self.dims(node)
        shape = sizes(operand)
        mask = facts[operand].mask
        for dim in mixed:
            mask = mask.all(dim, keepdim=True)
        if not bool(mask.any()):
            return None
        value = facts[operand].value
        value = value.expand([shape[d] if d in mixed else value.shape[d] for d in range(len(shape))])
        value = evaluate(node, {operand: value.contiguous()})
        if removed:
            mask = mask.squeeze(mixed)
        return known(mask, value)

    def read(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        operand: fx.Node = node.args[0]  # type: ignore[assignment]
        mixed, removed = self.dims(node)
        for dim in sorted(mixed):
            wanted = wanted.unsqueeze(dim) if removed else wanted.any(dim, keepdim=True)
        return {operand: wanted}

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        operand: fx.Node = node.args[0]  # type: ignore[assignment]
        mixed, removed = self.dims(node)
        kept = [d for d in range(len(sizes(operand))) if d not in mixed]
        places = range(len(kept)) if removed else kept
        return [equal(node, (node, e), (operand, d), sizes(operand)[d]) for d, e in zip(kept, places)]


def spatial(node: fx.Node) -> tuple[list[int], bool]:
    """Pools and resizes: the last one, two or three dimensions, as the operator's name says."""
    count, rank = int(re.search(r"(\d)d", str(node.target))[1]), len(sizes(node))  # type: ignore[index]
    return list(range(rank - count, rank)), False


def along(position: int) -> Callable[[fx.Node], tuple[list[int], bool]]:
    """softmax, cumsum: the dimension given as an argument stays in the result."""

    def dims(node: fx.Node) -> tuple[list[int], bool]:
        return [node.args[position] % len(sizes(node))], False  # type: ignore[operator]

    return dims


def reduced(node: fx.Node) -> tuple[list[int], bool]:
    """mean, sum, amax ...: the dimensions given as the second argument, gone unless keepdim."""
    rank = len(sizes(node.args[0]))  # type: ignore[arg-type]
    dims = argument(node, 1, "dim")
    dims = list(range(rank)) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
    keepdim = bool(argument(node, 2, "keepdim", False)) if node.target is not aten.var.correction else bool(node.kwargs.get("keepdim", False))
    return sorted(d % rank for d in dims), not keepdim


class LayerNorm(Row):
    """The normalised dimensions stay whole; a channel whose weight is 0 is known: its bias."""

    supported = True

    def normalised(self, node: fx.Node) -> list[int]:
        rank = len(sizes(node))
        return list(range(rank - len(node.args[1]), rank))  # type: ignore[arg-type]

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias") if node.target is aten.layer_norm.default else None
        if weight not in facts or (bias is not None and bias not in facts):
            return None
        rank = len(sizes(node))
        shape = [1] * (rank - len(sizes(weight))) + list(sizes(weight))
        value = facts[bias].value.expand(sizes(weight)) if bias is not None else torch.zeros(sizes(weight), dtype=torch.float64)
        return known(facts[weight].zero().reshape(shape), value.reshape(shape))

    def read(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        result = super().read(node, wanted, facts)
        for dim in self.normalised(node):
            wanted = wanted.any(dim, keepdim=True)
        result[node.args[0]] = wanted  # type: ignore[index]
        return result

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        operand: fx.Node = node.args[0]  # type: ignore[assignment]
        lead = len(sizes(node)) - len(node.args[1])  # type: ignore[arg-type]
        return [equal(node, (node, d), (operand, d), sizes(node)[d]) for d in range(lead)]


class GroupNorm(Row):
    """Channels of a group are normalised together: only the batch passes."""

    supported = True

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        return [equal(node, (node, 0), (node.args[0], 0), sizes(node)[0])]  # type: ignore[arg-type]


class Weighted(Row):
    """What linear and the convolutions share: ``out[o] = bias[o] + sum_i weight[o, i] * x[i]`` with a constant weight.

    A row of the weight that is zero wherever its input is unknown makes the output channel known; a column that is zero for all
    wanted rows makes the input channel unread; a known input channel that is cut leaves a term behind, which goes into the
    bias, or, where padding shows (the term differs at the border), into a bias map that is added after the operator.
    """

    supported = True

    def shrink(self, node: fx.Node, plan: Any) -> None:
        term = self.left_behind(node, plan)
        if term is None:
            return
        channel = self.channel(node)
        narrow = all(size == 1 for d, size in enumerate(term.shape) if d != channel)
        if narrow:
            plan.add_to_bias(node, term.reshape(-1))
        else:
            plan.add_after(node, term)

    def channel(self, node: fx.Node) -> int:
        raise NotImplementedError

    def left_behind(self, node: fx.Node, plan: Any) -> Tensor | None:
        """The (narrow) sum of what the cut, known input channels contributed to the kept outputs; None where it is 0."""
        operand: fx.Node = node.args[0]  # type: ignore[assignment]
        fact, channel = plan.facts.get(operand), self.channel(node)
        if fact is None or plan.full(operand, channel):
            return None
        shape = [1] * len(sizes(operand))
        shape[channel] = -1
        gone = torch.where(fact.mask & ~plan.keep[(operand, channel)].reshape(shape), fact.value, torch.zeros((), dtype=torch.float64))
        if not bool(gone.any()):
            return None
        term = self.apply(node, gone, plan.facts[node.args[1]].value)
        for dim in range(term.dim()):
            if term.shape[dim] > 1 and not plan.full(node, dim):
                term = term.index_select(dim, plan.keep[(node, dim)].nonzero().reshape(-1))
        return term if bool(term.any()) else None

    def apply(self, node: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
        """The operator without its bias on a narrow input; the narrow result."""
        raise NotImplementedError


class Linear(Weighted):
    """``aten.linear``: x [..., I], weight [O, I], bias [O]."""

    def channel(self, node: fx.Node) -> int:
        return len(sizes(node)) - 1

    def apply(self, node: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
        return compress(x.expand(*x.shape[:-1], weight.shape[1]) @ weight.T)

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        if weight not in facts or (bias is not None and bias not in facts):
            return None
        w = facts[weight].value  # type: ignore[index]
        used = (w != 0).double()
        unknown = (~_mask(x, facts)).double().expand(*_mask(x, facts).shape[:-1], w.shape[1])  # type: ignore[arg-type]
        mask = (unknown @ used.T) == 0
        if not bool(mask.any()):
            return None
        value = torch.zeros_like(mask, dtype=torch.float64)
        if x in facts and bool(facts[x].value.any()):  # type: ignore[index]
            value = self.apply(node, facts[x].value, w)  # type: ignore[index]
        if bias is not None:
            value = value + facts[bias].value
        return known(mask, value)

    def read(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        result = super().read(node, wanted, facts)
        x, weight = node.args[:2]
        if weight in facts:
            w = facts[weight].value  # type: ignore[index]
            result[x] = compress((wanted.double().expand(*wanted.shape[:-1], w.shape[0]) @ (w != 0).double()) > 0)  # type: ignore[index]
        return result

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        if weight not in facts:
            return []
        last, (rows, columns) = self.channel(node), sizes(weight)  # type: ignore[arg-type]
        found = [equal(node, (node, d), (x, d), sizes(node)[d]) for d in range(last)]  # type: ignore[arg-type]
        found += [equal(node, (x, last), (weight, 1), columns), equal(node, (node, last), (weight, 0), rows)]  # type: ignore[arg-type]
        if bias is not None:
            found.append(equal(node, (node, last), (bias, 0), rows))
        return found


class Convolution(Weighted):
    """1-d to 3-d, strided, dilated, grouped, depthwise, and transposed.

    weight: [O, I/groups, *k]; transposed: [I, O/groups, *k]. Whole groups go, and equal positions within all groups.
    """

    def __init__(self, dims: int, transposed: bool = False):
        self.rank, self.transposed = dims + 2, transposed

    def channel(self, node: fx.Node) -> int:
        return 1

    def groups(self, node: fx.Node) -> int:
        return argument(node, 6, "groups", 1)

    def usable(self, node: fx.Node, facts: Facts) -> bool:
        bias = argument(node, 2, "bias")
        return len(sizes(node.args[0])) == self.rank and node.args[1] in facts and (bias is None or bias in facts)  # type: ignore[arg-type,operator]

    def connections(self, node: fx.Node, facts: Facts) -> Tensor:
        """[groups, O/groups, I/groups]: whether any tap of the weight is nonzero."""
        weight, groups = facts[node.args[1]].value, self.groups(node)  # type: ignore[index]
        used = (weight != 0).flatten(2).any(2)
        if self.transposed:
            return used.reshape(groups, -1, used.shape[1]).transpose(1, 2)
        return used.reshape(groups, -1, used.shape[1])

    def apply(self, node: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
        operand: fx.Node = node.args[0]  # type: ignore[assignment]
        shape = (1, *sizes(operand)[1:])
        args = [x.expand(shape), weight, None, *concrete(tuple(node.args[3:]))]
        return compress(node.target(*args, **{k: concrete(v) for k, v in node.kwargs.items() if k != "bias"}))  # type: ignore[operator]

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        if not self.usable(node, facts):
            return None
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        used = self.connections(node, facts)
        count = sizes(x)[1]  # type: ignore[arg-type]
        constant = slices(_mask(x, facts), 1, count, every=True).reshape(used.shape[0], 1, -1)  # type: ignore[arg-type]
        mask = ~(used & ~constant).any(2).reshape(-1)
        if not bool(mask.any()):
            return None
        shape = [1, -1] + [1] * (self.rank - 2)
        value = torch.zeros(mask.numel(), dtype=torch.float64).reshape(shape)
        if x in facts and bool(facts[x].value.any()):  # type: ignore[index]
            value = self.apply(node, facts[x].value, facts[weight].value)  # type: ignore[index]
        if bias is not None:
            value = value + facts[bias].value.reshape(shape)
        return known(mask.reshape(shape), value)

    def read(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        result = super().read(node, wanted, facts)
        if self.usable(node, facts):
            used = self.connections(node, facts)
            rows = slices(wanted, 1, sizes(node)[1], every=False).reshape(used.shape[0], -1, 1)
            result[node.args[0]] = (used & rows).any(1).reshape([1, -1] + [1] * (self.rank - 2))  # type: ignore[index]
        return result

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        if not self.usable(node, facts):
            return []
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        groups, inputs, outputs = self.groups(node), sizes(x)[1], sizes(node)[1]  # type: ignore[arg-type]
        g, i, o = (node, "group"), (node, "input"), (node, "output")
        ins, outs = (groups, inputs // groups), (groups, outputs // groups)
        found = [split(node, (x, 1), (g, i), ins), split(node, (node, 1), (g, o), outs)]  # type: ignore[arg-type]
        if self.transposed:
            found += [split(node, (weight, 0), (g, i), ins), equal(node, (weight, 1), o, outs[1])]  # type: ignore[arg-type]
        else:
            found += [split(node, (weight, 0), (g, o), outs), equal(node, (weight, 1), i, ins[1])]  # type: ignore[arg-type]
        if bias is not None:
            found.append(split(node, (bias, 0), (g, o), outs))
        return found

    def shrink(self, node: fx.Node, plan: Any) -> None:
        super().shrink(node, plan)  # first: it still needs the old number of groups
        groups = plan.count(node, "group")
        if self.groups(node) != groups:
            node.update_arg(6, groups) if len(node.args) > 6 else node.update_kwarg("groups", groups)


class Embedding(Row):
    """weight [V, D], indices [...] -> [..., D]: the vocabulary stays, the width can go."""

    supported = True

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        weight = node.args[0]
        if weight not in facts:
            return None
        table = facts[weight].value  # type: ignore[index]
        same = (table == table[:1]).all(0)
        shape = [1] * (len(sizes(node)) - 1) + [-1]
        return known(same.reshape(shape), table[0].reshape(shape))

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        last = len(sizes(node)) - 1
        return [equal(node, (node, last), (node.args[0], 1), sizes(node)[last])]  # type: ignore[arg-type]


class Matmul(Row):
    """matmul and bmm of two computed values: a [..., M, K] @ b [..., K, N]."""

    supported = True

    def operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        a, b = node.args[:2]
        if not is_tensor(a) or not is_tensor(b) or len(sizes(a)) != len(sizes(b)) or len(sizes(a)) < 2:  # type: ignore[arg-type]
            return None
        return a, b  # type: ignore[return-value]

    def zero_pairs(self, a: fx.Node, b: fx.Node, facts: Facts) -> tuple[Tensor, Tensor, Tensor]:
        """Per contracted index: a is known 0, b is known 0, both are known (whole slices)."""
        ka, kb, size = len(sizes(a)) - 1, len(sizes(b)) - 2, sizes(a)[-1]
        none = torch.zeros(size, dtype=torch.bool)
        za = slices(facts[a].zero(), ka, size, True) if a in facts else none
        zb = slices(facts[b].zero(), kb, size, True) if b in facts else none
        return za, zb, slices(_mask(a, facts), ka, size, True) & slices(_mask(b, facts), kb, size, True)

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        found = self.operands(node)
        if found is None:
            return None
        a, b = found
        if a in facts and facts[a].all() and not bool(facts[a].value.any()) or b in facts and facts[b].all() and not bool(facts[b].value.any()):
            return Known(torch.ones([1] * len(sizes(node)), dtype=torch.bool), torch.zeros([1] * len(sizes(node)), dtype=torch.float64))
        rows = facts[a].zero().all(-1, keepdim=True) if a in facts else None
        columns = facts[b].zero().all(-2, keepdim=True) if b in facts else None
        if rows is None and columns is None:
            return None
        mask = rows if columns is None else columns if rows is None else rows | columns
        return known(mask, torch.zeros([1] * len(sizes(node)), dtype=torch.float64))  # type: ignore[arg-type]

    def read(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        found = self.operands(node)
        if found is None:
            return super().read(node, wanted, facts)
        a, b = found
        za, zb, _ = self.zero_pairs(a, b, facts)
        read_a = wanted.any(-1, keepdim=True) & ~zb
        read_b = wanted.any(-2, keepdim=True) & ~za.reshape(-1, 1)
        return {a: reduce_to(read_a, sizes(a)), b: reduce_to(read_b, sizes(b))}

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        found = self.operands(node)
        if found is None:
            return []
        a, b = found
        rank, out = len(sizes(node)), sizes(node)
        result = [equal(node, (a, rank - 1), (b, rank - 2), sizes(a)[-1])]
        result += [equal(node, (node, rank - 2), (a, rank - 2), out[-2]), equal(node, (node, rank - 1), (b, rank - 1), out[-1])]
        for operand in (a, b):
            result += [equal(node, (node, d), (operand, d), out[d]) for d in range(rank - 2) if sizes(operand)[d] == out[d]]
        return result

    def pins(self, node: fx.Node, facts: Facts) -> list[tuple[Key, Tensor]]:
        found = self.operands(node)
        if found is None:
            return []
        a, b = found
        za, zb, both = self.zero_pairs(a, b, facts)
        return [((a, len(sizes(a)) - 1), both & ~za & ~zb)]


class Attention(Row):
    """scaled_dot_product_attention: q [.., H, L, E], k [.., H, S, E], v [.., H, S, F], mask [.., L, S] -> [.., H, L, F].

    A value channel that is the same constant for all keys comes out as that constant, because the weights of a row add to 1.
    A head whose output is known needs neither its queries nor its keys.
    """

    supported = True

    def parts(self, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None]:
        q, k, v = node.args[:3]
        return q, k, v, argument(node, 3, "attn_mask")  # type: ignore[return-value]

    def grouped(self, node: fx.Node) -> int:
        """Query heads per key head (1 unless enable_gqa)."""
        q, k = node.args[:2]
        return sizes(q)[-3] // sizes(k)[-3] if len(sizes(q)) > 2 and sizes(k)[-3] else 1  # type: ignore[arg-type]

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        _, _, v, mask = self.parts(node)
        if v not in facts or (mask is not None and mask.meta["val"].dtype is torch.bool and mask not in facts):
            return None
        fact = facts[v]
        same = fact.mask.all(-2, keepdim=True) & (fact.value == fact.value.narrow(-2, 0, 1)).all(-2, keepdim=True)
        value = fact.value.narrow(-2, 0, 1)
        group = self.grouped(node)
        if group > 1:
            same, value = (t if t.shape[-3] == 1 else t.repeat_interleave(group, -3) for t in (same, value))
        return known(same, value)

    def read(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        q, k, v, mask = self.parts(node)
        za, zb, _ = self.zero_pairs(q, k, facts)
        row = wanted.any(-1, keepdim=True)
        heads = row.any(-2, keepdim=True)
        columns = wanted.any(-2, keepdim=True)
        group = self.grouped(node)
        kv_heads, kv_columns = (_merge_heads(t, group) for t in (heads, columns))
        result = {q: row & ~zb, k: kv_heads & ~za, v: kv_columns}
        if mask is not None:
            result[mask] = reduce_to(row, sizes(mask))
        merged: dict[fx.Node, Tensor] = {}
        for operand, fact in result.items():
            merged[operand] = reduce_to(fact, sizes(operand))
        if len({q, k, v}) < 3:  # one value in several roles: everything is read
            return {n: torch.ones([1] * len(sizes(n)), dtype=torch.bool) for n in merged}
        return merged

    def zero_pairs(self, q: fx.Node, k: fx.Node, facts: Facts) -> tuple[Tensor, Tensor, Tensor]:
        """Per contracted channel: q is known 0, k is known 0, both are known (whole slices)."""
        size, last = sizes(q)[-1], len(sizes(q)) - 1
        none = torch.zeros(size, dtype=torch.bool)
        za = slices(facts[q].zero(), last, size, True) if q in facts else none
        zb = slices(facts[k].zero(), last, size, True) if k in facts else none
        return za, zb, slices(_mask(q, facts), last, size, True) & slices(_mask(k, facts), last, size, True)

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        q, k, v, mask = self.parts(node)
        rank, out, causal = len(sizes(node)), sizes(node), bool(argument(node, 5, "is_causal", False))
        found = [equal(node, (q, rank - 1), (k, rank - 1), sizes(q)[-1]), equal(node, (node, rank - 1), (v, rank - 1), out[-1])]
        if not causal:
            found += [equal(node, (node, rank - 2), (q, rank - 2), out[-2]), equal(node, (k, rank - 2), (v, rank - 2), sizes(k)[-2])]
        for d in range(rank - 2):
            found.append(equal(node, (node, d), (q, d), out[d]))
            group = self.grouped(node) if d == rank - 3 else 1
            for operand in (k, v):
                if group > 1:
                    found.append(split(node, (node, d), ((operand, d), (node, "query")), (out[d] // group, group)))
                elif sizes(operand)[d] == out[d]:
                    found.append(equal(node, (node, d), (operand, d), out[d]))
        if mask is not None and not causal:
            places = {rank - 2: (node, rank - 2), rank - 1: (k, rank - 2)} | {d: (node, d) for d in range(rank - 2)}
            shift = rank - len(sizes(mask))
            for d, size in enumerate(sizes(mask)):
                key = places[d + shift]
                if size > 1 and size == sizes(key[0])[key[1]]:
                    found.append(equal(node, key, (mask, d), size))
        return found

    def pins(self, node: fx.Node, facts: Facts) -> list[tuple[Key, Tensor]]:
        q, k, _, _ = self.parts(node)
        za, zb, both = self.zero_pairs(q, k, facts)
        return [((q, len(sizes(q)) - 1), both & ~za & ~zb)]

    def shrink(self, node: fx.Node, plan: Any) -> None:
        q = node.args[0]
        last = len(sizes(q)) - 1  # type: ignore[arg-type]
        if argument(node, 6, "scale") is None and not plan.full(q, last):
            node.update_kwarg("scale", 1.0 / math.sqrt(sizes(q)[-1]))  # type: ignore[arg-type]


def _merge_heads(fact: Tensor, group: int) -> Tensor:
    """Facts of query heads -> facts of the key heads they share."""
    if group == 1 or fact.shape[-3] == 1:
        return fact
    return fact.unflatten(-3, (-1, group)).any(-3)


UNARY = """abs acos asin atan atanh ceil clamp clamp_max clamp_min clone contiguous cos cosh detach alias elu erf erfc exp expm1
    floor gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu log log10 log1p log2 log_sigmoid logical_not mish neg
    reciprocal relu relu6 round rsqrt selu celu sigmoid sign silu sin sinh softplus softshrink sqrt square tan tanh threshold trunc
    bitwise_not isnan isinf lift_fresh_copy""".split()
BINARY = """add sub rsub maximum minimum eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor
    remainder fmod atan2 pow prelu""".split()
REDUCTIONS = "mean sum amax amin var prod logsumexp any all argmax argmin var_mean std".split()
POOLS = """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    _adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d""".split()


def overloads(*names: str) -> list[Any]:
    """Every overload of the named ATen operators, but for in-place and out variants."""
    found = []
    for name in names:
        packet = getattr(aten, name, None)
        if packet is not None:
            found += [getattr(packet, o) for o in packet.overloads() if "out" not in o]
    return found


def _table() -> dict[Any, Row]:
    table: dict[Any, Row] = {}

    def add(row: Row, *names: str) -> None:
        table.update(dict.fromkeys(overloads(*names), row))

    add(Elementwise(), *UNARY, *BINARY, "_to_copy", "to", "masked_fill")
    table[torch.ops.thresher.shrink.default] = Elementwise()
    add(Filled(), "zeros_like", "ones_like", "full_like", "zeros", "ones", "full")
    add(Product(), "mul")
    add(Quotient(), "div")
    table[aten.where.self] = Choice()
    add(Movement(), "permute", "transpose", "t", "unsqueeze", "squeeze", "flip", "cat", "stack", "repeat", "pixel_shuffle", "pixel_unshuffle", "movedim")
    add(Movement(fix_sizes(1)), "reshape", "view", "expand")
    add(Movement(fix_select), "select")
    add(Slice(fix_slice), "slice")
    add(Pad(), "constant_pad_nd")
    add(Mixing(spatial), *POOLS)
    add(Mixing(along(1)), "softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum")
    for name in REDUCTIONS:
        for op in overloads(name):
            if "dim" in op._overloadname or name in ("amax", "amin", "logsumexp", "argmax", "argmin") or op is aten.var.correction:
                if len(op._schema.returns) == 1:
                    table[op] = Mixing(reduced)
    add(LayerNorm(), "layer_norm", "rms_norm")
    add(GroupNorm(), "group_norm")
    table[aten.linear.default] = Linear()
    for dims, suffix in ((1, "1d"), (2, "2d"), (3, "3d")):
        add(Convolution(dims), f"conv{suffix}")
        add(Convolution(dims, transposed=True), f"conv_transpose{suffix}")
    table[aten.embedding.default] = Embedding()
    add(Matmul(), "matmul", "bmm")
    table[aten.scaled_dot_product_attention.default] = Attention()
    return table


TABLE = _table()
DEFAULT = Row()


def row(node: fx.Node) -> Row:
    """The row of a call: of its operator, or the safe default."""
    return TABLE.get(node.target, DEFAULT)


def facts_of_constants(program: Any) -> Facts:
    return {n: of_constant(program.constants[n.target]) for n in program.graph.nodes if n.op == "get_attr"}
