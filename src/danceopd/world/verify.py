"""Exact verifiers: read an image back into a scene, and score it against what was asked.

Reading is analysis by synthesis: each cell of the 2 x 2 arrangement is compared with every object that the renderer
can draw there (shape, style, place, colour), and the best explanation stands if it explains enough of what is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from danceopd.world.render import CELL_SIZE, SHADE_DARK, glyph, shading
from danceopd.world.scene import BACKGROUNDS, COLORS, SHAPES, STYLES, Scene
from danceopd.world.tasks import Edit, Requirement, TextToImage

OCCUPIED_CONTRAST = 0.22
"""A pixel belongs to an object if some channel differs from the background by more than this (of 1)."""
OCCUPIED_PIXELS = 10
"""A cell with at least this many such pixels holds something."""
UNEXPLAINED_MOST = 0.22
"""Largest share of a cell's squared contrast that the best explanation may leave; above it the object is unreadable."""
BACKGROUND_TOLERANCE = 0.16
"""Largest channel difference between the seen and the named background."""
SEARCH = 2
"""Objects are sought within this many pixels of their cell's centre: the jitter and one pixel of shift."""


@dataclass(frozen=True)
class SeenObject:
    """One occupied cell. ``shape`` (and colour, style) is None where no drawable object explains the pixels."""

    cell: int
    shape: str | None
    color: str | None
    style: str | None
    realism: float
    """How shaded it looks, 0..1: see ``realism_reward``."""


@dataclass(frozen=True)
class SeenScene:
    """What an image shows. ``background`` is None where it is none of the named ones."""

    objects: tuple[SeenObject, ...]
    background: str | None

    @property
    def style(self) -> str | None:
        """The style that all objects share, or None."""
        styles = {item.style for item in self.objects}
        return styles.pop() if len(styles) == 1 else None

    def matches(self, scene: Scene) -> bool:
        """Whether everything seen is exactly the scene (jitter aside)."""
        seen = [(item.cell, item.shape, item.color, item.style) for item in self.objects]
        truth = [(item.cell, item.shape, item.color, scene.style) for item in scene.objects]
        return seen == truth and self.background == scene.background


@lru_cache(maxsize=1)
def _bank() -> tuple[list[tuple[str, str, int, int]], np.ndarray, np.ndarray]:
    """All drawable objects of a cell: keys, coverage [T, 256], coverage * brightness [T, 256]."""
    offsets = range(-SEARCH, SEARCH + 1)
    keys = [(shape, style, dx, dy) for shape in SHAPES for style in STYLES for dx in offsets for dy in offsets]
    drawn = [glyph(*key) for key in keys]
    coverage = np.stack([alpha.ravel() for alpha, _ in drawn])
    paint = np.stack([(alpha * light).ravel() for alpha, light in drawn])
    return keys, coverage, paint


def read_image(image: np.ndarray) -> SeenScene:
    """Read one image (float [3, 32, 32], nominally in [-1, 1]) into what it shows.

    Raises:
        ValueError: if the shape is another or a value is not finite.
    """
    if image.shape != (3, 2 * CELL_SIZE, 2 * CELL_SIZE):
        raise ValueError(f"an image of the Shapes world has shape (3, 32, 32), found {tuple(image.shape)}")
    if not np.isfinite(image).all():
        raise ValueError("the image holds non-finite values")
    pixels = np.clip((image.astype(np.float32) + 1) / 2, 0.0, 1.0)
    background = _background_color(pixels)
    named = {name: np.abs(background - np.asarray(color) / 255).max() for name, color in BACKGROUNDS.items()}
    nearest = min(named, key=lambda name: named[name])
    objects = []
    for cell in range(4):
        rows = slice(cell // 2 * CELL_SIZE, (cell // 2 + 1) * CELL_SIZE)
        columns = slice(cell % 2 * CELL_SIZE, (cell % 2 + 1) * CELL_SIZE)
        seen = _read_cell(cell, pixels[:, rows, columns], background)
        if seen is not None:
            objects.append(seen)
    return SeenScene(tuple(objects), nearest if named[nearest] <= BACKGROUND_TOLERANCE else None)


def _background_color(pixels: np.ndarray) -> np.ndarray:
    """Median over the frame and the middle cross, which objects rarely touch: [3]."""
    mask = np.zeros(pixels.shape[1:], dtype=bool)
    mask[[0, 1, 15, 16, 30, 31], :] = True
    mask[:, [0, 1, 15, 16, 30, 31]] = True
    return np.median(pixels[:, mask], axis=1)


def _read_cell(cell: int, pixels: np.ndarray, background: np.ndarray) -> SeenObject | None:
    contrast = pixels - background[:, None, None]
    if (np.abs(contrast).max(axis=0) > OCCUPIED_CONTRAST).sum() < OCCUPIED_PIXELS:
        return None
    keys, coverage, paint = _bank()
    seen = contrast.reshape(3, -1)
    energy = float((seen**2).sum())
    # |seen + background * coverage - color * paint|^2, expanded so that all templates and colours share products.
    with_coverage, with_paint = seen @ coverage.T, seen @ paint.T  # [3, T]
    cover_sq, paint_sq = (coverage**2).sum(1), (paint**2).sum(1)
    cross = (coverage * paint).sum(1)
    colors = np.asarray(list(COLORS.values()), dtype=np.float32) / 255  # [6, 3]
    tone = background[:, None]
    error = energy + (2 * tone * with_coverage + tone**2 * cover_sq).sum(0)[None]
    error = error + (colors**2).sum(1)[:, None] * paint_sq - 2 * colors @ (with_paint + tone * cross)
    color, template = np.unravel_index(int(error.argmin()), error.shape)
    if error[color, template] > UNEXPLAINED_MOST * energy:
        return SeenObject(cell, None, None, None, 0.0)
    shape, style, dx, dy = keys[template]
    name = tuple(COLORS)[color]
    return SeenObject(cell, shape, name, style, _realism(pixels, shape, name, dx, dy))


def _realism(pixels: np.ndarray, shape: str, color: str, dx: int, dy: int) -> float:
    """Strength of the shading ramp inside an object, 0..1.

    Brightness (the projection on the object's colour) inside the shape is regressed on the shaded style's own ramp.
    The strength is the slope (1 = as the renderer shades), cut to 0..1, times the correlation, cut to 0..1: a flat
    object scores 0, and stripes do not pass for shading.
    """
    inside = glyph(shape, "flat", dx, dy)[0] > 0.9
    tint = np.asarray(COLORS[color], dtype=np.float32) / 255
    brightness = np.tensordot(tint, pixels, axes=1)[inside] / float(tint @ tint)
    ramp = shading(dx, dy)[inside]
    brightness, ramp = brightness - brightness.mean(), ramp - ramp.mean()
    covariance, variance = float(brightness @ ramp), float(ramp @ ramp)
    slope = covariance / variance
    correlation = covariance / (np.sqrt(variance * float(brightness @ brightness)) + 1e-3 * (1 - SHADE_DARK))
    return float(np.clip(slope, 0, 1) * np.clip(correlation, 0, 1))


def score_text_to_image(image: np.ndarray, example: TextToImage) -> float:
    """1.0 if the image shows all that the prompt states, else 0.0 (GenEval's rule)."""
    return float(meets(read_image(image), example.requirement))


def meets(seen: SeenScene, requirement: Requirement) -> bool:
    """Whether what is seen satisfies the requirement."""
    for shape, color, number in requirement.include:
        found = [item for item in seen.objects if item.shape == shape and color in (None, item.color)]
        # A stated number is exact, and an unreadable object might be one more.
        exact = number > 1
        if len(found) < number or (exact and len(seen.objects) != number):
            return False
    if requirement.relation is not None and not _related(seen, *requirement.relation):
        return False
    if requirement.background not in (None, seen.background):
        return False
    return requirement.style in (None, seen.style)


def _related(seen: SeenScene, first: str, relation: str, second: str) -> bool:
    axis, sign = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}[relation]
    places = {
        shape: [divmod(item.cell, 2)[axis] for item in seen.objects if item.shape == shape] for shape in (first, second)
    }
    return any(sign * (a - b) > 0 for a in places[first] for b in places[second])


@dataclass(frozen=True)
class EditScore:
    """followed: 0 or 1, was the instruction done; preserved: 0..1, the share of all other facts that still hold."""

    followed: float
    preserved: float

    @property
    def overall(self) -> float:
        """Geometric mean, as GEdit-Bench combines its two parts."""
        return float(np.sqrt(self.followed * self.preserved))


def score_edit(image: np.ndarray, edit: Edit) -> EditScore:
    """Score an edited image against the edit's exact target.

    Facts are what each cell holds (nothing, or a shape of a colour), the background and the style. The edit's own
    fact must be the target's (``followed``); ``preserved`` is the share of the others that are the target's, which
    for them equals the source's.
    """
    facts, truth = _facts(read_image(image)), _true_facts(edit.target)
    own = {"background_change": ["background"], "style_change": ["style"]}.get(edit.task, [edit.cell])
    others = [key for key in truth if key not in own and truth[key] is not None]
    followed = all(facts[key] == truth[key] for key in own)
    # A style is nothing without an object to show it.
    if "style" in others and not edit.target.objects:
        others.remove("style")
    preserved = sum(facts[key] == truth[key] for key in others) / len(others)
    return EditScore(float(followed), preserved)


def _facts(seen: SeenScene) -> dict:
    facts: dict = {cell: "empty" for cell in range(4)}
    for item in seen.objects:
        facts[item.cell] = (item.shape, item.color)
    return facts | {"background": seen.background, "style": seen.style}


def _true_facts(scene: Scene) -> dict:
    facts: dict = {cell: "empty" for cell in range(4)}
    for item in scene.objects:
        facts[item.cell] = (item.shape, item.color)
    return facts | {"background": scene.background, "style": scene.style}


def realism_reward(image: np.ndarray) -> float:
    """Mean shading strength over the objects seen, in 0..1; 0 if none can be read."""
    seen = read_image(image)
    return float(np.mean([item.realism for item in seen.objects])) if seen.objects else 0.0
