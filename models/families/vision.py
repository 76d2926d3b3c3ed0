"""The models of torchvision and timm, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from thresher.models.families.sample import Case, Inputs
from thresher.models.families.weights import randomize
from thresher.models.pretrained import allow_torchvision

SMALLEST_IMAGE = 64
LARGE_IMAGES = {"inception_v3": 299, "maxvit_t": 224, "vit_b_32": 224, "vit_l_32": 224, "vit_h_14": 224}
MOST_PARAMETERS = 100_000_000


@cache
def import_library(name: str) -> Any:
    """Import torchvision or timm; the operators that they name must exist as long as they are used."""
    allowed = allow_torchvision()
    module = __import__(name)
    vars(module)["operators_of_torchvision"] = allowed
    return module


# ---------------------------------------------------------------------- torchvision


def torchvision_names() -> Iterator[str]:
    """Yield every model of torchvision: classification, segmentation, detection, video, optical flow, quantised."""
    yield from import_library("torchvision").models.list_models()


def torchvision_case(name: str) -> Case:
    """Return a model with an input as small as it takes."""
    torchvision = import_library("torchvision")
    torch.manual_seed(0)
    extra: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit_"):
        extra["image_size"] = LARGE_IMAGES.get(name, SMALLEST_IMAGE)
    builder = torchvision.models.get_model_builder(name)
    if "weights_backbone" in str(builder.__annotations__):
        extra["weights_backbone"] = None
    model = builder(weights=None, **extra)
    shapes = _torchvision_shapes(name, builder.__module__)
    return _case(model, shapes, images_in_a_list="detection" in builder.__module__)


def _torchvision_shapes(name: str, module: str) -> list[tuple[int, ...]]:
    if "optical_flow" in module:
        return [(1, 3, 128, 128)] * 2
    if "detection" in module:
        return [(3, 128, 128)]
    if "video" in module:
        return [(1, 3, 16, 224, 224)] if name in ("s3d", "mvit_v1_b", "mvit_v2_s") else [(1, 3, 8, 64, 64)]
    size = LARGE_IMAGES.get(name.removeprefix("quantized_"), SMALLEST_IMAGE)
    return [(1, 3, size, size)]


# ---------------------------------------------------------------------- timm


def timm_names() -> Iterator[str]:
    """Yield every module of timm: a family of models."""
    yield from import_library("timm").list_modules()


def timm_case(family: str) -> Case:
    """Return the smallest model of a family, at its own input size."""
    timm = import_library("timm")
    name = min((n for n in timm.list_models(module=family) if not n.startswith("test_")), key=_parameters)
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, **({"depth": 2} if _parameters(name) > MOST_PARAMETERS else {}))
    except TypeError:  # it has no depth to choose
        model = timm.create_model(name)
    return _case(model, [(1, *model.default_cfg["input_size"])])


@cache
def _parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in import_library("timm").create_model(name).parameters())


# ---------------------------------------------------------------------- both


def _case(model: nn.Module, shapes: list[tuple[int, ...]], images_in_a_list: bool = False) -> Case:
    def inputs(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        images: list[Tensor] = [torch.randn(shape, generator=generator) for shape in shapes]
        return Inputs((images,) if images_in_a_list else tuple(images))

    return Case(randomize(model, inputs(2)), inputs(0), [inputs(1)])
