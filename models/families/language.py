"""One small model of every architecture of transformers, with random weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn

from thresher.frontend.fixed_arguments import fix_arguments
from thresher.models.families.model_inputs import draw, find_inputs
from thresher.models.families.particular import PARTICULAR, Method, Particular, overlaid
from thresher.models.families.sample import Case, Inputs, SampleExcluded
from thresher.models.families.small_configs import LADDER, shrink
from thresher.models.families.vision import import_library
from thresher.models.families.weights import randomize

MOST_PARAMETERS = 150_000_000
SIZES = ("grid_thw", "image_grid_thw", "video_grid_thw", "merge_sizes", "spatial_shapes", "target_sizes", "tgt_sizes")
#: Mappings that are asked for a model class, in this order: the model without a head, then those whose architectures have only one with it.
FIRST_MAPPINGS = ("MODEL_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_PRETRAINING_MAPPING_NAMES")


@cache
def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import_library("torchvision")
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


@cache
def _classes() -> dict[str, str]:
    """Return the name of a model class by type of model: each class once."""
    _transformers()
    from transformers.models.auto import configuration_auto, modeling_auto

    configs = configuration_auto.CONFIG_MAPPING_NAMES
    mappings = sorted(n for n in dir(modeling_auto) if n.startswith("MODEL_") and n.endswith("_MAPPING_NAMES"))
    classes: dict[str, str] = {}
    for mapping in (*FIRST_MAPPINGS, *mappings):
        pairs = [(kind, n if isinstance(n, str) else n[0]) for kind, n in getattr(modeling_auto, mapping).items()]
        pairs = [(kind, name) for kind, name in pairs if kind in configs]
        # where several types share a class, the one that it is named after has it
        for kind, name in sorted(pairs, key=lambda p: not p[1].startswith(configs[p[0]].removesuffix("Config"))):
            if name not in classes.values():
                classes.setdefault(kind, name)
    return classes


def names() -> Iterator[str]:
    """Yield the type of every model (``bert``) that has a class."""
    yield from sorted(_classes())


def build(name: str) -> Case:
    """Return a small model; the first configuration of the ladder that can be built and runs."""
    particular = PARTICULAR.get(name, Particular())
    if particular.excluded:
        raise SampleExcluded(particular.reason)
    config_class, model_class = _class_pair(name, particular)
    errors = []
    for rules in LADDER:
        try:
            small = shrink(config_class(**particular.initial).to_dict(), rules)
            config = config_class.from_dict(overlaid(small, particular.config))
            _check_size(model_class, config)
            inputs = _inputs(_model(model_class, config, particular), config, particular)
            model = _model(model_class, config, particular)  # some keep what they have computed in the first call
            return _case(randomize(model, inputs[0]), inputs)
        except Exception as error:
            errors.append(error)
    raise errors[0]


def _case(model: nn.Module, inputs: list[Inputs]) -> Case:
    """Return the case of a model; arguments that say how large its inputs are decide sizes, and are fixed."""
    fixed = {name: value for name, value in inputs[0].kwargs.items() if name in SIZES}
    others = [Inputs((), {n: v for n, v in sample.kwargs.items() if n not in fixed}) for sample in inputs]
    return Case(fix_arguments(model, fixed), others[0], others[1:])


def _class_pair(name: str, particular: Particular) -> tuple[Any, Any]:
    """Return the classes of the configuration and of the model; not every model class is among the names of the library."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    transformers = _transformers()
    config_class = getattr(transformers, CONFIG_MAPPING_NAMES[name])
    class_name = particular.model or _classes()[name]
    if hasattr(transformers, class_name):
        model_class = getattr(transformers, class_name)
    else:
        model_class = getattr(import_module(config_class.__module__.replace("configuration_", "modeling_")), class_name)
    return (model_class.config_class if particular.model else config_class), model_class


def _inputs(model: nn.Module, config: Any, particular: Particular) -> list[Inputs]:
    """Return inputs that the model has accepted."""
    if not particular.inputs:
        return find_inputs(model, config)
    inputs = [draw(particular.inputs, seed) for seed in (0, 1)]
    with torch.no_grad():
        model(**inputs[0].kwargs)
    return inputs


def _check_size(model_class: Any, config: Any) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > MOST_PARAMETERS:
        raise SampleExcluded(f"its smallest configuration has {count / 1e6:.0f} million parameters")


def _model(model_class: Any, config: Any, particular: Particular) -> nn.Module:
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

    torch.manual_seed(0)
    model = model_class(config).eval()
    # some have keys and values among their outputs, whatever the configuration says
    register_cache_pytrees_for_model(model)
    return Method(model, particular.method) if particular.method else model
