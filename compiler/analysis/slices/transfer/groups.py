"""How many indices of a row are left to choose from, where a mask that is computed closes others.

A router that chooses groups first closes the experts of all other groups by -inf (DeepSeek-V3, arXiv 2412.19437). Which groups they are
differs from row to row, but not how many: so the fewest that are left are those of the groups with the fewest.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from thresher.analysis.slices.facts import sizes
from thresher.analysis.slices.transfer.base import Facts, argument, aten, evaluate, tensors
from thresher.analysis.slices.transfer.edge_marker import edge_marker

#: Operators whose result has the elements of their first argument: reshaped, copied, or selected.
SAME_ELEMENTS = {
    aten.reshape.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dims, aten.squeeze.dim,
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.clone.default, aten.alias.default, aten.detach.default, edge_marker,
}  # fmt: skip
#: Operators whose results are positive, as far as float32 reaches. Not relu: there an index that is always 0 ties with others, and may be
#: the one that is chosen.
POSITIVE = {aten.softmax.int, aten._softmax.default, aten.sigmoid.default, aten.exp.default, aten.softplus.default}
#: Operators that compute a mask from another one, element by element or of the same elements.
MASKS = SAME_ELEMENTS | {aten.bitwise_not.default, aten.logical_not.default, aten._to_copy.default}


def fewest_left(scores: fx.Node, possible: Tensor, facts: Facts) -> int:
    """Return how many ``possible`` indices (bool) of the last dimension are open in every row at least; 0 where that is not known."""
    masked = _masked(scores, facts)
    if not masked:
        return int(possible.sum())
    groups = _groups(scores, facts) if masked == [scores] else None
    if groups is None or sizes(scores)[-1] != len(possible):
        return 0
    count, members = groups
    return int((members & possible).sum(1).sort().values[:count].sum())


def _masked(scores: fx.Node, facts: Facts) -> list[fx.Node]:
    """Return the calls that set some of ``scores`` to -inf, or what they are computed from, under a condition that is computed."""
    reached = [scores]
    for node in reached:  # it grows
        if node.target in SAME_ELEMENTS | POSITIVE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            reached += [n for n in tensors(node) if n.meta["val"].is_floating_point() and n not in reached]
    return [n for n in reached if n.target is aten.where.self and _closes(n, facts)]


def _closes(node: fx.Node, facts: Facts) -> bool:
    """Return whether a computed condition decides which elements of ``where`` are -inf."""
    condition, *operands = node.args
    decided = condition in facts and facts[condition].all()
    return not decided and any(bool((facts[n].content == -torch.inf).any()) for n in operands if n in facts)


def _groups(scores: fx.Node, facts: Facts) -> tuple[int, Tensor] | None:
    """Return how many groups are open in each row, and which indices each group has (bool [groups, indices]).

    None where the condition is not that of groups that ``topk`` chose: ``where(closed, -inf, x)`` or ``where(open, x, -inf)``, of a mask
    made by writing into zeros. Which indices a group has is seen by running the mask's calls for each group.
    """
    mask, *operands = scores.args
    closed = [n in facts and bool((facts[n].mask & (facts[n].content == -torch.inf)).all()) for n in operands]
    calls = []
    while mask.target in MASKS:
        calls.append(mask)
        mask = mask.args[0]
    if sum(closed) != 1 or not _writes_choice(mask, facts):
        return None
    count, members = sizes(mask)[-1], []
    for group in range(count):
        value = torch.zeros(sizes(mask), dtype=mask.meta["val"].dtype)
        value[..., group] = mask.args[3]
        for call in reversed(calls):
            value = evaluate(call, {call.args[0]: value})
        rows = (~value if closed[0] else value).expand(sizes(scores)).reshape(-1, sizes(scores)[-1])
        if not bool((rows == rows[0]).all()):
            return None
        members.append(rows[0])
    alone = bool((torch.stack(members).sum(0) == 1).all())  # each index is of one group
    return (sizes(mask.args[2])[-1], torch.stack(members)) if alone else None


def _writes_choice(mask: fx.Node, facts: Facts) -> bool:
    """Return whether a call writes one number into zeros, at the indices along the last dimension that ``topk`` chose for each row."""
    if mask.target is not aten.scatter.value:
        return False
    zeros, dim, index, _ = mask.args
    last = len(sizes(mask)) - 1
    return (
        zeros in facts
        and bool(facts[zeros].zero().all())
        and dim % len(sizes(mask)) == last
        and index.target is operator.getitem
        and index.args[1] == 1
        and index.args[0].target is aten.topk.default
        and argument(index.args[0], 2, "dim", -1) % len(sizes(mask)) == last
        and sizes(index)[:-1] == sizes(mask)[:-1]
    )
