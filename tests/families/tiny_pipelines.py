"""The tiny pipelines, each with the family that it is tested as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from danceopd.families.flux import FluxFamily
from danceopd.families.sd3 import SD3Family
from danceopd.families.z_image import ZImageFamily
from danceopd.tiny.pipelines import (
    CLIP_TOKENS,
    flux_pipeline,
    kontext_pipeline,
    omni_pipeline,
    sd3_pipeline,
    z_image_pipeline,
)

TOKENS = CLIP_TOKENS
"""T5 tokens per prompt in the tests."""
CHAT_TOKENS = 80
"""Qwen tokens per prompt, with the chat around it."""


@dataclass(frozen=True)
class Case:
    """A tiny pipeline and its family.

    family: ``family(base)`` takes the pipeline or its folder.
    plain: options with which the pipeline's call makes 16 x 24 images from text, without classifier-free guidance.
    """

    pipeline: Callable[[], Any]
    family: Callable[..., Any]
    can_edit: bool
    plain: dict[str, Any] = field(default_factory=dict)


def sd3_family(base: Any, **options: Any) -> SD3Family:
    return SD3Family(base, max_sequence_length=TOKENS, **options)


def flux_family(base: Any, **options: Any) -> FluxFamily:
    return FluxFamily(base, max_sequence_length=TOKENS, **options)


def z_image_family(base: Any, **options: Any) -> ZImageFamily:
    return ZImageFamily(base, max_sequence_length=CHAT_TOKENS, **options)


CASES = {
    "sd3": Case(sd3_pipeline, sd3_family, False, {"guidance_scale": 1.0, "max_sequence_length": TOKENS}),
    "flux": Case(flux_pipeline, flux_family, False, {"max_sequence_length": TOKENS}),
    "kontext": Case(kontext_pipeline, flux_family, True, {"max_sequence_length": TOKENS, "max_area": 16 * 24}),
    "z_image": Case(
        z_image_pipeline, z_image_family, False, {"guidance_scale": 0.0, "max_sequence_length": CHAT_TOKENS}
    ),
    "omni": Case(omni_pipeline, z_image_family, True, {"guidance_scale": 0.0, "max_sequence_length": CHAT_TOKENS}),
}
