"""``CompileOptions``: how a model is built. ``compile()``, the command line and ``torch.compile`` make one; it checks itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import torch

from thresher.approximation.budget import Budget
from thresher.artifact.compiled import Compiled
from thresher.errors import InputError, ThresherError
from thresher.frontend.masks import Masks
from thresher.passes.pipelines import Passes
from thresher.tuning.options import Tune

Validate: TypeAlias = Literal["error", "warn", "off"]
Verify: TypeAlias = Literal["each", "final", "off"]

CHOICES = {
    "validate": ("error", "warn", "off"),
    "verify": ("each", "final", "off"),
    "widths": ("rule", "measured"),
    "library": ("auto", "never"),
}


@dataclass(frozen=True)
class CompileOptions:
    """The keyword arguments of :func:`thresher.compile`, which explains them; ``target`` is filled in where it was not given.

    Raises :class:`InputError` or :class:`ThresherError` naming the option that has a wrong value, or the two that exclude each other.
    """

    target: str = ""
    passes: Passes = "exact"
    backend: str = "tvm"
    dynamic_shapes: Any = None
    batch_sizes: Sequence[int] = (1, 8)
    masks: Masks | None = None
    fixed: Mapping[str, Any] | None = None
    validate: Validate = "error"
    verify: Verify = "final"
    certificate: bool = False
    widths: Literal["rule", "measured"] = "rule"
    strict_rounding: bool = False
    tune: Tune | Literal["recorded", "never"] = "recorded"
    library: Literal["auto", "never"] = "auto"
    calibration: Iterable[Any] | None = None
    budget: Budget | None = None
    share: Compiled | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", self.target or default_target())
        if not all(isinstance(size, int) and size > 0 for size in self.batch_sizes):
            raise InputError(f"batch_sizes must be positive whole numbers, not {tuple(self.batch_sizes)}")
        object.__setattr__(self, "batch_sizes", tuple(sorted(set(self.batch_sizes))))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise ThresherError(f"{name} must be one of {choices}, not {getattr(self, name)!r}")
        if not isinstance(self.tune, Tune) and self.tune not in ("recorded", "never"):
            raise ThresherError(f"tune must be 'recorded', 'never' or a thresher.Tune, not {self.tune!r}")
        if self.widths == "measured" and self.budget is not None:
            raise InputError("widths='measured' compares exact models; with a budget use widths='rule'")
        check_calibration(self.calibration, self.budget)

    @staticmethod
    def of(settings: Mapping[str, Any]) -> CompileOptions:
        """Return the options with these values. Raises :class:`InputError` naming a setting that does not exist."""
        known = sorted(f.name for f in fields(CompileOptions))
        if unknown := sorted(settings.keys() - set(known)):
            raise InputError(f"there is no option {unknown[0]!r}; the options: {', '.join(known)}")
        return CompileOptions(**{**settings, "target": settings.get("target") or ""})


def check_calibration(calibration: Iterable[Any] | None, budget: Budget | None) -> None:
    """Raise :class:`InputError` where only one of the two is given."""
    if (calibration is None) != (budget is None):
        raise InputError("approximate passes need both: calibration= (samples) and budget= (how much error is allowed)")


def default_target() -> str:
    """Return ``cuda:sm_NN`` of the first GPU, else ``cpu``."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"cuda:sm_{major}{minor}"
    return "cpu"
