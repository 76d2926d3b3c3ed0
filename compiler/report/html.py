"""The report as one HTML page that needs nothing from the network and runs no script; ``page.html`` is its template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from thresher.approximation.ledger import Change
from thresher.report import tables
from thresher.report.data import ReportData
from thresher.report.svg import ROW_HEIGHT, attention_picture, rails

TEMPLATE = Path(__file__).with_name("page.html")
SIZES = (
    ("parameters", "parameters", 1e6, "M"),
    ("operations", "flops", 1e9, "GFLOP"),
    ("constants", "bytes", 1e6, "MB"),
)
TIMES = (
    ("Latency", "latency"),
    ("Widths measured", "widths"),
    ("Exact and approximate", "approximation"),
    ("Tuning", "tuning"),
)  # fmt: skip
MARKS = {"kept": "as it was", "changed": "other sizes", "gone": "gone", "new": "new"}


def render_page(report: ReportData) -> str:
    """Return the page as HTML text. All that comes from the model is escaped: names and messages are data."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"sizes": _sizes, "rails": lambda lines: Markup(rails(lines)), "picture": _picture}
    slowest = max((k.milliseconds for k in report.kernels), default=0.0)
    return environment.from_string(TEMPLATE.read_text()).render(
        report=report,
        tables=tables,
        row=ROW_HEIGHT,
        marks=MARKS,
        graphs=[(side, report.graph[side]) for side in ("after", "before") if side in report.graph],
        figures=[(name, *_pair(report, field, unit), suffix) for name, field, unit, suffix in SIZES],
        times=[(title, getattr(report, field)) for title, field in TIMES if getattr(report, field)],
        slowest=slowest,
        all_kernels=sum(k.milliseconds for k in report.kernels),
    )


def _pair(report: ReportData, field: str, unit: float) -> tuple[float, float]:
    return getattr(report.before, field) / unit, getattr(report.after, field) / unit


def _sizes(numbers: Sequence[Any]) -> str:
    return "x".join(map(str, numbers)) or "scalar"


def _picture(change: Change) -> Markup:
    return Markup(attention_picture(change.mass, change.mask))
