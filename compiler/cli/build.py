"""``thresher build`` and ``thresher bundle``: artifacts from models, and one from several."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import thresher
from thresher.cli.arguments import (
    INPUTS,
    LIBRARY,
    MODEL,
    PASSES,
    TARGET,
    Commands,
    add_command,
    batch_sizes,
    budget,
    named_artifact,
)
from thresher.cli.model import import_attribute, load_model
from thresher.errors import ThresherError


def add(commands: Commands) -> None:
    """Add the commands of this module."""
    build = add_command(
        commands,
        "build MODEL [options]",
        run_build,
        "Compile a model into an artifact that loads without the model's code, and without torch.",
        "thresher build mypackage.models:make --input 1x3x224x224 -o model.thresher",
        MODEL,
        INPUTS,
        TARGET,
        PASSES,
        LIBRARY,
    )
    build.add_argument(
        "--validate",
        default="error",
        choices=("error", "warn", "off"),
        help="what to do about a wrong result (default: error)",
    )
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
        "--budget",
        type=budget,
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
        type=batch_sizes,
        metavar="SIZES",
        help="the first dimension of every input may have any size; code is made for batches of these, for instance 1,8",
    )
    build.add_argument("-o", "--output", default="model.thresher", metavar="FILE", help="default: model.thresher")
    build.add_argument("--html", metavar="FILE", help="write the report as a page, too")
    build.add_argument("--onnx", metavar="FILE", help="write the folded model for other runtimes, too")
    build.add_argument("--certificate", metavar="FILE", help="write the proof of what was folded, for thresher verify")

    bundle = add_command(
        commands,
        "bundle NAME=ARTIFACT ... [options]",
        run_bundle,
        "Put several artifacts into one, which holds equal weights once: prefill and decode of a language model.",
        "thresher bundle prefill=a.thresher decode=b.thresher -o llama.thresher",
    )
    bundle.add_argument(
        "models",
        nargs="+",
        type=named_artifact,
        metavar="NAME=ARTIFACT",
        help="the name of an entry, and its artifact",
    )
    bundle.add_argument("-o", "--output", default="bundle.thresher", metavar="FILE", help="default: bundle.thresher")


def run_build(options: Namespace) -> int:
    """Compile the model and write the artifact, and what else was asked for."""
    model, inputs = load_model(options.model, options.input, dict(options.fixed))
    approximation = {
        "calibration": import_attribute(options.calibration)() if options.calibration else None,
        "budget": options.budget,
    }
    example, dynamic = free_batch(inputs, options.batch) if options.batch else (inputs, {})
    compiled = thresher.compile(
        model,
        example,
        target=options.target,
        passes=options.passes,
        validate=options.validate,
        certificate=bool(options.certificate),
        widths=options.widths,
        strict_rounding=options.strict_rounding,
        library=options.library,
        **approximation,
        **dynamic,
    )
    compiled.save(options.output)
    if options.onnx:
        from thresher.exporters.onnx import write_onnx

        folded = thresher.rewrite(model, inputs, passes=options.passes, **approximation)
        print(f"wrote {write_onnx(folded, inputs, options.onnx)}")
    if options.html:
        compiled.report.save_html(options.html)
    compiled.report.print()
    print(f"wrote {options.output}")
    if options.certificate:
        certificate = compiled.certificate
        print(f"wrote {certificate.save(options.certificate)}" if certificate else "nothing was folded: no certificate")
    return 0


def free_batch(inputs: tuple, sizes: tuple[int, ...]) -> tuple[tuple, dict[str, Any]]:
    """Return the example inputs with at least two samples each, and the arguments of ``compile()`` that free their first dimension."""
    import torch

    dimension = torch.export.Dim("batch")
    example = tuple(
        torch.cat([x, x]) if x.shape[:1] == (1,) else x for x in inputs
    )  # export takes a size of 1 for fixed
    return example, {"dynamic_shapes": tuple({0: dimension} for _ in inputs), "batch_sizes": sizes}


def run_bundle(options: Namespace) -> int:
    """Write artifacts of one model each as the entries of one artifact."""
    models: dict[str, thresher.Compiled] = {}
    for name, path in options.models:
        if name in models:
            raise ThresherError(f"two models are named {name!r}")
        model = thresher.load(path)
        if not isinstance(model, thresher.Compiled):
            raise ThresherError(f"{path} holds {len(model)} models; a bundle is made of artifacts of one model each")
        models[name] = model
    bundle = thresher.Bundle(models).save(options.output)
    print(f"wrote {bundle} ({bundle.stat().st_size / 1e6:.1f} MB)")
    return 0
