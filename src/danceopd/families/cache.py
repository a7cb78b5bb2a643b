"""Encodings on disk: every prompt and every image is encoded once, for all runs that share the folder.

An entry is a safetensors file whose name is the SHA-256 of everything that its content depends on: the format below,
the encoders (weights, configurations, tokenizers, settings), and the prompt, or the image's pixels as they are encoded.
What has changed therefore is not found, and never has to be found out. Prompts and images are encoded one by one, so
that an encoding does not depend on the batch that it was first asked for in.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from danceopd.files import write_bytes
from danceopd.states import Condition, concatenate, select

FORMAT = 1

Tensors = dict[str, Tensor]


class CacheableFamily(Protocol):
    """What the cache needs of a family: its encoding in parts that depend on one prompt or one image alone."""

    condition_type: ClassVar[type[Condition]]
    text_parts: ClassVar[tuple[str, ...]]

    @property
    def device(self) -> torch.device:
        """Where conditions and latents go."""
        ...

    def encode_prompts(self, prompts: Sequence[str], *, edits: bool) -> Any: ...

    def add_sources(self, condition: Any, sources: Sequence[Tensor]) -> Any: ...

    def encode_images(self, images: Sequence[Tensor]) -> Tensor: ...

    def encoder_digest(self) -> str:
        """SHA-256 of all that encodings depend on besides prompts and images."""
        ...


class EncodingCache:
    """A family's encodings in a folder, which processes and runs may share."""

    def __init__(self, family: CacheableFamily, folder: Path) -> None:
        self.family, self.folder = family, folder
        self._encoders = family.encoder_digest()

    def encode(self, prompts: Sequence[str], sources: Sequence[Tensor] | None) -> Any:
        """``Family.encode`` of each prompt, with its source, by itself."""
        if sources is None:
            return concatenate([self._prompt(prompt, edits=False) for prompt in prompts])
        return concatenate(
            [
                self._with_source(self._prompt(prompt, edits=True), source)
                for prompt, source in zip(prompts, sources, strict=True)
            ]
        )

    def empty(self, condition: Condition, negative_prompt: str = "") -> Condition:
        """``Family.empty``."""
        blank = self._prompt(negative_prompt, edits=condition.source is not None)
        rows = select(blank, torch.zeros(len(condition.prompt_embeds), dtype=torch.int64))
        return replace(condition, **{part: getattr(rows, part) for part in self.family.text_parts})

    def encode_targets(self, images: Sequence[Tensor]) -> Tensor:
        """Images [3, H, W] in [-1, 1], of one size, as clean latents: float32 [B, C, h, w]."""
        found = [
            self._entry("target", pixel_digest(image), lambda image=image: {"z": self.family.encode_images([image])})
            for image in images
        ]
        return torch.cat([entry["z"] for entry in found])

    def _prompt(self, prompt: str, *, edits: bool) -> Condition:
        what = "edit prompt" if edits else "prompt"
        entry = self._entry(what, prompt, lambda: _parts(self.family.encode_prompts([prompt], edits=edits)))
        return self.family.condition_type(**entry)

    def _with_source(self, condition: Condition, source: Tensor) -> Condition:
        """The condition of one prompt with what a source image adds to it."""
        before = _parts(condition)

        def added() -> Tensors:
            whole = _parts(self.family.add_sources(condition, [source]))
            return {name: part for name, part in whole.items() if name not in before}

        return replace(condition, **self._entry("source", pixel_digest(source), added))

    def _entry(self, what: str, of: str, make: Callable[[], Mapping[str, Tensor]]) -> Tensors:
        """What is kept of (what, of), on the family's device; made, and kept, where there is no whole entry."""
        key = hashlib.sha256(json.dumps([FORMAT, self._encoders, what, of]).encode()).hexdigest()
        path = self.folder / key[:2] / f"{key}.safetensors"
        tensors = _read(path)
        if tensors is None:
            with torch.no_grad(), torch.autocast(self.family.device.type, enabled=False):
                tensors = {name: part.cpu().contiguous() for name, part in make().items()}
            write_bytes(path, save(tensors, {"digest": _digest(tensors)}))
        return {name: part.to(self.family.device) for name, part in tensors.items()}


def pixel_digest(image: Tensor) -> str:
    """SHA-256 of an image's size and pixels."""
    digest = hashlib.sha256(str((tuple(image.shape), image.dtype)).encode())
    digest.update(image.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _parts(condition: Condition) -> Tensors:
    named = {field.name: getattr(condition, field.name) for field in fields(condition)}
    return {name: part for name, part in named.items() if part is not None}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(str((name, tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> Tensors | None:
    """An entry's tensors, or None where there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            whole = (file.metadata() or {}).get("digest") == _digest(tensors)
    except SafetensorError:
        whole, tensors = False, {}
    if not whole:
        warnings.warn(f"{path} was damaged and is made again", stacklevel=2)
    return tensors if whole else None
