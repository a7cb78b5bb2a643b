"""The published models whose memory is counted: their configurations, and the longest prompts they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, ZImageTransformer2DModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    T5Config,
    T5EncoderModel,
)

from danceopd.families.flux import FluxCondition, FluxFamily, FluxModel
from danceopd.families.sd3 import SD3Family, SD3Model
from danceopd.families.z_image import ZImageCondition, ZImageFamily, ZImageModel, ZImageOmniModel
from danceopd.states import Condition

LATENT = (16, 128, 128)
"""Of a 1024 x 1024 picture."""

SD35_MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE = {
    "sample_size": 128,
    "num_layers": 38,
    "num_attention_heads": 38,
    "attention_head_dim": 64,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
FLUX_DEV = {"guidance_embeds": True}
Z_IMAGE = {"axes_lens": [1536, 512, 512]}
OMNI = Z_IMAGE | {"siglip_feat_dim": 1152}

CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
)
CLIP_G = CLIPTextConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
)
T5_XXL = T5Config(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)
QWEN3_4B = Qwen3Config(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
SIGLIP2 = Siglip2VisionConfig(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, num_patches=256
)
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SD3_ENCODERS = {
    "CLIP-L": (CLIPTextModelWithProjection, CLIP_L),
    "CLIP-G": (CLIPTextModelWithProjection, CLIP_G),
    "T5-XXL": (T5EncoderModel, T5_XXL),
}
FLUX_ENCODERS = {"CLIP-L": (CLIPTextModel, CLIP_L), "T5-XXL": (T5EncoderModel, T5_XXL)}
Z_IMAGE_ENCODERS = {"Qwen3-4B": (Qwen3Model, QWEN3_4B)}
OMNI_ENCODERS = Z_IMAGE_ENCODERS | {"SigLIP2": (Siglip2VisionModel, SIGLIP2)}


def sd3_condition(batch: int, edit: bool) -> Condition:
    """The longest prompts: CLIP's 77 tokens and T5's 256."""
    return Condition(prompt_embeds=torch.empty(batch, 77 + 256, 4096), pooled_embeds=torch.empty(batch, 2048))


def flux_condition(batch: int, edit: bool) -> FluxCondition:
    """512 T5 tokens; a source of the target's size for an edit."""
    return FluxCondition(
        prompt_embeds=torch.empty(batch, 512, 4096),
        pooled_embeds=torch.empty(batch, 768),
        guidance=torch.empty(batch),
        source=torch.empty(batch, *LATENT) if edit else None,
    )


def z_image_condition(batch: int, edit: bool) -> ZImageCondition:
    """512 Qwen tokens; for an edit a source of the target's size and its 256 vision tokens."""
    return ZImageCondition(
        prompt_embeds=torch.empty(batch, 512, 2560),
        lengths=torch.tensor([[32, 448, 32] if edit else [512]] * batch),
        source=torch.empty(batch, *LATENT) if edit else None,
        vision=torch.empty(batch, 16, 16, 1152) if edit else None,
    )


@dataclass(frozen=True)
class Published:
    """A published model. tasks: whether each is an edit. model: the canonical call around the transformer."""

    name: str
    guide: str
    transformer: type
    config: dict[str, Any]
    model: Callable[[Any], nn.Module]
    targets: tuple[str, ...]
    condition: Callable[[int, bool], Condition]
    encoders: dict[str, tuple[Any, Any]]
    tasks: dict[str, bool] = field(default_factory=lambda: {"text to image": False})


EDITING = {"text to image": False, "edit": True}
MODELS = [
    Published(
        "SD3.5-Medium",
        "sd3.md",
        SD3Transformer2DModel,
        SD35_MEDIUM,
        SD3Model,
        SD3Family.lora_targets,
        sd3_condition,
        SD3_ENCODERS,
    ),
    Published(
        "SD3.5-Large",
        "sd3.md",
        SD3Transformer2DModel,
        SD35_LARGE,
        SD3Model,
        SD3Family.lora_targets,
        sd3_condition,
        SD3_ENCODERS,
    ),
    Published(
        "FLUX.1-dev, Kontext-dev",
        "flux.md",
        FluxTransformer2DModel,
        FLUX_DEV,
        FluxModel,
        FluxFamily.lora_targets,
        flux_condition,
        FLUX_ENCODERS,
        EDITING,
    ),
    Published(
        "Z-Image",
        "z_image.md",
        ZImageTransformer2DModel,
        Z_IMAGE,
        ZImageModel,
        ZImageFamily.lora_targets,
        z_image_condition,
        Z_IMAGE_ENCODERS,
    ),
    Published(
        "Z-Image Omni",
        "z_image.md",
        ZImageTransformer2DModel,
        OMNI,
        ZImageOmniModel,
        ZImageFamily.lora_targets,
        z_image_condition,
        OMNI_ENCODERS,
        EDITING,
    ),
]
