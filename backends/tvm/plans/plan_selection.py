"""Which plan a kernel gets: the one measured as fastest for its workload, else the first that its family proposes.

A *workload* is what a kernel computes, in words: operator, shapes, literals. A *plan* is a frozen dataclass of the kernel family (tile,
task, algorithm); it is recorded as its ``repr`` and taken back only if the family proposes a plan with that very text, so a record can
choose among plans but never bring one in; but for the schedules that MetaSchedule found (``metaschedule.py``), which are programs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from tvm import s_tir, tirx

from thresher.backends.tvm.plans import metaschedule
from thresher.backends.tvm.plans.metaschedule import KERNEL, TRACE
from thresher.runtime.tensor_spec import dtype_name
from thresher.tuning.options import TorchKernel

MOST = 32  # plans that a family proposes at most

Plans = Callable[[int], Sequence[Any]]


@dataclass(frozen=True)
class Own:
    """The plan of a site that has one kernel of ours, and nothing to choose about it but the library."""


@dataclass(frozen=True)
class Site:
    """What has a workload (a node, on a GPU the kernel that its operators became), and the plans its kernel may have."""

    subject: Any
    plans: Plans


class PlanSelector:
    """Chooses for one program; ``records``: workload -> the text of its plan; ``library``: whether a plan may be to call torch;
    ``search``: whether kernels without plans of ours count as sites, too. ``sites``, ``taken`` and ``called`` tell afterwards what was
    asked for, which records were used, and which nodes torch computes."""

    def __init__(self, records: Mapping[str, str] | None = None, library: bool = False, search: bool = False):
        self.records, self.library, self.search = records or {}, library, search
        self.searched = search or any(workload.startswith(KERNEL) for workload in self.records)
        self.sites: dict[str, Site] = {}
        self.taken: set[str] = set()
        self.called: list[str] = []

    def by_library(self, workload: str, node: fx.Node) -> bool:
        """Whether torch computes ``node``, which it can: where that is on record as fastest."""
        self.sites.setdefault(workload, Site(node, lambda limit: [Own()]))
        if self.records.get(workload) != repr(TorchKernel()):
            return False
        self.taken.add(workload)
        self.called.append(node.name)
        return True

    def choose(self, workload: str, subject: Any, plans: Plans) -> Any:
        self.sites[workload] = Site(subject, plans)
        if text := self.records.get(workload):
            for plan in plans(MOST):
                if repr(plan) == text:
                    self.taken.add(workload)
                    return plan
        return plans(1)[0]

    def schedule(self, function: tirx.PrimFunc) -> s_tir.Schedule | None:
        """The schedule on record for a kernel that has no plans of ours."""
        if not self.searched:
            return None
        workload = metaschedule.workload_of(function)
        if self.search or workload in self.records:
            self.sites.setdefault(workload, Site(function, lambda limit: [Own()]))
        plan = self.records.get(workload, "")
        if not plan.startswith(TRACE):
            return None
        self.taken.add(workload)
        return metaschedule.scheduled(function, plan)


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
