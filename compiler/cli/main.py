"""``thresher``: the ahead-of-time face. ``thresher --help`` names the commands."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import thresher
from thresher.approximation.budget import METRICS, Budget
from thresher.artifact.diff import difference
from thresher.artifact.reader import load_all
from thresher.debugging.blame import blame
from thresher.errors import ThresherError
from thresher.exporters.onnx import write_onnx
from thresher.frontend.onnx.reader import read_onnx
from thresher.passes import pipelines
from thresher.rewriting.contract import Pass
from thresher.rewriting.registry import make_pass, registered_passes
from thresher.tuning.options import Remote, Tune
from thresher.tuning.records import Records, default_path, read_lines, write_lines
from thresher.tuning.timing import interleaved
from thresher.verification.certificate import Certificate
from thresher.verification.verifier import verify as verify_certificate


def main(argv: list[str] | None = None) -> int:
    """Run one command; errors of ours are one line on standard error and exit code 1."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        return options.run(options)
    except ThresherError as error:
        print(f"thresher: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="thresher", description=thresher.__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    build = commands.add_parser("build", help="compile a model into an artifact that loads without its code")
    build.add_argument(
        "model",
        help="package.module:function (returns a module, or a module and its example inputs), or a .pt2 or .onnx file",
    )
    build.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE",
        help="example input: 1x3x224x224, or 1x128:int64 for zeros of a dtype; repeat for more",
    )
    build.add_argument(
        "--target", help="cpu, cpu:<llvm name>, cuda:sm_NN; default: the GPU if there is one, else this CPU"
    )
    build.add_argument(
        "--passes",
        default="exact",
        help=f"a pipeline ({', '.join(pipelines.NAMED)}) or passes separated by ';', options in braces",
    )
    build.add_argument("--validate", default="error", choices=("error", "warn", "off"))
    build.add_argument(
        "--widths",
        default="rule",
        choices=("rule", "measured"),
        help="measured: build folded to several widths and not folded, and keep what is fastest here",
    )
    build.add_argument(
        "--strict-rounding", action="store_true", help="sums as the operators define them: no Winograd convolutions"
    )
    build.add_argument(
        "--library",
        default="never",
        choices=("auto", "never"),
        help="auto: torch's own kernels where tuning found them faster; the artifact then needs torch",
    )
    build.add_argument(
        "--budget",
        metavar="METRIC=LIMIT",
        help="for approximate passes: rel_l2=0.01, cosine=0.01, top1=0.005 or kl=0.02; needs --calibration",
    )
    build.add_argument(
        "--calibration",
        metavar="MODULE:FUNCTION",
        help="returns samples for approximate passes: tensors, tuples or dictionaries of inputs",
    )
    build.add_argument(
        "--batch",
        metavar="SIZES",
        help="the first dimension of every input may have any size; code is made for batches of these, for instance 1,8",
    )
    build.add_argument("--html", metavar="FILE", help="write the report as a page, too")
    build.add_argument("--onnx", metavar="FILE", help="write the folded model for other runtimes, too")
    build.add_argument(
        "--fixed",
        action="append",
        default=[],
        metavar="INPUT=NUMBER",
        help="an input of an .onnx file that is always this number, for instance sr=16000",
    )
    build.add_argument("--certificate", metavar="FILE", help="write the proof of what was folded, for thresher verify")
    build.add_argument("-o", "--output", default="model.thresher")
    build.set_defaults(run=_build)

    tune = commands.add_parser(
        "tune", help="measure the kernels of a model on this machine, or on a remote one, for later builds"
    )
    tune.add_argument("model", help="as for build")
    tune.add_argument("--input", action="append", default=[], metavar="SHAPE")
    tune.add_argument("--target")
    tune.add_argument("--passes", default="exact")
    tune.add_argument("--trials", type=int, default=Tune.trials, help="plans per workload, 2 to 32")
    tune.add_argument(
        "--seconds", type=float, help="begin no new workload after this long; what is missing can be measured later"
    )
    tune.add_argument(
        "--library", default="auto", choices=("auto", "never"), help="whether torch's own kernels may win"
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
    tune.add_argument("--remote", metavar="HOST:PORT:KEY", help="a device behind a TVM RPC tracker")
    tune.set_defaults(run=_tune)

    records = commands.add_parser("records", help="show, merge and export what tuning measured")
    records.add_argument("--records", metavar="FILE", help=f"default: {default_path()}")
    records.add_argument(
        "--merge", action="append", default=[], metavar="FILE", help="take over the records of .sqlite or .jsonl files"
    )
    records.add_argument("--export", metavar="FILE", help="write all as JSON lines")
    records.set_defaults(run=_records)

    inspect = commands.add_parser("inspect", help="show what an artifact holds, or what the passes would do to a model")
    inspect.add_argument("what", help="an artifact, or a model as for build")
    inspect.add_argument("--input", action="append", default=[], metavar="SHAPE")
    inspect.add_argument("--passes", default="exact")
    inspect.add_argument("--graph", action="store_true", help="print the rewritten graph")
    inspect.add_argument("--json", action="store_true", help="print the report as JSON")
    inspect.set_defaults(run=_inspect)

    validate = commands.add_parser("validate", help="let an artifact prove itself on this machine")
    validate.add_argument("artifact")
    validate.set_defaults(run=_validate)

    verify = commands.add_parser("verify", help="check the certificate of a fold, without the optimiser")
    verify.add_argument("certificate")
    verify.add_argument("--explain", metavar="VALUE:DIM:INDEX", help="print the chain of reasons for one removed index")
    verify.set_defaults(run=_verify)

    bench = commands.add_parser("bench", help="time artifacts on this machine, in turn")
    bench.add_argument("artifacts", nargs="+", help="one, or several that take the same inputs")
    bench.add_argument("--rounds", type=int, default=20)
    bench.add_argument("--json", action="store_true")
    bench.set_defaults(run=_bench)

    bundle = commands.add_parser(
        "bundle", help="put several artifacts into one: prefill and decode of a language model"
    )
    bundle.add_argument("models", nargs="+", metavar="NAME=ARTIFACT", help="the name of an entry, and its artifact")
    bundle.add_argument("-o", "--output", default="bundle.thresher")
    bundle.set_defaults(run=_bundle)

    diff = commands.add_parser("diff", help="say what differs between two artifacts; exit code 1 if anything does")
    diff.add_argument("a")
    diff.add_argument("b")
    diff.set_defaults(run=_diff)

    guilty = commands.add_parser(
        "blame", help="find the pass or the operator that makes a result wrong, and a small program that shows it"
    )
    guilty.add_argument("model", help="as for build")
    guilty.add_argument("--input", action="append", default=[], metavar="SHAPE")
    guilty.add_argument("--target", default="cpu")
    guilty.add_argument("--passes", default="exact")
    guilty.add_argument("-o", "--output", default="blame.py", help="the script that shows it")
    guilty.set_defaults(run=_blame)

    passes = commands.add_parser("passes", help="list all passes with their options, or explain one")
    passes.add_argument("name", nargs="?", help="a pass: what it does, its options, where it comes from")
    passes.set_defaults(run=_passes)

    demo = commands.add_parser("demo", help="prune, fold, compile and check a real pretrained model")
    demo.add_argument("--amount", type=float, default=0.3, help="fraction of the hidden channels to prune")
    demo.add_argument("--directory", default=".", help="where model.thresher and report.html go")
    demo.set_defaults(run=_demo)
    return parser


def load_model(spec: str, shapes: list[str], fixed: Mapping[str, Any] | None = None) -> tuple[Any, tuple]:
    """The model behind a command-line spec, and its example inputs. ``fixed``: inputs of an .onnx file that are always these numbers."""
    inputs = tuple(example(s) for s in shapes)
    if spec.endswith(".pt2"):
        return spec, inputs
    if spec.endswith(".onnx"):
        onnx_model = read_onnx(spec, fixed)
        found = inputs or onnx_model.example()
        if found is None:
            sizes = ", ".join(onnx_model.described())
            raise ThresherError(f"{spec} leaves sizes open ({sizes}); describe its inputs with --input")
        return onnx_model, found
    if ":" not in spec:
        raise ThresherError(f"cannot read {spec!r}: give package.module:function, or a .pt2 or .onnx file")
    made = attribute(spec)
    made = made() if not isinstance(made, torch.nn.Module) else made
    if isinstance(made, tuple):
        model, example_inputs = made
        return model, inputs or tuple(example_inputs)
    if not inputs:
        raise ThresherError(f"{spec} returned a module without example inputs; describe them with --input")
    return made, inputs


def budget(text: str | None) -> Budget | None:
    """``cosine=0.01``."""
    if text is None:
        return None
    metric, _, limit = text.partition("=")
    try:
        return Budget(**{metric: float(limit)})  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ThresherError(
            f"cannot read the budget {text!r}: write one of {', '.join(METRICS)}, = and a number"
        ) from error


def attribute(spec: str) -> Any:
    """What ``package.module:name`` names; modules of the current folder are found, too."""
    module, _, name = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ThresherError(f"cannot import {spec!r}: {error}") from error
    finally:
        sys.path.pop(0)


def example(text: str) -> torch.Tensor:
    """``1x3x8x8`` -> a random float tensor; ``1x16:int64`` -> zeros."""
    shape, _, dtype_name = text.partition(":")
    dtype = getattr(torch, dtype_name or "float32", None)
    try:
        size = [int(d) for d in shape.split("x")]
    except ValueError as error:
        raise ThresherError(
            f"cannot read the input {text!r}: write sizes like 1x3x224x224, and a dtype after a colon"
        ) from error
    if not isinstance(dtype, torch.dtype):
        raise ThresherError(f"unknown dtype {dtype_name!r} in the input {text!r}")
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(size, generator=generator).to(dtype) if dtype.is_floating_point else torch.zeros(size, dtype=dtype)
    )


def split_passes(text: str) -> str | list[str]:
    return [p for p in text.split(";") if p] if ";" in text or text not in pipelines.NAMED else text


def numbers(given: list[str]) -> dict[str, float]:
    """``sr=16000``"""
    found = {}
    for text in given:
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError as error:
            raise ThresherError(f"cannot read {text!r}: write an input, = and a number") from error
    return found


def batch(text: str, inputs: tuple) -> tuple[tuple, dict[str, Any]]:
    """``1,8``: the example inputs with at least two samples, and what compile() is told."""
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise ThresherError(f"cannot read --batch {text!r}: write sizes separated by commas") from error
    dimension = torch.export.Dim("batch")
    several = tuple(
        torch.cat([x, x]) if x.shape[:1] == (1,) else x for x in inputs
    )  # export takes a size of 1 for fixed
    return several, {"dynamic_shapes": tuple({0: dimension} for _ in inputs), "batch_sizes": sizes}


def _build(options: argparse.Namespace) -> int:
    model, inputs = load_model(options.model, options.input, numbers(options.fixed))
    calibration = attribute(options.calibration)() if options.calibration else None
    several, free = batch(options.batch, inputs) if options.batch else (inputs, {})
    compiled = thresher.compile(
        model,
        several,
        target=options.target,
        passes=split_passes(options.passes),
        validate=options.validate,
        certificate=bool(options.certificate),
        widths=options.widths,
        strict_rounding=options.strict_rounding,
        library=options.library,
        calibration=calibration,
        budget=budget(options.budget),
        **free,
    )
    compiled.save(options.output)
    if options.onnx:
        passes = split_passes(options.passes)
        small = thresher.rewrite(model, inputs, passes=passes, calibration=calibration, budget=budget(options.budget))
        print(f"wrote {write_onnx(small, inputs, options.onnx)}")
    if options.html:
        compiled.report.save_html(options.html)
    compiled.report.print()
    print(f"wrote {options.output}")
    if options.certificate:
        made = compiled.certificate
        print(f"wrote {made.save(options.certificate)}" if made else "nothing was folded: no certificate")
    return 0


def _tune(options: argparse.Namespace) -> int:
    model, inputs = load_model(options.model, options.input)
    how = Tune(options.trials, options.seconds, options.records, options.again, remote(options.remote), options.search)
    compiled = thresher.compile(
        model,
        inputs,
        target=options.target,
        passes=split_passes(options.passes),
        tune=how,
        library=options.library,
        progress=True,
    )
    taken, sites = compiled.report.tuned
    times = "  ".join(f"{name}: {ms:.2f} ms" for name, ms in compiled.report.tuning.items())
    print(f"{taken} of {sites} workloads are faster by another plan than the estimated one.  {times}")
    return 0


def remote(text: str | None) -> Remote | None:
    """``host:port:key``."""
    if text is None:
        return None
    host, _, rest = text.partition(":")
    port, _, key = rest.partition(":")
    if not (host and port.isdigit() and key):
        raise ThresherError(f"cannot read the remote device {text!r}: write HOST:PORT:KEY")
    return Remote(host, int(port), key)


def _records(options: argparse.Namespace) -> int:
    records = Records(options.records)
    for path in options.merge:
        if not Path(path).exists():
            raise ThresherError(f"{path} does not exist")
        found = read_lines(path) if path.endswith(".jsonl") else Records(path).all()
        print(f"{path}: {records.put(found)} of {len(found)} records are new")
    if options.export:
        write_lines(records.all(), options.export)
        print(f"wrote {options.export}")
    if not options.merge and not options.export:
        for r in records.all():
            print(
                f"{r.rule_microseconds / r.microseconds:5.2f}x {r.microseconds:10.1f} us  {r.workload}  {r.plan or 'as estimated'}"
            )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    if Path(options.what).suffix not in (".pt2", ".onnx") and (
        Path(options.what).suffix == ".thresher" or Path(options.what).is_file()
    ):
        for name, compiled in load_all(options.what).items():
            if options.json or options.graph:
                print(compiled.report.to_json() if options.json else compiled.text)
            else:
                print(f"{name}\n{json.dumps(compiled.signature.to_json(), indent=1)}")
                compiled.report.print()
        return 0
    model, inputs = load_model(options.what, options.input)
    compiled = thresher.compile(model, inputs, target="cpu", backend="eager", passes=split_passes(options.passes))
    if options.json or options.graph:
        print(compiled.report.to_json() if options.json else compiled.text)
        return 0
    compiled.report.print()
    for module, words in compiled.report.attention:
        print(f"attention {module}: {words}")
    for record in compiled.report.passes:
        for kind, notes in (("rewrote", record.rewrites), ("refused", record.refusals)):
            for note in notes:
                print(f"{record.name} {kind} {note.module}: {note.message}")
    return 0


def _validate(options: argparse.Namespace) -> int:
    for name, compiled in load_all(options.artifact).items():
        for check in compiled.validate():
            print(f"{name}: {check.name}: relative error {check.error:.2e}, allowed {check.tolerance:.0e}: ok")
    return 0


def _verify(options: argparse.Namespace) -> int:
    certificate = Certificate.load(options.certificate)
    verdict = verify_certificate(certificate)
    print(f"the certificate holds: {verdict.steps} steps, {verdict.values} values, {verdict.removed} removed indices")
    if options.explain:
        try:
            value, dim, index = options.explain.split(":")
            print(certificate.explain(value, int(dim), int(index)))
        except ValueError as error:
            raise ThresherError(f"cannot read {options.explain!r}: write VALUE:DIM:INDEX") from error
    return 0


def _bench(options: argparse.Namespace) -> int:
    """Every artifact on the inputs that it carries as its proof."""
    if options.rounds < 1:
        raise ThresherError(f"--rounds must be at least 1, not {options.rounds}")
    calls = {}
    for path in options.artifacts:
        for name, loaded in load_all(path).items():
            calls[name] = partial(loaded.executable.run, loaded.signature.check(loaded.reference_run.inputs))
    found = interleaved(calls, rounds=options.rounds)
    first = next(iter(found.values()))
    if options.json:
        print(json.dumps({path: {"median": t.median, "low": t.low, "high": t.high} for path, t in found.items()}))
        return 0
    for path, t in found.items():
        ratio = f"  {first.over(t):.2f}x the first" if t is not first else ""
        print(f"{t.median:.3f} ms ({t.low:.3f} to {t.high:.3f})  {path}{ratio}")
    return 0


def _diff(options: argparse.Namespace) -> int:
    one, other = ({label[len(path) :]: m for label, m in load_all(path).items()} for path in (options.a, options.b))
    lines = [f"only in {options.a if name in one else options.b}: {name}" for name in sorted(one.keys() ^ other.keys())]
    for name in [n for n in one if n in other]:
        lines += [f"{name} {line}".lstrip() for line in difference(one[name], other[name])]
    print("\n".join(lines) or "no difference")
    return 1 if lines else 0


def _bundle(options: argparse.Namespace) -> int:
    """Artifacts of one model each as the entries of one."""
    models = {}
    for text in options.models:
        name, equals, path = text.partition("=")
        if not equals:
            raise ThresherError(f"cannot read {text!r}: write NAME=ARTIFACT, for instance prefill=a.thresher")
        if name in models:
            raise ThresherError(f"two models are named {name!r}")
        found = thresher.load(path)
        if not isinstance(found, thresher.Compiled):
            raise ThresherError(f"{path} holds {len(found)} models; a bundle is made of artifacts of one model each")
        models[name] = found
    path = thresher.Bundle(models).save(options.output)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def _blame(options: argparse.Namespace) -> int:
    model, inputs = load_model(options.model, options.input)
    found = blame(model, inputs, passes=split_passes(options.passes), target=options.target)
    if found is None:
        print("nothing is wrong: every pass is exact, and the lowered program agrees with torch")
        return 0
    print(f"{found}\nwrote {found.save(options.output)}")
    return 1


def _passes(options: argparse.Namespace) -> int:
    known = registered_passes()
    if options.name:
        cls = type(make_pass(options.name))
        print(f"{_usage(cls)}\n\n{inspect.getdoc(sys.modules[cls.__module__]) or inspect.getdoc(cls)}\n")
        for field in dataclasses.fields(cls):
            print(f"option {field.name}: {field.type}, default {field.default}")
        if cls.requires:
            print(f"runs after {', '.join(cls.requires)}")
        print(f"from {cls.__module__}")
        return 0
    for cls in known.values():
        print(f"{_usage(cls)}\n    {(cls.__doc__ or '').strip().splitlines()[0]}")
    return 0


def _usage(cls: type[Pass]) -> str:
    """``name{option=default,...}  [exact]``"""
    fields = ",".join(f"{f.name}={f.default}" for f in dataclasses.fields(cls))
    return f"{cls.name}{'{' + fields + '}' if fields else ''}  [{cls.kind}]"


def _demo(options: argparse.Namespace) -> int:
    from thresher.models.demo import run

    return run(options.amount, Path(options.directory))


if __name__ == "__main__":
    sys.exit(main())
