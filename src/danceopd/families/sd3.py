"""Stable Diffusion 3 and 3.5, text to image, over a diffusers ``StableDiffusion3Pipeline``.

The transformer takes unpacked latents and 1000 sigma, and its output is the velocity eps - x itself. The pipeline
leaves the sigmas to its scheduler, whose smallest sigma is already shifted when the grid is shifted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffusers import StableDiffusion3Pipeline  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from danceopd.families.pipeline import PipelineFamily
from danceopd.states import Condition


class SD3Model(nn.Module):
    """The transformer behind the canonical call: v(z [B, C, H, W], sigma [B], condition), the shape and dtype of z."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        if condition.pooled_embeds is None or condition.source is not None:
            raise ValueError("an SD3 condition has pooled_embeds and no source; make it with SD3Family.encode")
        dtype = next(self.network.parameters()).dtype
        velocity = self.network(
            hidden_states=z.to(dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=condition.prompt_embeds.to(dtype),
            pooled_projections=condition.pooled_embeds.to(dtype),
            return_dict=False,
        )[0]
        return velocity.to(z.dtype)


class SD3Family(PipelineFamily[Condition]):
    """See ``PipelineFamily``; base: a ``StableDiffusion3Pipeline``. Text to image only."""

    name: ClassVar[str] = "sd3"
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
    """The paper's for SD3.5 (arXiv 2606.27377)."""
    pipelines: ClassVar[tuple[type, ...]] = (StableDiffusion3Pipeline,)
    passes_sigmas: ClassVar[bool] = False

    def __init__(
        self, base: StableDiffusion3Pipeline | str | Path, *, max_sequence_length: int = 256, **options: Any
    ) -> None:
        super().__init__(base, max_sequence_length=max_sequence_length, **options)

    def behind_the_call(self, network: Any) -> SD3Model:
        return SD3Model(network)

    def encode_prompts(self, prompts: Sequence[str], *, edits: bool) -> Condition:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=self.loaded.encoder_device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Condition(prompt_embeds=embeds, pooled_embeds=pooled)
