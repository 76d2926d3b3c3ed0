"""One small model of every family of transformers, timm and torchvision, with random weights; nothing is downloaded.

The libraries are optional: their names and models are asked for by name (:data:`LIBRARIES`), and a library is imported then.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from thresher.models.families import language, vision
from thresher.models.families.sample import Case


@dataclass(frozen=True)
class Library:
    """The models of one library.

    Attributes:
        names: lists the families.
        build: makes the model of a family; raises :class:`~thresher.models.families.sample.SampleExcluded` where it has none that can run.
        requires: the packages that it needs.
    """

    names: Callable[[], Iterator[str]]
    build: Callable[[str], Case]
    requires: tuple[str, ...]

    def missing(self) -> list[str]:
        """Return the packages that are not installed."""
        return [name for name in self.requires if importlib.util.find_spec(name) is None]


LIBRARIES = {
    "torchvision": Library(vision.torchvision_names, vision.torchvision_case, ("torchvision",)),
    "timm": Library(vision.timm_names, vision.timm_case, ("torchvision", "timm")),
    "transformers": Library(language.names, language.build, ("torchvision", "transformers")),
}

__all__ = ["LIBRARIES", "Library"]
