"""What was done and what it gained: one record, shown on a terminal, as JSON, or as a self-contained HTML page."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thresher.budget import Change, Measured, Spent
from thresher.pass_manager import Note, PassRecord
from thresher.pictures import attention_picture


@dataclass
class Figures:
    """Size and work of a program."""

    parameters: int
    flops: int
    bytes: int


@dataclass
class Check:
    """One comparison that was made: ``error`` is relative to the scale of the reference output."""

    name: str
    error: float
    tolerance: float
    passed: bool
    detail: str = ""


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
    #: Bytes: ``weights`` as they are packed for the kernels, ``activations`` as planned for all intermediate values, and, to compare, what
    #: these take ``one operator at a time``, each freed after its last use.
    memory: dict[str, int] = field(default_factory=dict)

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
        spent = [
            Spent(**{**s, "held_out": Measured(**s["held_out"]), "changes": [Change(**c) for c in s["changes"]]})
            for s in raw.pop("spent")
        ]
        return Report(before=before, after=after, passes=passes, checks=checks, tuned=tuned, spent=spent, **raw)

    # ------------------------------------------------------------------ terminal

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, record=True, file=open_null(), color_system=None)
        self.print(console)
        return console.export_text(clear=True).rstrip()

    def print(self, console: Any = None) -> None:
        """Tables on a rich console."""
        from rich.console import Console
        from rich.table import Table

        console = console or Console()
        size = Table(title=f"{self.model} for {self.target} ({self.backend})", title_justify="left")
        for column in ("", "before", "after", "saved"):
            size.add_column(column, justify="left" if not column else "right")
        for label, name, unit in (
            ("parameters", "parameters", 1e6),
            ("GFLOP", "flops", 1e9),
            ("constants, MB", "bytes", 1e6),
        ):
            a, b = getattr(self.before, name), getattr(self.after, name)
            size.add_row(
                label + (", M" if unit == 1e6 and name == "parameters" else ""),
                f"{a / unit:.3f}",
                f"{b / unit:.3f}",
                _saved(a, b),
            )
        console.print(size)
        ledger = Table(title="passes", title_justify="left")
        for column in ("pass", "result", "rewrites", "refused", "float64 error", "s"):
            ledger.add_column(column, justify="left" if column in ("pass", "result") else "right")
        for record in self.passes:
            if record.status == "skipped":
                continue
            error = "" if record.error is None else f"{record.error:.1e}"
            ledger.add_row(
                record.name,
                record.status,
                str(len(record.rewrites)),
                str(len(record.refusals)),
                error,
                f"{record.seconds:.2f}",
            )
        console.print(ledger)
        checks = Table(title="validation", title_justify="left")
        for column in ("check", "error", "allowed", ""):
            checks.add_column(column)
        for check in self.checks:
            checks.add_row(
                check.name,
                f"{check.error:.1e}",
                f"{check.tolerance:.0e}",
                "ok" if check.passed else f"FAILED {check.detail}",
            )
        console.print(checks)
        if self.spent:
            rows = list(map(_ledger_row, self.spent))
            console.print(_table("error ledger (held-out samples)", LEDGER_COLUMNS, rows))
            for one, words in ((s, w) for s in self.spent for w in s.checks):
                console.print(f"{one.name}: {words}")
        if self.sparsity:
            console.print(_table("zeros", SPARSITY_COLUMNS, list(map(_sparsity_row, self.sparsity))))
        if self.memory:
            parts = ", ".join(f"{name} {value / 1e6:.2f} MB" for name, value in self.memory.items())
            console.print(f"memory: {parts}")
        console.print(f"estimated by the cost model: {self.estimate:.2f} ms")
        if self.tuned[0]:
            console.print(f"plans on record: {self.tuned[0]} of {self.tuned[1]} workloads")
        if self.library:
            console.print(f"computed by torch: {', '.join(self.library)}")
        for title, times in (
            ("", self.latency),
            ("approximation: ", self.approximation),
            ("widths measured: ", self.widths),
            ("tuning: ", self.tuning),
        ):
            if times:
                console.print(title + "  ".join(f"{name}: {ms:.2f} ms" for name, ms in times.items()))

    # ------------------------------------------------------------------ HTML

    def to_html(self) -> str:
        """A page that needs nothing from the network."""
        sections = [
            f"<h1>Thresher: {html.escape(self.model)}</h1>",
            f"<p>target {html.escape(self.target)}, backend {html.escape(self.backend)}</p>",
            _html_sizes(self),
            _html_table("Memory", ("what", "MB"), [(name, f"{v / 1e6:.2f}") for name, v in self.memory.items()]),
            _html_times("Latency (medians, interleaved)", self.latency),
            _html_times("Widths measured (medians, interleaved)", self.widths),
            _html_times("Exact and approximate (medians, interleaved)", self.approximation),
            _html_table("Error ledger (held-out samples)", LEDGER_COLUMNS, list(map(_ledger_row, self.spent)))
            if self.spent
            else "",
            *map(_html_changes, self.spent),
            _html_table("Zeros", SPARSITY_COLUMNS, list(map(_sparsity_row, self.sparsity))) if self.sparsity else "",
            _html_table("Attention", ("module", "what it is"), self.attention) if self.attention else "",
            _html_table("Validation", ("check", "error", "allowed", "result"), [_check_row(c) for c in self.checks]),
            _html_table("Passes", PASS_COLUMNS, [_pass_row(p) for p in self.passes]),
        ]
        for record in self.passes:
            for title, notes in (("what it changed", record.rewrites), ("what it refused, and why", record.refusals)):
                if notes:
                    rows = [(n.module, n.message, n.source) for n in notes]
                    table = _html_table("", ("module", "note", "source"), rows)
                    sections.append(
                        f"<details><summary>{record.name}: {title} ({len(notes)})</summary>{table}</details>"
                    )
        title = f"<title>Thresher: {html.escape(self.model)}</title>"
        return f"<!doctype html><html lang=en><meta charset=utf-8>{title}{STYLE}{''.join(sections)}</html>"

    def save_html(self, path: str | Path) -> None:
        Path(path).write_text(self.to_html())


STYLE = """<style>
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:64rem;padding:0 1rem;color:#1b1f24;background:#fff}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}th,td{border-bottom:1px solid #d8dee4;padding:.25rem .8rem;text-align:left}
th{background:#f6f8fa}.bar{display:grid;grid-template-columns:9rem 1fr 7rem;gap:.6rem;align-items:center;margin:.2rem 0}
figure{margin:0;font-size:11px;width:9rem}.heads{display:flex;flex-wrap:wrap;gap:.8rem}
.bar i{display:block;height:1.1rem;background:#b6c2cf}.bar i.after{background:#1f7a4d}details{margin:.4rem 0}summary{cursor:pointer}
</style>"""


PASS_COLUMNS = ("pass", "result", "kind", "rewrites", "refused", "float64 error", "seconds")


def _check_row(check: Check) -> tuple:
    return (
        check.name,
        f"{check.error:.2e}",
        f"{check.tolerance:.0e}",
        "ok" if check.passed else f"failed: {check.detail}",
    )


def _pass_row(record: PassRecord) -> tuple:
    result = record.status + (f": {record.failure}" if record.failure else "")
    error = "" if record.error is None else f"{record.error:.1e}"
    counts = len(record.rewrites), len(record.refusals)
    return record.name, result, record.preserves, *counts, error, f"{record.seconds:.2f}"


LEDGER_COLUMNS = ("approximate pass", "changes", "error before", "error after", "at most", "worst sample")


def _ledger_row(spent: Spent) -> tuple:
    held_out = spent.held_out
    errors = (f"{e:.2e}" for e in (spent.before, spent.after, held_out.bound, held_out.worst))
    return spent.name, str(len(spent.changes)), *errors


SPARSITY_COLUMNS = (
    "layer",
    "zeros of",
    "not 0",
    "arithmetic saved",
    "dense, ms",
    "skipping, ms",
    "dense is faster from",
    "",
)


def _sparsity_row(line: dict[str, Any]) -> tuple:
    times = (f"{line[k]:.3f}" + ("" if line["measured"] else " (estimated)") for k in ("dense", "sparse"))
    parts = (f"{100 * line[k]:.1f} %" for k in ("nonzero", "saved"))
    return (
        line["module"],
        line["kind"],
        *parts,
        *times,
        f"{100 * line['crossover']:.0f} %",
        "skips" if line["chosen"] else "dense",
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _html_changes(spent: Spent) -> str:
    """What one approximate pass replaced, and pictures of what heads attended to and look at now."""
    rows = [(c.module, c.choice, f"{c.error**0.5:.1e}", f"{c.saved:.3f}") for c in spent.changes]
    table = _html_table("", ("module", "replaced by", "relative error there", "saved, ms (estimated)"), rows)
    drawn = [c for c in spent.changes if c.mass]
    pictures = "".join(
        f"<figure>{attention_picture(c.mass, c.mask, html.escape(c.choice))}"
        f"<figcaption>{html.escape(c.module)}<br>{html.escape(c.choice)}</figcaption></figure>"
        for c in sorted(drawn, key=lambda c: (c.module, c.choice))
    )
    explained = (
        "<p>Attention mass in blue, queries downward, keys to the right; pale: not looked at any more.</p>"
        if drawn
        else ""
    )
    checks = "".join(f"<p>{html.escape(words)}</p>" for words in spent.checks)
    heads = f"{explained}<div class=heads>{pictures}</div>"
    return f"<details><summary>{spent.name}: {len(rows)} changes</summary>{checks}{table}{heads}</details>"


def _saved(before: float, after: float) -> str:
    return f"{100 * (1 - after / before):.1f} %" if before else ""


def _bar(label: str, value: float, largest: float, text: str, after: bool) -> str:
    width = 100 * value / largest if largest else 0
    kind = "after" if after else "before"
    return f'<div class=bar><span>{html.escape(label)}</span><i class="{kind}" style="width:{width:.1f}%"></i><span>{text}</span></div>'


def _html_sizes(report: Report) -> str:
    parts = ["<h2>Size and work</h2>"]
    for label, name, unit, suffix in (
        ("parameters", "parameters", 1e6, "M"),
        ("operations", "flops", 1e9, "GFLOP"),
        ("constants", "bytes", 1e6, "MB"),
    ):
        a, b = getattr(report.before, name), getattr(report.after, name)
        parts.append(_bar(f"{label} before", a, a, f"{a / unit:.2f} {suffix}", False))
        parts.append(_bar("after", b, a, f"{b / unit:.2f} {suffix}", True))
    return "".join(parts)


def _html_times(title: str, times: dict[str, float]) -> str:
    if not times:
        return ""
    largest = max(times.values())
    bars = (_bar(name, ms, largest, f"{ms:.2f} ms", "thresher" in name.lower()) for name, ms in times.items())
    return f"<h2>{title}</h2>" + "".join(bars)


def _html_table(title: str, header: tuple[str, ...], rows: list[tuple]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return (f"<h2>{html.escape(title)}</h2>" if title else "") + f"<table><tr>{head}</tr>{body}</table>"


def open_null() -> Any:
    """A file that swallows what a recording console prints."""
    import io

    return io.StringIO()
