"""What commands share: arguments that several of them take, and types that turn the text of an argument into its value.

A type raises :class:`argparse.ArgumentTypeError`, for which argparse names the argument and exits with code 2. Types import what they need
when they are called, so that ``--help`` loads neither torch nor TVM.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from thresher.approximation.budget import Budget
    from thresher.tuning.options import Remote

Commands: TypeAlias = "argparse._SubParsersAction[ArgumentParser]"


def add_command(
    commands: Commands,
    usage: str,
    run: Callable[[argparse.Namespace], int],
    description: str,
    example: str,
    *shared: ArgumentParser,
) -> ArgumentParser:
    """Add a command and return its parser.

    Args:
        commands: of the whole command line.
        usage: the name and the arguments, such as ``build MODEL [options]``.
        run: executes the command and returns the exit code.
        description: a sentence that says what the command does.
        example: a command line that can be copied.
        shared: parsers whose arguments the command has, too.
    """
    parser = commands.add_parser(
        usage.split()[0],
        usage=f"thresher {usage}",
        parents=shared,
        description=textwrap.fill(description, 79),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def input_tensor(text: str) -> Tensor:
    """Return a random float32 tensor for ``1x3x8x8``, always the same one, or zeros of another dtype for ``1x16:int64``."""
    import torch

    shape, _, dtype_name = text.partition(":")
    sizes, dtype = shape.split("x"), getattr(torch, dtype_name or "float32", None)
    if not all(size.isdecimal() for size in sizes):
        raise ArgumentTypeError(
            f"cannot read the input {text!r}: write sizes like 1x3x224x224, and a dtype after a colon"
        )
    if not isinstance(dtype, torch.dtype):
        raise ArgumentTypeError(f"unknown dtype {dtype_name!r} in the input {text!r}")
    size, generator = [int(s) for s in sizes], torch.Generator().manual_seed(0)
    try:
        if dtype.is_floating_point:
            return torch.randn(size, generator=generator).to(dtype)
        return torch.zeros(size, dtype=dtype)
    except RuntimeError as error:  # more memory than there is, or a dtype that has no zeros
        raise ArgumentTypeError(f"cannot make the input {text!r}: {str(error).splitlines()[0]}") from error


def passes(text: str) -> list[str]:
    """Return the items of ``exact;reduce-tokens{keep=0.5}``: pipelines and passes, not yet looked up.

    The module of the model may register a pass of its own, and it is imported later.
    """
    items = re.split(r";(?![^{]*\})", text)  # not at a semicolon within options
    return [item.strip() for item in items if item.strip()]


def budget(text: str) -> Budget:
    """Return the budget of ``cosine=0.01``."""
    from thresher.approximation.budget import METRICS, Budget

    metric, _, limit = text.partition("=")
    try:
        return Budget(**{metric: float(limit)})  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        message = f"cannot read the budget {text!r}: write one of {', '.join(METRICS)}, = and a number"
        raise ArgumentTypeError(message) from error


def remote(text: str) -> Remote:
    """Return the device of ``host:port:key``."""
    from thresher.tuning.options import Remote

    host, _, rest = text.partition(":")
    port, _, key = rest.partition(":")
    if not (host and port.isdecimal() and key):
        raise ArgumentTypeError(f"cannot read the remote device {text!r}: write HOST:PORT:KEY")
    return Remote(host, int(port), key)


def named_numbers(text: str) -> tuple[str, float | list[float]]:
    """Return the name and the number of ``sr=16000``, or the numbers of ``shape=1,-1``; ``k=5,`` is a list of one."""
    name, _, numbers = text.partition("=")
    try:
        values = [_number(number) for number in numbers.removesuffix(",").split(",")]
    except ValueError as error:
        raise ArgumentTypeError(
            f"cannot read {text!r}: write an input, = and a number, or numbers with commas"
        ) from error
    return name, values if "," in numbers else values[0]


def _number(text: str) -> float:
    """Return a whole number as it is, which a float might not have."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def named_artifact(text: str) -> tuple[str, str]:
    """Return the name and the path of ``prefill=a.thresher``."""
    name, equals, path = text.partition("=")
    if not equals:
        raise ArgumentTypeError(f"cannot read {text!r}: write NAME=ARTIFACT, for instance prefill=a.thresher")
    return name, path


def batch_sizes(text: str) -> tuple[int, ...]:
    """Return the sizes of ``1,8``."""
    try:
        return tuple(positive(size) for size in text.split(","))
    except ValueError as error:
        raise ArgumentTypeError(f"cannot read the batch sizes {text!r}: write numbers separated by commas") from error


def removed_index(text: str) -> tuple[str, int, int]:
    """Return value, dimension and index of ``relu:1:7``."""
    try:
        value, dim, index = text.split(":")
        return value, int(dim), int(index)
    except ValueError as error:
        raise ArgumentTypeError(f"cannot read {text!r}: write VALUE:DIM:INDEX") from error


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def count(text: str) -> int:
    """Return a whole number of at least 0."""
    number = int(text)
    if number < 0:
        raise ArgumentTypeError(f"must be at least 0, not {number}")
    return number


def fraction(text: str) -> float:
    """Return a number between 0 and 1, without these."""
    number = float(text)
    if not 0 < number < 1:
        raise ArgumentTypeError(f"must be between 0 and 1, not {number}")
    return number


INPUTS = ArgumentParser(add_help=False)
INPUTS.add_argument(
    "--input",
    action="append",
    default=[],
    type=input_tensor,
    metavar="SHAPE",
    help="example input: 1x3x224x224, or 1x128:int64 for zeros of a dtype; repeat for more",
)
INPUTS.add_argument(
    "--fixed",
    action="append",
    default=[],
    type=named_numbers,
    metavar="INPUT=NUMBERS",
    help="an input of an .onnx file that is always this number or these numbers: sr=16000, or shape=1,-1",
)

MODEL = ArgumentParser(add_help=False)
MODEL.add_argument(
    "model",
    metavar="MODEL",
    help="package.module:function (returns a module, or a module and its example inputs), or a .pt2 or .onnx file",
)

PASSES = ArgumentParser(add_help=False)
PASSES.add_argument(
    "--passes",
    default="exact",
    type=passes,
    help="a pipeline (exact, canonicalize, approximate, none), also with a pass at a place in it, exact.before(fold-scale, my-pass), or "
    "passes separated by ';', options in braces",
)

TARGET = ArgumentParser(add_help=False)
TARGET.add_argument(
    "--target", help="cpu, cpu:<llvm name>, cuda:sm_NN; default: the GPU if there is one, else this CPU"
)

#: ``thresher.compile`` defaults to ``auto``: its result runs in this process, which has torch. An artifact should run without torch, and
#: records that name a kernel of torch would be of no use to its build: so the commands default to ``never``.
LIBRARY = ArgumentParser(add_help=False)
LIBRARY.add_argument(
    "--library",
    default="never",
    choices=("auto", "never"),
    help="auto: torch's own kernels for operators that have no lowering, or where tuning found them faster; the artifact then needs "
    "torch. never (default): such an operator is refused",
)
