"""Several compiled models that belong together, in one artifact: ``prefill`` and ``decode`` of a language model, or one model for several
batch sizes. Weights that are the same are stored once and held once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from thresher.errors import ArtifactError
from thresher.runtime.format import NAME

M = TypeVar("M")


class Bundle(Mapping[str, M], Generic[M]):
    """Models by name.

    >>> bundle = thresher.Bundle({"prefill": prefill, "decode": decode})
    >>> bundle.save("model.thresher")
    >>> logits, cache = thresher.load("model.thresher")["prefill"](ids)

    Raises :class:`ArtifactError` for names that are no identifiers.
    """

    def __init__(self, models: Mapping[str, M]):
        if not models:
            raise ArtifactError("a bundle needs at least one model")
        for name in models:
            if not NAME.fullmatch(name):
                raise ArtifactError(f"{name!r} cannot name a model: use letters, digits and _, at most 64")
        self._models = dict(models)

    def __getitem__(self, name: str) -> M:
        if name not in self._models:
            raise KeyError(f"{name!r}; this bundle has {', '.join(self._models)}")
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def __repr__(self) -> str:
        return f"Bundle({', '.join(self._models)})"

    def validate(self) -> dict[str, Any]:
        """Let each model prove itself; return the result of each by its name."""
        return {name: model.validate() for name, model in self._models.items()}  # type: ignore[attr-defined]

    def save(self, path: str | Path) -> Path:
        """Write one artifact with all of them. Raise :class:`ArtifactError` where it cannot be written."""
        from thresher.artifact.writer import save  # needs torch; a bundle is also loaded where torch is not

        return save(self._models, Path(path))  # type: ignore[arg-type]
