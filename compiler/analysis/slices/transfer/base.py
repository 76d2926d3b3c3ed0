"""The interface of a transfer rule, by which facts about slices pass through an operator, and its safe default."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from thresher.analysis.slices.facts import Known, hint, sizes
from thresher.analysis.slices.ties import Key, Tie
from thresher.ir.nodes import is_tensor

aten = torch.ops.aten


Facts = dict[fx.Node, Known]


def tensors(node: fx.Node) -> list[fx.Node]:
    """Return the tensor arguments of a call, lists flattened, in order and without repetition."""
    return [n for n in node.all_input_nodes if is_tensor(n)]


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call by position or by name, else ``default``."""
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
    """Return the result of the call on the given tensors; other arguments are literals. Nothing is recorded for gradients."""
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda a: values[a] if isinstance(a, fx.Node) and a in values else concrete(a)
    )
    with torch.no_grad():
        return node.target(*args, **kwargs)


class TransferRule:
    """A rule by which facts about slices pass through one operator, and a call is rewritten when indices of its values are cut.

    This base class is the safe default: nothing is known, everything is read, nothing is cut. A rule overrides what it can say more about,
    and is entered for its operators in ``thresher.analysis.slices.operators``. One instance serves all calls of an operator; it keeps no
    state about them.

    Facts are *narrow* tensors: of the rank of the value, with size 1 along every dimension in which they do not vary, and the value's
    size in the others (``thresher.analysis.slices.facts``). A dimension of a value is a *key*, ``(node, dim)`` with ``dim`` from 0 on.
    ``sizes(node)`` is the shape of a value. All rules must be *sound*: each method may say less than is true, never more. The manager
    compares the folded program with the original in float64, and ``thresher.verification.verifier`` checks every claim by running the
    operator.

    An example is ``aten.permute(x, dims)``, ``y[i_0, ..., i_n] = x[...]`` with ``y.shape[d] == x.shape[dims[d]]``:

        class Permute(TransferRule):
            supported = True

            def forward(self, node, facts):                # what is known of x is known of y, at the permuted indices
                x, dims = node.args
                return known(facts[x].mask.permute(dims), facts[x].value.permute(dims)) if x in facts else None

            def backward(self, node, wanted, facts):       # y[i] reads x at the same element, and nothing else
                x, dims = node.args
                inverse = sorted(range(len(dims)), key=lambda d: dims[d] % len(dims))
                return {x: wanted.permute(inverse)}

            def constraints(self, node, facts):            # dimension d of y and dimension dims[d] of x keep the same indices
                x, dims = node.args
                return [equal(node, (node, d), (x, e % len(dims)), sizes(node)[d]) for d, e in enumerate(dims)]

    It needs no ``narrow``, because no literal of the call depends on a size, and no ``pins``, because any index may go. (The table has
    permute under ``Movement``, which derives all this by running the operator on coordinates.)

    Attributes:
        supported: True in a rule for an operator; the generated page of operators lists it so.
    """

    supported = False

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        """Return the elements of the result that are constant, from those of the arguments.

        Args:
            node: the call; its arguments are ``node.args`` and ``node.kwargs``, literals or nodes.
            facts: what is known so far, by node. A node that is missing has no known element. A ``get_attr`` node, a constant of the
                program, is known whole; its content is the tensor itself, in its own dtype.

        Returns:
            ``known(mask, value)`` with narrow ``mask`` (bool) and ``value`` (float64, or the value's dtype where that is not floating);
            or None where nothing is known. Each element that the mask marks must have this value for all finite values of the unknown
            elements (0 times an unknown element is 0). ``facts`` must not be changed.
        """
        return None

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        """Return the elements of each argument that the wanted elements of the result depend on.

        Args:
            node: the call.
            wanted: which elements of the result are read, a narrow boolean tensor. Elements that are known are not among them.
            facts: what is known, as in :meth:`forward`, of all nodes; an element of another argument that is known to be 0 may make one of
                this unread.

        Returns:
            For every tensor argument (``tensors(node)``) a narrow boolean tensor. It must be a superset: other finite values at the
            elements that are False must not change the wanted elements of the result. Elements of a constant count like those of a
            value. An argument that is used in two roles has the union of both.
        """
        everything = bool(wanted.any())
        return {n: torch.full([1] * len(sizes(n)), everything) for n in tensors(node)}

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Return the ties between dimensions of the result and the arguments, of which indices may then be cut.

        Args:
            node: the call.
            facts: what is known, as in :meth:`forward`.

        Returns:
            Ties (``thresher.analysis.slices.ties``) such that the operator on the kept indices of the arguments gives the kept indices
            of the result, after :meth:`narrow`, for every choice of kept indices that respects them. More ties than needed only cut
            less. A dimension of the result or of an argument that occurs in no tie is kept whole, so a dimension whose size matters to
            the operator (what a softmax runs over) must not occur in one.
        """
        return []

    def pins(self, node: fx.Node, facts: Facts) -> list[tuple[Key, Tensor]]:
        """Return indices that must stay although nothing reads them or all their elements are known.

        An operator pins what it could not do without: a known channel whose contribution :meth:`narrow` cannot carry on. Each entry is a
        key and a boolean vector of the size of that dimension; the indices marked True are kept.
        """
        return []

    def narrow(self, node: fx.Node, plan: Any) -> None:
        """Rewrite the call for the kept indices, in place, so that the result has the kept elements of what it was.

        It is called once for each call one of whose values loses indices, in the order of the program, before the constants are cut:
        shapes in ``node.meta`` and the tensors in ``plan.program.constants`` are still those from before. Constants that are arguments
        lose their indices without help. What remains to be done are literals that depend on a size, a weight that is laid out anew, and
        what a known index that is cut contributed to the kept ones.

        Args:
            node: the call, in ``plan.program``; edit ``node.args``, ``node.kwargs`` and ``node.target``.
            plan: of :class:`~thresher.passes.fold.fold_channels.FoldChannels`. It has ``program``; ``facts`` as in :meth:`forward`;
                ``keep[key]``, the kept indices of a dimension (bool); ``full(node, dim)``, True if it loses none; ``count(node, dim)``,
                how many it keeps; and the edits ``replace_constant``, ``add_to_bias``, ``add_after``, ``leave_out``, ``look_up`` and
                ``looked_up``.
        """
        return None

    def widths(self, node: fx.Node) -> list[tuple[str, Key]]:
        """Return the dimensions that a report names where they lose indices, each with what its indices are."""
        return []

    def refusal(self, node: fx.Node, facts: Facts) -> str:
        """Return what could have gone at ``node``, and why it stays; empty where there is nothing to say."""
        return ""


def is_constant(node: Any, facts: Facts) -> bool:
    """Return whether ``node`` is a constant of the program. A computed value is none, even where all of it is known."""
    return isinstance(node, fx.Node) and node.op == "get_attr" and node in facts


def nothing(node: fx.Node) -> Tensor:
    """Return a narrow zero for a value of which nothing is known: float64, or the value's dtype where that is not floating."""
    dtype = node.meta["val"].dtype
    return torch.zeros([1] * len(sizes(node)), dtype=torch.float64 if dtype.is_floating_point else dtype)


def mask_of(node: fx.Node, facts: Facts) -> Tensor:
    """Return which elements of a value are known, narrow; all False where nothing is known."""
    return facts[node].mask if node in facts else torch.zeros([1] * len(sizes(node)), dtype=torch.bool)
