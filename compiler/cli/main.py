"""``thresher``: compile models ahead of time, and look at what was compiled. Each module of this folder has a group of commands."""

from __future__ import annotations

import argparse
import sys

from thresher.cli import build, check, compare, demo, prove, show, tune
from thresher.errors import ThresherError

#: In groups, on one screen: argparse lists commands in one column without groups.
HELP = """\
usage: thresher COMMAND ...

Thresher compiles pruned and sparse PyTorch models, and makes the saving real.

make
  build     compile a model into an artifact that loads without its code
  bundle    put several artifacts into one
  tune      measure the kernels of a model, for later builds
  records   show, merge and export what tuning measured
show
  inspect   show an artifact, or what the passes would do to a model
  passes    list all passes with their options, or explain one
  bench     time artifacts on this machine, in turn
  diff      say what differs between two artifacts
check
  validate  let an artifact prove itself on this machine
  verify    check the certificate of a fold, without the optimiser
  blame     find the pass or the operator that makes a result wrong
  prove     try a pass on its cases, and its cases on changes of the pass
try
  demo      prune, fold, compile and check a real pretrained model

thresher COMMAND --help has the options and an example. Read on: docs/index.md
"""


class Parser(argparse.ArgumentParser):
    """The parser of the whole command line; its help is :data:`HELP`."""

    def format_help(self) -> str:
        """Return the help of all commands."""
        return HELP


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 1, and one line on standard error, for a :class:`ThresherError`."""
    options = make_parser().parse_args(argv)
    try:
        return options.run(options)
    except ThresherError as error:
        print(f"thresher: {error}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands. A value that cannot be read is an error of argparse: exit code 2."""
    parser = Parser(prog="thresher", usage="thresher COMMAND ...")
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", prog="thresher", parser_class=argparse.ArgumentParser
    )
    for group in (build, tune, show, compare, check, prove, demo):
        group.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
