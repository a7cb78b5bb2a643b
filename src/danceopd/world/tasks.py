"""Text-to-image tasks and edits: what is asked in words, and the scene that answers it.

The six text-to-image tasks mirror GenEval's, the six edit types those that the paper reports from GEdit-Bench. A task
draws a scene, its words, and what exactly the words require; whatever the words leave open, a picture may choose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from danceopd.world.scene import BACKGROUNDS, COLORS, PLACES, SHAPES, STYLES, Scene, SceneObject, random_object

T2I_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
LOCAL_EDITS = ("subject-add", "subject-replace", "subject-remove", "color_alter")
GLOBAL_EDITS = ("background_change", "style_change")
EDIT_TASKS = LOCAL_EDITS + GLOBAL_EDITS
HARD_T2I_OFTENER = ("single_object", "colors", *2 * ("two_object", "counting"), *3 * ("position", "color_attr"))
LOCAL_EDITS_OFTENER = 2 * LOCAL_EDITS + GLOBAL_EDITS
"""What training data is drawn from, uniformly; evaluation takes every task alike."""

RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
BACKGROUND_STATED = 0.4
STYLE_STATED = 0.3
"""Shares of prompts that state the background or the style; unstated, any background and the flat style."""


@dataclass(frozen=True)
class Requirement:
    """What a prompt demands of its picture, in GenEval's terms.

    include: (shape, colour or None, number) triples that must be there. A stated number above one must match
        exactly (GenEval excludes number + 1); one means at least one.
    relation: ``(shape, relation, shape)`` or None.
    background, style: required when the prompt states them.
    """

    include: tuple[tuple[str, str | None, int], ...]
    relation: tuple[str, str, str] | None = None
    background: str | None = None
    style: str | None = None


@dataclass(frozen=True)
class TextToImage:
    """One text-to-image example."""

    task: str
    prompt: str
    scene: Scene
    requirement: Requirement


@dataclass(frozen=True)
class Edit:
    """One edit example: ``target`` is the exact answer to ``instruction`` on ``source``."""

    task: str
    instruction: str
    source: Scene
    target: Scene
    cell: int | None
    """The cell that the edit changes, or None for the whole image."""


def draw_text_to_image(rng: np.random.Generator, task: str | None = None, style: str | None = None) -> TextToImage:
    """Draw an example of ``task`` (uniform over tasks when None).

    ``style`` forces the scene's style while the words stay drawn as usual, except that a stated style is the forced
    one (this is the realism source's training data).
    """
    task = task or T2I_TASKS[rng.integers(len(T2I_TASKS))]
    words, objects, include, relation = _describe(rng, task)
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    background_stated = rng.random() < BACKGROUND_STATED
    style_stated = rng.random() < STYLE_STATED
    drawn = STYLES[rng.integers(len(STYLES))]
    style = style or (drawn if style_stated else "flat")
    prompt = words
    if style_stated:
        prompt += f" in {style} style"
    if background_stated:
        prompt += f" on a {background} background"
    requirement = Requirement(
        include, relation, background if background_stated else None, style if style_stated else None
    )
    return TextToImage(task, prompt, Scene(tuple(sorted(objects)), background, style), requirement)


def _describe(rng: np.random.Generator, task: str):
    """Words, objects, included triples and relation of a text-to-image task."""
    first, second = (SHAPES[i] for i in rng.choice(len(SHAPES), size=2, replace=False))
    color_a, color_b = (tuple(COLORS)[i] for i in rng.choice(len(COLORS), size=2, replace=False))
    if task in ("single_object", "colors"):
        stated = color_a if task == "colors" else None
        item = random_object(rng, rng.integers(4), first, stated)
        return f"a {stated} {first}" if stated else f"a {first}", [item], ((first, stated, 1),), None
    if task == "counting":
        number = int(rng.integers(2, 5))
        cells = rng.choice(4, size=number, replace=False)
        objects = [random_object(rng, cell, first, color_a) for cell in cells]
        return f"{NUMBERS[number]} {PLURALS[first]}", objects, ((first, None, number),), None
    if task in ("two_object", "color_attr"):
        stated = (color_a, color_b) if task == "color_attr" else (None, None)
        cells = np.sort(rng.choice(4, size=2, replace=False))  # drawn in reading order; any order answers the prompt
        pair = list(zip((first, second), stated, strict=True))
        objects = [random_object(rng, cell, *item) for cell, item in zip(cells, pair, strict=True)]
        words = " and ".join(f"a {color} {shape}" if color else f"a {shape}" for shape, color in pair)
        return words, objects, tuple((shape, color, 1) for shape, color in pair), None
    if task == "position":
        relation = RELATIONS[rng.integers(len(RELATIONS))]
        other = int(rng.integers(2))
        cells = {
            "left of": (2 * other, 2 * other + 1),
            "right of": (2 * other + 1, 2 * other),
            "above": (other, other + 2),
            "below": (other + 2, other),
        }[relation]
        objects = [random_object(rng, cell, shape) for cell, shape in zip(cells, (first, second), strict=True)]
        include = ((first, None, 1), (second, None, 1))
        return f"a {first} {relation} a {second}", objects, include, (first, relation, second)
    raise ValueError(f"unknown text-to-image task {task!r}; known: {', '.join(T2I_TASKS)}")


def draw_edit(rng: np.random.Generator, task: str | None = None) -> Edit:
    """Draw an edit of type ``task`` (uniform over the six types when None)."""
    task = task or EDIT_TASKS[rng.integers(len(EDIT_TASKS))]
    source = _edit_source(rng)
    if task == "subject-add":
        item = random_object(rng, rng.choice(source.free_cells()))
        words = f"add a {item.color} {item.shape} at the {PLACES[item.cell]}"
        return Edit(task, words, source, source.with_object(item), item.cell)
    if task == "background_change":
        background = _other(rng, tuple(BACKGROUNDS), source.background)
        words = f"change the background to {background}"
        return Edit(task, words, source, replace(source, background=background), None)
    if task == "style_change":
        style = _other(rng, STYLES, source.style)
        return Edit(task, f"change the style to {style}", source, replace(source, style=style), None)
    old: SceneObject = source.objects[rng.integers(len(source.objects))]
    name = f"the {old.color} {old.shape}"
    if task == "subject-remove":
        return Edit(task, f"remove {name}", source, source.without_cell(old.cell), old.cell)
    if task == "subject-replace":
        new = replace(old, shape=_other(rng, SHAPES, old.shape), color=tuple(COLORS)[rng.integers(len(COLORS))])
        words = f"replace {name} with a {new.color} {new.shape}"
        return Edit(task, words, source, source.with_object(new), old.cell)
    if task == "color_alter":
        new = replace(old, color=_other(rng, tuple(COLORS), old.color))
        return Edit(task, f"make {name} {new.color}", source, source.with_object(new), old.cell)
    raise ValueError(f"unknown edit type {task!r}; known: {', '.join(EDIT_TASKS)}")


def _edit_source(rng: np.random.Generator) -> Scene:
    """One to three objects, no two of the same shape and colour, so that words can name each."""
    number = int(rng.integers(1, 4))
    kinds = rng.choice(len(SHAPES) * len(COLORS), size=number, replace=False)
    cells = np.sort(rng.choice(4, size=number, replace=False))
    objects = [
        random_object(rng, cell, SHAPES[kind % len(SHAPES)], tuple(COLORS)[kind // len(SHAPES)])
        for cell, kind in zip(cells, kinds, strict=True)
    ]
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    return Scene(tuple(objects), background, STYLES[rng.integers(len(STYLES))])


def _other(rng: np.random.Generator, options: tuple[str, ...], current: str) -> str:
    return [option for option in options if option != current][rng.integers(len(options) - 1)]
