"""Scenes: what an image of the Shapes world contains, as plain values.

A scene has one background, one drawing style and up to four objects, at most one in each cell of a 2 x 2
arrangement. Everything else in the world (pictures, prompts, edits, verification) is a function of a scene.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (230, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (245, 215, 40),
    "purple": (160, 50, 200),
    "cyan": (40, 200, 220),
}
BACKGROUNDS = {"white": (245, 245, 245), "black": (12, 12, 12), "gray": (128, 128, 128), "pink": (250, 190, 200)}
STYLES = ("flat", "outline", "shaded", "striped")
PLACES = ("top left", "top right", "bottom left", "bottom right")
"""Name of each cell; cell index = 2 * row + column."""

MAX_JITTER = 1
"""An object's centre lies at most this many pixels from its cell's centre, along each axis."""


@dataclass(frozen=True, order=True)
class SceneObject:
    """One object. ``cell`` in 0..3 (row-major), ``dx`` and ``dy`` whole pixels in -1..1."""

    cell: int
    shape: str
    color: str
    dx: int = 0
    dy: int = 0

    @property
    def row(self) -> int:
        return self.cell // 2

    @property
    def column(self) -> int:
        return self.cell % 2


@dataclass(frozen=True)
class Scene:
    """A whole image. ``objects`` is sorted by cell and no cell is used twice."""

    objects: tuple[SceneObject, ...]
    background: str = "white"
    style: str = "flat"

    def __post_init__(self) -> None:
        cells = [item.cell for item in self.objects]
        if sorted(set(cells)) != cells:
            raise ValueError(f"objects must be sorted by cell with at most one per cell, found cells {cells}")

    def free_cells(self) -> tuple[int, ...]:
        return tuple(sorted(set(range(4)) - {item.cell for item in self.objects}))

    def with_object(self, item: SceneObject) -> Scene:
        """The scene with ``item`` put in its cell, in place of whatever was there."""
        kept = [other for other in self.objects if other.cell != item.cell]
        return replace(self, objects=tuple(sorted([*kept, item])))

    def without_cell(self, cell: int) -> Scene:
        return replace(self, objects=tuple(item for item in self.objects if item.cell != cell))


def random_object(
    rng: np.random.Generator, cell: int | np.integer, shape: str | None = None, color: str | None = None
) -> SceneObject:
    """An object in ``cell``; shape, colour and jitter are uniform unless given."""
    dx, dy = rng.integers(-MAX_JITTER, MAX_JITTER + 1, size=2)
    return SceneObject(
        cell=int(cell),
        shape=shape or SHAPES[rng.integers(len(SHAPES))],
        color=color or tuple(COLORS)[rng.integers(len(COLORS))],
        dx=int(dx),
        dy=int(dy),
    )
