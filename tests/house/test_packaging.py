"""pyproject.toml names every folder of the package and all its data: what it forgets is missing once Thresher is installed."""

from __future__ import annotations

import tomllib
from pathlib import Path

from rooms import FOLDERS, ROOT

SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def packages() -> dict[str, Path]:
    """Return the folder of every package by its dotted name."""
    folders = {}
    for top, package in FOLDERS.items():
        for file in (ROOT / top).rglob("*.py"):
            parts = file.parent.relative_to(ROOT / top).parts
            folders[".".join([package, *parts])] = file.parent
    return folders


def test_every_folder_is_a_package() -> None:
    assert SETUPTOOLS["package-dir"] == {package: folder for folder, package in FOLDERS.items()}
    assert set(SETUPTOOLS["packages"]) == set(packages())


def test_every_other_file_is_data() -> None:
    for package, folder in packages().items():
        patterns = SETUPTOOLS["package-data"].get(package, [])
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in (".py", ".pyc"):
                assert any(file.match(pattern) for pattern in patterns), f"{file} is not installed"
