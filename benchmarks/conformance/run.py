"""Run suites that nobody here wrote, and write docs/conformance.md: ``make conformance``.

    python -m benchmarks.conformance.run [--suite NAME ...] [--only PATTERN] [--jobs N] [--again OUTCOME ...]
    python -m benchmarks.conformance.run --render

The results are JSON lines, one file a suite, appended as they come: a run that was stopped goes on where it was. ``--again`` judges the
samples anew whose last outcome was one of these ("all" for every sample). The page is written after a run of all samples of all suites,
and by ``--render``.
"""

from __future__ import annotations

import argparse
import fnmatch
import random
import sys
import time
from pathlib import Path

from .page import render
from .results import Results
from .runner import ROOT, Row, run_samples
from .suites import SUITES

PAGE = ROOT / "docs" / "conformance.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="default: all")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="samples whose name matches, as in a shell")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--again", nargs="*", default=[], metavar="OUTCOME", help="judge these anew; all: every sample")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "conformance", help="folder of the results")
    parser.add_argument("--render", action="store_true", help="only write the page, from the results")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
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
    start = time.perf_counter()

    def done(sample: str, row: Row) -> None:
        results.append(sample, row)
        print(f"{name} {sample}: {row['outcome']} {row['reason']}", flush=True)

    run_samples(name, names, suite.limit, options.jobs, options.results / f"{name}.log", done)
    print(f"{name}: {len(names)} samples in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
