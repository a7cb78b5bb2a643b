"""FLUX.1 text to image, and FLUX.1 Kontext (text to image and edits), over diffusers' pipelines of these names.

The transformer sees latents as tokens of 2 x 2 patches, each with its place in the picture. A source image's tokens
stand behind the target's, told apart by a 1 in the first coordinate of their places; of the output only the target's
tokens are the velocity eps - x. The grid's shift grows with the number of target tokens.

Embedded guidance is a number that a guidance-distilled transformer is told, at the price of one pass. It is no
classifier-free guidance, which needs a second pass, and which a guided field puts on top of it as everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxKontextPipeline, FluxPipeline  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from danceopd.families.pipeline import PipelineFamily
from danceopd.states import Condition

EMBEDDED_GUIDANCE = 3.5
"""What both pipelines tell the transformer when their caller says nothing."""


@dataclass(frozen=True, kw_only=True)
class FluxCondition(Condition):
    """guidance: float32 [B], the embedded guidance; None for a transformer that takes none (FLUX.1 schnell)."""

    guidance: Tensor | None = None


def pack(latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] as tokens [B, H/2 * W/2, 4 C], row by row; channels before the patch's own rows and columns.

    Raises:
        ValueError: if H or W is odd.
    """
    b, c, h, w = latents.shape
    if h % 2 or w % 2:
        raise ValueError(f"latents with even sides are needed, found {h} x {w}")
    patches = latents.view(b, c, h // 2, 2, w // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: Tensor, shape: torch.Size) -> Tensor:
    """Tokens of ``pack`` as latents of ``shape`` [B, C, H, W]."""
    b, c, h, w = shape
    patches = tokens.view(b, h // 2, w // 2, c, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(shape)


def places(latents: Tensor, *, image: int) -> Tensor:
    """Each token's (image, row, column): float32 [H/2 * W/2, 3]; image 0 is the target, 1 the source."""
    rows, columns = (torch.arange(side // 2, device=latents.device, dtype=torch.float32) for side in latents.shape[-2:])
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.full_like(row, image), row, column], dim=-1).flatten(0, 1)


class FluxModel(nn.Module):
    """The transformer behind the canonical call: v(z [B, C, H, W], sigma [B], condition), the shape and dtype of z."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, sigma: Tensor, condition: FluxCondition) -> Tensor:
        if condition.pooled_embeds is None or (condition.guidance is None) == self.network.config.guidance_embeds:
            needed = "and guidance" if self.network.config.guidance_embeds else "and no guidance"
            raise ValueError(f"this FLUX condition needs pooled_embeds {needed}; make it with FluxFamily.encode")
        dtype = next(self.network.parameters()).dtype
        tokens, ids = pack(z), places(z, image=0)
        length = tokens.shape[1]
        if condition.source is not None:
            tokens = torch.cat([tokens, pack(condition.source).to(tokens.dtype)], dim=1)
            ids = torch.cat([ids, places(condition.source, image=1)])
        velocity = self.network(
            hidden_states=tokens.to(dtype),
            timestep=sigma,
            guidance=condition.guidance,
            pooled_projections=condition.pooled_embeds.to(dtype),
            encoder_hidden_states=condition.prompt_embeds.to(dtype),
            txt_ids=ids.new_zeros(condition.prompt_embeds.shape[1], 3),
            img_ids=ids,
            return_dict=False,
        )[0]
        return unpack(velocity[:, :length], z.shape).to(z.dtype)


class FluxFamily(PipelineFamily[FluxCondition]):
    """See ``PipelineFamily``; base: a ``FluxPipeline`` or a ``FluxKontextPipeline``, of which the latter edits.

    embedded_guidance: told to a guidance-distilled transformer; by default what the pipelines tell it.

    Source images are taken in the size they come in, a multiple of the VAE's scale times 2; the pipeline's resizing to
    the sizes that Kontext was trained on is left to whoever prepares the images (``_auto_resize=False`` there).

    Raises:
        ValueError: if embedded guidance is given for a transformer that takes none, or is not a number >= 0.
    """

    name: ClassVar[str] = "flux"
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    )
    """The attention layers, as the paper names them for SD3.5; it names none for FLUX."""
    pipelines: ClassVar[tuple[type, ...]] = (FluxPipeline, FluxKontextPipeline)
    editors: ClassVar[tuple[type, ...]] = (FluxKontextPipeline,)
    condition_type: ClassVar[type[Condition]] = FluxCondition

    def __init__(
        self,
        base: FluxPipeline | FluxKontextPipeline | str | Path,
        *,
        embedded_guidance: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(base, **options)
        if self.network.config.guidance_embeds:
            self.embedded_guidance = EMBEDDED_GUIDANCE if embedded_guidance is None else embedded_guidance
            if not 0.0 <= self.embedded_guidance < float("inf"):
                raise ValueError(f"embedded_guidance must be a finite number >= 0, found {embedded_guidance}")
        else:
            if embedded_guidance is not None:
                raise ValueError(
                    f"this transformer takes no embedded guidance, found embedded_guidance {embedded_guidance}"
                )
            self.embedded_guidance = None

    def behind_the_call(self, network: Any) -> FluxModel:
        return FluxModel(network)

    def encode_prompts(self, prompts: Sequence[str], *, edits: bool) -> FluxCondition:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            device=self.loaded.encoder_device,
            max_sequence_length=self.max_sequence_length,
        )
        guidance = None
        if self.embedded_guidance is not None:
            guidance = torch.full((len(prompts),), self.embedded_guidance, device=embeds.device)
        return FluxCondition(prompt_embeds=embeds, pooled_embeds=pooled, guidance=guidance)

    def call_options(self, guidance_scale: float) -> dict[str, Any]:
        embedded = {} if self.embedded_guidance is None else {"guidance_scale": self.embedded_guidance}
        return (
            embedded if guidance_scale == 1.0 else {**embedded, "true_cfg_scale": guidance_scale, "negative_prompt": ""}
        )

    def encoder_settings(self) -> dict[str, Any]:
        return super().encoder_settings() | {"embedded_guidance": self.embedded_guidance}
