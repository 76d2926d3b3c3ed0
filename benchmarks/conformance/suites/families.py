"""The models of torchvision, timm and transformers: one of every family (:mod:`thresher.models.families`)."""

from __future__ import annotations

from thresher.models.families import language, vision

from ..sample import Suite

TORCHVISION = Suite(
    "torchvision",
    "torchvision",
    "Every model of `torchvision.models.list_models()`, with random weights and a small input.",
    vision.torchvision_names,
    vision.torchvision_case,
    limit=600.0,
)
TIMM = Suite(
    "timm",
    "timm",
    "The smallest model of every family of `timm.list_modules()`, with random weights, at its own input size.",
    vision.timm_names,
    vision.timm_case,
    limit=600.0,
)
TRANSFORMERS = Suite(
    "transformers",
    "transformers",
    "One small configuration of every architecture of transformers that has a model class, with random weights. Rules on the names of "
    "fields and arguments make configurations and inputs; what they do not give an architecture is in a table, with the reason. "
    "Sizes of images that are an argument (`grid_thw`) are fixed.",
    language.names,
    language.build,
    limit=300.0,
)
