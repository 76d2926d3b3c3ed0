"""Models that read text and an image, a video or audio."""

from __future__ import annotations

from thresher.models.families.particular.entry import Particular
from thresher.models.families.particular.images import SPATIAL
from thresher.models.families.tensors import PROMPT, boxes, fixed, normal, ones, patches, text_with, whole

PERCEPTION = {
    "architecture": "vit_pe_core_tiny_patch16_384",
    "model_args": {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 64},
}

MIXED: dict[str, Particular] = {
    "siglip2": Particular(
        "its images are patches and the sizes of their grids",
        config={"text_config": {"projection_size": 64}},
        inputs={"input_ids": whole(300, 1, 64, low=5), **SPATIAL},
    ),
    "lxmert": Particular(
        "it reads features of regions",
        inputs={"input_ids": PROMPT, "visual_feats": normal(1, 4, 2048), "visual_pos": normal(1, 4, 4)},
    ),
    "kosmos-2": Particular(
        "a mask says where in the text an image is",
        config={"latent_query_num": 8},
        inputs={
            "pixel_values": normal(1, 3, 64, 64),
            "input_ids": whole(300, 1, 16, low=5),
            "image_embeds_position_mask": fixed([[0] * 2 + [1] * 8 + [0] * 6]),
        },
    ),
    "pix2struct": Particular(
        "a patch begins with its row and its column",
        inputs={"flattened_patches": patches(4, 4, 768), "attention_mask": ones(1, 16), "decoder_input_ids": PROMPT},
    ),
    "oneformer": Particular(
        "its task is text, and its backbone has three heads",
        config={"backbone_config": {"num_heads": [2, 4, 8, 16]}, "conv_dim": 64, "mask_dim": 64},
        inputs={"pixel_values": normal(1, 3, 64, 64), "task_inputs": whole(300, 1, 77)},
    ),
    "idefics": Particular(
        "it needs images, and which text they are for",
        inputs={
            "input_ids": PROMPT,
            "attention_mask": ones(1, 12),
            "pixel_values": normal(1, 1, 3, 64, 64),
            "image_attention_mask": ones(1, 12, 1),
        },
    ),
    "blip-2": Particular(
        "its token of an image has no default",
        config={"image_token_index": 301},
        inputs={"pixel_values": normal(1, 3, 64, 64), "input_ids": text_with(301, 16)},
    ),
    "blip_2_qformer": Particular(
        "it reads an image's states",
        inputs={"query_embeds": normal(1, 8, 64), "encoder_hidden_states": normal(1, 12, 64)},
    ),
    "instructblip": Particular(
        "its token of an image has no default",
        config={"image_token_index": 301},
        inputs={"pixel_values": normal(1, 3, 64, 64), "qformer_input_ids": PROMPT, "input_ids": text_with(301, 16)},
    ),
    "instructblipvideo": Particular(
        "its token of a video has no default",
        config={"video_token_index": 301},
        inputs={"pixel_values": normal(1, 2, 3, 64, 64), "qformer_input_ids": PROMPT, "input_ids": text_with(301, 32)},
    ),
    "tvp": Particular(
        "it reads frames of a video with a prompt around them",
        config={"max_img_size": 64, "visual_prompt_size": 8, "num_frames": 2},
        inputs={"input_ids": PROMPT, "attention_mask": ones(1, 12), "pixel_values": normal(1, 2, 3, 64, 64)},
    ),
    "udop": Particular(
        "boxes of words are fractions of the page",
        inputs={
            "input_ids": PROMPT,
            "bbox": boxes(12),
            "pixel_values": normal(1, 3, 64, 64),
            "decoder_input_ids": PROMPT,
        },
    ),
    "omdet-turbo": Particular(
        "classes and a task are text, and widths of its parts have many names",
        config={
            "text_config": {"hidden_size": 96, "projection_dim": 96},
            "text_projection_in_dim": 96,
            "text_projection_out_dim": 96,
            "class_embed_dim": 96,
            "task_encoder_hidden_dim": 96,
            "vision_features_channels": [64, 64, 64],
            "encoder_hidden_dim": 64,
            "encoder_dim_feedforward": 96,
            "decoder_dim_feedforward": 96,
        },
        inputs={
            "pixel_values": normal(1, 3, 64, 64),
            "classes_input_ids": whole(300, 3, 12, low=5),
            "classes_attention_mask": ones(3, 12),
            "tasks_input_ids": PROMPT,
            "tasks_attention_mask": ones(1, 12),
            "classes_structure": fixed([3]),
        },
    ),
    "perception_lm": Particular("its vision model has no default that fits", config={"vision_config": PERCEPTION}),
    "pe_video": Particular(
        "its vision model is one of timm",
        config={"video_config": {"vision_config": PERCEPTION}},
        inputs={"input_ids": PROMPT, "pixel_values_videos": normal(1, 2, 3, 64, 64)},
    ),
    "pe_video_encoder": Particular(
        "its vision model is one of timm",
        config={"vision_config": PERCEPTION},
        inputs={"pixel_values_videos": normal(1, 2, 3, 64, 64)},
    ),
    "pe_audio_video": Particular(
        "its vision model is one of timm",
        config={"audio_video_config": {"video_config": {"vision_config": PERCEPTION}}},
        inputs={
            "input_ids": PROMPT,
            "pixel_values_videos": normal(1, 2, 3, 64, 64),
            "input_values": normal(1, 1, 7680),
        },
    ),
    "pe_audio_video_encoder": Particular(
        "its vision model is one of timm",
        config={"video_config": {"vision_config": PERCEPTION}},
        inputs={"pixel_values_videos": normal(1, 2, 3, 64, 64), "input_values": normal(1, 1, 7680)},
    ),
    "gemma3n": Particular(
        "its vision model is one of timm, and widths are listed by layer",
        config={
            "text_config": {"intermediate_size": [96] * 8},
            "vision_config": {"model_args": {"channel_multiplier": 0.25}},
        },
    ),
    "pi0": Particular(
        "it reads actions, and images at placeholders in text",
        inputs={
            "action_embeds": normal(1, 5, 64),
            "input_ids": text_with(312, 16),
            "pixel_values": normal(1, 1, 3, 64, 64),
            "attention_mask": ones(1, 24),
            "pixel_attention_mask": fixed([[True]]),
        },
    ),
    "deepseek_ocr2": Particular(
        "the types of its layers have no default", config={"text_config": {"mlp_layer_types": ["dense", "sparse"]}}
    ),
    "granite4_vision": Particular(
        "which layers of text read which of the image has no default",
        config={
            "deepstack_layer_map": [[0, 0], [1, 1]],
            "downsample_rate": "1/2",
            "spatial_target_layers": [0, 0, 1, 1],
        },
    ),
    "llama4": Particular(
        "in this release the whole reads an attribute that the outputs of its text model lack: its vision model",
        model="Llama4VisionModel",
        config={
            "intermediate_size": 256,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        },
    ),
}
