"""The whole command line: help on one screen, help and an example for every command, exit codes, and what starting it costs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from thresher.cli.main import main, make_parser
from thresher.passes import pipelines

ROOT = Path(__file__).parents[2]
COMMANDS = next(a for a in make_parser()._actions if a.choices).choices


def printed(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Return what a command that ends by itself prints on standard output; its exit code is 0."""
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_fits_on_one_screen(capsys) -> None:
    lines = printed(capsys, "--help").splitlines()
    assert len(lines) < 24 and max(map(len, lines)) <= 80
    assert sorted(re.findall(r"^  (\w+) ", "\n".join(lines), flags=re.M)) == sorted(COMMANDS)
    (page,) = re.findall(r"Read on: (\S+)", lines[-1])
    assert (ROOT / page).exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_can_be_read(name: str, capsys) -> None:
    text = printed(capsys, name, "--help")
    (example,) = re.findall(r"example:\n  thresher (.*)$", text, flags=re.M)
    options = make_parser().parse_args(shlex.split(example))
    assert shlex.split(example)[0] == name and callable(options.run)
    assert max(map(len, text.splitlines())) <= 90


def test_help_names_the_pipelines(capsys) -> None:
    assert f"({', '.join(pipelines.NAMED)})" in " ".join(printed(capsys, "build", "--help").split())


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["tune", "--help"], ["none-such"]])
def test_starting_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import atexit, sys
from thresher.cli.main import main
atexit.register(lambda: print("loaded", *{{"torch", "tvm", "numpy", "rich", "networkx"}} & set(sys.modules)))
main({arguments!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("loaded\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "m:make", "--input", "2xa"], "argument --input: cannot read the input '2xa': write sizes like"),
        (["build", "m:make", "--input", "1x-3"], "argument --input: cannot read the input '1x-3'"),
        (["build", "m:make", "--input", "2x8:float99"], "argument --input: unknown dtype 'float99' in the input"),
        (["build", "m:make", "--input", "x".join(["99999999"] * 3)], "argument --input: cannot make the input"),
        (["build", "m:make", "--budget", "best=1"], "argument --budget: cannot read the budget 'best=1': write one of"),
        (["build", "m:make", "--budget", "cosine=x"], "argument --budget: cannot read the budget"),
        (["build", "m:make", "--batch", "1,many"], "argument --batch: cannot read the batch sizes '1,many'"),
        (["build", "m:make", "--batch", "0"], "argument --batch: must be at least 1, not 0"),
        (["build", "m.onnx", "--fixed", "sr="], "argument --fixed: cannot read 'sr=': write an input, = and a number"),
        (["build", "m:make", "--library", "mine"], "argument --library: invalid choice: 'mine'"),
        (["tune", "m:make", "--remote", "board"], "argument --remote: cannot read the remote device 'board': write"),
        (["bundle", "a.thresher"], "argument NAME=ARTIFACT: cannot read 'a.thresher': write NAME=ARTIFACT"),
        (["verify", "c", "--explain", "relu:1"], "argument --explain: cannot read 'relu:1': write VALUE:DIM:INDEX"),
        (["bench", "a.thresher", "--rounds", "0"], "argument --rounds: must be at least 1, not 0"),
        (["demo", "--amount", "3"], "argument --amount: must be between 0 and 1, not 3.0"),
    ],
)
def test_a_value_that_cannot_be_read(arguments: list[str], message: str, capsys) -> None:
    """Exit code 2, and a message that names the option; the usage before it is one line."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    usage, error = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert usage.startswith(f"usage: thresher {arguments[0]}") and error.startswith(
        f"thresher {arguments[0]}: error: {message}"
    )
