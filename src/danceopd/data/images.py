"""Image files: opened once before training to see that they can be read, then read as tensors, in a given size."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from danceopd.errors import UserError

PIXEL_LIMIT = 2**26
"""The largest image that is read, 67 megapixels (8192 x 8192): a larger one is a mistake, or an attack on memory."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""What is read, whatever a file is called; others need decoders that were not meant for strangers' files."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""What counts as an image in a folder of images."""


class ImageError(UserError, ValueError):
    """An image cannot be used; the message names it."""


@dataclass(frozen=True)
class ImageFile:
    """An image that was read once. height, width: upright, as its EXIF orientation says. digest: SHA-256 of its bytes.

    content: the bytes of an image that has no file of its own.
    """

    name: str
    digest: str
    height: int
    width: int
    content: bytes | None = None

    def read(self, size: tuple[int, int] | None = None) -> Tensor:
        """As ``read_image``."""
        return read_image(Path(self.name) if self.content is None else self.content, self.name, size)


def check_image(place: Path | bytes, name: str) -> ImageFile:
    """Read an image whole; ``place`` is its file or its bytes, ``name`` what errors call it.

    Raises:
        ImageError: if it is missing, unreadable, truncated, not of 8 bits, or of more than ``PIXEL_LIMIT`` pixels.
    """
    if isinstance(place, Path):
        if not place.is_file():
            raise ImageError(f"image not found: {name}")
        content = place.read_bytes()
    else:
        content = place
    image = _open(content, name)
    kept = None if isinstance(place, Path) else content
    return ImageFile(name, hashlib.sha256(content).hexdigest(), image.height, image.width, kept)


def read_image(place: Path | bytes, name: str, size: tuple[int, int] | None = None) -> Tensor:
    """An image as float32 [3, H, W] in [-1, 1].

    size: (H, W) to scale and cut the image to, with a Lanczos filter: scaled until it covers the size, what then stands
        over is cut evenly from both sides. None leaves it as it is.

    Raises:
        ImageError: as ``check_image``.
    """
    image = _open(place, name)
    if size is not None and size != (image.height, image.width):
        image = ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def read_image_file(path: Path) -> Tensor:
    """``read_image`` of a file in its own size."""
    return read_image(path, str(path))


def write_image_file(path: Path, image: Tensor) -> None:
    """Write float [3, H, W] in [-1, 1] (cut to it) as an 8-bit image."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path)


def _open(place: Path | bytes, name: str) -> Image.Image:
    """Upright RGB pixels, decoded; what is transparent shows white."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            with Image.open(io.BytesIO(place) if isinstance(place, bytes) else place, formats=FORMATS) as image:
                if image.width * image.height > PIXEL_LIMIT:
                    raise ImageError(
                        f"image has {image.width} x {image.height} pixels, at most {PIXEL_LIMIT:,} are read: {name}"
                    )
                if image.mode.startswith(("I", "F")):
                    raise ImageError(f"image is of mode {image.mode}, needed is one of 8 bits a channel: {name}")
                upright = ImageOps.exif_transpose(image)
                if upright.has_transparency_data:  # the colours of what is transparent were never to be seen
                    white = Image.new("RGBA", upright.size, "white")
                    upright = Image.alpha_composite(white, upright.convert("RGBA"))
                return upright.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ImageError(f"image has too many pixels, at most {PIXEL_LIMIT:,} are read: {name} ({error})") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"image cannot be read: {name} ({error})") from error
