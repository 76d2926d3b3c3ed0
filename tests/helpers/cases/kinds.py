"""Cases of one builder that makes models of several kinds, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from thresher.testing import Case, Entry


def kinds(
    name: str,
    build: Callable,
    first: Sequence[str],
    active: Sequence[str],
    refused: Sequence[str] = (),
    lost: Sequence[str] = (),
) -> list[Entry]:
    """Return an entry for each kind that the pass rewrites, and one for all that it refuses, beside one that it does not.

    With those in ``lost`` parameters have no way back.
    """
    cases = [Case(f"{name}: {kind}", build, kind=(kind,), n=(2,)) for kind in active]
    entries = [Entry(case, first=first, misses=40, restored=kind not in lost) for kind, case in zip(active, cases)]
    if refused:
        beside = Case(f"{name}: others", build, kind=(active[0], *refused), n=(3,), refused={"kind": refused})
        entries.append(Entry(beside, first=first, draws=1 + len(refused), misses=0))
    return entries
