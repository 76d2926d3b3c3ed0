"""Tests that pytest runs in this process: which lines each of them reaches, and which is the first that fails."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from thresher.errors import ThresherError
from thresher.testing.mutation.pass_modules import Lines, traced


@dataclass(frozen=True)
class Test:
    """A test by its path and name, the lines of the pass that it reaches, and its seconds."""

    name: str
    lines: Lines
    seconds: float


def preload(files: Sequence[str]) -> None:
    """Import test files, and what they import, in this process; then a fork of it need not.

    Raises :class:`ThresherError` where one cannot be imported.
    """
    recorder = _Recorder(())
    with redirect_stdout(io.StringIO()):
        _run([*files, "--collect-only"], recorder)
    if recorder.failed:
        raise ThresherError(f"{recorder.failed} cannot be imported by pytest: mend it first")


def record(files: Sequence[str], sources: Sequence[str]) -> list[Test]:
    """Run test files and return their tests; ``sources`` are the files whose lines are looked at.

    Raises :class:`ThresherError` where one fails: a mutant cannot be told from the pass then.
    """
    recorder = _Recorder(sources)
    code = _run([*files], recorder)
    if recorder.failed:
        raise ThresherError(f"{recorder.failed} fails before anything is changed: mend it first")
    if code or not recorder.tests:
        raise ThresherError(f"pytest finds no test in {', '.join(files)} (exit code {int(code)})")
    return recorder.tests


def first_failure(names: Sequence[str]) -> str:
    """Run tests up to the first that fails, and return its name; empty where none does."""
    recorder = _Recorder(())
    code = _run([*names, "-x"], recorder)
    if code and not recorder.failed:
        raise RuntimeError(f"pytest ends with exit code {int(code)} and names no test that fails")
    return recorder.failed


def _run(arguments: list[str], recorder: _Recorder) -> int:
    import pytest  # a user of the kit need not have it

    return pytest.main([*arguments, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"], plugins=[recorder])


@dataclass(eq=False)  # pytest keeps plugins in sets
class _Recorder:
    """A plugin of pytest."""

    sources: Sequence[str]
    tests: list[Test] = field(default_factory=list)
    failed: str = ""
    paths: dict[str, str] = field(default_factory=dict)
    tracing: ExitStack = field(default_factory=ExitStack)
    lines: Lines = field(default_factory=set)
    start: float = 0.0

    def pytest_collection_modifyitems(self, items: Sequence[Any]) -> None:
        """Keep the path of each test: its name is relative to a folder that may be another one in the next run."""
        for item in items:
            self.paths[item.nodeid] = f"{item.path}::{item.nodeid.partition('::')[2]}"

    def pytest_collectreport(self, report: Any) -> None:
        """Keep the name of a file that cannot be imported."""
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Trace a test with its fixtures."""
        self.start = time.perf_counter()
        self.lines = self.tracing.enter_context(traced(self.sources))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Keep what the test reached."""
        self.tracing.close()
        self.tests.append(Test(self.paths[nodeid], self.lines, time.perf_counter() - self.start))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep the name of the first test that fails."""
        if report.failed:
            self.failed = self.failed or report.nodeid
