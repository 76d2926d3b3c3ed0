"""Models of images and of videos."""

from __future__ import annotations

from thresher.models.families.particular.entry import Particular
from thresher.models.families.tensors import Maker, fixed, normal, ones

PAIR = {"pixel_values": normal(1, 2, 3, 64, 64)}
GRID = fixed([[1, 4, 4]])
SPATIAL = {"pixel_values": normal(1, 16, 768), "pixel_attention_mask": ones(1, 16), "spatial_shapes": fixed([[4, 4]])}
PACKED = {"pixel_values": normal(1, 3, 16, 256), "target_sizes": fixed([[4, 4]])}
REPVIT = {"backbone_config": {"architecture": "repvit_m1"}}


def positions(height: int, width: int) -> list[list[list[int]]]:
    """Return the column and the row of every patch of one image."""
    return [[[x, y] for y in range(height) for x in range(width)]]


def kernels() -> dict[str, list[object]]:
    """Return size, stride and padding of each convolution of a block: high ones, wide ones and square ones of three sizes."""
    blocks: dict[str, list[object]] = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    for ratio, size in (("longratio", 7), ("midratio", 5), ("shortratio", 3)):
        half = size // 2
        blocks[f"vertical_long_to_small_conv_{ratio}"] = [[size, 1], 1, [half, 0]]
        blocks[f"horizontal_small_to_long_conv_{ratio}"] = [[1, size], 1, [0, half]]
        blocks[f"symmetric_conv_long_{ratio}"] = [size, 1, half]
    return blocks


def frame(x: float, y: float) -> dict[str, Maker]:
    """Return makers of one frame of a video and of a point on an object that is seen there (a model without objects has no masks)."""
    return {
        "pixel_values": normal(1, 3, 64, 64),
        "input_points": fixed([[[[x, y]]]]),
        "input_labels": fixed([[[1]]]),
    }


SESSION = "its forward takes a session that its processor makes: one frame without memory of others"
HIERA = {"hidden_size": 32, "embed_dim_per_stage": [32, 64, 128, 256]}
FEATURES = [[16, 16], [8, 8], [4, 4]]

PATCHES = {"image_size": 64, "patch_size": 16}
SAM = {"vision_config": {"image_size": 256}, "prompt_encoder_config": {"image_size": 256, "image_embedding_size": 16}}
DEPTH = {
    "patch_size": 64,
    "intermediate_hook_ids": [1, 0],
    "intermediate_feature_dims": [64, 64],
    "scaled_images_feature_dims": [64, 64, 64],
    "image_model_config": PATCHES,
    "patch_model_config": PATCHES,
    "fov_model_config": PATCHES,
}
#: Every level has half of the size of the one before.
LEVELS = {
    "out_indices": [1, 2, 3, 4],
    "block_configs": [
        [[3, 96, 96, 1, True]],
        [[3, 96, 96, 2, False], [3, 96, 96, 1, False]],
        [[3, 96, 192, 2, False], [3, 192, 192, 1, True]],
        [[3, 192, 384, 2, False], [3, 384, 384, 1, True]],
    ],
}
KERNELS = {"kernel_list": [3, 2, 2], "scale_factor_list": [1, 2, 4, 8], "intraclass_block_config": kernels()}

OF_HIERA = {
    "vision_config": {
        "backbone_config": HIERA,
        "backbone_channel_list": [256, 128, 64, 32],
        "backbone_feature_sizes": FEATURES,
    }
}

IMAGES: dict[str, Particular] = {
    "inkling2_vision": Particular(
        "channels come last, and a patch is one of the language model's",
        inputs={"pixel_values": normal(4, 40, 40, 3), "image_grid_thw": fixed([[1, 2, 2]])},
    ),
    "kimi_k25_vision": Particular(
        "it reads patches with channels", inputs={"pixel_values": normal(16, 3, 14, 14), "grid_thw": GRID}
    ),
    "siglip2_vision_model": Particular("its images are patches and the sizes of their grids", inputs=SPATIAL),
    "superglue": Particular(
        "it compares two images",
        config={"keypoint_detector_config": {"descriptor_decoder_dim": 64}, "keypoint_encoder_sizes": [32, 64]},
        inputs=PAIR,
    ),
    "lightglue": Particular(
        "it compares two images",
        config={"keypoint_detector_config": {"descriptor_decoder_dim": 64}, "descriptor_dim": 64},
        inputs=PAIR,
    ),
    "efficientloftr": Particular(
        "it compares two images; eight heads share one rotation of the whole width; fields that follow from others are in its dictionary",
        config={
            "out_features": [16, 16, 32, 64],
            "stage_num_blocks": [1, 1, 1, 1],
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "stage_in_channels": [1, 16, 16, 32],
            "stage_block_stride": [[2], [1], [2], [2]],
            "stage_block_out_channels": [[16], [16], [32], [64]],
            "stage_block_in_channels": [[1], [16], [16], [32]],
            "fine_fusion_dims": [64, 32, 16],
        },
        inputs=PAIR,
    ),
    "video_llama_3_vision": Particular(
        "its images are patches and the sizes of their grids",
        inputs={"pixel_values": normal(16, 768), "grid_thw": GRID, "merge_sizes": fixed([2])},
    ),
    "gemma4_vision": Particular(
        "its images are patches and their positions",
        inputs={"pixel_values": normal(1, 36, 768), "pixel_position_ids": fixed(positions(6, 6))},
    ),
    "minicpm_ocr_vision": Particular("its patches lie side by side", config={"insert_layer_id": 0}, inputs=PACKED),
    "minicpmv4_7_vision": Particular("its patches lie side by side", config={"insert_layer_id": 0}, inputs=PACKED),
    "lw_detr": Particular(
        "its scales have no default, and fields that follow from them are in its dictionary",
        config={
            "projector_scale_factors": [1.0],
            "projector_in_channels": [64],
            "projector_out_channels": 64,
            "num_feature_levels": 1,
            "backbone_config": {"num_windows": 4, "num_windows_side": 2},
        },
    ),
    "mgp-str": Particular("its images are wider than high", inputs={"pixel_values": normal(1, 3, 32, 64)}),
    "sam": Particular("two of its parts must have the same size of image", config=SAM),
    "sam_hq": Particular("two of its parts must have the same size of image", config=SAM),
    "seggpt": Particular(
        "its image lies under an example with its mask",
        config={"image_size": [128, 64], "merge_index": 0, "intermediate_hidden_state_indices": [0, 1, 2, 3]},
        inputs={
            "pixel_values": normal(1, 3, 64, 64),
            "prompt_pixel_values": normal(1, 3, 64, 64),
            "prompt_masks": normal(1, 3, 64, 64),
        },
    ),
    "edgetam_vision_model": Particular(
        "its default has the backbone's name in a field that nothing reads", config=REPVIT
    ),
    "edgetam": Particular(
        "its default has the backbone's name in a field that nothing reads",
        config={"vision_config": {**REPVIT, "backbone_feature_sizes": FEATURES}},
        inputs=frame(20.0, 30.0),
    ),
    "cvt": Particular(
        "a stage has as many layers as its number, at least",
        config={"embed_dim": [32, 48, 64], "num_heads": [1, 3, 4], "depth": [1, 2, 3]},
    ),
    "timm_backbone": Particular("the backbone has no default", config={"backbone": "resnet18"}),
    "sam2_video": Particular(
        SESSION,
        method="_single_frame_forward",
        config=OF_HIERA,
        inputs=frame(60.0, 60.0),
    ),
    "sam3_tracker_video": Particular(
        SESSION,
        method="_single_frame_forward",
        config={
            "vision_config": {"backbone_feature_sizes": FEATURES, "backbone_config": {"patch_size": 16}},
            "prompt_encoder_config": {"patch_size": 16},
        },
        inputs=frame(20.0, 30.0),
    ),
    "edgetam_video": Particular(
        SESSION,
        method="_single_frame_forward",
        config=OF_HIERA,
        inputs=frame(20.0, 30.0),
    ),
    "glm_image_vqmodel": Particular(
        "it has no forward: it writes tokens of an image",
        config={"latent_channels": 64, "num_embeddings": 512},
        method="encode",
        inputs={"hidden_states": normal(1, 64, 4, 4)},
    ),
    "depth_pro": Particular(
        "its image is read at three scales, in patches that are images of another model",
        config=DEPTH,
        inputs={"pixel_values": normal(1, 3, 256, 256)},
    ),
    "pp_doclayout_v2": Particular(
        "thresholds of its classes have no default, and widths of its parts are listed by level",
        config={"decoder_in_channels": [64, 64, 64], "class_thresholds": [0.5, 0.5], "class_order": [0, 1]},
        inputs={"pixel_values": normal(1, 3, 64, 64)},
    ),
    "pp_ocrv5_server_det": Particular("kernels have no default", config=KERNELS),
    "pp_ocrv6_medium_det": Particular(
        "kernels have no default, and the default backbone is that of lines of text",
        config={**KERNELS, "backbone_config": LEVELS},
    ),
    "pp_ocrv6_small_det": Particular(
        "its neck reads four levels, and the default backbone is that of lines of text",
        config={"layer_list_out_channels": [96, 96, 192, 384], "backbone_config": LEVELS},
    ),
    "uvdoc": Particular("its head reads six levels", config={"backbone_config": {"out_indices": [1, 2, 3, 4, 5, 6]}}),
}
