"""Language models, and models of language and something else that are given text alone."""

from __future__ import annotations

from thresher.models.families.particular.entry import Particular
from thresher.models.families.tensors import PROMPT, fixed, normal, ones, pair, parts

DOTS = {
    "index_topk": 8,
    "per_layer_config": {
        "02": {
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "head_dim": 24,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        }
    },
}
#: One drafted token, and what the large model has kept of twelve.
ASSISTANT = {
    "inputs_embeds": normal(1, 1, 128),
    "position_ids": fixed([[12]]),
    "shared_kv_states": parts(
        {kind: pair(normal(1, 2, 12, 16), normal(1, 2, 12, 16)) for kind in ("full_attention", "sliding_attention")}
    ),
}

#: While it is traced, the encoder makes no mask of its own.
MASKED = Particular(
    "under torch.export it needs the mask that it makes itself in eager mode",
    inputs={"input_ids": PROMPT, "attention_mask": ones(1, 12), "decoder_input_ids": PROMPT},
)

TEXT: dict[str, Particular] = {
    "longt5": MASKED,
    "switch_transformers": MASKED,
    "cohere_compass_text": Particular(
        "its rotary embedding has parameters by type of layer, and none by default",
        config={
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            }
        },
    ),
    "cohere_compass": Particular(
        "its rotary embedding has parameters by type of layer, and none by default",
        config={
            "text_config": {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
                }
            }
        },
    ),
    "dots1": Particular("shared experts have no default", config={"n_shared_experts": 1}),
    "lfm2_moe": Particular(
        "the types of layers have no default",
        config={"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    ),
    "diffusion_gemma": Particular(
        "experts have no default, and the text that it refines is drawn at random unless it is given",
        config={
            "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96},
            "canvas_length": 12,
        },
        inputs={"input_ids": PROMPT, "decoder_input_ids": PROMPT},
    ),
    "zamba": Particular(
        "two layers share one block only where the library's pattern of shared names fits",
        config={
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "mamba_dt_rank": 8,
        },
    ),
    "dory": Particular(
        "its dictionary counts each layer twice, as two blocks",
        config={
            "num_hidden_layers": 8,
            "n_input_layers": 2,
            "n_recurrent_layers": 4,
            "n_output_layers": 2,
            "layer_types": [
                "sliding_attention",
                "mlp",
                "sliding_attention",
                "mlp",
                "full_attention",
                "mlp",
                "sliding_attention",
                "mlp",
            ],
        },
    ),
    "qwen4_exp_text": Particular(
        "the sizes of its indexer have no default",
        config={
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
    ),
    "qwen4_exp": Particular(
        "the sizes of its indexer have no default",
        config={
            "text_config": {
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 16,
                "indexer_budget": 8,
                "indexer_compress_ratio": 2,
            }
        },
    ),
    "xmod": Particular(
        "a language has to be chosen", config={"default_language": "en_XX", "languages": ["en_XX", "de_DE"]}
    ),
    "dia": Particular(
        "the width that the decoder reads has a name of its own",
        config={
            "decoder_config": {
                "cross_hidden_size": 64,
                "cross_head_dim": 16,
                "cross_num_attention_heads": 4,
                "cross_num_key_value_heads": 2,
            }
        },
    ),
    "dbrx": Particular(
        "the rotary embedding's base and the bound of the projections have no default",
        config={
            "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96},
        },
    ),
    "step3p7": Particular(
        "it has layers that look through a window, and no default for its width",
        config={"text_config": {"sliding_window": 8}},
    ),
    "dots3_note_text": Particular(
        "layers of one type have sizes of their own, and the configuration checks their sum", config=DOTS
    ),
    "dots3_note": Particular(
        "layers of one type have sizes of their own, and the configuration checks their sum",
        config={
            "text_config": DOTS,
            "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
            "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
        },
    ),
    "gemma4_assistant": Particular(
        "it reads the keys and values of another model",
        initial={
            "text_config": {
                "model_type": "gemma4_text",
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
            }
        },
        config={"backbone_hidden_size": 64, "text_config": {"num_kv_shared_layers": 6}},
        inputs=ASSISTANT,
    ),
    "gemma4_unified_assistant": Particular(
        "it reads the keys and values of another model",
        config={"backbone_hidden_size": 64, "text_config": {"num_kv_shared_layers": 6}},
        inputs=ASSISTANT,
    ),
    "ernie4_5_vl_moe": Particular(
        "its rotary embedding has sections of its own",
        config={"text_config": {"rope_parameters": {"mrope_section": [3, 3, 2]}}},
    ),
    "apertus1p5": Particular(
        "its vocabulary has ranges for image and audio tokens",
        config={
            "text_config": {"vocab_size": 448},
            "vision_config": {"codebook_size": 64, "base_channels": 32},
            "audio_config": {"codebook_size": 64, "hidden_size": 64, "codebook_dim": 64},
            "image_token_id": 301,
            "audio_token_id": 302,
            "image_token_offset": 320,
            "audio_token_offset": 384,
        },
    ),
    "chameleon": Particular(
        "its tokens of images are named by text",
        config={"vocabulary_map": {"<image>": 301, **{f"IMGIMG{'ABCDEFGHIJ'[i]}Z": 302 + i for i in range(10)}}},
    ),
    "emu3": Particular(
        "its tokens of images are named by text",
        config={
            "vq_config": {"base_channels": 32},
            "vocabulary_map": {
                "<image>": 301,
                "<|extra_200|>": 302,
                **{f"<|visual token {i:06d}|>": 303 + i for i in range(8)},
            },
        },
    ),
    "shieldgemma2": Particular(
        "its answers are tokens by number", config={"yes_token_index": 301, "no_token_index": 302}
    ),
    "qwen2_5_omni": Particular(
        "the whole has no forward: its part that reads", model="Qwen2_5OmniThinkerForConditionalGeneration"
    ),
    "qwen3_omni_moe": Particular(
        "the whole has no forward: its part that reads", model="Qwen3OmniMoeThinkerForConditionalGeneration"
    ),
    "bark": Particular("the whole has no forward: its first model", model="BarkSemanticModel"),
    "molmo2": Particular(
        "its adapter reads layers by number",
        config={"adapter_config": {"vision_feature_layer": [-1, -2], "hidden_size": 64, "text_hidden_size": 64}},
    ),
    "t5gemma2_encoder": Particular(
        "dropout is given by the whole model", config={"text_config": {"dropout_rate": 0.0}}
    ),
    "jev": Particular(
        "it answers questions at marks",
        inputs={
            "input_ids": PROMPT,
            "marks": fixed([[6, 12]]),
            "num_options": fixed([[2, 3]]),
            "question_type_ids": fixed([[0, 2]]),
        },
    ),
    "muse_glimmer_assistant": Particular(
        "it drafts a block from the states of five layers of another model",
        inputs={"noise_embeds": normal(1, 16, 64), "context_hidden_states": normal(1, 12, 320)},
    ),
    "blt": Particular(
        "its tables of groups of bytes are large",
        config={
            "encoder_hash_byte_group_vocab": 512,
            "encoder_config": {"hidden_size_global": 64},
            "decoder_config": {"hidden_size_global": 64},
        },
    ),
}
