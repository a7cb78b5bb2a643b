"""The Shapes world as a model family: pixels are its latents, so encoding and decoding are the identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from danceopd.data.examples import Example, ExampleSource
from danceopd.distill.schedule import Grid, shifted_grid
from danceopd.families.latents import LatentSpace
from danceopd.fields.guidance import linear_guidance
from danceopd.fields.lora import Lora
from danceopd.fields.weights import WeightsError, file_hash, load_checkpoint, load_lora, read_metadata
from danceopd.states import Condition, Samples, select
from danceopd.world.generator import GeneratedExamples
from danceopd.world.network import LORA_TARGETS, ShapesTransformer
from danceopd.world.render import IMAGE_SIZE
from danceopd.world.text import TextEncoder, tokenize

WEIGHTS = Path(__file__).parent.parent / "world" / "weights"
TEXT_FILE = "text.safetensors"
SOURCES = ("base", "edit", "local", "global", "realism")


class ShapesModel(nn.Module):
    """The network behind the canonical call."""

    def __init__(self, network: ShapesTransformer) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return self.network(z, sigma, condition.prompt_embeds, condition.pooled_embeds, condition.source)


class ShapesFamily:
    """See ``Family``. ``base`` is a reference to the base weights.

    The text encoder is the ``text.safetensors`` beside the base weights, as ``world build`` writes it, or the shipped
    one where there is none. Weights that record another text encoder are refused.
    """

    name: ClassVar[str] = "shapes"
    lora_targets: ClassVar[tuple[str, ...]] = LORA_TARGETS
    takes_any_prompt: ClassVar[bool] = False
    default_shift: ClassVar[float] = 1.0
    size = (IMAGE_SIZE, IMAGE_SIZE)

    def __init__(self, base: str = "shapes:base") -> None:
        self._base_path = self.resolve(base)
        beside = self._base_path.with_name(TEXT_FILE)
        self._text_path = beside if beside.is_file() else WEIGHTS / TEXT_FILE
        self.device = torch.device("cpu")
        self.encoder = TextEncoder()
        load_checkpoint(self.encoder, self._text_path)
        self.encoder.requires_grad_(False).eval()
        self._model = self.load_model()

    @property
    def can_edit(self) -> bool:
        return True

    @property
    def model(self) -> ShapesModel:
        return self._model

    @property
    def network(self) -> ShapesTransformer:
        return self._model.network

    def load_model(self, path: Path | None = None) -> ShapesModel:
        network = ShapesTransformer()
        self._require_text_encoder(path or self._base_path)
        load_checkpoint(network, path or self._base_path)
        return ShapesModel(network).to(self.device).eval()

    def load_lora(self, path: Path) -> Lora:
        self._require_text_encoder(path)
        return load_lora(path)

    def _require_text_encoder(self, path: Path) -> None:
        if path.name.endswith(".index.json"):  # shards record nothing
            return
        recorded, loaded = read_metadata(path).get("text"), file_hash(self._text_path)
        if recorded not in (None, loaded):
            raise WeightsError(
                f"{path} was trained with the text encoder of SHA-256 {recorded}, found {loaded} in {self._text_path}; "
                f"use it over a base that stands beside its own {TEXT_FILE}"
            )

    @property
    def files(self) -> dict[str, Path]:
        return {"text encoder": self._text_path}

    @property
    def latent_space(self) -> LatentSpace:
        return LatentSpace(channels=3, downscale=1, autoencoder="pixels in [-1, 1]")

    def resolve(self, reference: str) -> Path:
        if reference.startswith("shapes:"):
            name = reference.removeprefix("shapes:")
            if name not in SOURCES:
                raise WeightsError(f"unknown shipped source {reference!r}; known: {', '.join(SOURCES)}")
            return WEIGHTS / f"{name}.safetensors"
        return Path(reference)

    def generator(self, name: str, *, size: int, seed: int) -> ExampleSource:
        return GeneratedExamples(name, size=size, seed=seed)

    def encode(self, prompts: Sequence[str], sources: Sequence[Tensor] | None) -> Condition:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            tokens, pooled = self.encoder(tokenize(list(prompts)).to(self.device))
        source = None
        if sources is not None:
            for index, image in enumerate(sources):
                if image.shape != (3, IMAGE_SIZE, IMAGE_SIZE):
                    raise ValueError(f"source image {index} has shape {tuple(image.shape)}, needed (3, 32, 32)")
            source = torch.stack(list(sources)).to(self.device)
        return Condition(prompt_embeds=tokens, pooled_embeds=pooled, source=source)

    def empty(self, condition: Condition, negative_prompt: str = "") -> Condition:
        blank = select(
            self.encode([negative_prompt], None), torch.zeros(len(condition.prompt_embeds), dtype=torch.int64)
        )
        return replace(blank, source=condition.source)

    def guide(self, conditional: Tensor, empty: Tensor, guidance_scale: float) -> Tensor:
        return linear_guidance(conditional, empty, guidance_scale)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        if (height, width) != self.size:
            raise ValueError(f"family 'shapes' has images of {IMAGE_SIZE} x {IMAGE_SIZE}, found {height} x {width}")
        return 3, height, width

    def samples(self, examples: Sequence[Example], size: tuple[int, int] | None = None) -> Samples:
        sources = [example.source for example in examples if example.source is not None]
        if sources and len(sources) != len(examples):
            raise ValueError("examples with and without a source image cannot share a batch")
        targets = [example.target for example in examples if example.target is not None]
        return Samples(
            condition=self.encode([example.prompt for example in examples], sources or None),
            shape=self.latent_shape(*(examples[0].wanted_size or size or self.size)),
            target=torch.stack(targets).to(self.device) if len(targets) == len(examples) else None,
        )

    def buckets(self, size: tuple[int, int]) -> None:
        return None

    def use_cache(self, folder: Path) -> bool:
        return False

    def release_encoders(self) -> None:
        pass

    def grid(self, steps: int, shift: float | None = None, shape: tuple[int, ...] | None = None) -> Grid:
        return shifted_grid(steps=steps, shift=self.default_shift if shift is None else shift)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)

    def checkpoint_gradients(self, network: nn.Module) -> None:
        raise ValueError("family 'shapes' is too small to gain by gradient checkpointing and has none")

    def compile(self, network: nn.Module) -> None:
        raise ValueError("family 'shapes' is too small to gain by compiling and is not compiled")

    def to(self, device: torch.device, *, network: bool = True) -> None:
        self.device = device
        self.encoder.to(device)
        if network:
            self._model.to(device)
