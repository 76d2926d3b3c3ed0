"""The fold on architectures of torchvision, timm and transformers: equal in float64, smaller, certified. A sample; ``-m slow`` runs all."""

from __future__ import annotations

import pytest

from helpers.architectures import build, names, settle
from thresher.errors import CaptureError
from thresher.frontend.capture import capture
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager
from thresher.testing import zero_channels
from thresher.verification.compare import EXACT_TOLERANCE, compare_programs, observe
from thresher.verification.verifier import verify

SAMPLE = [
    ("torchvision", "resnext50_32x4d"),
    ("torchvision", "shufflenet_v2_x0_5"),
    ("torchvision", "regnet_y_400mf"),
    ("torchvision", "swin_t"),
    ("timm", "convnext_atto"),
    ("timm", "cait_xxs24_224"),
    ("transformers", "Bert"),
    ("transformers", "GPT2"),
    ("transformers", "Llama"),
]


def folds(library: str, name: str, certified: bool) -> None:
    model, args = build(library, name)
    program = capture(zero_channels(settle(model, args), 0.3), args)
    manager = PassManager(pipelines.exact, "off")
    folded = manager.run(program)
    assert [r.failure for r in manager.records if r.status == "reverted"] == []
    assert not compare_programs(observe(program), folded).exceeds(EXACT_TOLERANCE)
    assert folded.parameter_count() < program.original.parameter_count
    if certified:
        assert verify(manager.certificate).removed > 0


@pytest.mark.parametrize(("library", "name"), SAMPLE)
def test_sample(library: str, name: str) -> None:
    folds(library, name, certified=library == "transformers")


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name"), names())
def test_all(library: str, name: str) -> None:
    try:
        folds(library, name, certified=False)
    except CaptureError as error:  # not ours: torch.export says why
        pytest.skip(str(error).splitlines()[0])
