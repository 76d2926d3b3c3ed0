"""``Report``: the record of a build, shown as tables, as JSON, or as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thresher.atomic_files import write_text
from thresher.report.data import ReportData


class Report(ReportData):
    """A :class:`ReportData` that shows itself. ``print(report)`` gives Markdown; rich and jinja2 are imported when they are used."""

    def __str__(self) -> str:
        from thresher.report.terminal import markdown

        return markdown(self)

    def print(self, console: Any = None) -> None:
        """Print the tables on a rich ``Console``; default: one on standard output."""
        from rich.console import Console

        from thresher.report.terminal import print_report

        print_report(self, console or Console())

    def to_html(self) -> str:
        """Return the report as one HTML page that needs nothing from the network."""
        from thresher.report.html import render_page

        return render_page(self)

    def save_html(self, path: str | Path) -> None:
        """Write the page of :meth:`to_html` to ``path``."""
        write_text(path, self.to_html())
