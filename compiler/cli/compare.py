"""``thresher bench`` and ``thresher diff``: the times of artifacts, and what differs between two."""

from __future__ import annotations

import json
from argparse import Namespace
from functools import partial

from thresher.cli.arguments import Commands, add_command, positive


def add(commands: Commands) -> None:
    """Add the commands of this module."""
    bench = add_command(
        commands,
        "bench ARTIFACT ... [options]",
        run_bench,
        "Time artifacts on this machine, in turn, on the inputs that they carry as their proof.",
        "thresher bench before.thresher after.thresher --rounds 50",
    )
    bench.add_argument("artifacts", metavar="ARTIFACT", nargs="+", help="one, or several that take the same inputs")
    bench.add_argument("--rounds", type=positive, default=20, help="default: 20")
    bench.add_argument("--json", action="store_true", help="print milliseconds as JSON")

    diff = add_command(
        commands,
        "diff ARTIFACT ARTIFACT",
        run_diff,
        "Print what differs between two artifacts; the exit code is 1 if anything does.",
        "thresher diff old.thresher new.thresher",
    )
    diff.add_argument("a", metavar="ARTIFACT", help="an artifact")
    diff.add_argument("b", metavar="ARTIFACT", help="another one")


def run_bench(options: Namespace) -> int:
    """Print the median and the range in milliseconds of every model of the artifacts."""
    from thresher.artifact.reader import load_all
    from thresher.tuning.timing import interleaved

    calls = {}
    for path in options.artifacts:
        for name, model in load_all(path).items():
            calls[name] = partial(model.executable.run, model.signature.check(model.reference_run.inputs))
    timings = interleaved(calls, rounds=options.rounds)
    if options.json:
        print(json.dumps({name: {"median": t.median, "low": t.low, "high": t.high} for name, t in timings.items()}))
        return 0
    first = next(iter(timings.values()))
    for name, t in timings.items():
        ratio = f"  {first.over(t):.2f}x the first" if t is not first else ""
        print(f"{t.median:.3f} ms ({t.low:.3f} to {t.high:.3f})  {name}{ratio}")
    return 0


def run_diff(options: Namespace) -> int:
    """Print the differences, and return 1 where there are any."""
    from thresher.artifact.diff import difference
    from thresher.artifact.reader import load_all

    one, other = (
        {label[len(path) :]: model for label, model in load_all(path).items()} for path in (options.a, options.b)
    )
    lines = [f"only in {options.a if name in one else options.b}: {name}" for name in sorted(one.keys() ^ other.keys())]
    for name in [n for n in one if n in other]:
        lines += [f"{name} {line}".lstrip() for line in difference(one[name], other[name])]
    print("\n".join(lines) or "no difference")
    return 1 if lines else 0
