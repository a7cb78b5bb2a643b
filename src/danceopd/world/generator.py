"""Generated examples: a finite manifest of training inputs, and evaluation scenes that no training ever uses."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from danceopd.data.examples import Example
from danceopd.world.render import render
from danceopd.world.tasks import (
    EDIT_TASKS,
    GLOBAL_EDITS,
    HARD_T2I_OFTENER,
    LOCAL_EDITS,
    LOCAL_EDITS_OFTENER,
    T2I_TASKS,
    Edit,
    TextToImage,
    draw_edit,
    draw_text_to_image,
)

GENERATORS: dict[str, tuple[str, ...]] = {
    "shapes/t2i": HARD_T2I_OFTENER,
    "shapes/edit": LOCAL_EDITS_OFTENER,
    "shapes/local": LOCAL_EDITS,
    "shapes/global": GLOBAL_EDITS,
}
"""Names that a recipe may use, and the tasks each draws uniformly: the mixtures that the sources were trained on."""

_TRAINING, _EVALUATION, SOURCE_TRAINING = 11, 12, 13
"""First words of the seed sequences: a student's training, evaluation, and the sources' own training draw from streams
that cannot meet."""


DATA_VERSION = 1
"""Counts the changes of what these streams draw: scenes, sentences, tasks, rendering. Raise it with each."""

_DIGESTED = 8


class GeneratedExamples:
    """``size`` examples of a named generator; example i depends on (seed, i) alone.

    Raises:
        ValueError: for an unknown name.
    """

    def __init__(self, name: str, *, size: int, seed: int) -> None:
        if name not in GENERATORS:
            raise ValueError(f"unknown generator {name!r}; known: {', '.join(GENERATORS)}")
        self.name, self.tasks, self.size, self.seed = name, GENERATORS[name], size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng([_TRAINING, self.seed, index])
        task = self.tasks[rng.integers(len(self.tasks))]
        if task in T2I_TASKS:
            drawn = draw_text_to_image(rng, task)
            return Example(prompt=drawn.prompt, target=torch.from_numpy(render(drawn.scene)))
        return edit_example(draw_edit(rng, task))

    def digest(self) -> str:
        """SHA-256 over the data's version, the name, the size, the seed and the first eight examples themselves."""
        digest = hashlib.sha256(f"{DATA_VERSION} {self.name} {self.size} {self.seed}".encode())
        for index in range(min(self.size, _DIGESTED)):
            example = self[index]
            digest.update(example.prompt.encode())
            for image in (example.source, example.target):
                if image is not None:
                    digest.update(image.numpy().tobytes())
        return digest.hexdigest()


def edit_example(edit: Edit) -> Example:
    """The edit as a training input, its exact target included."""
    source, target = (torch.from_numpy(render(scene)) for scene in (edit.source, edit.target))
    return Example(prompt=edit.instruction, source=source, target=target)


def evaluation_set(tasks: Sequence[str], *, per_task: int, seed: int) -> list[TextToImage | Edit]:
    """``per_task`` fresh examples of each task, in order; scene j of a task depends on (seed, task, j) alone."""
    known = T2I_TASKS + EDIT_TASKS
    drawn: list[TextToImage | Edit] = []
    for task in tasks:
        for j in range(per_task):
            rng = np.random.default_rng([_EVALUATION, seed, known.index(task), j])
            drawn.append(draw_text_to_image(rng, task) if task in T2I_TASKS else draw_edit(rng, task))
    return drawn
