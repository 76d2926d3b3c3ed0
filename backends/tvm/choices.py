"""Which plan a kernel gets: the one measured as fastest for its workload, else the first that its family proposes.

A *workload* is what a kernel computes, in words: operator, shapes, literals. A *plan* is a frozen dataclass of the kernel family (tile,
task, algorithm); it is recorded as its ``repr`` and taken back only if the family proposes a plan with that very text, so a record can
choose among plans but never bring one in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thresher.signature import dtype_name

MOST = 32  # plans that a family proposes at most

Plans = Callable[[int], Sequence[Any]]


@dataclass(frozen=True)
class Site:
    """The first node with a workload, and the plans its kernel may have."""

    node: fx.Node
    plans: Plans


class Choices:
    """Chooses for one program; ``records``: workload -> the text of its plan. ``sites`` and ``taken`` tell afterwards what was asked for
    and which records were used."""

    def __init__(self, records: Mapping[str, str] | None = None):
        self.records = records or {}
        self.sites: dict[str, Site] = {}
        self.taken: set[str] = set()

    def choose(self, workload: str, node: fx.Node, plans: Plans) -> Any:
        self.sites.setdefault(workload, Site(node, plans))
        if text := self.records.get(workload):
            for plan in plans(MOST):
                if repr(plan) == text:
                    self.taken.add(workload)
                    return plan
        return plans(1)[0]


def workload_of(node: fx.Node, strict_rounding: bool) -> str:
    """The operator and its arguments, tensors by shape and dtype."""

    def word(value: Any) -> str:
        if isinstance(value, fx.Node):
            seen = value.meta.get("val")
            if not isinstance(seen, torch.Tensor):
                return "?"
            constant = "*" if value.op == "get_attr" else ""
            return f"{'x'.join(map(str, seen.shape))}:{dtype_name(seen.dtype)}{constant}"
        if isinstance(value, (list, tuple)):
            return f"({','.join(map(word, value))})"
        return str(value)

    words = [word(a) for a in node.args] + [f"{k}={word(v)}" for k, v in sorted(node.kwargs.items())]
    return " ".join([str(node.target), *words, *(["strict"] if strict_rounding else [])])
