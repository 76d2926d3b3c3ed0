"""The tables of a report: column titles and rows of text, which the terminal and the page both show."""

from __future__ import annotations

from collections.abc import Sequence

from thresher.approximation.ledger import Spent
from thresher.report.data import Kernel, ReportData
from thresher.rewriting.contract import SkippedZeros
from thresher.rewriting.manager import PassRecord
from thresher.runtime.comparison import Check

Row = tuple[str, ...]
Table = tuple[Sequence[str], list[Row]]  # column titles, rows

SIZES = (
    ("parameters, M", "parameters", 1e6),
    ("GFLOP", "flops", 1e9),
    ("constants, MB", "bytes", 1e6),
)
SLOWEST_KERNELS = 3  # named in the list of facts


def sizes(report: ReportData) -> Table:
    """Return the figures of the program before and after."""
    rows: list[Row] = []
    for label, name, unit in SIZES:
        before, after = getattr(report.before, name), getattr(report.after, name)
        saved = f"{100 * (1 - after / before):.1f} %" if before else ""
        rows.append((label, f"{before / unit:.3f}", f"{after / unit:.3f}", saved))
    return ("", "before", "after", "saved"), rows


def passes(report: ReportData, idle: bool = True) -> Table:
    """Return the passes that ran; with ``idle`` also those that changed and refused nothing."""
    columns = ("pass", "result", "kind", "rewrites", "refused", "float64 error", "seconds")
    return columns, [_pass_row(p) for p in report.passes if _is_active(p) or (idle and p.status != "skipped")]


def checks(report: ReportData) -> Table:
    """Return the comparisons that validation made; where the model in float64 judged, with the errors of both sides against it."""
    judged = any(c.ours is not None for c in report.checks)
    columns = ("check", "error", "allowed", *(("ours against float64", "the reference's") if judged else ()), "result")
    return columns, [_check_row(c, judged) for c in report.checks]


def ledger(report: ReportData) -> Table:
    """Return what each approximate pass spent of the error budget."""
    columns = ("approximate pass", "changes", "error before", "error after", "at most", "worst sample")
    return columns, [_ledger_row(spent) for spent in report.spent]


def zeros(report: ReportData) -> Table:
    """Return the layers that meet zeros."""
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
    return columns, [_zeros_row(layer) for layer in report.sparsity]


def facts(report: ReportData) -> list[str]:
    """Return the sentences below the tables: checks of passes, memory, kernels, and what was measured against what."""
    lines = [f"{spent.name}: {message}" for spent in report.spent for message in spent.checks]
    if report.batch:
        lines.append(f"batch: {report.batch}")
    active = {p.name for p in report.passes if _is_active(p)}
    idle = [n for n in dict.fromkeys(p.name for p in report.passes if p.status != "skipped") if n not in active]
    if idle:
        lines.append(f"found nothing to do: {', '.join(idle)}")
    if report.memory:
        lines.append("memory: " + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in report.memory.items()))
    lines.append(f"estimated by the cost model: {report.estimate:.2f} ms")
    if report.kernels:
        lines.append(_slowest_kernels(report.kernels))
    if report.tuned[0]:
        lines.append(f"plans on record: {report.tuned[0]} of {report.tuned[1]} workloads")
    if report.library:
        lines.append(_computed_by_torch(report))
    for title, times in (
        ("measured", report.latency),
        ("approximation", report.approximation),
        ("widths measured", report.widths),
        ("tuning", report.tuning),
    ):
        if times:
            lines.append(f"{title}: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items()))
    return lines


def _computed_by_torch(report: ReportData) -> str:
    """Name the operators that torch computes, each with its nodes and its share of the time, and why."""
    total = sum(k.milliseconds for k in report.kernels)
    texts = []
    for operator, reason in dict.fromkeys((c.operator, c.reason) for c in report.library):
        calls = [c for c in report.library if (c.operator, c.reason) == (operator, reason)]
        share = f", {100 * sum(c.milliseconds for c in calls) / total:.0f} % of the time" if total else ""
        texts.append(f"{operator} ({', '.join(c.node for c in calls)}{share}; {reason})")
    return "computed by torch: " + "; ".join(texts)


def _is_active(record: PassRecord) -> bool:
    return record.status in ("changed", "reverted") or bool(record.refusals)


def _pass_row(record: PassRecord) -> Row:
    result = record.status + (f": {record.failure}" if record.failure else "")
    error = "" if record.error is None else f"{record.error:.1e}"
    counts = str(len(record.rewrites)), str(len(record.refusals))
    return record.name, result, record.kind, *counts, error, f"{record.seconds:.2f}"


def _check_row(check: Check, judged: bool) -> Row:
    errors = [f"{check.error:.1e}", f"{check.tolerance:.0e}"] if not check.skipped else ["", ""]
    truth = ["" if e is None else f"{e:.1e}" for e in (check.ours, check.eager)] if judged else []
    verdict = " ".join(filter(None, ("ok" if check.passed else "FAILED", check.detail)))
    return check.name, *errors, *truth, f"not made: {check.skipped}" if check.skipped else verdict


def _ledger_row(spent: Spent) -> Row:
    errors = (spent.before, spent.after, spent.held_out.bound, spent.held_out.worst)
    return spent.name, str(len(spent.changes)), *(f"{e:.2e}" for e in errors)


def _zeros_row(layer: SkippedZeros) -> Row:
    source = "" if layer.measured else " (estimated)"
    fractions = (f"{100 * fraction:.1f} %" for fraction in (layer.nonzero, layer.saved))
    times = (f"{ms:.3f}{source}" for ms in (layer.dense, layer.sparse))
    decision = "skips" if layer.chosen else "dense"
    return layer.module, layer.kind, *fractions, *times, f"{100 * layer.break_even:.0f} %", decision


def _slowest_kernels(kernels: Sequence[Kernel]) -> str:
    total = sum(k.milliseconds for k in kernels)
    slowest = sorted(kernels, key=lambda k: -k.milliseconds)[:SLOWEST_KERNELS]
    labels = ", ".join(f"{k.modules[0] if k.modules else k.name} {k.milliseconds:.3f} ms" for k in slowest)
    return f"{len(kernels)} kernels take {total:.2f} ms; the slowest: {labels}"
