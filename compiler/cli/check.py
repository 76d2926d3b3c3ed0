"""``thresher validate``, ``thresher verify`` and ``thresher blame``: is a result right, and if not, whose fault is it?"""

from __future__ import annotations

from argparse import Namespace

from thresher.cli.arguments import INPUTS, MODEL, PASSES, Commands, add_command, removed_index
from thresher.cli.model import load_model


def add(commands: Commands) -> None:
    """Add the commands of this module."""
    validate = add_command(
        commands,
        "validate ARTIFACT",
        run_validate,
        "Let an artifact prove itself on this machine: it carries inputs, and the answers of the original model.",
        "thresher validate model.thresher",
    )
    validate.add_argument("artifact", metavar="ARTIFACT", help="the file that thresher build or bundle wrote")

    verify = add_command(
        commands,
        "verify CERTIFICATE [options]",
        run_verify,
        "Check the certificate of a fold, without the optimiser.",
        "thresher verify model.certificate --explain relu:1:7",
    )
    verify.add_argument("certificate", metavar="CERTIFICATE", help="the file that thresher build --certificate wrote")
    verify.add_argument(
        "--explain",
        type=removed_index,
        metavar="VALUE:DIM:INDEX",
        help="print the chain of reasons for one removed index",
    )

    blame = add_command(
        commands,
        "blame MODEL [options]",
        run_blame,
        "Find the pass or the operator that makes a result wrong, and write a small program that shows it.",
        "thresher blame mypackage.models:make --input 1x3x224x224 --passes 'exact;my-pass'",
        MODEL,
        INPUTS,
        PASSES,
    )
    blame.add_argument("--target", default="cpu", help="as for thresher build (default: cpu)")
    blame.add_argument("-o", "--output", default="blame.py", metavar="FILE", help="the script (default: blame.py)")


def run_validate(options: Namespace) -> int:
    """Print the error of every model of an artifact; a larger one than is allowed raises."""
    from thresher.artifact.reader import load_all

    for name, model in load_all(options.artifact).items():
        for check in model.validate():
            print(f"{name}: {check.name}: relative error {check.error:.2e}, allowed {check.tolerance:.0e}: ok")
    return 0


def run_verify(options: Namespace) -> int:
    """Print how much the certificate proves, and the reasons for one removed index."""
    from thresher.verification.certificate import Certificate
    from thresher.verification.verifier import verify

    certificate = Certificate.load(options.certificate)
    verdict = verify(certificate)
    if not verdict.removed:
        print("nothing was folded: the certificate removes no index")
        return 0
    print(f"the certificate holds: {verdict.steps} steps, {verdict.values} values, {verdict.removed} removed indices")
    if options.explain:
        print(certificate.explain(*options.explain))
    return 0


def run_blame(options: Namespace) -> int:
    """Print the culprit and write the script, and return 1; return 0 where nothing is wrong."""
    from thresher.debugging.blame import blame

    model, inputs = load_model(options.model, options.input, dict(options.fixed))
    culprit = blame(model, inputs, passes=options.passes, target=options.target)
    if culprit is None:
        print("nothing is wrong: every pass is exact, and the lowered program agrees with torch")
        return 0
    print(f"{culprit}\nwrote {culprit.save(options.output)}")
    return 1
