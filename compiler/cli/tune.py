"""``thresher tune`` and ``thresher records``: measure kernels for later builds, and carry the measurements to other machines."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import thresher
from thresher.cli.arguments import INPUTS, LIBRARY, MODEL, PASSES, TARGET, Commands, add_command, remote
from thresher.cli.model import load_model
from thresher.errors import ThresherError
from thresher.tuning.options import Tune
from thresher.tuning.records import Records, default_path, read_lines, write_lines


def add(commands: Commands) -> None:
    """Add the commands of this module."""
    tune = add_command(
        commands,
        "tune MODEL [options]",
        run_tune,
        "Measure the kernels of a model on this machine, or on a remote one, for later builds.",
        "thresher tune mypackage.models:make --input 1x3x224x224 --trials 8",
        MODEL,
        INPUTS,
        TARGET,
        PASSES,
        LIBRARY,
    )
    tune.add_argument(
        "--trials", type=int, default=Tune.trials, help=f"plans per workload, 2 to 32 (default: {Tune.trials})"
    )
    tune.add_argument(
        "--seconds", type=float, help="begin no new workload after this long; what is missing can be measured later"
    )
    tune.add_argument("--records", metavar="FILE", help=f"default: {default_path()}")
    tune.add_argument(
        "--search",
        type=int,
        default=0,
        metavar="N",
        help="also let MetaSchedule try N schedules for every kernel without plans",
    )
    tune.add_argument("--again", action="store_true", help="measure what is on record, too")
    tune.add_argument(
        "--remote", type=remote, metavar="HOST:PORT:KEY", help="a device registered with a TVM RPC tracker"
    )

    records = add_command(
        commands,
        "records [options]",
        run_records,
        "Show, merge and export the measurements of tuning.",
        "thresher records --merge board.jsonl --export all.jsonl",
    )
    records.add_argument("--records", metavar="FILE", help=f"default: {default_path()}")
    records.add_argument(
        "--merge", action="append", default=[], metavar="FILE", help="take over the records of .sqlite or .jsonl files"
    )
    records.add_argument("--export", metavar="FILE", help="write all as JSON lines")


def run_tune(options: Namespace) -> int:
    """Measure, and print how many workloads gained by it and the times of the whole model."""
    model, inputs = load_model(options.model, options.input, dict(options.fixed))
    tune = Tune(options.trials, options.seconds, options.records, options.again, options.remote, options.search)
    compiled = thresher.compile(
        model,
        inputs,
        target=options.target,
        passes=options.passes,
        tune=tune,
        library=options.library,
        progress=True,
    )
    taken, sites = compiled.report.tuned
    times = "  ".join(f"{name}: {ms:.2f} ms" for name, ms in compiled.report.tuning.items())
    print(f"{taken} of {sites} workloads are faster by another plan than the estimated one.  {times}")
    return 0


def run_records(options: Namespace) -> int:
    """Merge, export, or else print the records: speed-up over the estimated plan, microseconds, workload and plan."""
    records = Records(options.records)
    for path in options.merge:
        if not Path(path).exists():
            raise ThresherError(f"{path} does not exist")
        others = read_lines(path) if path.endswith(".jsonl") else Records(path).all()
        print(f"{path}: {records.put(others)} of {len(others)} records are new")
    if options.export:
        write_lines(records.all(), options.export)
        print(f"wrote {options.export}")
    if not options.merge and not options.export:
        for r in records.all():
            speedup = r.rule_microseconds / r.microseconds
            print(f"{speedup:5.2f}x {r.microseconds:10.1f} us  {r.workload}  {r.plan or 'as estimated'}")
    return 0
