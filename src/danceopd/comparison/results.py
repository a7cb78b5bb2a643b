"""What the runs of a suite gave, and which tasks make a capability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from danceopd.evaluation.shapes import CAPABILITIES
from danceopd.world.tasks import EDIT_TASKS, GLOBAL_EDITS, LOCAL_EDITS, T2I_TASKS

GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "t2i": ("t2i", T2I_TASKS),
    "edit": ("edit", EDIT_TASKS),
    "local": ("edit", LOCAL_EDITS),
    "global": ("edit", GLOBAL_EDITS),
}
"""A suite's names for capabilities: the kind of sampling that shows each, and its tasks."""


@dataclass(frozen=True)
class Point:
    """A measured state of a run. compute: forward-equivalents spent; taken: by measure, as JSON."""

    updates: int
    compute: float
    seconds: float
    taken: dict[str, Any]


@dataclass(frozen=True)
class Results:
    """All that a suite measured.

    points: {method: {updates: a point per seed}}; views: {method: {view: updates}};
    sources: {name: what was taken of its scores}; expected: {method: {view: the forward-equivalents predicted for it}}.
    """

    points: dict[str, dict[int, list[Point]]]
    views: dict[str, dict[str, int]]
    sources: dict[str, dict[str, Any]]
    expected: dict[str, dict[str, float]]

    def scores(self, method: str, updates: int, capability: str) -> np.ndarray:
        """[seeds, tasks, n]; the same scenes and noise for every method."""
        return np.stack([scores_of(point.taken["scores"], capability) for point in self.points[method][updates]])

    def source(self, name: str, capability: str) -> np.ndarray:
        """[tasks, n]."""
        return scores_of(self.sources[name], capability)


def scores_of(taken: dict[str, Any], capability: str) -> np.ndarray:
    """A capability's scores [tasks, n] out of what was taken; ``realism`` is the reward on text to image."""
    if capability == "realism":
        return np.array(taken["realism"])
    kind, tasks = GROUPS[capability]
    return np.array(taken[kind])[[CAPABILITIES[kind].index(task) for task in tasks]]
