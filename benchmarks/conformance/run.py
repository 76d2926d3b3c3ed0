"""Run suites that nobody here wrote, and write docs/conformance.md: ``make conformance``.

    python -m benchmarks.conformance.run [--suite NAME ...] [--only PATTERN] [--jobs N] [--again OUTCOME ...]
    python -m benchmarks.conformance.run --render

The results are JSON lines in benchmarks/results/conformance, one file a suite, appended as they come: a run that was stopped goes on where
it was. ``--again`` judges the samples anew whose last outcome was one of these ("all" for every sample). The page is written after a run
of all samples of all suites, and by ``--render``.
"""

from __future__ import annotations

import argparse
import fnmatch
import random
import subprocess
import sys
import time
from pathlib import Path

from .page import render
from .results import Results
from .runner import ROOT, Row, run_samples
from .suites import SUITES

PAGE = ROOT / "docs" / "conformance.md"
RESULTS = ROOT / "benchmarks" / "results" / "conformance"
LOGS = ROOT / "build" / "conformance"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="default: all")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="samples whose name matches, as in a shell")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--again", nargs="*", default=[], metavar="OUTCOME", help="judge these anew; all: every sample")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--render", action="store_true", help="only write the page, from the results")
    options = parser.parse_args()
    for folder in (options.results, LOGS):
        folder.mkdir(parents=True, exist_ok=True)
    if not options.render:
        for name in options.suite:
            run_suite(name, options)
    if options.render or (options.suite == list(SUITES) and options.only == "*"):
        PAGE.write_text(render({name: Results(options.results / f"{name}.jsonl") for name in SUITES}))
    return 0


def run_suite(name: str, options: argparse.Namespace) -> None:
    """Judge the samples of one suite that have no result yet, and those that are to be judged again."""
    suite, results = SUITES[name], Results(options.results / f"{name}.jsonl")
    stale = {n for n, row in results.rows.items() if "all" in options.again or row["outcome"] in options.again}
    names = [n for n in suite.names() if fnmatch.fnmatchcase(n, options.only)]
    names = [n for n in names if n not in results.rows or n in stale]
    random.Random(0).shuffle(names)  # what a run has judged when it is stopped is then a fair sample
    start, commit = time.perf_counter(), _commit()

    def done(sample: str, row: Row) -> None:
        results.append(sample, {**row, "commit": commit})
        print(f"{name} {sample}: {row['outcome']} {row['reason']}", flush=True)

    run_samples(name, names, suite.limit, options.jobs, LOGS / f"{name}.log", done)
    results.tidy()
    print(f"{name}: {len(names)} samples in {time.perf_counter() - start:.0f} s", flush=True)


def _commit() -> str:
    """Return what is judged, as git calls it: a short hash, with ``-dirty`` behind it where the files differ from the commit."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
