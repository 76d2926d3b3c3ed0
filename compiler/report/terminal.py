"""The report on a terminal: Markdown tables, which also can be pasted into an issue."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thresher.report import tables
from thresher.report.data import ReportData

MARKDOWN_COLUMNS = 140


def print_report(report: ReportData, console: Console) -> None:
    """Print the tables and facts of ``report`` on a rich console."""
    console.print(f"**{report.model}** for {report.target} ({report.backend})", markup=False, highlight=False)
    for title, (columns, rows) in (
        ("", tables.sizes(report)),
        ("passes that did something", tables.passes(report, idle=False)),
        ("validation", tables.checks(report)),
        ("error ledger (held-out samples)", tables.ledger(report)),
        ("zeros", tables.zeros(report)),
    ):
        if rows:
            _print_table(console, title, columns, rows)
    for line in tables.facts(report):
        console.print(f"* {line}", markup=False, highlight=False, soft_wrap=True)


def markdown(report: ReportData) -> str:
    """Return what :func:`print_report` prints, without colour and trailing blanks."""
    console = Console(width=MARKDOWN_COLUMNS, record=True, file=io.StringIO(), color_system=None)
    print_report(report, console)
    lines = console.export_text(clear=True).splitlines()
    return "\n".join(line.rstrip() for line in lines).strip()


def _print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[tables.Row]) -> None:
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
