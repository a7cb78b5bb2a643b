"""A diffusers pipeline as all families use it: frozen, with its VAE, and networks of its kind that share nothing.

Needs the extra ``danceopd[diffusers]``. Nothing here downloads: a pipeline comes as an object that the caller made, or
from a folder on disk in safetensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from danceopd.families.latents import LatentSpace, latent_space_of
from danceopd.families.pipeline_folder import other_files, part_files, read_folder
from danceopd.families.pipeline_grid import require_euler
from danceopd.fields.weights import WeightsError, file_hash, load_checkpoint


class LoadedPipeline:
    """A diffusers pipeline, frozen, in evaluation mode, with what families do to it alike.

    base: a pipeline object, or the local folder of one. A pipeline object is frozen in place.
    classes: pipeline classes that the family knows, by name.
    dtype: of the weights read from a folder; a pipeline object keeps its own.

    Raises:
        WeightsError: if the folder is not a whole pipeline of a known class, or the pipeline samples in a way that
            is not Euler's method in sigma.
    """

    def __init__(
        self, base: Any, *, classes: Mapping[str, type], family: str, dtype: torch.dtype = torch.float32
    ) -> None:
        self.folder: Path | None = None
        if isinstance(base, str | Path):
            self.folder = Path(base)
            base = read_folder(self.folder, classes, family, dtype)
        if type(base).__name__ not in classes:
            raise WeightsError(
                f"family {family!r} needs a pipeline of class {' or '.join(classes)}, found {type(base).__name__}"
            )
        self.pipeline = base
        for module in self.modules():
            module.requires_grad_(False).eval()
        require_euler(base.scheduler, family)
        self.device: torch.device = next(self.network.parameters()).device
        """Where conditions and latents go, wherever the network and the encoders are."""

    @property
    def network(self) -> Any:
        """The transformer."""
        return self.pipeline.transformer

    def modules(self) -> list[nn.Module]:
        """Every network of the pipeline."""
        return [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]

    @property
    def encoder_device(self) -> torch.device:
        """Where text encoders and VAE are."""
        return next(self.pipeline.vae.parameters()).device

    def to(self, device: torch.device, *, network: bool = True) -> None:
        self.encoders_to(device)
        if network:
            self.network.to(device)
        self.device = device

    def encoders_to(self, device: torch.device) -> None:
        """Move everything but the transformer; conditions and latents stay where they are needed."""
        for module in self.modules():
            if module is not self.network:
                module.to(device)

    def encoder_digest(self) -> str:
        """SHA-256 of the pipeline's class and of its parts but the transformer and the scheduler: every file that makes
        them up, the type of their weights, and the versions of the libraries, which have the prompts' templates.

        Raises:
            ValueError: if the pipeline is not from a folder.
        """
        if self.folder is None:
            raise ValueError("a pipeline object has no files to know its encoders by; load it from a folder")
        versions = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}"
        digest = hashlib.sha256(f"{type(self.pipeline).__name__} {versions}".encode())
        for name, part in sorted(self.pipeline.components.items()):
            if part is None or name in ("transformer", "scheduler"):
                continue
            digest.update(f"{name} {getattr(part, 'dtype', None)}".encode())
            folder = self.folder / name
            for path in part_files(folder):
                digest.update(f"{path.relative_to(folder).as_posix()} {file_hash(path)}".encode())
        return digest.hexdigest()

    @property
    def latent_space(self) -> LatentSpace:
        return latent_space_of(self.pipeline.vae, self.pipeline.vae_scale_factor)

    @property
    def files(self) -> dict[str, Path]:
        """Every weight file and configuration of the folder but the transformer's first, by its place there."""
        return {} if self.folder is None else other_files(self.folder)

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

    @property
    def size_step(self) -> int:
        """What image sides must be multiples of: the VAE's scale times the transformer's patches of 2 x 2."""
        return 2 * self.pipeline.vae_scale_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The shape [C, H / s, W / s] of an image's latents.

        Raises:
            ValueError: if the size is not a multiple of ``size_step``.
        """
        scale, step = self.pipeline.vae_scale_factor, self.size_step
        if height < 1 or width < 1 or height % step or width % step:
            raise ValueError(f"image sides must be positive multiples of {step}, found {height} x {width}")
        return self.pipeline.vae.config.latent_channels, height // scale, width // scale

    @torch.no_grad()
    def encode_images(self, images: Sequence[Tensor]) -> Tensor:
        """Images [3, H, W] in [-1, 1], of one size, as the VAE's mode, normalised: float32 [B, C, H / s, W / s].

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

        def encoded(image: Tensor) -> Tensor:
            # One by one and channels-last, as pipelines do: convolutions round by the batch and the memory's layout.
            pixels = torch.stack([image]).contiguous(memory_format=torch.channels_last)
            return vae.encode(pixels.to(self.encoder_device, vae.dtype)).latent_dist.mode()

        with torch.autocast(self.device.type, enabled=False):
            latents = torch.cat([encoded(image) for image in images])
        return ((latents - vae.config.shift_factor) * vae.config.scaling_factor).float().to(self.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents [B, C, h, w] as images [B, 3, H, W] in [-1, 1]."""
        vae = self.pipeline.vae
        with torch.autocast(self.device.type, enabled=False):
            plain = latents.to(self.encoder_device) / vae.config.scaling_factor + vae.config.shift_factor
            return vae.decode(plain.to(vae.dtype), return_dict=False)[0].float().clamp(-1, 1).to(latents.device)
