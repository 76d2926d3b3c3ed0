"""Layers that meet zeros are found in untouched models, gates where activations are gated; skipping them changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from helpers.transformer_models import TEXT, TOKENS, transformers
from thresher.analysis.cost.break_even import BreakEven, Layer
from thresher.frontend.capture import capture
from thresher.passes import pipelines
from thresher.passes.sparsity._densities import densities, sites_of
from thresher.passes.sparsity._targets import targets_of
from thresher.passes.sparsity.skip_zeros import SkipZeros
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare

Make = Callable[[], tuple[nn.Module, tuple]]
OPT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96, "vocab_size": 200, "word_embed_proj_dim": 64,
    "max_position_embeddings": 64, "use_cache": False,
}  # fmt: skip
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 200}

#: model -> how to build it, layers whose inputs are often 0, and gates
MODELS: dict[str, tuple[Make, int, int]] = {
    "OPT": (transformers("OPTModel", (TOKENS[:1, :1],), **OPT), 2, 0),
    "T5 encoder": (transformers("T5EncoderModel", (TOKENS[:1, :4],), **T5), 2, 0),
    "T5 encoder, gated": (transformers("T5EncoderModel", (TOKENS[:1, :4],), feed_forward_proj="gated-gelu", **T5), 0, 2),
    "Llama": (transformers("LlamaModel", (TOKENS[:1, :1],), num_key_value_heads=2, use_cache=False, **TEXT), 0, 2),
    "Llama, ReLU": (
        transformers("LlamaModel", (TOKENS[:1, :1],), num_key_value_heads=2, use_cache=False, hidden_act="relu", **TEXT), 2, 2
    ),
    "BERT, ReLU": (transformers("BertModel", (TOKENS[:1, :6],), hidden_act="relu", **TEXT), 2, 0),
    "GPT-2": (transformers("GPT2Model", (TOKENS[:1, :1],), n_embd=64, n_layer=2, n_head=4, vocab_size=200, use_cache=False), 0, 0),
}  # fmt: skip


def free(layer: Layer) -> BreakEven:
    return BreakEven(1.0, (0.01, 1.0), (0.01, 1.0))


@pytest.mark.parametrize("name", MODELS)
def test_zeros_are_found_and_skipped(name: str) -> None:
    make, layers, gates = MODELS[name]
    model, args = make()
    program = PassManager(pipelines.exact).run(capture(model, args))
    sites = sites_of(program)
    often = {s: d for s, d in densities(program, sites, [list(program.probe)]).items() if d.nonzero < 0.8}
    assert len({s.linear for s in often if s.kind == "input"}) == layers
    assert len([t for t in targets_of(program) if t.kind == "gate"]) == gates
    manager = PassManager([SkipZeros()])
    result = manager.run(program, Context(find_break_even=free))
    assert bool(manager.records[0].rewrites) == any(d.listed < 0.84 for d in often.values())  # what is worth it
    assert not compare(program.run(*program.probe), result.run(*program.probe)).exceeds(1e-5)
