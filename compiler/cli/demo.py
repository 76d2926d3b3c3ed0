"""``thresher demo``: the whole way on a real model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from thresher.cli.arguments import Commands, add_command, fraction


def add(commands: Commands) -> None:
    """Add the command of this module."""
    demo = add_command(
        commands,
        "demo [options]",
        run_demo,
        "Prune, fold, compile and check a real pretrained model.",
        "thresher demo --amount 0.5 --directory demo",
    )
    demo.add_argument(
        "--amount", type=fraction, default=0.3, help="fraction of the hidden channels to prune (default: 0.3)"
    )
    demo.add_argument("--directory", type=Path, default=".", help="where model.thresher and report.html go")


def run_demo(options: Namespace) -> int:
    """Print the table and write the files; return 0 where the artifact proves itself in a second process."""
    from thresher.models.demo import run

    return run(options.amount, options.directory)
