"""Z-Image text to image, and Z-Image Omni (text to image and edits), over diffusers' pipelines of these names.

The transformer takes lists of latents and captions without padding. It counts time from noise to data, 1 - sigma, and
its output points that way too: the velocity eps - x is its output negated. Omni puts the parts of a caption, a source's
clean latents and a vision encoder's view of the source into one sequence, and tells clean from noisy tokens by a mask.

Guidance scales mean here what they mean in every family, v = v_empty + alpha (v_cond - v_empty), so that 1 is no
guidance. The ``guidance_scale`` of both pipelines is w in v_cond + w (v_cond - v_empty), that is alpha - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import ZImageOmniPipeline, ZImagePipeline  # pyright: ignore[reportPrivateImportUsage]
from PIL import Image
from torch import Tensor, nn

from danceopd.families.pipeline import PipelineFamily
from danceopd.states import Condition


@dataclass(frozen=True, kw_only=True)
class ZImageCondition(Condition):
    """A caption is of one part, or of three around a source: what stands before it, the instruction, and what ends it.

    prompt_embeds: the parts' tokens one part behind another [B, L, D], then zeros. L is the same for all captions of
        as many parts, whatever their lengths, so that any two of them can share a batch.
    lengths: int64 [B, P], the number of tokens of each of the P parts.
    vision: the source as the vision encoder sees it, [B, h, w, S]; None without a source.
    """

    lengths: Tensor
    vision: Tensor | None = None


def captions(condition: ZImageCondition, dtype: torch.dtype) -> list[list[Tensor]]:
    """Each sample's parts [length, D] without padding."""
    rows = zip(condition.prompt_embeds.to(dtype), condition.lengths.tolist(), strict=True)
    return [list(row[: sum(lengths)].split(lengths)) for row, lengths in rows]


def padded(parts: Sequence[Sequence[Tensor]], longest: int) -> tuple[Tensor, Tensor]:
    """Captions in parts as ``ZImageCondition`` holds them: tokens [B, L, D] and lengths [B, P].

    longest: the most tokens that the middle part can have. The others are the same for every prompt, so that
        L = longest + their lengths.
    """
    lengths = torch.tensor([[len(part) for part in caption] for caption in parts])
    middle = lengths.shape[1] // 2
    width = longest + int(lengths[0].sum() - lengths[0, middle])
    tokens = parts[0][0].new_zeros(len(parts), width, parts[0][0].shape[-1])
    for row, caption in zip(tokens, parts, strict=True):
        joined = torch.cat(list(caption))
        row[: len(joined)] = joined
    return tokens, lengths.to(tokens.device)


class ZImageModel(nn.Module):
    """The transformer behind the canonical call: v(z [B, C, H, W], sigma [B], condition), the shape and dtype of z."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, sigma: Tensor, condition: ZImageCondition) -> Tensor:
        if condition.source is not None or condition.lengths.shape[1] != 1:
            raise ValueError(
                "a Z-Image condition has a caption in one part and no source; make it by ZImageFamily.encode"
            )
        dtype = next(self.network.parameters()).dtype
        outputs = self.network(
            list(z.to(dtype).unsqueeze(2)),
            1 - sigma,
            [caption for (caption,) in captions(condition, dtype)],
            return_dict=False,
        )[0]
        return -torch.stack(outputs).squeeze(2).to(z.dtype)


class ZImageOmniModel(nn.Module):
    """As ``ZImageModel``, for the Omni transformer: with or without sources, but not both in one call."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, sigma: Tensor, condition: ZImageCondition) -> Tensor:
        edits = condition.source is not None
        if edits != (condition.vision is not None) or condition.lengths.shape[1] != (3 if edits else 1):
            raise ValueError(
                "a Z-Image Omni condition has either a caption in one part alone, or one in three parts, a source and "
                "its vision tokens; make it with ZImageFamily.encode"
            )
        dtype = next(self.network.parameters()).dtype
        images = [[target] for target in z.to(dtype).unsqueeze(2)]
        vision: list[list[Tensor | None] | None] = [None] * len(z)
        if condition.source is not None and condition.vision is not None:
            sources = condition.source.to(dtype).unsqueeze(2)
            images = [[source, *target] for source, target in zip(sources, images, strict=True)]
            vision = [[tokens, None] for tokens in condition.vision.to(dtype)]
        outputs = self.network(
            images,
            1 - sigma,
            captions(condition, dtype),
            siglip_feats=vision,
            image_noise_mask=[[0] * edits + [1]] * len(z),
            return_dict=False,
        )[0]
        return -torch.stack(outputs).squeeze(2).to(z.dtype)


class ZImageFamily(PipelineFamily[ZImageCondition]):
    """See ``PipelineFamily``; base: a ``ZImagePipeline`` or a ``ZImageOmniPipeline``, of which the latter edits.

    Guidance is v_empty + alpha (v_cond - v_empty): what the pipeline does under a ``guidance_scale`` of alpha - 1. A
    prompt is cut to ``max_sequence_length`` tokens with its chat template.

    Source images are taken in the size they come in, a multiple of the VAE's scale times 2. Omni's pipeline shrinks
    larger ones to 1024 x 1024 pixels; that is left to whoever prepares the images. It also needs its VAE in bfloat16
    for edits; here any will do.
    """

    name: ClassVar[str] = "z_image"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
    """The paper's for Z-Image (arXiv 2606.27377)."""
    pipelines: ClassVar[tuple[type, ...]] = (ZImagePipeline, ZImageOmniPipeline)
    editors: ClassVar[tuple[type, ...]] = (ZImageOmniPipeline,)
    condition_type: ClassVar[type[Condition]] = ZImageCondition
    text_parts: ClassVar[tuple[str, ...]] = ("prompt_embeds", "lengths")

    def behind_the_call(self, network: Any) -> ZImageModel | ZImageOmniModel:
        return ZImageOmniModel(network) if self.can_edit else ZImageModel(network)

    def call_options(self, guidance_scale: float) -> dict[str, Any]:
        return {"guidance_scale": guidance_scale - 1.0}

    def own_size(self) -> tuple[int, int]:
        return 1024, 1024

    def encode_prompts(self, prompts: Sequence[str], *, edits: bool) -> ZImageCondition:
        """A caption is in three parts around a source, and in one without."""
        options = {"num_condition_images": int(edits)} if self.can_edit else {}
        found, _ = self.pipeline.encode_prompt(
            prompt=list(prompts),
            device=self.loaded.encoder_device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            **options,
        )
        parts = found if self.can_edit else [[caption] for caption in found]
        tokens, lengths = padded(parts, self.max_sequence_length)
        return ZImageCondition(prompt_embeds=tokens, lengths=lengths)

    def add_sources(self, condition: ZImageCondition, sources: Sequence[Tensor]) -> ZImageCondition:
        return replace(super().add_sources(condition, sources), vision=self._see(sources))

    def decode(self, latents: Tensor) -> Tensor:
        return self.loaded.decode(latents.to(self.pipeline.vae.dtype))

    def _see(self, sources: Sequence[Tensor]) -> Tensor:
        """Source images [3, H, W] in [-1, 1], of one size, through the vision encoder: [B, h, w, S]."""
        pictures = [
            Image.fromarray((source.cpu() * 127.5 + 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
            for source in sources
        ]
        (seen,) = self.pipeline.prepare_siglip_embeds(
            pictures, batch_size=1, device=self.loaded.encoder_device, dtype=torch.float32
        )
        return torch.stack(seen)
