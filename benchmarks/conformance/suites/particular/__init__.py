"""What rules on names do not give an architecture: its own values, each with the reason."""

from __future__ import annotations

from .absent import ABSENT
from .audio import AUDIO
from .entry import Method, Particular, overlaid
from .images import IMAGES
from .mixed import MIXED
from .series import SERIES
from .text import TEXT

#: By type of model; architectures that are not here need nothing of it.
PARTICULAR: dict[str, Particular] = {**TEXT, **IMAGES, **MIXED, **AUDIO, **SERIES, **ABSENT}

__all__ = ["PARTICULAR", "Method", "Particular", "overlaid"]
