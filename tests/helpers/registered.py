"""The registered passes that this package has; those of other packages are not judged here."""

from __future__ import annotations

from thresher.rewriting.contract import Pass
from thresher.rewriting.registry import registered_passes

OWN: dict[str, type[Pass]] = {n: p for n, p in registered_passes().items() if p.__module__.startswith("thresher.")}
