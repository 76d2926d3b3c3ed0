"""Inputs of a model of transformers, by the names of what its ``forward`` takes.

A name has a few candidates (audio as samples or as frames, frames first or last), and the first combination that the model accepts is
taken: first of the arguments that it needs, then with further ones.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from thresher.models.families.sample import Inputs
from thresher.models.families.small_configs import FIRST_SPECIAL_TOKEN
from thresher.models.families.tensors import Maker, fixed, normal, ones, whole

TOKENS = 12
MOST_ATTEMPTS = 40
#: Arguments that are given where those that a model needs are not enough: it says only when it runs that it needs one of several. What
#: a model else draws at random is given where it can be.
FURTHER: list[tuple[str, ...]] = [
    ("noise",),
    (),
    ("decoder_input_ids",),
    ("input_ids",),
    ("pixel_values",),
    ("input_ids", "pixel_values"),
    ("attention_mask",),
    ("input_ids", "attention_mask"),
    ("input_ids", "attention_mask", "pixel_values"),
    ("input_features",),
    ("input_values",),
    ("input_features", "input_ids"),
    ("bbox",),
    ("input_ids", "pixel_values", "image_grid_thw"),
]


def fields(config: Any, *names: str) -> Iterator[Any]:
    """Yield the values that a configuration and its sub-configurations have for these names, the outermost first."""
    for name in names:
        if (value := getattr(config, name, None)) is not None:
            yield value
    for part in vars(config).values():
        if hasattr(part, "to_dict") and part is not config:
            yield from fields(part, *names)


def field(config: Any, default: int, *names: str) -> int:
    """Return the first of these values as a number; of a pair, its first one."""
    value = next(fields(config, *names), default)
    while isinstance(value, list | tuple):
        value = value[0]
    return int(value)


def candidates(name: str, config: Any) -> list[Maker]:
    """Return makers of what an argument may look like; none where the name says nothing."""
    image = field(config, 64, "image_size", "img_size")
    channels = field(config, 3, "num_channels", "in_channels", "in_chans")
    mel = field(config, 80, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "input_dim")
    frames = field(config, 16, "num_frames")
    source = 2 * field(config, 50, "max_source_positions")
    width = field(config, 64, "hidden_size", "d_model")
    series, size = field(config, 1, "num_input_channels", "input_size"), field(config, 16, "patch_size")
    context = field(config, 32, "context_length")
    patch = channels * field(config, 1, "temporal_patch_size", "patch_temporal") * field(config, 14, "patch_size") ** 2

    vocabulary = min(field(config, FIRST_SPECIAL_TOKEN, "vocab_size"), FIRST_SPECIAL_TOKEN)
    tokens = whole(vocabulary, 1, TOKENS, low=5)
    makers: dict[str, list[Maker]] = {
        "input_ids": [tokens, *(whole(vocabulary, *shape) for shape in ((1, 9, TOKENS), (1, TOKENS, 9)))],
        "decoder_input_ids": [tokens],
        "attention_mask": [ones(1, TOKENS)],
        "decoder_attention_mask": [ones(1, TOKENS)],
        "token_type_ids": [whole(2, 1, TOKENS)],
        "bbox": [lambda generator: torch.randint(0, 50, (1, TOKENS, 2), generator=generator).repeat(1, 1, 2).sort(-1).values],
        "pixel_values": [
            normal(1, channels, image, image),
            normal(1, frames, channels, image, image),
            normal(1, 1, channels, image, image),
            normal(1, channels, 224, 224),
            normal(16, patch),
        ],
        "image_grid_thw": [fixed([[1, 4, 4]])],
        "grid_thw": [fixed([[1, 4, 4]])],
        "query_embeds": [normal(1, 8, width)],
        "qformer_input_ids": [tokens],
        "pixel_values_videos": [normal(1, frames, channels, image, image), normal(1, channels, frames, image, image)],
        "pixel_mask": [ones(1, image, image)],
        "input_features": [normal(1, mel, source), normal(1, source, mel), normal(1, 1, source, mel), normal(1, source, 80)],
        "input_values": [normal(1, 4000), normal(1, 1, 4000), normal(1, 1, 8000), normal(1, 128, mel), normal(1, 1024, mel)],
        "audio_values": [normal(1, 4000), normal(1, 1, 4000)],
        "inputs_embeds": [normal(1, TOKENS, width)],
        "encoder_hidden_states": [normal(1, TOKENS, width)],
        "hidden_states": [normal(1, TOKENS, width), normal(1, width, 8, 8), normal(16, patch)],
        "past_values": [normal(1, context + 8, series), normal(1, context, series)],
        "noise": [normal(1, (image // size) ** 2)],
    }  # fmt: skip
    return makers.get(name, [])


def find_inputs(model: nn.Module, config: Any) -> list[Inputs]:
    """Return two sets of inputs of the same shapes. Raises the first error of the model where it accepts none."""
    needed = _needed(model)
    errors: list[Exception] = []
    for further in FURTHER:
        names = list(dict.fromkeys([*needed, *further]))
        if not set(names) <= set(inspect.signature(model.forward).parameters):
            continue
        for combination in itertools.product(*(candidates(name, config) for name in names)):
            if len(errors) == MOST_ATTEMPTS:
                raise errors[0]
            inputs = [draw(dict(zip(names, combination)), seed) for seed in (0, 1)]
            try:
                with torch.no_grad():
                    model(**inputs[0].kwargs)
                return inputs
            except Exception as error:
                errors.append(error)
    raise errors[0] if errors else TypeError(f"no inputs for {', '.join(needed)}")


def draw(makers: Mapping[str, Maker], seed: int) -> Inputs:
    """Return one set of inputs."""
    generator = torch.Generator().manual_seed(seed)
    return Inputs((), {name: maker(generator) for name, maker in makers.items()})


def _needed(model: nn.Module) -> list[str]:
    """Return the arguments without a default, and the main ones."""
    parameters = inspect.signature(model.forward).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and p.kind not in variadic]
    main = getattr(model, "main_input_name", "input_ids")
    mains = [main] if isinstance(main, str) else main
    return [*(n for n in mains if n in parameters), *(n for n in needed if n not in mains)]
