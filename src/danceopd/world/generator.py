"""Generated examples: a finite manifest of training inputs, and evaluation scenes that no training ever uses."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Stream:
    """What a generator draws: ``tasks``, uniformly, and in a share ``mismatched`` a target that is not the prompt's.

    Mismatched targets are what careless collecting gives: the picture of another prompt, an edit's source as it was.
    """

    tasks: tuple[str, ...]
    mismatched: float = 0.0


GENERATORS: dict[str, Stream] = {
    "shapes/t2i": Stream(HARD_T2I_OFTENER),
    "shapes/edit": Stream(LOCAL_EDITS_OFTENER),
    "shapes/local": Stream(LOCAL_EDITS),
    "shapes/global": Stream(GLOBAL_EDITS),
    "shapes/t2i_mismatched": Stream(HARD_T2I_OFTENER, mismatched=0.25),
    "shapes/edit_mismatched": Stream(LOCAL_EDITS_OFTENER, mismatched=0.25),
}
"""Names that a recipe may use; the first four draw the mixtures that the sources were trained on."""

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
        self.name, self.stream, self.size, self.seed = name, GENERATORS[name], size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.size:
            raise IndexError(f"{self.name} has examples 0 to {self.size - 1}, found {index}")
        rng = np.random.default_rng([_TRAINING, self.seed, index])
        task = self.stream.tasks[rng.integers(len(self.stream.tasks))]
        example = _drawn(rng, task)
        if self.stream.mismatched and rng.random() < self.stream.mismatched:
            wrong = _drawn(rng, task).target if example.source is None else example.source
            return replace(example, target=wrong)
        return example

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


def _drawn(rng: np.random.Generator, task: str) -> Example:
    if task in T2I_TASKS:
        drawn = draw_text_to_image(rng, task)
        return Example(prompt=drawn.prompt, target=torch.from_numpy(render(drawn.scene)))
    return edit_example(draw_edit(rng, task))


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
