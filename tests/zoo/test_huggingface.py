"""Folded widths written to a config: the folded weights load into the architecture's own class."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import thresher
from helpers.architectures import build
from thresher.exporters.huggingface import folded_config
from thresher.passes import pipelines
from thresher.verification.compare import compare

EXACT = [*pipelines.canonicalize, "fold-channels{round_to=1,min_improvement=inf}"]


def pruned(counts: list[int]) -> tuple[nn.Module, tuple]:
    """A small Llama; ``counts`` hidden units of each layer are dead."""
    model, args = build("transformers", "Llama")
    for layer, count in zip(model.layers, counts):
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            with torch.no_grad():
                projection.weight[:count] = 0
    return model, args


def test_equal_widths_are_written() -> None:
    model, args = pruned([16, 16])
    small = thresher.rewrite(model, args, passes=EXACT)
    config, problems = folded_config(model.config, small)
    assert problems == []
    assert config.intermediate_size == 80
    narrow = type(model)(config).eval()
    narrow.load_state_dict({k: v for k, v in small.program.rounded().constants.items() if k in narrow.state_dict()})
    with torch.no_grad():
        assert not compare(tree_leaves(model(*args)), tree_leaves(narrow(*args))).exceeds(1e-5)
    assert model.config.intermediate_size == 96


def test_the_example_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "interchange.md").read_text()
    section = page.partition("## Hugging Face configurations\n")[2]
    (example, *_) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    model, args = pruned([32, 32])
    names = {"thresher": thresher, "model": model, "args": args}
    exec(example, names)
    assert names["problems"] == [] and names["config"].intermediate_size == 64
    with torch.no_grad():
        assert not compare(tree_leaves(model(*args)), tree_leaves(names["narrow"](*args))).exceeds(1e-5)


def test_different_widths_are_reported() -> None:
    model, args = pruned([16, 8])
    config, problems = folded_config(model.config, thresher.rewrite(model, args, passes=EXACT))
    assert problems == ["intermediate_size = 96: layers now have 80, 88; the config has one number"]
    assert config.intermediate_size == 96


def test_what_has_no_field_is_reported() -> None:
    model, args = pruned([0, 0])
    with torch.no_grad():
        model.layers[0].self_attn.o_proj.weight[:, :32] = 0  # the query heads of one key head
    _, problems = folded_config(model.config, thresher.rewrite(model, args, passes=EXACT))
    assert any("has no field for it" in p or "the config has one number" in p for p in problems)
