"""Small models of transformers with random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from thresher.models.pretrained import allow_torchvision

TEXT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 200,
    "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = torch.randint(1, 200, (2, 12), generator=torch.Generator().manual_seed(0))
THERE = torch.ones(2, 12, dtype=torch.long)
THERE[1, 8:] = 0


def transformers(
    name: str, args: tuple, attention: str | None = None, pick: str = "", **config
) -> Callable[[], tuple[nn.Module, tuple]]:
    """A transformers model of random weights; ``attention``: the implementation that is asked for; ``pick``: a part of the model."""

    def make() -> tuple[nn.Module, tuple]:
        allow_torchvision()
        import transformers as library

        torch.manual_seed(0)
        cls = getattr(library, name)
        made = cls._from_config(cls.config_class(**config), **({"attn_implementation": attention} if attention else {}))
        return (getattr(made, pick)() if pick else made).eval(), args

    return make
