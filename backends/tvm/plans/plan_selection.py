"""The choice of a plan for every kernel: the one measured as fastest for its workload, else the first that its family proposes.

A *workload* describes what a kernel computes as text: operator, shapes, literals. A *plan* is a frozen dataclass of the kernel family
(tile, task, algorithm). It is recorded as its ``repr`` and used again only if the family proposes a plan with that very text, so a
record can choose among plans but never introduce one. The schedules that MetaSchedule found (``metaschedule.py``) are the exception:
they are programs.
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

MAX_PLANS = 32  # that a family proposes

#: ``plans(limit)`` returns at most ``limit`` plans of a kernel, at least one, the one estimated to be the fastest first.
Plans = Callable[[int], Sequence[Any]]


@dataclass(frozen=True)
class Own:
    """The plan of a site that has one kernel of ours: there is nothing to choose but torch's kernel or a searched schedule."""


@dataclass(frozen=True)
class Site:
    """A kernel with a workload, and the plans that it may have; ``subject`` is its node or, where schedules follow fusion, its function."""

    subject: Any
    plans: Plans


class PlanSelector:
    """The choice of plans for one program, and an account of it.

    Attributes:
        sites: every workload that was asked for.
        used_records: the workloads whose plan came from a record.
    """

    def __init__(self, records: Mapping[str, str] | None = None, library: bool = False, search: bool = False):
        """Choose by ``records`` (workload -> text of its plan).

        ``library`` lets a plan be to call torch's own kernel; ``search`` counts kernels without plans of ours as sites, too.
        """
        self.records, self.library, self.search = records or {}, library, search
        self.sites: dict[str, Site] = {}
        self.used_records: set[str] = set()
        self._asks_for_schedules = search or any(workload.startswith(KERNEL) for workload in self.records)

    def uses_torch(self, workload: str, node: fx.Node) -> bool:
        """Return whether torch computes ``node``, one that it can compute: it does where that is on record as fastest."""
        self.sites.setdefault(workload, Site(node, lambda limit: [Own()]))
        if self.records.get(workload) != repr(TorchKernel()):
            return False
        self.used_records.add(workload)
        return True

    def choose(self, workload: str, subject: Any, plans: Plans) -> Any:
        """Return the plan on record for a workload if its family proposes it, else the first plan that the family proposes."""
        self.sites[workload] = Site(subject, plans)
        if text := self.records.get(workload):
            for plan in plans(MAX_PLANS):
                if repr(plan) == text:
                    self.used_records.add(workload)
                    return plan
        return plans(1)[0]

    def schedule(self, function: tirx.PrimFunc) -> s_tir.Schedule | None:
        """Return the schedule on record for a kernel that has no plans of ours, None where there is none."""
        if not self._asks_for_schedules:
            return None
        workload = metaschedule.workload_of(function)
        if self.search or workload in self.records:
            self.sites.setdefault(workload, Site(function, lambda limit: [Own()]))
        plan = self.records.get(workload, "")
        if not plan.startswith(TRACE):
            return None
        self.used_records.add(workload)
        return metaschedule.scheduled(function, plan)


def workload_of(node: fx.Node, strict_rounding: bool) -> str:
    """Describe the operator of a node and its arguments: tensors by shape and dtype, constants with a star."""

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            tensor = value.meta.get("val")
            if not isinstance(tensor, torch.Tensor):
                return "?"
            constant = "*" if value.op == "get_attr" else ""
            return f"{'x'.join(map(str, tensor.shape))}:{dtype_name(tensor.dtype)}{constant}"
        if isinstance(value, (list, tuple)):
            return f"({','.join(map(text, value))})"
        return str(value)

    arguments = [text(a) for a in node.args] + [f"{k}={text(v)}" for k, v in sorted(node.kwargs.items())]
    return " ".join([str(node.target), *arguments, *(["strict"] if strict_rounding else [])])
