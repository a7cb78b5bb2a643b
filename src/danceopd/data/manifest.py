"""JSONL manifests: one training input a line, every line validated before training starts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor

from danceopd.data.examples import Example


class ManifestError(ValueError):
    """A manifest cannot be used; the message names the file and the line."""


class ManifestLine(BaseModel):
    """``{"prompt": ...}`` for text-to-image; ``{"instruction": ..., "source": FILE}`` for an edit.

    Either may name a ``target`` image. Image files are relative to the manifest's folder.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = None
    instruction: str | None = None
    source: str | None = None
    target: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> ManifestLine:
        if (self.prompt is None) == (self.instruction is None):
            raise ValueError("needs either 'prompt' or 'instruction'")
        if not (self.prompt or self.instruction or "").strip():
            raise ValueError("the text is empty")
        if (self.instruction is not None) != (self.source is not None):
            raise ValueError("an edit needs both 'instruction' and 'source', text-to-image neither")
        return self


class Manifest:
    """The examples of a JSONL file.

    Raises:
        ManifestError: for a missing or empty file, a line that is not valid (with its number), an image that is
            missing or unreadable (with its line), or lines of both kinds.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ManifestError(f"manifest not found: {path}")
        self.path = path
        self.lines: list[ManifestLine] = []
        self.numbers: list[int] = []
        """Line number in the file of each example."""
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ManifestError(f"{path} is not UTF-8 text: {error}") from error
        for number, text in enumerate(content.removesuffix("\n").split("\n") if content else [], start=1):
            if not text.strip():
                raise ManifestError(f"{path}, line {number}: the line is empty")
            try:
                line = ManifestLine.model_validate_json(text)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                raise ManifestError(f"{path}, line {number}: {where + ': ' if where else ''}{first['msg']}") from error
            for kind in ("source", "target"):
                name = getattr(line, kind)
                if name is not None:
                    try:
                        check_image_file(path.parent / name)
                    except ManifestError as error:
                        raise ManifestError(f"{path}, line {number}, {kind}: {error}") from error
            self.lines.append(line)
            self.numbers.append(number)
        if not self.lines:
            raise ManifestError(f"{path} holds no example; a route needs at least one line")
        if len({line.source is None for line in self.lines}) != 1:
            raise ManifestError(f"{path} mixes text-to-image and edit lines; give each its own manifest and route")

    @property
    def edits(self) -> bool:
        return self.lines[0].source is not None

    def digest(self) -> str:
        """SHA-256 of the file and of every image that it names."""
        digest = hashlib.sha256(self.path.read_bytes())
        for line in self.lines:
            for name in (line.source, line.target):
                if name is not None:
                    digest.update((self.path.parent / name).read_bytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Example:
        line = self.lines[index]
        images = {
            kind: None if name is None else read_image_file(self.path.parent / name)
            for kind, name in (("source", line.source), ("target", line.target))
        }
        return Example(prompt=line.prompt or line.instruction or "", **images)


def check_image_file(path: Path) -> None:
    """Raise ManifestError unless ``path`` is an image that Pillow can identify."""
    try:
        with Image.open(path) as image:
            image.verify()
    except FileNotFoundError as error:
        raise ManifestError(f"image not found: {path}") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ManifestError(f"image cannot be read: {path} ({error})") from error


def read_image_file(path: Path) -> Tensor:
    """An image file as float32 [3, H, W] in [-1, 1]."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    except (FileNotFoundError, UnidentifiedImageError, OSError) as error:
        raise ManifestError(f"image cannot be read: {path} ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def write_image_file(path: Path, image: Tensor) -> None:
    """Write float [3, H, W] in [-1, 1] (cut to it) as an 8-bit image."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path)
