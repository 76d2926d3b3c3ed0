"""Progress of long steps: a bar on a terminal, plain lines elsewhere, nothing where it was not asked for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str], None]


@contextmanager
def show_progress(title: str, enabled: bool | None = None) -> Iterator[Progress]:
    """Yields ``step(message)``. ``enabled=None``: only where standard error is a terminal."""
    terminal = sys.stderr.isatty()
    if enabled is False or (enabled is None and not terminal):
        yield lambda message: None
    elif terminal:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn(f"[bold]{title}"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda message: bar.update(task, description=message, advance=1)
    else:
        start = time.perf_counter()
        yield lambda message: print(
            f"{title}: {message} ({time.perf_counter() - start:.1f} s)", file=sys.stderr, flush=True
        )
