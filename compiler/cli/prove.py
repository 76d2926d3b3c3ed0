"""``thresher prove``: put a pass through the proof kit, or mutate it to see what its cases do not notice."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from thresher.cli.arguments import Commands, add_command, count, passes, positive
from thresher.cli.model import import_attribute
from thresher.errors import ThresherError

if TYPE_CHECKING:
    import torch

    from thresher.rewriting.contract import Pass
    from thresher.testing.cases import Case, Entry
    from thresher.testing.mutation.mutants import Mutant
    from thresher.testing.mutation.source_edits import SourceEdit


def add(commands: Commands) -> None:
    """Add the command of this module."""
    parser = add_command(
        commands,
        "prove PASS CASES [options]",
        run_prove,
        "Put a pass through the proof kit, or with --mutate change its source and list the changes that no check notices.",
        "thresher prove my-pass mypackage.cases:CASES --mutate --limit 50",
    )
    parser.add_argument("item", metavar="PASS", help="a name, options in braces, or package.module:Class")
    parser.add_argument(
        "cases",
        metavar="CASES",
        help="package.module:NAME of a Case, of a list of cases, or of a dict from names of passes to them",
    )
    parser.add_argument(
        "--draws",
        type=positive,
        metavar="N",
        help="sizes of a case, at most",
    )
    parser.add_argument("--misses", type=count, metavar="N", help="graphs one step off, for each case")
    parser.add_argument(
        "--dtypes", type=dtypes, metavar="A,B", help="besides float32; default: float64,float16,bfloat16"
    )
    parser.add_argument(
        "--first", type=passes, default=(), metavar="PASSES", help="passes that run before it, separated by ';'"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is drawn")
    parser.add_argument("--mutate", action="store_true", help="list the changes of the source that no check notices")
    parser.add_argument(
        "--tests",
        action="append",
        default=[],
        metavar="FILE",
        help="with --mutate: tests that may notice it, too; repeat for more",
    )
    parser.add_argument(
        "--only",
        default="*",
        metavar="PATTERN",
        help="with --mutate: functions, as file:name with * for anything: '*:_takes'",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="with --mutate: so many changes, drawn with the seed"
    )
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="with --mutate: processes at a time")
    parser.add_argument(
        "--reasons",
        metavar="NAME",
        help="with --mutate: package.module:NAME of a dict that says why changes change nothing",
    )


def dtypes(text: str) -> list[torch.dtype]:
    """Return the dtypes of ``float64,bfloat16``; none for an empty text."""
    import torch

    chosen = [getattr(torch, name, None) for name in text.split(",") if name]
    if not all(isinstance(dtype, torch.dtype) for dtype in chosen):
        raise ArgumentTypeError(f"cannot read the dtypes {text!r}: write names of torch such as float64,bfloat16")
    return chosen


def run_prove(options: Namespace) -> int:
    """Print the findings, or the mutants that live; return 1 where there are any."""
    collection = import_attribute(options.cases)  # it may register the pass
    item = _pass(options.item)
    cases = _cases(collection, options.cases, item)
    chosen = {
        name: getattr(options, name) for name in ("draws", "misses", "dtypes") if getattr(options, name) is not None
    }
    arguments = {**chosen, "first": options.first, "seed": options.seed}
    return (_print_mutants if options.mutate else _print_findings)(item, cases, arguments, options)


def _print_findings(
    item: str | Pass, cases: Sequence[Case | Entry], arguments: dict[str, Any], options: Namespace
) -> int:
    from thresher.testing import examine

    findings = examine(item, *cases, **arguments)
    for finding in findings:
        print(finding)
    print(f"findings: {len(findings)}; cases: {len(cases)}")
    return min(1, len(findings))


def _print_mutants(
    item: str | Pass, cases: Sequence[Case | Entry], arguments: dict[str, Any], options: Namespace
) -> int:
    from thresher.testing import mutate

    def chosen(file: str, edit: SourceEdit) -> bool:
        return fnmatchcase(f"{file}:{edit.function}", options.only)

    def show(mutant: Mutant) -> None:
        if mutant.lives:
            print(mutant, flush=True)

    reasons = import_attribute(options.reasons) if options.reasons else {}
    more = {"tests": options.tests, "only": chosen, "limit": options.limit, "jobs": options.jobs, "reasons": reasons}
    mutants = mutate(item, *cases, done=show, **more, **arguments)
    print(summary(mutants))
    return int(any(mutant.lives for mutant in mutants))


def summary(mutants: Sequence[Mutant]) -> str:
    """Return a line that says what became of how many mutants."""
    tests = sum(mutant.by_test for mutant in mutants)
    cases = sum(mutant.killed for mutant in mutants) - tests
    explained = sum(bool(mutant.reason) and not mutant.killed for mutant in mutants)
    lives = sum(mutant.lives for mutant in mutants)
    killed = f"{cases} killed by the cases, {tests} by the tests"
    return f"{len(mutants)} mutants: {killed}, {explained} explained, {lives} live"


def _pass(text: str) -> str | Pass:
    """Return a pass by its class, or the text that names it."""
    if ":" not in text.partition("{")[0]:
        return text
    cls = import_attribute(text)
    if not isinstance(cls, type):
        raise ThresherError(f"{text} is no class; give the class of a pass, or the name of a registered one")
    return cls()


def _cases(collection: Any, spec: str, item: str | Pass) -> list[Case | Entry]:
    """Return the cases in what ``spec`` names."""
    from thresher.testing import Case, Entry

    if isinstance(collection, dict):
        name = (item if isinstance(item, str) else item.name).partition("{")[0]
        if name not in collection:
            raise ThresherError(
                f"{spec} has no cases of {name!r}; it has those of {', '.join(map(str, collection)) or 'no pass'}"
            )
        collection = collection[name]
    cases = list(collection) if isinstance(collection, (list, tuple)) else [collection]
    if not cases or not all(isinstance(case, (Case, Entry)) for case in cases):
        raise ThresherError(f"{spec} is no Case, no list of cases and no dict from names of passes to lists of cases")
    return cases
