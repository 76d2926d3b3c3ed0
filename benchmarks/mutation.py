"""Mutate our passes and keep what became of each mutant: ``make mutation``.

    python benchmarks/mutation.py [--only PATTERN] [--limit N] [--seed N] [--jobs N]
    python benchmarks/mutation.py --render

The results are JSON lines in benchmarks/results/mutation.jsonl, one a mutant; those of a pass that is run again are replaced. ``--limit``
draws so many mutants a pass, 0 takes all. The table in docs/authoring.md is written after each run, and by ``--render``.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]
RESULTS = ROOT / "benchmarks" / "results" / "mutation.jsonl"
PAGE = ROOT / "docs" / "authoring.md"
TABLE = re.compile(r"(<!-- mutation -->\n).*?(<!-- end of mutation -->)", re.S)
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", metavar="PATTERN", help="passes whose name matches, as in a shell")
    parser.add_argument(
        "--limit", type=int, default=40, help="mutants a pass, drawn with the seed; 0: all (default: 40)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--render", action="store_true", help="only write the table, from the results")
    options = parser.parse_args()
    if not options.render:
        run(options)
    PAGE.write_text(TABLE.sub(lambda match: match[1] + table(rows()) + match[2], PAGE.read_text()))
    return 0


def run(options: argparse.Namespace) -> None:
    """Mutate the passes and write their rows."""
    import torch

    from helpers.cases import CASES
    from helpers.equivalent_mutants import REASONS
    from helpers.registered import OWN
    from thresher.testing import mutate

    torch.set_num_threads(1)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    for name in fnmatch.filter(OWN, options.only):
        start = time.perf_counter()
        tests = tests_of(OWN[name])
        mutants = mutate(
            name, *CASES[name], tests=tests, limit=options.limit or None, seed=options.seed, jobs=options.jobs,
            reasons=REASONS, done=lambda mutant: print(mutant, flush=True) if mutant.lives else None,
        )  # fmt: skip
        fresh = [{"pass": name, **row_of(mutant), "commit": commit} for mutant in mutants]
        kept = [row for row in rows() if row["pass"] != name]
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in (*kept, *fresh)))
        lives = sum(mutant.lives for mutant in mutants)
        print(f"{name}: {lives} of {len(mutants)} live, {time.perf_counter() - start:.0f} s", flush=True)


def tests_of(cls: type) -> list[str]:
    """Return the test files of a pass: ``tests/passes/<stage>/test_<module>*.py``, and the one of the options of all passes."""
    *_, stage, module = cls.__module__.split(".")
    folder = ROOT / "tests" / "passes"
    return [str(folder / "test_option_values.py"), *sorted(map(str, (folder / stage).glob(f"test_{module}*.py")))]


def row_of(mutant: Any) -> Row:
    """Return what is kept of a mutant."""
    edit = mutant.edit
    row = {"file": mutant.file, "line": edit.line, "before": edit.before[:80], "after": edit.after}
    by = "test" if mutant.by_test else mutant.check
    return {**row, "outcome": mutant.outcome, "check": by, "reason": bool(mutant.reason)}


def rows() -> list[Row]:
    """Return the results there are."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(results: Iterable[Row]) -> str:
    """Return the table of the page: a line a pass, and the sum."""
    passes: dict[str, list[Row]] = {}
    for row in results:
        passes.setdefault(row["pass"], []).append(row)
    lines = [
        "| pass | mutants | killed by its cases | by its tests only | explained | live |",
        "|---|---|---|---|---|---|",
    ]
    lines += [line(name, mutants) for name, mutants in sorted(passes.items())]
    return "\n".join([*lines, line("all", [row for mutants in passes.values() for row in mutants])]) + "\n"


def line(name: str, mutants: list[Row]) -> str:
    """Return the line of some mutants."""
    dead = [row for row in mutants if row["outcome"] in ("killed", "timeout")]
    tests = [row for row in dead if row["check"] == "test"]
    explained = [row for row in mutants if row not in dead and row["reason"]]
    share = f"{1 - (len(mutants) - len(dead) - len(explained)) / len(mutants):.0%}"
    counts = (
        len(mutants),
        f"{len(dead) - len(tests)} ({(len(dead) - len(tests)) / len(mutants):.0%})",
        len(tests),
        len(explained),
    )
    return f"| {name} | {' | '.join(map(str, counts))} | {len(mutants) - len(dead) - len(explained)} (killed or explained: {share}) |"


if __name__ == "__main__":
    sys.exit(main())
