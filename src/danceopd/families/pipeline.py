"""What every family over a diffusers pipeline shares: loading a local folder, the sigma grid, the VAE, own networks.

Needs the extra ``danceopd[diffusers]``. Nothing here downloads: a pipeline comes as an object that the caller made, or
from a folder on disk in safetensors.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from danceopd.data.examples import Example
from danceopd.distill.schedule import Grid
from danceopd.families.family import Family
from danceopd.fields.teachers import CheckpointError, load_checkpoint
from danceopd.states import Samples

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA_WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""The names that diffusers and PEFT give a LoRA's file."""


class LoadedPipeline:
    """A diffusers pipeline, frozen, in evaluation mode, with what families do to it alike.

    base: a pipeline object, or the local folder of one. A pipeline object is frozen in place.
    classes: pipeline classes that the family knows, by name.
    dtype: of the weights read from a folder; a pipeline object keeps its own.

    Raises:
        CheckpointError: if the folder is not a whole pipeline of a known class, or the pipeline samples in a way that
            is not Euler's method in sigma.
    """

    def __init__(
        self, base: Any, *, classes: Mapping[str, type], family: str, dtype: torch.dtype = torch.float32
    ) -> None:
        self.folder: Path | None = None
        if isinstance(base, str | Path):
            self.folder = Path(base)
            base = _read_folder(self.folder, classes, family, dtype)
        if type(base).__name__ not in classes:
            raise CheckpointError(
                f"family {family!r} needs a pipeline of class {' or '.join(classes)}, found {type(base).__name__}"
            )
        self.pipeline = base
        for module in self.modules():
            module.requires_grad_(False).eval()
        _require_euler(base.scheduler, family)

    @property
    def network(self) -> Any:
        """The transformer."""
        return self.pipeline.transformer

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def modules(self) -> list[nn.Module]:
        """Every network of the pipeline."""
        return [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]

    def to(self, device: torch.device) -> None:
        for module in self.modules():
            module.to(device)

    @property
    def files(self) -> dict[str, Path]:
        """Every weight file of the folder but the one that ``weight_file`` names, by its place in the folder."""
        if self.folder is None:
            return {}
        base = weight_file(self.folder)
        parts = _read_index(self.folder)
        found = sorted(path for part in parts for path in (self.folder / part).glob("*.safetensors"))
        return {path.relative_to(self.folder).as_posix(): path for path in found if path != base}

    def own_network(self, path: Path | None = None) -> Any:
        """A new transformer that shares nothing with the pipeline's: the base's weights, or a full checkpoint's.

        Adapters that the pipeline's transformer carries are left out.
        """
        weights = {
            name.replace(".base_layer.", "."): tensor.detach().clone()
            for name, tensor in self.network.state_dict().items()
            if ".lora_" not in name
        }
        with init_empty_weights():
            network = type(self.network).from_config(self.network.config)
        network.load_state_dict(weights, assign=True)
        if path is not None:
            load_checkpoint(network, path)
        return network.requires_grad_(False).eval()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The shape [C, H / s, W / s] of an image's latents.

        Raises:
            ValueError: if the size is not a multiple of the VAE's scale times the transformer's 2 x 2 patches.
        """
        scale = self.pipeline.vae_scale_factor
        if height < 1 or width < 1 or height % (2 * scale) or width % (2 * scale):
            raise ValueError(f"image sides must be positive multiples of {2 * scale}, found {height} x {width}")
        return self.pipeline.vae.config.latent_channels, height // scale, width // scale

    @torch.no_grad()
    def encode_images(self, images: Sequence[Tensor]) -> Tensor:
        """Images [3, H, W] in [-1, 1], of one size, as normalised latents [B, C, H / s, W / s]: the VAE's mode.

        Raises:
            ValueError: if a shape differs from the first, or the size is not one that the pipeline can take.
        """
        for index, image in enumerate(images):
            if image.ndim != 3 or image.shape[0] != 3 or image.shape != images[0].shape:
                raise ValueError(
                    f"image {index} has shape {tuple(image.shape)}; needed is (3, H, W), the same for the whole batch "
                    f"(the first has {tuple(images[0].shape)})"
                )
        self.latent_shape(*images[0].shape[1:])
        vae = self.pipeline.vae
        with torch.autocast(self.device.type, enabled=False):
            latents = vae.encode(torch.stack(list(images)).to(self.device, vae.dtype)).latent_dist.mode()
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents [B, C, h, w] as images [B, 3, H, W] in [-1, 1]."""
        vae = self.pipeline.vae
        with torch.autocast(self.device.type, enabled=False):
            plain = latents / vae.config.scaling_factor + vae.config.shift_factor
            return vae.decode(plain.to(vae.dtype), return_dict=False)[0].float().clamp(-1, 1)

    def grid(self, steps: int, *, shift: float | None, shape: tuple[int, ...] | None, passes_sigmas: bool) -> Grid:
        """The grid that the pipeline's own scheduler makes, for 2 x 2 patches as tokens.

        passes_sigmas: whether the pipeline hands the scheduler linspace(1, 1/N, N), or leaves it to the scheduler,
            which then starts from an already shifted smallest sigma.
        shape: of one latent [C, H, W]; needed where the scheduler's shift depends on the number of tokens.

        Raises:
            ValueError: if ``steps`` or ``shift`` is not positive, or the shape is needed and missing.
        """
        if steps < 1 or (shift is not None and shift <= 0):
            raise ValueError(f"a grid needs steps >= 1 and shift > 0, found steps {steps} and shift {shift}")
        scheduler, config = copy.deepcopy(self.pipeline.scheduler), self.pipeline.scheduler.config
        options: dict[str, Any] = {}
        if config.use_dynamic_shifting:
            options["mu"] = _mu(config, shift, shape)
        elif shift is not None:
            scheduler = type(scheduler).from_config(config, shift=shift)
        if passes_sigmas:
            options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(steps, **options)
        return Grid(scheduler.sigmas.detach().float().cpu())


def _mu(config: Any, shift: float | None, shape: tuple[int, ...] | None) -> float:
    """The scheduler's ``mu``: of a given shift, or linear in the number of tokens as the config says."""
    if shift is not None:
        return shift if config.time_shift_type == "linear" else math.log(shift)
    if shape is None:
        raise ValueError(
            "this pipeline's sigma grid depends on the size of the latents: pass shape=(C, H, W), or a shift"
        )
    tokens = (shape[-2] // 2) * (shape[-1] // 2)
    share = (tokens - config.base_image_seq_len) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + share * (config.max_shift - config.base_shift)


def encode_examples(
    family: Family, loaded: LoadedPipeline, examples: Sequence[Example], size: tuple[int, int]
) -> Samples:
    """Training inputs of one shape signature: the size is the target's where there is one, else the source's, else
    ``size`` (height, width).

    Raises:
        ValueError: if examples with and without a source are mixed, or images of one kind differ in size.
    """
    sources = [example.source for example in examples if example.source is not None]
    if sources and len(sources) != len(examples):
        raise ValueError("examples with and without a source image cannot share a batch")
    targets = [example.target for example in examples if example.target is not None]
    whole = len(targets) == len(examples)
    pictures = targets if whole else sources
    height, width = (pictures[0].shape[1], pictures[0].shape[2]) if pictures else size
    return Samples(
        condition=family.encode([example.prompt for example in examples], sources or None),
        shape=loaded.latent_shape(height, width),
        target=loaded.encode_images(targets).float() if whole else None,
    )


def weight_file(reference: str | Path) -> Path:
    """The weights that a reference means: the file itself, or in a folder the transformer's weights (those of a
    pipeline, or its own), their shard index, or a LoRA.

    Raises:
        CheckpointError: if a folder holds none of these in safetensors, or several files and none of the known names.
    """
    path = Path(reference)
    if not path.is_dir():
        return path
    whole = (path / INDEX).is_file()
    folder = path / "transformer" if whole else path
    for name in (WEIGHTS, f"{WEIGHTS}.index.json", *(() if whole else LORA_WEIGHTS)):
        if (folder / name).is_file():
            return folder / name
    others = [] if whole else sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    if others:
        listed = ", ".join(other.name for other in others[:4])
        raise CheckpointError(f"{folder} holds {len(others)} safetensors files ({listed}); name the one that is meant")
    raise CheckpointError(f"no transformer weights in {folder}: needed is {WEIGHTS}, or {WEIGHTS}.index.json")


def _read_folder(folder: Path, classes: Mapping[str, type], family: str, dtype: torch.dtype) -> Any:
    """The pipeline in a local folder, without touching a network."""
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"family {family!r} needs the local folder of a diffusers pipeline, found no {INDEX} in {folder}; "
            "nothing is downloaded by itself (huggingface-cli download ORG/NAME --local-dir FOLDER)"
        )
    parts = _read_index(folder)
    found = str(parts.get("_class_name"))
    if found not in classes:
        raise CheckpointError(f"{folder} holds a {found}; family {family!r} needs {' or '.join(classes)}")
    needed = [name for name, part in parts.items() if isinstance(part, list) and part[0] is not None]
    missing = [name for name in needed if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(f"{folder} is not whole: its {INDEX} names {', '.join(missing)}, which is not there")
    weight_file(folder)
    cls: Any = classes[found]
    try:
        return cls.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded as a {found}: {error}") from error


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} is not a pipeline's index: {error}") from error


def _require_euler(scheduler: Any, family: str) -> None:
    config = scheduler.config
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or config.stochastic_sampling or config.invert_sigmas:
        raise CheckpointError(
            f"family {family!r} steps with Euler's method in sigma, as FlowMatchEulerDiscreteScheduler does without "
            f"stochastic_sampling and invert_sigmas; found {type(scheduler).__name__} with {dict(config)}"
        )
