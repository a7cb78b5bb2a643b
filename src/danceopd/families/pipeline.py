"""What every family over a diffusers pipeline shares. Each family's own file has its network's call and its prompts."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from danceopd.data.buckets import Buckets
from danceopd.data.examples import Example, ExampleSource
from danceopd.distill.schedule import Grid
from danceopd.families.cache import EncodingCache
from danceopd.families.compiled import compile_blocks
from danceopd.families.latents import LatentSpace
from danceopd.families.loaded_pipeline import LoadedPipeline
from danceopd.families.lora_files import read_lora
from danceopd.families.pipeline_folder import weight_file
from danceopd.families.pipeline_grid import scheduler_grid
from danceopd.fields.guidance import linear_guidance
from danceopd.fields.lora import Lora
from danceopd.states import Condition, Samples, select, to_device

ConditionType = TypeVar("ConditionType", bound=Condition)


class PipelineFamily(ABC, Generic[ConditionType]):
    """See ``Family``.

    base: a pipeline object of one of ``pipelines``, which is frozen in place, or the local folder of one.
    size: height and width of the images of examples that bring none of their own; the pipeline's own by default.
    max_sequence_length: tokens that a prompt is padded or cut to, as in the pipeline's call.
    dtype: of the weights read from a folder; a pipeline object keeps its own.

    Raises:
        WeightsError: if the base is no such pipeline; see ``LoadedPipeline``.
        ValueError: if the size is not one that the pipeline can take.
    """

    name: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]
    takes_any_prompt: ClassVar[bool] = True
    pipelines: ClassVar[tuple[type, ...]]
    """Classes of pipelines that the family is for."""
    editors: ClassVar[tuple[type, ...]] = ()
    """Those of them that take source images."""
    condition_type: ClassVar[type[Condition]] = Condition
    text_parts: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_embeds")
    """The parts of a condition that come of the prompt alone."""
    passes_sigmas: ClassVar[bool] = True
    """Whether the pipelines hand their scheduler the sigmas; see ``scheduler_grid``."""

    def __init__(
        self,
        base: Any,
        *,
        size: tuple[int, int] | None = None,
        max_sequence_length: int = 512,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        classes = {cls.__name__: cls for cls in self.pipelines}
        self.loaded = LoadedPipeline(base, classes=classes, family=self.name, dtype=dtype)
        self.size = self.own_size() if size is None else size
        self.latent_shape(*self.size)
        self.max_sequence_length = max_sequence_length
        self._model = self.behind_the_call(self.loaded.network)
        self._cache: EncodingCache | None = None
        self._negatives: dict[tuple[str, bool], ConditionType] = {}

    @abstractmethod
    def behind_the_call(self, network: Any) -> nn.Module:
        """A transformer behind the canonical call, ``model(z, sigma, condition) -> v``."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], *, edits: bool) -> ConditionType:
        """Prompts as the pipeline's own encoders see them. edits: whether source images will be put with them."""

    def add_sources(self, condition: ConditionType, sources: Sequence[Tensor]) -> ConditionType:
        """The condition with source images [3, H, W] in [-1, 1], of one size."""
        return replace(condition, source=self.loaded.encode_images(sources))

    def own_size(self) -> tuple[int, int]:
        """Height and width of the images that the pipeline makes by itself."""
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    @property
    def device(self) -> torch.device:
        return self.loaded.device

    @property
    def can_edit(self) -> bool:
        return isinstance(self.pipeline, self.editors)

    @property
    def pipeline(self) -> Any:
        return self.loaded.pipeline

    @property
    def model(self) -> nn.Module:
        return self._model

    @property
    def network(self) -> Any:
        return self.loaded.network

    @property
    def files(self) -> dict[str, Path]:
        return self.loaded.files

    @property
    def latent_space(self) -> LatentSpace:
        return self.loaded.latent_space

    def resolve(self, reference: str) -> Path:
        return weight_file(reference)

    def generator(self, name: str, *, size: int, seed: int) -> ExampleSource:
        raise ValueError(f"family {self.name!r} has no generated data, found {name!r}; give the route a manifest")

    def load_model(self, path: Path | None = None) -> nn.Module:
        return self.behind_the_call(self.loaded.own_network(path))

    def load_lora(self, path: Path) -> Lora:
        return read_lora(path, self.pipeline)

    def encode(self, prompts: Sequence[str], sources: Sequence[Tensor] | None) -> ConditionType:
        """Prompts and source images as the pipeline's own encoders see them.

        Raises:
            ValueError: if there are sources and the pipeline cannot edit, or they differ in number from the prompts or
                in size from each other.
        """
        if sources is not None:
            self.require_sources(prompts, sources)
        if self._cache is not None:
            return self._cache.encode(prompts, sources)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            condition = self.encode_prompts(prompts, edits=sources is not None)
            whole = condition if sources is None else self.add_sources(condition, sources)
            return to_device(whole, self.device)

    def require_sources(self, prompts: Sequence[str], sources: Sequence[Tensor]) -> None:
        """Raise ValueError unless the pipeline edits, and there is a source for each prompt."""
        if not self.can_edit:
            wanted = " or ".join(cls.__name__ for cls in self.editors)
            way_out = f"edits need a base of class {wanted}" if wanted else "put edits on a family that can"
            raise ValueError(
                f"family {self.name!r} with a {type(self.pipeline).__name__} makes images from text alone and cannot "
                f"edit, found {len(sources)} source images; {way_out}"
            )
        if len(sources) != len(prompts):
            raise ValueError(f"one source image per prompt is needed, found {len(sources)} for {len(prompts)} prompts")

    def empty(self, condition: Condition, negative_prompt: str = "") -> Condition:
        if self._cache is not None:
            return self._cache.empty(condition, negative_prompt)
        key = negative_prompt, condition.source is not None
        if key not in self._negatives:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self._negatives[key] = to_device(self.encode_prompts([negative_prompt], edits=key[1]), self.device)
        blank = select(self._negatives[key], torch.zeros(len(condition.prompt_embeds), dtype=torch.int64))
        return replace(condition, **{part: getattr(blank, part) for part in self.text_parts})

    def guide(self, conditional: Tensor, empty: Tensor, guidance_scale: float) -> Tensor:
        return linear_guidance(conditional, empty, guidance_scale)

    def call_options(self, guidance_scale: float) -> dict[str, Any]:
        """What the pipeline's own call is told, so that it draws under ``guidance_scale``."""
        return {"guidance_scale": guidance_scale}

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return self.loaded.latent_shape(height, width)

    def samples(self, examples: Sequence[Example], size: tuple[int, int] | None = None) -> Samples:
        """Training inputs of one shape signature: of the size that the first wants, or else ``size``, or the family's.

        Raises:
            ValueError: if examples with and without a source are mixed, or images of one kind differ in size.
        """
        sources = [example.source for example in examples if example.source is not None]
        if sources and len(sources) != len(examples):
            raise ValueError("examples with and without a source image cannot share a batch")
        targets = [example.target for example in examples if example.target is not None]
        encode_targets = self.encode_images if self._cache is None else self._cache.encode_targets
        return Samples(
            condition=self.encode([example.prompt for example in examples], sources or None),
            shape=self.latent_shape(*(examples[0].wanted_size or size or self.size)),
            target=encode_targets(targets) if len(targets) == len(examples) else None,
        )

    def encode_images(self, images: Sequence[Tensor]) -> Tensor:
        """Images [3, H, W] in [-1, 1], of one size, as clean latents: float32 [B, C, h, w]."""
        return self.loaded.encode_images(images)

    def buckets(self, size: tuple[int, int]) -> Buckets:
        return Buckets(size, self.loaded.size_step)

    def use_cache(self, folder: Path) -> bool:
        if self.loaded.folder is None:
            return False
        self._cache = EncodingCache(self, folder)
        return True

    def encoder_digest(self) -> str:
        settings = json.dumps([self.name, self.loaded.encoder_digest(), self.encoder_settings()])
        return hashlib.sha256(settings.encode()).hexdigest()

    def encoder_settings(self) -> dict[str, Any]:
        """What a prompt's encoding depends on besides the encoders."""
        return {"max_sequence_length": self.max_sequence_length}

    def release_encoders(self) -> None:
        if self._cache is not None:
            self.loaded.encoders_to(torch.device("cpu"))

    def grid(self, steps: int, shift: float | None = None, shape: tuple[int, ...] | None = None) -> Grid:
        return scheduler_grid(
            self.pipeline.scheduler, steps, shift=shift, shape=shape, passes_sigmas=self.passes_sigmas
        )

    def decode(self, latents: Tensor) -> Tensor:
        return self.loaded.decode(latents)

    def checkpoint_gradients(self, network: Any) -> None:
        network.enable_gradient_checkpointing()

    def compile(self, network: Any) -> None:
        compile_blocks(network)

    def to(self, device: torch.device, *, network: bool = True) -> None:
        self.loaded.to(device, network=network)
        self._negatives.clear()
