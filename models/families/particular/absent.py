"""Architectures that cannot be run."""

from __future__ import annotations

from thresher.models.families.particular.entry import Particular

ABSENT: dict[str, Particular] = {
    "sam3_video": Particular(
        "its forward takes a session that its processor makes; its parts are the models of sam3 and sam3_tracker_video",
        excluded=True,
    ),
    "higgs_audio_v2_tokenizer": Particular(
        "it needs the library torchaudio, and has no other model class", excluded=True
    ),
    "dinat": Particular("it needs the library natten, and has no other model class", excluded=True),
    "layoutlmv2": Particular("it needs the library detectron2, and has no other model class", excluded=True),
}
