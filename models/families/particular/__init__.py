"""What rules on names do not give an architecture: its own values, each with the reason."""

from __future__ import annotations

from thresher.models.families.particular.absent import ABSENT
from thresher.models.families.particular.audio import AUDIO
from thresher.models.families.particular.entry import Method, Particular, overlaid
from thresher.models.families.particular.images import IMAGES
from thresher.models.families.particular.mixed import MIXED
from thresher.models.families.particular.series import SERIES
from thresher.models.families.particular.text import TEXT

#: By type of model; architectures that are not here need nothing of it.
PARTICULAR: dict[str, Particular] = {**TEXT, **IMAGES, **MIXED, **AUDIO, **SERIES, **ABSENT}

__all__ = ["PARTICULAR", "Method", "Particular", "overlaid"]
