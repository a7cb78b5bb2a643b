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
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ZImageOmniPipeline, ZImagePipeline  # pyright: ignore[reportPrivateImportUsage]
from PIL import Image
from torch import Tensor, nn

from danceopd.data.examples import Example, ExampleSource
from danceopd.distill.schedule import Grid
from danceopd.families.lora_files import read_lora
from danceopd.families.pipeline import LoadedPipeline, encode_examples, weight_file
from danceopd.fields.adapters import Lora
from danceopd.fields.guidance import linear_guidance
from danceopd.states import Condition, Samples, select


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


class ZImageFamily:
    """See ``Family``. It edits if, and only if, its pipeline is Omni's.

    base: a ``ZImagePipeline`` or ``ZImageOmniPipeline``, which is frozen in place, or the local folder of one.
    size: height and width of the images of examples that bring none of their own.
    max_sequence_length: tokens that a prompt, with its chat template, is cut to, as in the pipeline's call.

    Source images are taken in the size they come in, a multiple of the VAE's scale times 2. Omni's pipeline shrinks
    larger ones to 1024 x 1024 pixels; that is left to whoever prepares the images. It also needs its VAE in bfloat16
    for edits; here any will do.
    """

    name: ClassVar[str] = "z_image"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
    """The paper's for Z-Image (arXiv 2606.27377)."""

    def __init__(
        self,
        base: ZImagePipeline | ZImageOmniPipeline | str | Path,
        *,
        size: tuple[int, int] = (1024, 1024),
        max_sequence_length: int = 512,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        classes = {"ZImagePipeline": ZImagePipeline, "ZImageOmniPipeline": ZImageOmniPipeline}
        self.loaded = LoadedPipeline(base, classes=classes, family=self.name, dtype=dtype)
        self.size = size
        self.max_sequence_length = max_sequence_length
        self._model = self._behind_the_call(self.loaded.network)
        self._negatives: dict[tuple[str, int], ZImageCondition] = {}

    @property
    def can_edit(self) -> bool:
        return isinstance(self.pipeline, ZImageOmniPipeline)

    @property
    def pipeline(self) -> Any:
        return self.loaded.pipeline

    @property
    def model(self) -> ZImageModel | ZImageOmniModel:
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

    def load_model(self, path: Path | None = None) -> ZImageModel | ZImageOmniModel:
        return self._behind_the_call(self.loaded.own_network(path))

    def load_lora(self, path: Path) -> Lora:
        return read_lora(path, self.pipeline)

    def encode(self, prompts: Sequence[str], sources: Sequence[Tensor] | None) -> ZImageCondition:
        """Prompts and source images as the pipeline's own encoders see them.

        Raises:
            ValueError: if there are sources and the pipeline is not Omni's, or they differ in number from the prompts
                or in size from each other.
        """
        if sources is not None and not self.can_edit:
            raise ValueError(
                f"family {self.name!r} with a ZImagePipeline makes images from text alone and cannot edit, found "
                f"{len(sources)} source images; edits need an Omni base (ZImageOmniPipeline)"
            )
        if sources is not None and len(sources) != len(prompts):
            raise ValueError(f"one source image per prompt is needed, found {len(sources)} for {len(prompts)} prompts")
        tokens, lengths = self._encode_prompts(prompts, images=0 if sources is None else 1)
        condition = ZImageCondition(prompt_embeds=tokens, lengths=lengths)
        if sources is None:
            return condition
        latents = self.loaded.encode_images(sources).float()
        return replace(condition, source=latents, vision=self._see(sources))

    def empty(self, condition: Condition, negative_prompt: str = "") -> ZImageCondition:
        if not isinstance(condition, ZImageCondition):
            raise TypeError(f"Z-Image needs a ZImageCondition, made by encode; found a {type(condition).__name__}")
        key = negative_prompt, 0 if condition.source is None else 1
        if key not in self._negatives:
            tokens, lengths = self._encode_prompts([negative_prompt], images=key[1])
            self._negatives[key] = ZImageCondition(prompt_embeds=tokens, lengths=lengths)
        blank = select(self._negatives[key], torch.zeros(len(condition.prompt_embeds), dtype=torch.int64))
        return replace(blank, source=condition.source, vision=condition.vision)

    def guide(self, conditional: Tensor, empty: Tensor, guidance_scale: float) -> Tensor:
        """v_empty + alpha (v_cond - v_empty): what the pipeline does under a ``guidance_scale`` of alpha - 1."""
        return linear_guidance(conditional, empty, guidance_scale)

    def samples(self, examples: Sequence[Example]) -> Samples:
        return encode_examples(self, self.loaded, examples, self.size)

    def grid(self, steps: int, shift: float | None = None, shape: tuple[int, ...] | None = None) -> Grid:
        return self.loaded.grid(steps, shift=shift, shape=shape, passes_sigmas=True)

    def decode(self, latents: Tensor) -> Tensor:
        return self.loaded.decode(latents.to(self.pipeline.vae.dtype))

    def to(self, device: torch.device) -> None:
        self.loaded.to(device)
        self._negatives.clear()

    def _behind_the_call(self, network: Any) -> ZImageModel | ZImageOmniModel:
        return ZImageOmniModel(network) if self.can_edit else ZImageModel(network)

    @torch.no_grad()
    def _encode_prompts(self, prompts: Sequence[str], images: int) -> tuple[Tensor, Tensor]:
        """The tokens and lengths of ``ZImageCondition``, of captions around so many source images (0 or 1)."""
        options = {"num_condition_images": images} if self.can_edit else {}
        with torch.autocast(self.loaded.device.type, enabled=False):
            found, _ = self.pipeline.encode_prompt(
                prompt=list(prompts),
                device=self.loaded.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
                **options,
            )
        return padded(found if self.can_edit else [[caption] for caption in found], self.max_sequence_length)

    @torch.no_grad()
    def _see(self, sources: Sequence[Tensor]) -> Tensor:
        """Source images [3, H, W] in [-1, 1], of one size, through the vision encoder: [B, h, w, S]."""
        pictures = [
            Image.fromarray((source.cpu() * 127.5 + 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
            for source in sources
        ]
        with torch.autocast(self.loaded.device.type, enabled=False):
            (seen,) = self.pipeline.prepare_siglip_embeds(
                pictures, batch_size=1, device=self.loaded.device, dtype=torch.float32
            )
        return torch.stack(seen)
