"""``thresher inspect`` and ``thresher passes``: show what an artifact holds, what passes would do, and which there are."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import thresher
from thresher.cli.arguments import INPUTS, PASSES, Commands, add_command, passes
from thresher.cli.model import load_model
from thresher.errors import ThresherError

if TYPE_CHECKING:
    from thresher.ir.program import Program
    from thresher.rewriting.contract import Pass
    from thresher.rewriting.manager import PassRecord


def add(commands: Commands) -> None:
    """Add the commands of this module."""
    parser = add_command(
        commands,
        "inspect MODEL [options]",
        run_inspect,
        "Show what an artifact holds, or what the passes would do to a model, and what they refused and why.",
        "thresher inspect mypackage.models:make --input 1x3x224x224 --graph",
        INPUTS,
        PASSES,
    )
    parser.add_argument("subject", metavar="MODEL", help="an artifact, or a model as for thresher build")
    parser.add_argument("--graph", action="store_true", help="print the rewritten graph")
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON; of several models an object by their names"
    )

    parser = add_command(
        commands,
        "passes [NAME | --graph PASSES MODEL]",
        run_passes,
        "List all passes with their options, explain one, or show what a graph looks like between passes.",
        "thresher passes --graph exact mypackage.models:make --input 1x3x224x224",
        INPUTS,
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="a pass: what it does, its options, where it comes from; with --graph a model",
    )
    parser.add_argument(
        "--graph",
        metavar="PASSES",
        type=passes,
        help="print the graph of MODEL before these passes, and what each of them changes",
    )


def run_inspect(options: Namespace) -> int:
    """Print the report, the graph or the JSON of an artifact or of a model."""
    path = Path(options.subject)
    if path.suffix not in (".pt2", ".onnx") and (path.suffix == ".thresher" or path.is_file()):
        return _inspect_artifact(options)
    model, inputs = load_model(options.subject, options.input, dict(options.fixed))
    compiled = thresher.compile(model, inputs, target="cpu", backend="eager", passes=options.passes)
    if options.json or options.graph:
        print(compiled.report.to_json() if options.json else compiled.text)
        return 0
    compiled.report.print()
    for module, description in compiled.report.attention:
        print(f"attention {module}: {description}")
    for record in compiled.report.passes:
        for kind, notes in (("rewrote", record.rewrites), ("refused", record.refusals)):
            for note in notes:
                print(f"{record.name} {kind} {note.module}: {note.message}")
    return 0


def _inspect_artifact(options: Namespace) -> int:
    from thresher.artifact.reader import load_all

    if options.json:
        print(_json(thresher.load(options.subject)))
        return 0
    for name, model in load_all(options.subject).items():
        if options.graph:
            print(model.text)
        else:
            print(f"{name}\n{json.dumps(model.signature.to_json(), indent=1)}")
            model.report.print()
    return 0


def _json(loaded: thresher.Compiled | thresher.Bundle[thresher.Compiled]) -> str:
    """Return one document: the report of a model, or the reports of several by their names."""
    if not isinstance(loaded, thresher.Bundle):
        return loaded.report.to_json()
    return json.dumps({name: json.loads(model.report.to_json()) for name, model in loaded.items()}, indent=1)


def run_passes(options: Namespace) -> int:
    """Print a line for each pass, the documentation of one, or the graph of a model between passes."""
    from thresher.rewriting.registry import make_pass, registered_passes

    if options.graph is not None:
        return _print_graphs(options)
    if not options.name:
        for cls in registered_passes().values():
            print(f"{_usage(cls)}\n    {(cls.__doc__ or '').strip().splitlines()[0]}")
        return 0
    cls = type(make_pass(options.name))
    print(f"{_usage(cls)}\n\n{inspect.getdoc(sys.modules[cls.__module__]) or inspect.getdoc(cls)}\n")
    for field in dataclasses.fields(cls):
        print(f"option {field.name}: {field.type}, default {field.default}")
    if cls.requires:
        print(f"runs after {', '.join(cls.requires)}")
    print(f"from {cls.__module__}")
    return 0


def _print_graphs(options: Namespace) -> int:
    """Print the graph before the first pass, and after each pass what it rewrote, and the lines that differ."""
    from thresher.passes.pipelines import resolve
    from thresher.rewriting.manager import PassManager

    if not options.name:
        raise ThresherError("--graph needs a MODEL")
    program = thresher.capture(*load_model(options.name, options.input, dict(options.fixed)))
    print(f"# as captured\n{program.text()}")
    PassManager(resolve(options.graph), "off", _print_step).run(program)
    return 0


def _print_step(record: PassRecord, before: Program, after: Program) -> None:
    reason = f": {record.failure}" if record.failure else ""
    print(f"# after {record.name}: {record.status}{reason}")
    for note in record.rewrites:
        print(f"#   {note.module}: {note.message}")
    if after is not before:
        print(before.diff(after))


def _usage(cls: type[Pass]) -> str:
    """Return ``name{option=default,...}  [exact]``."""
    fields = ",".join(f"{f.name}={f.default}" for f in dataclasses.fields(cls))
    return f"{cls.name}{'{' + fields + '}' if fields else ''}  [{cls.kind}]"
