"""The documentation: the pages made from the code are up to date, the site builds without a warning, its examples name what exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import thresher
from thresher.cli import main as cli

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


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


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_what_pages_name_exists(page: Path) -> None:
    """Functions of ours, commands and files."""
    text = page.read_text()
    for name in set(re.findall(r"thresher\.(\w+)\(", text)):
        assert hasattr(thresher, name), f"thresher.{name}"
    commands = next(a for a in cli._parser()._actions if a.choices).choices
    for block in re.findall(r"```\n(.*?)```", text, flags=re.S):
        for name in re.findall(r"^thresher (\w+)", block, flags=re.M):
            assert name in commands, f"thresher {name}"
    for link in re.findall(r"\]\(([\w./-]+\.md)\)", text):
        assert (page.parent / link).exists(), link
