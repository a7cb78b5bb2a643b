"""Tiny, randomly initialised diffusers pipelines, made in memory: no download, under a second each.

Everything is real but the size and the weights: the classes, the attention layers' names, tokenizers (a token a
character), text encoders, a VAE of 4 channels that shrinks each side by 2, the scheduler.
"""

# diffusers exports its names lazily, and declares tuples of any length as tuples of one.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImageOmniPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CLIP_TOKENS = 48
"""The most tokens that the CLIP tokenizers give."""
CHARACTERS = string.ascii_letters + string.digits + string.punctuation


def clip_tokenizer() -> CLIPTokenizer:
    """Characters as tokens, at the end of a word and elsewhere."""
    words = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(f"{character}</w>" for character in CHARACTERS)]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=CLIP_TOKENS
    )


def t5_tokenizer() -> T5Tokenizer:
    """Characters as tokens; a space is \u2581."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=[*pieces, *((character, -3.0) for character in CHARACTERS)], extra_ids=0)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Characters as tokens; a space and a line's end are \u0120 and \u010a."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate([*special, "\u0120", "\u010a", *CHARACTERS])},
        merges=[],
        extra_special_tokens=special[1:],
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    return tokenizer


def clip_config(tokenizer: CLIPTokenizer, width: int, projection: int) -> CLIPTextConfig:
    """Of a text encoder of two layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_encoder(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    """A text encoder of two layers."""
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2)
    return T5EncoderModel(config)


def vae() -> AutoencoderKL:
    """Shrinks each side by 2; 4 latent channels."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def quiet(pipeline: Any) -> Any:
    """The pipeline in evaluation mode, without a progress bar."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sd3_pipeline(seed: int = 0, shift: float = 3.0) -> StableDiffusion3Pipeline:
    """SD3.5's architecture: query-key norms and a block with dual attention."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip, t5 = clip_tokenizer(), t5_tokenizer()
        parts = {
            "text_encoder": CLIPTextModelWithProjection(clip_config(clip, 16, 16)),
            "text_encoder_2": CLIPTextModelWithProjection(clip_config(clip, 16, 16)),
            "text_encoder_3": t5_encoder(t5, 32),
            "vae": vae(),
            "transformer": SD3Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=32,
                caption_projection_dim=16,
                pooled_projection_dim=32,
                pos_embed_max_size=16,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
            ),
        }
    return quiet(
        StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            tokenizer=clip,
            tokenizer_2=clip,
            tokenizer_3=t5,
            **parts,
        )
    )


def flux_pipeline(cls: type = FluxPipeline, seed: int = 0, distilled: bool = True) -> Any:
    """FLUX.1 dev (or Kontext, by class); not distilled, it is built as schnell: no embedded guidance, a static grid."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip, t5 = clip_tokenizer(), t5_tokenizer()
        parts = {
            "text_encoder": CLIPTextModel(clip_config(clip, 16, 16)),
            "text_encoder_2": t5_encoder(t5, 32),
            "vae": vae(),
            "transformer": FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=16,
                guidance_embeds=distilled,
                axes_dims_rope=(4, 4, 8),
            ),
        }
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if distilled else 1.0, use_dynamic_shifting=distilled, base_image_seq_len=8, max_image_seq_len=64
    )
    return quiet(cls(scheduler=scheduler, tokenizer=clip, tokenizer_2=t5, **parts))


def kontext_pipeline(seed: int = 0) -> FluxKontextPipeline:
    """FLUX.1 Kontext."""
    return flux_pipeline(FluxKontextPipeline, seed)


def z_image_pipeline(cls: type = ZImagePipeline, seed: int = 0) -> Any:
    """Z-Image, or Z-Image Omni by class."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        omni = cls is ZImageOmniPipeline
        parts: dict[str, Any] = {
            "text_encoder": Qwen3Model(
                Qwen3Config(
                    vocab_size=len(tokenizer),
                    hidden_size=16,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    head_dim=8,
                )
            ),
            "vae": vae(),
            "transformer": ZImageTransformer2DModel(
                in_channels=4,
                dim=32,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=16,
                siglip_feat_dim=16 if omni else None,
                axes_dims=[8, 4, 4],
                axes_lens=[1536, 64, 64],
            ),
        }
        for name, token in parts["transformer"].named_parameters():
            if name.endswith("pad_token"):
                torch.nn.init.normal_(token, std=0.1)
        if omni:
            config = Siglip2VisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_patches=16,
                patch_size=4,
            )
            parts["siglip"] = Siglip2VisionModel(config)
            parts["siglip_processor"] = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16)
    return quiet(cls(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=tokenizer, **parts))


def omni_pipeline(seed: int = 0) -> ZImageOmniPipeline:
    """Z-Image Omni."""
    return z_image_pipeline(ZImageOmniPipeline, seed)


PIPELINES: dict[str, Callable[[int], Any]] = {
    "StableDiffusion3Pipeline": sd3_pipeline,
    "FluxPipeline": lambda seed: flux_pipeline(seed=seed),
    "FluxKontextPipeline": kontext_pipeline,
    "ZImagePipeline": lambda seed: z_image_pipeline(seed=seed),
    "ZImageOmniPipeline": omni_pipeline,
}
"""A tiny pipeline of each class, by its name; the seed is of its weights."""
