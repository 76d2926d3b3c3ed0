"""What was done and what it gained: one record, shown as tables, as JSON, or as a page (:mod:`thresher.report.html`)."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from thresher.approximation.budget import Measured
from thresher.approximation.ledger import Change, Spent
from thresher.atomic_files import write_text
from thresher.report.graph_diff import Line
from thresher.rewriting.contract import Note
from thresher.rewriting.manager import PassRecord
from thresher.runtime.comparison import Check

Table = tuple[Sequence[str], list[tuple[str, ...]]]  # columns and rows


@dataclass
class Figures:
    """Size and work of a program."""

    parameters: int
    flops: int
    bytes: int


@dataclass
class Kernel:
    """One call of a kernel: the nodes of the lowered program that it computes, their modules, and the median of its milliseconds."""

    name: str
    nodes: list[str]
    modules: list[str]
    milliseconds: float


@dataclass
class Layer:
    """Shapes of one weight: ``after`` is empty where it is gone; ``left``: the part of its numbers that is left."""

    module: str
    operator: str
    before: list[int]
    after: list[int]

    @property
    def left(self) -> float:
        before, after = (float(torch.Size(shape).numel()) for shape in (self.before, self.after))
        return after / before if self.after and before else 0.0


@dataclass
class Report:
    """Everything a build can say about itself."""

    model: str
    target: str
    backend: str
    before: Figures
    after: Figures
    passes: list[PassRecord] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # build time per stage
    latency: dict[str, float] = field(default_factory=dict)  # milliseconds, where a benchmark was run
    widths: dict[str, float] = field(default_factory=dict)  # milliseconds of each candidate, where widths were measured
    tuning: dict[str, float] = field(default_factory=dict)  # milliseconds tuned and untuned, where kernels were tuned
    tuned: tuple[int, int] = (0, 0)  # workloads with a plan from a record, of all that have plans
    attention: list[tuple[str, str]] = field(
        default_factory=list
    )  # (module, what it is) of every attention that was found
    approximation: dict[str, float] = field(default_factory=dict)  # milliseconds of the exact and the approximate model
    spent: list[Spent] = field(default_factory=list)  # what approximate passes spent of the budget
    #: Layers that meet zeros: module, kind, and the numbers of ``passes.sparsity.skip_zeros.Skipped``.
    sparsity: list[dict[str, Any]] = field(default_factory=list)
    library: list[str] = field(default_factory=list)  # nodes that torch computes, where that was measured as faster
    estimate: float = 0.0  # milliseconds of a run, by the cost model that the passes decide with
    batch: str = ""  # how a batch of any size is computed
    #: Bytes: ``weights`` as they are packed for the kernels, ``activations`` as planned for all intermediate values, and, to compare, what
    #: these take ``one operator at a time``, each freed after its last use.
    memory: dict[str, int] = field(default_factory=dict)
    graph: dict[str, list[Line]] = field(
        default_factory=dict
    )  # the captured program (``before``) and the rewritten one (``after``)
    kernels: list[Kernel] = field(default_factory=list)  # in the order in which they run, where the target is here

    # ------------------------------------------------------------------ reading

    def layers(self) -> list[Layer]:
        """The weights of the captured program, and what they became."""
        return [
            Layer(line.module, line.operator, weight, _became(line, i))
            for line in self.graph.get("before", ())
            for i, weight in enumerate(line.weights)
        ]

    def sizes_table(self) -> Table:
        rows: list[tuple[str, ...]] = []
        for label, name, unit in (
            ("parameters, M", "parameters", 1e6),
            ("GFLOP", "flops", 1e9),
            ("constants, MB", "bytes", 1e6),
        ):
            a, b = getattr(self.before, name), getattr(self.after, name)
            rows.append((label, f"{a / unit:.3f}", f"{b / unit:.3f}", f"{100 * (1 - b / a):.1f} %" if a else ""))
        return ("", "before", "after", "saved"), rows

    def passes_table(self, said_nothing: bool = True) -> Table:
        """``said_nothing``: also those that changed and refused nothing."""
        columns = ("pass", "result", "kind", "rewrites", "refused", "float64 error", "seconds")
        return columns, [_pass_row(p) for p in self.passes if _spoke(p) or (said_nothing and p.status != "skipped")]

    def checks_table(self) -> Table:
        return ("check", "error", "allowed", "result"), [
            (c.name, f"{c.error:.1e}", f"{c.tolerance:.0e}", "ok" if c.passed else f"FAILED {c.detail}")
            for c in self.checks
        ]

    def ledger_table(self) -> Table:
        columns = ("approximate pass", "changes", "error before", "error after", "at most", "worst sample")
        return columns, [_ledger_row(s) for s in self.spent]

    def zeros_table(self) -> Table:
        columns = (
            "layer",
            "zeros of",
            "not 0",
            "arithmetic saved",
            "dense, ms",
            "skipping, ms",
            "dense is faster from",
            "",
        )
        return columns, [_zeros_row(line) for line in self.sparsity]

    # ------------------------------------------------------------------ JSON

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Report:
        raw = json.loads(text)
        passes = [
            PassRecord(
                **{**p, "rewrites": [Note(**n) for n in p["rewrites"]], "refusals": [Note(**n) for n in p["refusals"]]}
            )
            for p in raw.pop("passes")
        ]
        before, after = Figures(**raw.pop("before")), Figures(**raw.pop("after"))
        checks = [Check(**c) for c in raw.pop("checks")]
        tuned = tuple(raw.pop("tuned"))
        raw["attention"] = [tuple(line) for line in raw["attention"]]
        raw["graph"] = {side: [Line(**line) for line in lines] for side, lines in raw["graph"].items()}
        raw["kernels"] = [Kernel(**k) for k in raw["kernels"]]
        spent = [
            Spent(**{**s, "held_out": Measured(**s["held_out"]), "changes": [Change(**c) for c in s["changes"]]})
            for s in raw.pop("spent")
        ]
        return Report(before=before, after=after, passes=passes, checks=checks, tuned=tuned, spent=spent, **raw)

    # ------------------------------------------------------------------ tables

    def __str__(self) -> str:
        """Markdown: tables that are read on a terminal, and can be pasted where people talk about models."""
        from rich.console import Console

        console = Console(width=140, record=True, file=io.StringIO(), color_system=None)
        self.print(console)
        lines = console.export_text(clear=True).splitlines()
        return "\n".join(line.rstrip() for line in lines).strip()

    def print(self, console: Any = None) -> None:
        """The tables on a rich console."""
        from rich.console import Console

        console = console or Console()
        console.print(f"**{self.model}** for {self.target} ({self.backend})", markup=False, highlight=False)
        for title, (columns, rows) in (
            ("", self.sizes_table()),
            ("passes that did something", self.passes_table(said_nothing=False)),
            ("validation", self.checks_table()),
            ("error ledger (held-out samples)", self.ledger_table()),
            ("zeros", self.zeros_table()),
        ):
            if rows:
                _print_table(console, title, columns, rows)
        for line in self._facts():
            console.print(f"* {line}", markup=False, highlight=False, soft_wrap=True)

    def _facts(self) -> list[str]:
        facts = [f"{spent.name}: {words}" for spent in self.spent for words in spent.checks]
        if self.batch:
            facts.append(f"batch: {self.batch}")
        spoke = {p.name for p in self.passes if _spoke(p)}
        idle = [n for n in dict.fromkeys(p.name for p in self.passes if p.status != "skipped") if n not in spoke]
        if idle:
            facts.append(f"found nothing to do: {', '.join(idle)}")
        if self.memory:
            facts.append("memory: " + ", ".join(f"{name} {value / 1e6:.2f} MB" for name, value in self.memory.items()))
        facts.append(f"estimated by the cost model: {self.estimate:.2f} ms")
        if self.kernels:
            total = sum(k.milliseconds for k in self.kernels)
            slowest = sorted(self.kernels, key=lambda k: -k.milliseconds)[:3]
            named = ", ".join(f"{_label(k)} {k.milliseconds:.3f} ms" for k in slowest)
            facts.append(f"{len(self.kernels)} kernels take {total:.2f} ms; the slowest: {named}")
        if self.tuned[0]:
            facts.append(f"plans on record: {self.tuned[0]} of {self.tuned[1]} workloads")
        if self.library:
            facts.append(f"computed by torch: {', '.join(self.library)}")
        for title, times in (
            ("measured", self.latency),
            ("approximation", self.approximation),
            ("widths measured", self.widths),
            ("tuning", self.tuning),
        ):
            if times:
                facts.append(f"{title}: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items()))
        return facts

    # ------------------------------------------------------------------ HTML

    def to_html(self) -> str:
        """A page that needs nothing from the network."""
        from thresher.report.html import page

        return page(self)

    def save_html(self, path: str | Path) -> None:
        write_text(path, self.to_html())


def _spoke(record: PassRecord) -> bool:
    return record.status in ("changed", "reverted") or bool(record.refusals)


def _became(line: Line, index: int) -> list[int]:
    if line.mark == "gone":
        return []
    after = line.other["weights"] if line.other else line.weights
    return after[index] if index < len(after) else []


def _label(kernel: Kernel) -> str:
    return kernel.modules[0] if kernel.modules else kernel.name


def _pass_row(record: PassRecord) -> tuple[str, ...]:
    result = record.status + (f": {record.failure}" if record.failure else "")
    error = "" if record.error is None else f"{record.error:.1e}"
    counts = str(len(record.rewrites)), str(len(record.refusals))
    return record.name, result, record.kind, *counts, error, f"{record.seconds:.2f}"


def _ledger_row(spent: Spent) -> tuple[str, ...]:
    held_out = spent.held_out
    errors = (f"{e:.2e}" for e in (spent.before, spent.after, held_out.bound, held_out.worst))
    return spent.name, str(len(spent.changes)), *errors


def _zeros_row(line: dict[str, Any]) -> tuple[str, ...]:
    times = (f"{line[k]:.3f}" + ("" if line["measured"] else " (estimated)") for k in ("dense", "sparse"))
    parts = (f"{100 * line[k]:.1f} %" for k in ("nonzero", "saved"))
    return (
        line["module"],
        line["kind"],
        *parts,
        *times,
        f"{100 * line['break_even']:.0f} %",
        "skips" if line["chosen"] else "dense",
    )


def _print_table(console: Any, title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.MARKDOWN)
    for i, column in enumerate(columns):
        numbers = i > 0 and all(_is_number(row[i]) for row in rows if row[i])
        table.add_column(escape(column), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    if title:
        console.print(f"**{title}**", markup=False, highlight=False)
    console.print(table)


def _is_number(text: str) -> bool:
    return text.split(" ")[0].lstrip("-").replace(".", "").replace("e-", "").replace("e+", "").isdigit()
