"""The renderer: scene -> image, anti-aliased, deterministic."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from danceopd.world.scene import BACKGROUNDS, COLORS, Scene

IMAGE_SIZE = 32
CELL_SIZE = IMAGE_SIZE // 2
RADIUS = 5.5
STROKE = 1.5
STRIPE_PERIOD = 4
STRIPE_DARK = 0.45
SHADE_DARK = 0.35


@lru_cache(maxsize=4096)
def glyph(shape: str, style: str, dx: int, dy: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and brightness of one object in its cell.

    Returns:
        ``coverage`` [16, 16] in [0, 1], the object's opacity per pixel, and ``brightness`` [16, 16] in [0, 1], the
        factor on its colour (1 for flat and outline; a diagonal ramp for shaded; two levels for striped).
    """
    axis = np.arange(CELL_SIZE) + 0.5 - CELL_SIZE / 2
    x, y = np.meshgrid(axis - dx, axis - dy)
    distance = _signed_distance(shape, x, y)
    coverage = np.clip(0.5 - distance, 0.0, 1.0)
    brightness = np.ones_like(coverage)
    if style == "outline":
        coverage = coverage * np.clip(distance + STROKE + 0.5, 0.0, 1.0)
    elif style == "shaded":
        brightness = shading(dx, dy)
    elif style == "striped":
        brightness = np.where(np.floor(y).astype(int) % STRIPE_PERIOD < STRIPE_PERIOD // 2, 1.0, STRIPE_DARK)
    return coverage.astype(np.float32), brightness.astype(np.float32)


@lru_cache(maxsize=64)
def shading(dx: int, dy: int) -> np.ndarray:
    """The shaded style's brightness [16, 16]: a ramp from 1 at the upper left to 0.35 at the lower right."""
    axis = np.arange(CELL_SIZE) + 0.5 - CELL_SIZE / 2
    x, y = np.meshgrid(axis - dx, axis - dy)
    ramp = np.clip(0.5 + (x + y) / (2.8 * RADIUS), 0.0, 1.0)
    return (1.0 - (1.0 - SHADE_DARK) * ramp).astype(np.float32)


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Approximate signed distance in pixels to the outline, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - RADIUS
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.88 * RADIUS
    if shape == "triangle":
        slope = np.array([2.0, 1.0]) / np.sqrt(5.0)
        return np.maximum(y - RADIUS * 0.9, slope[0] * abs(x) - slope[1] * (y + RADIUS))
    if shape == "cross":
        arm = 0.47 * RADIUS
        return np.minimum(np.maximum(abs(x) - arm, abs(y) - RADIUS), np.maximum(abs(y) - arm, abs(x) - RADIUS))
    raise ValueError(f"unknown shape {shape!r}")


def render(scene: Scene) -> np.ndarray:
    """The scene's image: float32 [3, 32, 32] in [-1, 1]."""
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    canvas[:] = np.asarray(BACKGROUNDS[scene.background], dtype=np.float32) / 255
    for item in scene.objects:
        coverage, brightness = glyph(item.shape, scene.style, item.dx, item.dy)
        rows = slice(item.row * CELL_SIZE, (item.row + 1) * CELL_SIZE)
        columns = slice(item.column * CELL_SIZE, (item.column + 1) * CELL_SIZE)
        paint = brightness[..., None] * (np.asarray(COLORS[item.color], dtype=np.float32) / 255)
        alpha = coverage[..., None]
        canvas[rows, columns] = (1 - alpha) * canvas[rows, columns] + alpha * paint
    return np.ascontiguousarray(canvas.transpose(2, 0, 1)) * 2 - 1
