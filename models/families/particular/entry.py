"""One entry of the table: what an architecture has of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from thresher.models.families.tensors import Maker


@dataclass(frozen=True)
class Particular:
    """The values of one architecture.

    Attributes:
        reason: why rules do not give them.
        initial: arguments of the default configuration, where it cannot be made without, or has parts that it lists nowhere.
        config: fields of the small configuration, and of its parts.
        model: a model class in place of the one of its mapping; its own configuration class goes with it.
        method: a method that is called in place of ``forward``.
        inputs: makers of the arguments; empty: they are looked for.
        excluded: there is no way to give the model tensors; ``reason`` says why.
    """

    reason: str = ""
    initial: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    method: str = ""
    inputs: Mapping[str, Maker] = field(default_factory=dict)
    excluded: bool = False


class Method(nn.Module):
    """A method of a model as a module."""

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, **inputs: Any) -> Any:
        return getattr(self.model, self.method)(**inputs)


def overlaid(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with these values; mappings in mappings are overlaid, everything else is replaced."""
    merged = dict(config)
    for key, value in values.items():
        before = merged.get(key)
        merged[key] = overlaid(before, value) if isinstance(value, Mapping) and isinstance(before, Mapping) else value
    return merged
