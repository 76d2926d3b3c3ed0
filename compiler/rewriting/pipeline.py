"""Pipelines, and pipelines with a pass of one's own at a place in them: in Python, and in the same words as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from thresher.errors import PassError
from thresher.rewriting.contract import Pass
from thresher.rewriting.registry import make_pass

CHANGE = re.compile(r"\.(before|after|without)\(([^()]*)\)")


class Pipeline(tuple[Pass, ...]):
    """Passes in the order in which they run. Each method returns another pipeline.

    ``exact.before("fold-scale", MyPass())`` is, on the command line, ``exact.before(fold-scale, my-pass)``.
    """

    def __new__(cls, *passes: Pass) -> Pipeline:
        return super().__new__(cls, passes)

    def before(self, name: str, *passes: str | Pass) -> Pipeline:
        """Return the pipeline with ``passes`` before the first pass called ``name``. Raises :class:`PassError` where there is none."""
        return self._with(self._places(name)[0], passes)

    def after(self, name: str, *passes: str | Pass) -> Pipeline:
        """Return the pipeline with ``passes`` after the last pass called ``name``. Raises :class:`PassError` where there is none."""
        return self._with(self._places(name)[-1] + 1, passes)

    def without(self, *names: str) -> Pipeline:
        """Return the pipeline without any pass that has one of these names. Raises :class:`PassError` for a name that none has."""
        dropped = {index for name in names for index in self._places(name)}
        return Pipeline(*(p for index, p in enumerate(self) if index not in dropped))

    def _with(self, index: int, passes: Iterable[str | Pass]) -> Pipeline:
        return Pipeline(*self[:index], *map(make_pass, passes), *self[index:])

    def _places(self, name: str) -> list[int]:
        if places := [index for index, p in enumerate(self) if p.name == name]:
            return places
        names = ", ".join(dict.fromkeys(p.name for p in self))
        raise PassError(f"there is no {name!r} in this pipeline; it has {names}")


def read_changed(text: str, pipelines: Mapping[str, Pipeline]) -> Pipeline | None:
    """Return the pipeline that ``exact.before(fold-scale, my-pass).without(simplify)`` is; None for a text that names no pipeline.

    Raises :class:`PassError` where what follows the name is none of ``before``, ``after`` and ``without``.
    """
    name = text.partition(".")[0]
    if name not in pipelines:
        return None
    pipeline, rest = pipelines[name], text[len(name) :]
    for change in CHANGE.finditer(rest):
        names = [part.strip() for part in re.split(r",(?![^{]*\})", change[2]) if part.strip()]
        if not names or (change[1] != "without" and len(names) < 2):
            raise PassError(f"{change[0]!r} in {text!r} needs the name of a pass, and what is to run beside it")
        pipeline = getattr(pipeline, change[1])(*names)
    if CHANGE.sub("", rest).strip():
        raise PassError(
            f"cannot read {text!r}; write {name}.before(PASS, NEW), {name}.after(PASS, NEW) or {name}.without(PASS)"
        )
    return pipeline
