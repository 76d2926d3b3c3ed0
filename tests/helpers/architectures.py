"""The architectures of torchvision, timm and transformers that the fold is run on: random weights, no download.

An entry is a builder that returns ``(model, args)``; it imports its library when it is called. Vision models take the smallest input their
architecture takes, so that a float64 run is affordable; the widths are the published ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from thresher.models.pretrained import allow_torchvision

Builder = Callable[[], tuple[nn.Module, tuple]]

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# ---------------------------------------------------------------------- torchvision

FIXED = {
    "inception_v3": 299,
    "maxvit_t": 224,
    "vit_b_16": 224,
    "vit_b_32": 224,
    "vit_l_16": 224,
    "vit_l_32": 224,
    "vit_h_14": 224,
}


def torchvision_names() -> list[str]:
    """All 80 classification architectures."""
    allow_torchvision()
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def torchvision_model(name: str) -> tuple[nn.Module, tuple]:
    allow_torchvision()
    import torchvision

    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit_h"):
        extra["image_size"] = 224
    model = torchvision.models.get_model(name, weights=None, **extra)
    size = FIXED.get(name, 64)
    return model.eval(), (torch.randn(1, 3, size, size),)


# ---------------------------------------------------------------------- timm

TIMM = """vit_tiny_patch16_224 deit_tiny_patch16_224 swin_tiny_patch4_window7_224 poolformer_s12 mobilenetv3_small_100 repvgg_a0
    mobileone_s0 convnext_atto levit_128s pvt_v2_b0 efficientvit_m0 cait_xxs24_224 xcit_nano_12_p16_224 mixer_s32_224 resmlp_12_224
    ghostnet_100 hrnet_w18_small dla34 res2net50_26w_4s skresnet18 ecaresnet26t resnest14d botnet26t_256 coatnet_pico_rw_224
    edgenext_xx_small fastvit_t8 tiny_vit_5m_224 twins_pcpvt_small gmlp_s16_224 visformer_tiny mambaout_femto regnetz_b16 rexnet_100
    tinynet_e lcnet_050 crossvit_tiny_240""".split()


def timm_model(name: str) -> tuple[nn.Module, tuple]:
    allow_torchvision()
    import timm

    model = timm.create_model(name, pretrained=False)
    size = model.default_cfg["input_size"][-1]
    return model.eval(), (torch.randn(1, 3, size, size),)


# ---------------------------------------------------------------------- transformers

TEXT = """Bert DistilBert Roberta Albert Electra MPNet GPT2 GPTNeoX OPT Llama Mistral Qwen2 Gemma Phi Bloom Falcon Cohere
    XLMRoberta Camembert ConvBert DebertaV2 MobileBert Starcoder2 StableLm Olmo""".split()
IMAGES = "ViT DeiT Swin ConvNext Dinov2 Segformer PoolFormer ResNet MobileNetV2 Beit CLIPVision SiglipVision".split()
SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "vocab_size": 200, "max_position_embeddings": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "dim": 64, "n_layers": 2, "n_heads": 4,
    "hidden_dim": 96, "ffn_dim": 96, "embedding_size": 64, "word_embed_proj_dim": 64, "pad_token_id": 0, "image_size": 64,
    "head_dim": 16, "num_labels": 5,
}  # fmt: skip


def transformers_model(name: str) -> tuple[nn.Module, tuple]:
    allow_torchvision()
    import transformers

    config_class = getattr(transformers, f"{name}Config")
    default = config_class()
    image = name in IMAGES
    keep_shape = ("Swin", "ConvNext", "Segformer", "PoolFormer", "ResNet", "MobileNetV2")
    fixed = {k for k in SMALL if isinstance(getattr(config_class, k, None), property)}  # computed from others
    chosen = {k: v for k, v in SMALL.items() if hasattr(default, k) and k not in fixed}
    chosen = {k: v for k, v in chosen.items() if not (name in keep_shape and k != "image_size")}
    model = getattr(transformers, f"{name}Model")(config_class(**chosen)).eval()
    model.config.return_dict = True
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    if image:
        size = default.image_size if name == "Swin" else 64
        return model, (torch.randn(1, 3, size, size),)
    return model, (torch.randint(1, 200, (1, 12), generator=torch.Generator().manual_seed(0)),)


def names() -> list[tuple[str, str]]:
    """(library, name) of every architecture."""
    return (
        [("torchvision", n) for n in torchvision_names()]
        + [("timm", n) for n in TIMM]
        + [("transformers", n) for n in [*TEXT, *IMAGES]]
    )


def build(library: str, name: str) -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    makers = {"torchvision": torchvision_model, "timm": timm_model, "transformers": transformers_model}
    return makers[library](name)


# ---------------------------------------------------------------------- preparing


def settle(model: nn.Module, args: tuple = (), seed: int = 0) -> nn.Module:
    """Weights with which the output depends on the input and rounding does not grow: batch norms that normalise what they see (on a batch
    of random variants of ``args``), random affine parameters, layer scales that are not almost 0."""
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1, generator=generator)
        for module in norms:
            if module.affine:
                module.weight.copy_(0.5 + torch.rand(module.num_features, generator=generator))
                module.bias.copy_(0.1 * torch.randn(module.num_features, generator=generator))
        for name, parameter in model.named_parameters():
            if "layer_scale" in name or name.endswith("gamma"):
                parameter.fill_(0.5)
        if norms and args:
            model.eval()
            for module in norms:
                module.train()
                module.momentum = None  # the statistics of this one batch
                module.reset_running_stats()
            model(*(torch.randn(4, *a.shape[1:], generator=generator) if a.is_floating_point() else a for a in args))
    return model.eval()
