"""The documentation: its examples run, its commands parse, its links lead somewhere, and the pages made from the code are up to date."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import thresher
from thresher import authoring
from thresher.cli import main as cli
from thresher.rewriting import registry

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_WIDTH, MAX_LINES = 110, 110  # of README.md


def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs/generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "index.html").read_text()
    assert "compiler for pruned" in page and "fonts.googleapis" not in page


def test_the_readme_is_two_screens() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= MAX_LINES and max(map(len, lines)) <= MAX_WIDTH


# ---------------------------------------------------------------------- examples


@dataclass(frozen=True)
class Example:
    """Python of a page, the number of its first line, and the output that the page shows after it ("": none)."""

    code: str
    line: int
    output: str = ""


BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^>]+) -->\n)?"
    r"^```python\n(?P<code>.*?)^```\n(?:\n^```\n(?P<output>.*?)^```\n)?"
    r"|^<!-- python\n(?P<hidden>.*?)^-->\n",
    flags=re.M | re.S,
)


def examples(page: Path) -> Iterator[Example]:
    """Yield the Python of a page in order: its blocks, and the comments that begin with ``python``, which prepare what blocks use."""
    text = page.read_text()
    for block in BLOCK.finditer(text):
        if not block["reason"]:
            line = text.count("\n", 0, block.start("code" if block["code"] else "hidden"))
            yield Example(block["code"] or block["hidden"], line, block["output"] or "")


@pytest.mark.parametrize("page", [p for p in PAGES if any(examples(p))], ids=lambda p: p.name)
def test_examples_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """All examples of a page run in order, in one namespace and in a folder of their own, and print what the page shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    torch.manual_seed(0)
    module = types.ModuleType("examples")
    monkeypatch.setitem(sys.modules, "examples", module)
    for example in examples(page):
        code = compile("\n" * example.line + example.code, str(page), "exec", dont_inherit=True)
        exec(code, vars(module))
        assert_shown(example.output, capsys.readouterr().out)


def test_the_guide_has_every_name_for_authors() -> None:
    text = "".join((ROOT / "docs" / page).read_text() for page in ("authoring.md", "operators-and-kernels.md"))
    assert [name for name in authoring.__all__ if f"`{name}`" not in text] == []


def test_the_guide_names_fields_and_methods_that_exist() -> None:
    """Of programs, and every field of a candidate."""
    text = (ROOT / "docs/authoring.md").read_text()
    names = set(re.findall(r"\b(?:program|work)\.([a-z]\w+)", text))
    assert [
        name for name in names if not hasattr(authoring.Program, name) and name not in fields(authoring.Program)
    ] == []
    assert [name for name in fields(authoring.Candidate) if f"`{name}`" not in text] == []


def fields(cls: type) -> list[str]:
    """Return the names of the fields of a dataclass."""
    return [field.name for field in dataclasses.fields(cls)]


def assert_shown(shown: str, printed: str) -> None:
    """Assert that the lines a page shows were printed in this order; numbers and the widths of columns may be others."""
    lines = iter([shape(line) for line in printed.splitlines()])
    for line in shown.splitlines():
        if line.strip() != "...":
            assert shape(line) in lines, f"not printed, or not in this order: {line}\n{printed}"


def shape(line: str) -> str:
    """Return a line with every number as #, and without repeated spaces and dashes."""
    return re.sub(r"[ -]+", " ", re.sub(r"\d[\d.]*(e[+-]\d+)?", "#", line))


# ---------------------------------------------------------------------- commands and links


def commands(page: Path) -> Iterator[str]:
    """Yield the commands of a page that begin with ``thresher``, without their comments."""
    for block in re.findall(r"^```(?:bash|sh|shell)?\n(.*?)^```", page.read_text(), flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("thresher "):
                yield line


@pytest.mark.parametrize("page", [p for p in PAGES if any(commands(p))], ids=lambda p: p.name)
def test_commands_parse(page: Path) -> None:
    for command in commands(page):
        try:
            cli.make_parser().parse_args(shlex.split(command, comments=True)[1:])
        except SystemExit:
            pytest.fail(f"{page.name}: {command}")


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of every command."""
    return next(a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_sentences_have_these_options(page: Path) -> None:
    for name, rest in re.findall(r"`thresher ([a-z]+)([^`]*)`", page.read_text()):
        assert name in subcommands(), f"thresher {name}"
        for option in re.findall(r"(?<!\S)(--?[a-z][\w-]*)", rest):
            assert option in subcommands()[name]._option_string_actions, f"thresher {name} {option}"


def test_the_first_page_lists_every_command() -> None:
    listed = re.findall(r"^\| `thresher ([a-z]+)", (ROOT / "docs/index.md").read_text(), flags=re.M)
    assert sorted(listed) == sorted(subcommands())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_pages_name_exists(page: Path) -> None:
    """Our public functions, the targets of links, options of passes, and files of the repository."""
    text = page.read_text()
    for name in set(re.findall(r"thresher\.(\w+)\(", text)):
        assert hasattr(thresher, name), f"thresher.{name}"
    for link in re.findall(r"\]\(([\w./-]+\.\w+)(?:#[\w-]+)?\)", text):
        assert (page.parent / link).exists(), link
    for option in re.findall(r"\b([a-z]+(?:-[a-z]+)*\{\w+=[^}]*\})", text):
        if option.partition("{")[0] in registry.registered_passes():
            registry.make_pass(option)
    for file in re.findall(r"`((?:compiler|passes|backends|models|tests|examples|benchmarks|docs)/[\w/.-]+)`", text):
        assert (ROOT / file).exists(), file
