"""Find passes by name. Built-in and third-party ones are entry points of the group ``thresher.passes``, loaded when asked for."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import warnings
from collections.abc import Iterable
from typing import Any

from thresher.errors import PassError
from thresher.rewriting.contract import Pass
from thresher.rewriting.options import read_options

GROUP = "thresher.passes"
_REGISTRY: dict[str, type[Pass]] = {}


def register_pass(cls: type[Pass]) -> type[Pass]:
    """Make a pass available by its name, in this process; a class decorator.

    Raises :class:`PassError` where the class has no name, is no frozen dataclass, or has the name of another pass.
    """
    if not cls.name:
        raise PassError(f"{cls.__name__} has no name; give it a class-level `name: ClassVar[str]`")
    parameters = cls.__dict__.get(
        "__dataclass_params__"
    )  # its own: a subclass that is no dataclass inherits its parent's
    if parameters is None or not parameters.frozen:
        raise PassError(f"pass {cls.name!r} must be a frozen dataclass: its fields are its options")
    known = _REGISTRY.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise PassError(f"two passes are named {cls.name!r}: {known.__qualname__} and {cls.__qualname__}")
    _REGISTRY[cls.name] = cls
    return cls


def registered_passes() -> dict[str, type[Pass]]:
    """Return all passes by name, loading those of every installed package. One that cannot be loaded is left out with a warning."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            _load(entry)
        except PassError as error:
            warnings.warn(str(error), stacklevel=2)
    return dict(sorted(_REGISTRY.items()))


def find_pass(name: str) -> type[Pass]:
    """Return the pass of this name; only its own module is loaded.

    Raises :class:`PassError` with the name that is nearest and all known names, or the reason why the module cannot be loaded.
    """
    if name not in _REGISTRY:
        if name not in pass_names():
            raise unknown_pass(name)
        _load(importlib.metadata.entry_points(group=GROUP)[name])
    return _REGISTRY[name]


def pass_names() -> list[str]:
    """Return the names of all passes; nothing is loaded."""
    return sorted({*_REGISTRY, *importlib.metadata.entry_points(group=GROUP).names})


def unknown_pass(name: str, pipelines: Iterable[str] = ()) -> PassError:
    """Return the error for a name that neither a pass nor one of the ``pipelines`` has."""
    near = difflib.get_close_matches(name, [*pipelines, *pass_names()], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    listed = f" pipelines: {', '.join(pipelines)};" if pipelines else ""
    return PassError(f"unknown pass {name!r}{hint}{listed} known passes: {', '.join(pass_names())}")


def make_pass(spec: str | Pass) -> Pass:
    """Return a pass from its instance, its name, or ``name{option=value,...}``.

    Values are Python literals, or words without quotes: ``fold-channels{strict=true,slack=0.25}``. ``make_pass(str(p)) == p``.
    Raises :class:`PassError` naming the pass or the option that does not exist, or the type that a value should have.
    """
    if isinstance(spec, Pass):
        return spec
    if isinstance(spec, type) and issubclass(spec, Pass):
        raise PassError(f"{spec.__name__} is a class, and a pass is an instance of one: write {spec.__name__}()")
    if not isinstance(spec, str):
        raise PassError(f"a pass is an instance of Pass, or a name, and not {spec!r}")
    name, _, options = spec.partition("{")
    cls = find_pass(name)
    if options and not options.endswith("}"):
        raise PassError(f"cannot read {spec!r}: options are written name{{option=value,...}}")
    return cls(**_checked(cls, options.removesuffix("}")))


def _load(entry: importlib.metadata.EntryPoint) -> None:
    if entry.name in _REGISTRY:
        return
    package = entry.dist.name if entry.dist is not None else "some package"
    try:
        cls = register_pass(entry.load())
    except Exception as error:  # of somebody else's package
        reason = f"{type(error).__name__}: {error}"
        raise PassError(f"the pass {entry.name!r} of {package} ({entry.value}) cannot be loaded: {reason}") from error
    if cls.name != entry.name:
        raise PassError(
            f'the entry point {entry.name!r} of {package} is the pass {cls.name!r}: write {cls.name} = "{entry.value}"'
        )


def _checked(cls: type[Pass], text: str) -> dict[str, Any]:
    """Return the options in ``text``, each one of the fields of the pass."""
    fields = [f.name for f in dataclasses.fields(cls)]
    known = ", ".join(fields) or "none"
    try:
        values = read_options(text)
    except ValueError as error:
        raise PassError(f"pass {cls.name!r} has no option {error.args[0]!r}; its options: {known}") from error
    for key in values:
        if key not in fields:
            raise PassError(f"pass {cls.name!r} has no option {key!r}; its options: {known}")
    return values
