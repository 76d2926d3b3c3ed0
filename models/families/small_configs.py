"""A small configuration of every architecture of transformers, by rules on the names of fields.

There is no list of architectures: the name of a field says whether it is a width, a count or a token. ``shrink`` takes the dictionary of a
default configuration and returns one of the same structure. Where all rules together give a model that does not run (sizes that must
divide each other in a way that names do not tell), fewer are tried.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

VOCABULARY = 320
FIRST_SPECIAL_TOKEN = 300  # special tokens are from here to the end of the vocabulary; inputs are below
LAYERS, MOST_LAYERS = 2, 8
Rule = tuple[str, int]  # pattern of a field's name, and its largest value

LAYER_COUNT = (
    r"^(num_hidden_layers|num_layers|n_layers?|depth|num_encoder_layers|num_decoder_layers|(en|de)coder_layers|layers)$"
)
COUNTS: list[Rule] = [
    (LAYER_COUNT, LAYERS),
    (r"^(?!num_feat_extract)\w*_layers$|_depth$|^num_blocks$|^num_block$", LAYERS),
    (r"^(num|n|moe_num)_(local_|routed_)?experts$|^expert_count$", 4),
    (r"experts_per_tok(en)?$|^moe_(topk|top_k|k)$|^num_selected_experts$|^top_k_experts$", 2),
    (r"^(n_group|num_expert_group)$", 2),
    (r"^topk_group$", 1),
    (r"_(period|interval)$", 2),
    (r"^(expert|attn)_layer_offset$", 1),
    (r"^(first_k_dense_replace|num_kv_shared_layers|num_nextn_predict_layers|n_shared_experts)$", 1),
    (r"^(num_queries|num_query_tokens|num_latents|num_denoising)$", 16),
    (r"^(max_position_embeddings|n_positions|max_source_positions|max_target_positions|n_ctx|max_seq_len)$", 128),
]
IMAGES: list[Rule] = [(r"^(\w+_)?image_size$|^img_size$", 64)]


def sizes(width: int, heads: int) -> list[Rule]:
    """Return rules for layers of this width."""
    return [
        (
            r"^(hidden_size|d_model|n_embd|embed_dim|dim|embedding_size|emb_dim|hidden_dim|embedding_dim|output_dim)$",
            width,
        ),
        (
            r"^((out|output|projector|pooler|word_embed_proj)_(hidden_)?(size|dim)|projection_dim|pooler_output_size)$",
            width,
        ),
        (
            r"^(text|vision|audio|encoder|decoder|attention|mm|qformer|lm|fpn|fusion)_(hidden_size|embed_dim|hidden_dim)$",
            width,
        ),
        (
            r"(intermediate|inner|ffn|feedforward|mlp)_(size|dim)$|^(n_inner|d_ff|ffn_dim|d_inner)$|_(ffn_dim|ff_dim)$",
            96,
        ),
        (r"(key_value_heads|kv_heads|kv_head)$", heads // 2),
        (r"(^|_)(num_)?(attention_)?heads$|^(n_head|num_head)$", heads),
        (
            r"^(head_dim|d_kv|attention_head_(dim|size)|dim_head|d_head|v_head_dim|qk_nope_head_dim|kv_channels)$",
            width // heads,
        ),
        (r"^qk_rope_head_dim$", width // heads // 2),
        (r"^qk_head_dim$", width // heads * 3 // 2),
        (r"^(kv|q)_lora_rank$", 32),
        (r"^rotary_dim$", width // heads // 2),
        (r"^(mamba_)?n_groups$", 2),
        (r"^conv_dim$", 32),
    ]


#: What is tried, one after the other.
SMALL, LARGE_HEADS = sizes(64, 4), sizes(256, 2)  # some rotate parts of a head of 128
LADDER: list[list[Rule]] = [
    COUNTS + SMALL + IMAGES,
    COUNTS + LARGE_HEADS + IMAGES,
    COUNTS + SMALL,
    COUNTS + IMAGES,
    COUNTS,
    COUNTS[:2],
]

STAGES = re.compile(r"^(depths|blocks_per_stage|stage_numb_of_layers|layer_depths|num_layers|num_block_repeats)$")
INDICES = re.compile(r"(_|^)(out_indices|indices|indexes)$")
TOKEN = re.compile(
    r"(_|^)token_(id|index)$|^(bos|eos|pad|sep|cls|mask)_token_id$|_token_ids?$|_token_index$|^(boi|eoi)_"
)
#: Fields whose default is None, although the model needs a value.
NEEDED = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "prediction_length": 4, "n_routed_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
LABELS = ("id2label", "label2id", "label_names")
RECOMPUTED = ("stage_names", "out_features", "aligned_out_features")


def shrink(config: Mapping[str, Any], rules: list[Rule]) -> dict[str, Any]:
    """Return the dictionary of a smaller configuration: every field that a rule fits, in sub-configurations too."""
    layers = _layer_count(config)
    small = {k: _shrunk(k, v, rules, config, layers) for k, v in config.items() if k not in RECOMPUTED}
    return _consistent(small, config)


def _consistent(small: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the small configuration with the relations that the large one has, where a name says what is to be equal."""
    heads = config.get("num_attention_heads")
    if heads and "num_key_value_heads" in config and config["num_key_value_heads"] in (None, heads):
        small["num_key_value_heads"] = small["num_attention_heads"]
    for head_dim, count, expand in (
        ("head_dim", "num_heads", "expand"),
        ("mamba_d_head", "mamba_n_heads", "mamba_expand"),
        ("mamba_headdim", "n_mamba_heads", "mamba_expand"),
    ):
        if {head_dim, count, expand} <= small.keys():  # of a state space model
            inner = small.get("mamba_d_ssm") or int(small["hidden_size"] * small[expand])
            small[head_dim] = inner // small[count]
    if config.get("attention_hidden_size", 0) == 2 * config.get("hidden_size", 1):  # of a block that reads two states
        small["attention_hidden_size"] = 2 * small["hidden_size"]
        small["attention_head_dim"] = small["attention_hidden_size"] // small["num_attention_heads"]
    nope, rotated = "qk_nope_head_dim", "qk_rope_head_dim"
    if {"head_dim", nope, rotated} <= config.keys():
        if config["head_dim"] == config[rotated]:
            small["head_dim"] = small[rotated]
        elif config["head_dim"] == config[nope] + config[rotated]:
            small["head_dim"] = small[nope] + small[rotated]
    if small.get("head_dim", 0) is None and heads:
        small["head_dim"] = small["hidden_size"] // small["num_attention_heads"]
    rope = small.get("rope_parameters")
    if heads and isinstance(rope, dict) and "rope_theta" in rope:
        small["rope_parameters"] = {**rope, "mrope_section": _sections(small, rope)}
    return small


def _sections(small: Mapping[str, Any], rope: Mapping[str, Any]) -> list[int]:
    """Return parts of the rotated half of a head for time, height and width; models of text alone do not read them."""
    width = (
        small.get("qk_rope_head_dim") or small.get("head_dim") or small["hidden_size"] // small["num_attention_heads"]
    )
    half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    _, *others = parts = rope.get("mrope_section") or [1, 1, 1]
    others = [half * part // sum(parts) for part in others]
    return [half - sum(others), *others]


def _shrunk(key: str, value: Any, rules: list[Rule], config: Mapping[str, Any], layers: int | None) -> Any:
    if isinstance(value, Mapping):
        if "layer_config" in key:
            return {index: shrink(part, rules) for index, part in value.items() if int(index) < (layers or 0)}
        kept = key in LABELS or "rope" in key or "map" in key or not all(isinstance(k, str) for k in value)
        return dict(value) if kept else shrink(value, rules)
    if value is None:
        return NEEDED.get(key)
    if key == "use_cache":
        return False
    if isinstance(value, bool) or not isinstance(value, int | list | tuple):
        return value
    if TOKEN.search(key):
        return _special_tokens(value)
    if isinstance(value, int):
        return _shrunk_int(key, value, rules, layers)
    if layers is not None and len(value) == _default_layers(config) and not INDICES.search(key):
        return value[:layers]
    if STAGES.search(key):
        return [min(v, 1) if isinstance(v, int) else v for v in value]
    if INDICES.search(key) and layers is not None:
        return list(range(max(layers - len(value), 0), layers))
    return [_shrunk_int(key, v, rules, None) if isinstance(v, int) and not isinstance(v, bool) else v for v in value]


def _shrunk_int(key: str, value: int, rules: list[Rule], layers: int | None) -> int:
    if "vocab_size" in key and "type" not in key:
        return min(value, VOCABULARY)
    if re.search(LAYER_COUNT, key) and layers is not None:
        return min(value, layers)
    limit = next((limit for pattern, limit in rules if re.search(pattern, key)), value)
    return min(value, limit)


def _special_tokens(value: Any) -> Any:
    """Return tokens of a small vocabulary; different ones stay different, as far as it goes."""
    if isinstance(value, list | tuple):
        return [_special_tokens(v) for v in value]
    small = value < FIRST_SPECIAL_TOKEN
    return value if small else FIRST_SPECIAL_TOKEN + value % (VOCABULARY - FIRST_SPECIAL_TOKEN)


def _default_layers(config: Mapping[str, Any]) -> int:
    counts = [v for k, v in config.items() if isinstance(v, int) and re.search(LAYER_COUNT, k)]
    return max(counts, default=0)


def _layer_count(config: Mapping[str, Any]) -> int | None:
    """Return how many layers hold one of each kind that the configuration lists by layer, and one of each whose output it uses."""
    before = _default_layers(config)
    if not before:
        return None
    count = LAYERS
    for key, value in config.items():
        if isinstance(value, list | tuple) and INDICES.search(key):
            count = max(count, len(value))
        elif isinstance(value, list | tuple) and len(value) == before:
            count = max(count, *(value.index(kind) + 1 for kind in value)) if value else count
    return min(count, MOST_LAYERS, before)
