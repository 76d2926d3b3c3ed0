"""What a suite yields: samples, each of which builds a model and its inputs when it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from thresher.models.families.sample import Case


@dataclass(frozen=True)
class Suite:
    """Samples by name.

    Attributes:
        name: as on the command line, and the name of the file of results.
        title: a heading.
        text: a few sentences: where the samples are from, and how they are run.
        names: lists the samples.
        build: makes a sample's case; raises :class:`SampleExcluded`.
        limit: seconds of processor time for one sample.
    """

    name: str
    title: str
    text: str
    names: Callable[[], Iterator[str]]
    build: Callable[[str], Case]
    limit: float = 60.0
