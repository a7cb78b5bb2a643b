"""FLUX.1 text to image, and FLUX.1 Kontext (text to image and edits), over diffusers' pipelines of these names.

The transformer sees latents as tokens of 2 x 2 patches, each with its place in the picture. A source image's tokens
stand behind the target's, told apart by a 1 in the first coordinate of their places; of the output only the target's
tokens are the velocity eps - x. The grid's shift grows with the number of target tokens.

Embedded guidance is a number that a guidance-distilled transformer is told, at the price of one pass. It is no
classifier-free guidance, which needs a second pass, and which a guided field puts on top of it as everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxKontextPipeline, FluxPipeline  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from danceopd.data.examples import Example, ExampleSource
from danceopd.distill.schedule import Grid
from danceopd.families.lora_files import read_lora
from danceopd.families.pipeline import LoadedPipeline, encode_examples, weight_file
from danceopd.fields.adapters import Lora
from danceopd.fields.guidance import linear_guidance
from danceopd.states import Condition, Samples, select

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


class FluxFamily:
    """See ``Family``. It edits if, and only if, its pipeline is Kontext's.

    base: a ``FluxPipeline`` or ``FluxKontextPipeline``, which is frozen in place, or the local folder of one.
    embedded_guidance: told to a guidance-distilled transformer; by default what the pipelines tell it.
    size: height and width of the images of examples that bring none of their own; the pipeline's own by default.
    max_sequence_length: T5 tokens that a prompt is padded or cut to, as in the pipeline's call.

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

    def __init__(
        self,
        base: FluxPipeline | FluxKontextPipeline | str | Path,
        *,
        embedded_guidance: float | None = None,
        size: tuple[int, int] | None = None,
        max_sequence_length: int = 512,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        classes = {"FluxPipeline": FluxPipeline, "FluxKontextPipeline": FluxKontextPipeline}
        self.loaded = LoadedPipeline(base, classes=classes, family=self.name, dtype=dtype)
        if self.loaded.network.config.guidance_embeds:
            self.embedded_guidance = EMBEDDED_GUIDANCE if embedded_guidance is None else embedded_guidance
            if not 0.0 <= self.embedded_guidance < float("inf"):
                raise ValueError(f"embedded_guidance must be a finite number >= 0, found {embedded_guidance}")
        else:
            if embedded_guidance is not None:
                raise ValueError(
                    f"this transformer takes no embedded guidance, found embedded_guidance {embedded_guidance}"
                )
            self.embedded_guidance = None
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        self.size = (side, side) if size is None else size
        self.max_sequence_length = max_sequence_length
        self._model = FluxModel(self.loaded.network)
        self._negatives: dict[str, FluxCondition] = {}

    @property
    def can_edit(self) -> bool:
        return isinstance(self.pipeline, FluxKontextPipeline)

    @property
    def pipeline(self) -> Any:
        return self.loaded.pipeline

    @property
    def model(self) -> FluxModel:
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

    def load_model(self, path: Path | None = None) -> FluxModel:
        return FluxModel(self.loaded.own_network(path))

    def load_lora(self, path: Path) -> Lora:
        return read_lora(path, self.pipeline)

    def encode(self, prompts: Sequence[str], sources: Sequence[Tensor] | None) -> FluxCondition:
        """Prompts and source images as the pipeline's own encoders see them.

        Raises:
            ValueError: if there are sources and the pipeline is not Kontext's, or they differ in number from the
                prompts or in size from each other.
        """
        if sources is not None and not self.can_edit:
            raise ValueError(
                f"family {self.name!r} with a FluxPipeline makes images from text alone and cannot edit, found "
                f"{len(sources)} source images; edits need a Kontext base (FluxKontextPipeline)"
            )
        if sources is not None and len(sources) != len(prompts):
            raise ValueError(f"one source image per prompt is needed, found {len(sources)} for {len(prompts)} prompts")
        with torch.no_grad(), torch.autocast(self.loaded.device.type, enabled=False):
            embeds, pooled, _ = self.pipeline.encode_prompt(
                prompt=list(prompts),
                prompt_2=None,
                device=self.loaded.device,
                max_sequence_length=self.max_sequence_length,
            )
        guidance = None
        if self.embedded_guidance is not None:
            guidance = torch.full((len(prompts),), self.embedded_guidance, device=self.loaded.device)
        return FluxCondition(
            prompt_embeds=embeds,
            pooled_embeds=pooled,
            source=None if sources is None else self.loaded.encode_images(sources),
            guidance=guidance,
        )

    def empty(self, condition: Condition, negative_prompt: str = "") -> FluxCondition:
        if not isinstance(condition, FluxCondition):
            raise TypeError(f"FLUX needs a FluxCondition, made by encode; found a {type(condition).__name__}")
        if negative_prompt not in self._negatives:
            self._negatives[negative_prompt] = self.encode([negative_prompt], None)
        rows = torch.zeros(len(condition.prompt_embeds), dtype=torch.int64)
        blank: FluxCondition = select(self._negatives[negative_prompt], rows)
        return replace(blank, source=condition.source, guidance=condition.guidance)

    def guide(self, conditional: Tensor, empty: Tensor, guidance_scale: float) -> Tensor:
        return linear_guidance(conditional, empty, guidance_scale)

    def samples(self, examples: Sequence[Example]) -> Samples:
        return encode_examples(self, self.loaded, examples, self.size)

    def grid(self, steps: int, shift: float | None = None, shape: tuple[int, ...] | None = None) -> Grid:
        return self.loaded.grid(steps, shift=shift, shape=shape, passes_sigmas=True)

    def decode(self, latents: Tensor) -> Tensor:
        return self.loaded.decode(latents)

    def to(self, device: torch.device) -> None:
        self.loaded.to(device)
        self._negatives.clear()
