"""Stable Diffusion 3 and 3.5, text to image, over a diffusers ``StableDiffusion3Pipeline``.

The transformer takes unpacked latents and 1000 sigma, and its output is the velocity eps - x itself. The pipeline
leaves the sigmas to its scheduler, whose smallest sigma is already shifted when the grid is shifted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from danceopd.data.examples import Example, ExampleSource
from danceopd.distill.schedule import Grid
from danceopd.families.lora_files import read_lora
from danceopd.families.pipeline import LoadedPipeline, encode_examples, weight_file
from danceopd.fields.adapters import Lora
from danceopd.fields.guidance import linear_guidance
from danceopd.states import Condition, Samples, select


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


class SD3Family:
    """See ``Family``. Text to image only.

    base: a ``StableDiffusion3Pipeline``, which is frozen in place, or the local folder of one.
    size: height and width of the images of examples that bring none of their own; the pipeline's own by default.
    max_sequence_length: T5 tokens that a prompt is padded or cut to, as in the pipeline's call.
    """

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

    def __init__(
        self,
        base: StableDiffusion3Pipeline | str | Path,
        *,
        size: tuple[int, int] | None = None,
        max_sequence_length: int = 256,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        classes = {"StableDiffusion3Pipeline": StableDiffusion3Pipeline}
        self.loaded = LoadedPipeline(base, classes=classes, family=self.name, dtype=dtype)
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        self.size = (side, side) if size is None else size
        self.max_sequence_length = max_sequence_length
        self._model = SD3Model(self.loaded.network)
        self._negatives: dict[str, Condition] = {}

    @property
    def can_edit(self) -> bool:
        return False

    @property
    def pipeline(self) -> Any:
        return self.loaded.pipeline

    @property
    def model(self) -> SD3Model:
        return self._model

    @property
    def network(self) -> Any:
        return self._model.network

    @property
    def files(self) -> dict[str, Path]:
        return self.loaded.files

    def resolve(self, reference: str) -> Path:
        return weight_file(reference)

    def generator(self, name: str, *, size: int, seed: int) -> ExampleSource:
        raise ValueError(f"family {self.name!r} has no generated data, found {name!r}; give the route a manifest")

    def load_model(self, path: Path | None = None) -> SD3Model:
        return SD3Model(self.loaded.own_network(path))

    def load_lora(self, path: Path) -> Lora:
        return read_lora(path, self.pipeline)

    def encode(self, prompts: Sequence[str], sources: Sequence[Tensor] | None) -> Condition:
        """Prompts as the pipeline's own encoders see them.

        Raises:
            ValueError: if there are sources: this family cannot edit.
        """
        if sources is not None:
            raise ValueError(
                f"family {self.name!r} (Stable Diffusion 3) makes images from text alone and cannot edit, found "
                f"{len(sources)} source images; put edits on a family that can, such as 'flux' with a Kontext base"
            )
        with torch.no_grad(), torch.autocast(self.loaded.device.type, enabled=False):
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=list(prompts),
                prompt_2=None,
                prompt_3=None,
                device=self.loaded.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        return Condition(prompt_embeds=embeds, pooled_embeds=pooled)

    def empty(self, condition: Condition, negative_prompt: str = "") -> Condition:
        if negative_prompt not in self._negatives:
            self._negatives[negative_prompt] = self.encode([negative_prompt], None)
        return select(self._negatives[negative_prompt], torch.zeros(len(condition.prompt_embeds), dtype=torch.int64))

    def guide(self, conditional: Tensor, empty: Tensor, guidance_scale: float) -> Tensor:
        return linear_guidance(conditional, empty, guidance_scale)

    def samples(self, examples: Sequence[Example]) -> Samples:
        return encode_examples(self, self.loaded, examples, self.size)

    def grid(self, steps: int, shift: float | None = None, shape: tuple[int, ...] | None = None) -> Grid:
        return self.loaded.grid(steps, shift=shift, shape=shape, passes_sigmas=False)

    def decode(self, latents: Tensor) -> Tensor:
        return self.loaded.decode(latents)

    def to(self, device: torch.device) -> None:
        self.loaded.to(device)
        self._negatives.clear()
