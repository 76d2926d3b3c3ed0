"""The modules that a pass is written in, and how they are executed anew from a changed text."""

from __future__ import annotations

import ast
import functools
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from thresher.rewriting.pattern import forget_patterns

Lines = set[tuple[str, int]]  # a file, as its module names it, and a line


def modules_of(cls: type) -> list[ModuleType]:
    """Return the module of a class, and the private modules beside it that it imports, directly or through one another."""
    modules, waiting = [], [sys.modules[cls.__module__]]
    while waiting:
        module = waiting.pop(0)
        if module in modules:
            continue
        modules.append(module)
        folder = _path(module).parent
        beside = (m for m in _imported(module) if _path(m).parent == folder and _path(m).name.startswith("_"))
        waiting += [m for m in beside if _path(m).name != "__init__.py"]
    return modules


def importers_of(module: ModuleType) -> list[ModuleType]:
    """Return the loaded modules that import a module, directly or through one another, each after those that it imports.

    They are modules of the package above its own, such as the passes of other stages, and of no installed package: tests and their helpers.
    """
    graph = {m: set(_imported(m)) for m in list(sys.modules.values()) if _may_import(m, module)}
    importers, order = {module}, []
    grown = True
    while grown:
        fresh = [m for m, imported in graph.items() if m not in importers and imported & importers]
        importers.update(fresh)
        grown = bool(fresh)
    rest = importers - {module}
    while rest:
        ready = [m for m in rest if not graph[m] & (rest - {m})] or list(rest)  # all at once where there is a circle
        order += sorted(ready, key=lambda m: m.__name__)
        rest -= set(ready)
    return order


def execute(module: ModuleType, text: str, importers: Sequence[ModuleType]) -> None:
    """Execute a module anew from a text, then all that import it from their files. There is no way back: do it in a fork."""
    exec(compile(text, str(module.__file__), "exec"), vars(module))
    for importer in importers:
        exec(compile(_path(importer).read_text(), str(importer.__file__), "exec"), vars(importer))


@contextmanager
def traced(files: Sequence[str]) -> Iterator[Lines]:
    """Collect the lines of some files that run within the block, those of patterns included that are traced once and for all."""
    forget_patterns()
    lines: Lines = set()
    watched = frozenset(files)

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    def start(frame: FrameType, event: str, argument: Any) -> Any:
        return local(frame, event, argument) if frame.f_code.co_filename in watched else None

    before = sys.gettrace()
    sys.settrace(start)
    try:
        yield lines
    finally:
        sys.settrace(before)


def _path(module: ModuleType) -> Path:
    return Path(str(module.__file__))


def _imported(module: ModuleType) -> Iterator[ModuleType]:
    """Yield the loaded modules that the text of a module names in its imports."""
    for name in _imported_names(_path(module), module.__package__ or ""):
        imported = sys.modules.get(name)
        if imported is not None and _is_source(imported):
            yield imported


@functools.cache
def _imported_names(path: Path, package: str) -> list[str]:
    """Return the names in the imports of a file: of modules, and of what may be one."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def _is_source(module: ModuleType) -> bool:
    """Return whether a module is a file of Python; some of torch only say so."""
    return str(getattr(module, "__file__", None)).endswith(".py") and _path(module).is_file()


def _may_import(other: ModuleType, module: ModuleType) -> bool:
    if not _is_source(other) or other.__name__ == "__main__":
        return False
    package = (module.__package__ or "").rpartition(".")[0] or module.__package__
    top = module.__name__.partition(".")[0]
    if other.__name__.partition(".")[0] == top:
        return bool(package) and f"{other.__name__}.".startswith(f"{package}.")
    installed = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib", "platlib")]
    libraries = [*installed, Path(__file__).parents[2]]  # the last is this one
    return not any(_path(other).is_relative_to(path) for path in libraries)
