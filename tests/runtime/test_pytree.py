"""Nestings: written and read as torch writes and reads them, taken apart and put together as torch does it."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

from thresher.errors import InputError
from thresher.ir.signature import read_tree, tree_of
from thresher.runtime.pytree import PyTree

Pair = collections.namedtuple("Pair", "left right")

VALUES: list[Any] = [
    1,
    (1, 2),
    [1, (2, [3]), {"b": 4, "a": (5,)}],
    {"x": [], "y": {}, 3: 1},
    collections.OrderedDict(a=1, b=(2, 3)),
    collections.deque([1, 2]),
    torch.Size([2, 3]),
]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_as_torch_does_it(value: Any) -> None:
    leaves, spec = pytree.tree_flatten(value)
    tree = tree_of(spec)
    assert tree.assemble(iter(leaves)) == value and type(tree.assemble(iter(leaves))) is type(value)
    assert pytree.treespec_loads(tree.dumps()) == spec and tree.leaf_count == len(leaves)
    again = read_tree(pytree.treespec_dumps(spec))
    assert again.assemble(iter(leaves)) == value
    assert PyTree.read(tree.dumps()).leaf_count == len(leaves)


def test_named_tuples_come_back_with_torch() -> None:
    leaves, spec = pytree.tree_flatten({"p": Pair(1, [2])})
    made = tree_of(spec).assemble(iter(leaves))
    assert made == {"p": Pair(1, [2])} and type(made["p"]) is Pair


def test_without_torch_others_are_dictionaries() -> None:
    value = {"o": collections.OrderedDict(a=1), "d": collections.defaultdict(int, b=2)}
    leaves, spec = pytree.tree_flatten(value)
    made = PyTree.read(pytree.treespec_dumps(spec)).assemble(iter(leaves))
    assert made == {"o": {"a": 1}, "d": {"b": 2}} and type(made["o"]) is dict and type(made["d"]) is dict


def test_calls() -> None:
    tree = tree_of(pytree.tree_flatten((((1, [2]), Pair(3, 4)), {"k": 5, "more": {"x": 6, "y": 7}}))[1])
    good = ((1, [2]), Pair(3, 4))
    assert tree.flatten_call(good, {"more": {"y": 7, "x": 6}, "k": 5}) == [1, 2, 3, 4, 5, 6, 7]
    named = {"k": 5, "more": {"x": 6, "y": 7}}
    for args, kwargs, message in (
        (good[:1], named, "the arguments must be a tuple of 2"),
        (((1, (2,)), good[1]), named, r"the arguments\[0\]\[1\] must be a list of 1"),
        (((1, [[2]]), good[1]), named, r"the arguments\[0\]\[1\]\[0\] must be one value, not a list"),
        ((good[0], (3, 4)), named, r"the arguments\[1\] must be a Pair"),
        (good, {"k": 5}, "the keyword arguments must be a dictionary of 'k', 'more'"),
        (good, {**named, "less": 1}, "takes no argument 'less'"),
        (good, {"k": 5, "more": {"x": 6}}, r"the keyword arguments\['more'\] must be a dictionary of 'x', 'y'"),
    ):
        with pytest.raises(InputError, match=message) as error:
            tree.flatten_call(args, kwargs)
        assert "structure" in str(error.value)
