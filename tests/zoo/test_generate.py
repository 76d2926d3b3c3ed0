"""generate() of transformers under torch.compile: with static and dynamic caches, token by token what eager generates, with few builds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thresher.driver import dynamo
from thresher.models.pretrained import allow_torchvision

PROMPT, STEPS = 5, 64
#: Class of the model and what its configuration needs besides; the widths are small and the logits of random weights distinct.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"num_key_value_heads": 2},
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "MistralForCausalLM": {"num_key_value_heads": 2, "sliding_window": 32},
    "Qwen2ForCausalLM": {"num_key_value_heads": 2},
    "GemmaForCausalLM": {"num_key_value_heads": 1, "head_dim": 8},
}
#: A prompt and a step have other shapes; a growing cache has its free sizes from its second step on.
MAX_BUILDS = {"static": 2, "dynamic": 3}
#: More where the tokens leave a sliding window: a cache that is full is another graph, and one that is about to be.
WINDOW_BUILDS = {"static": 1, "dynamic": 3}


def language_model(name: str) -> nn.Module:
    allow_torchvision()
    import transformers as library

    torch.manual_seed(0)
    widths = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    settings = {"vocab_size": 97, **({} if name.startswith("GPT2") else widths), **ARCHITECTURES[name]}
    cls = getattr(library, name)
    model = cls(cls.config_class(**settings, initializer_range=0.3)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def generate(model: nn.Module, cache: str, steps: int) -> Tensor:
    prompt = torch.randint(1, 97, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    settings = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    return model.generate(prompt, max_new_tokens=steps, do_sample=False, **settings)


def assert_equal_tokens(name: str, cache: str, steps: int, **options: Any) -> None:
    model = language_model(name)
    wanted = generate(copy.deepcopy(model), cache, steps)
    model.forward = torch.compile(model.forward, backend="thresher", options=options)  # type: ignore[method-assign]
    found = generate(model, cache, steps)
    assert found.tolist() == wanted.tolist() and found.shape[1] == PROMPT + steps
    assert len(set(wanted[0].tolist())) > 5  # it does not repeat one token
    slides = "sliding_window" in ARCHITECTURES[name]
    assert 0 < len(dynamo.built()) <= MAX_BUILDS[cache] + (WINDOW_BUILDS[cache] if slides else 0)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("cache", MAX_BUILDS)
def test_tokens(cache: str) -> None:
    assert_equal_tokens("LlamaForCausalLM", cache, 12, backend="eager", fallback=False)


@pytest.mark.slow
@pytest.mark.parametrize("cache", MAX_BUILDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sixty_four_tokens_of_compiled_code(name: str, cache: str) -> None:
    assert_equal_tokens(name, cache, STEPS, fallback=False)
