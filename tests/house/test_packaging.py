"""What pyproject.toml says of the package is what there is: a folder that it forgets is missing once Thresher is installed."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PLACES = {
    "thresher": "compiler",
    "thresher.passes": "passes",
    "thresher.backends": "backends",
    "thresher.models": "models",
}


def packages() -> dict[str, Path]:
    found = {}
    for package, place in PLACES.items():
        for file in (ROOT / place).rglob("*.py"):
            parts = file.parent.relative_to(ROOT / place).parts
            found[".".join([package, *parts])] = file.parent
    return found


def test_every_folder_is_a_package() -> None:
    assert SETUPTOOLS["package-dir"] == PLACES
    assert set(SETUPTOOLS["packages"]) == set(packages())


def test_every_other_file_is_data() -> None:
    for package, folder in packages().items():
        patterns = SETUPTOOLS["package-data"].get(package, [])
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in (".py", ".pyc"):
                assert any(file.match(pattern) for pattern in patterns), f"{file} is not installed"
