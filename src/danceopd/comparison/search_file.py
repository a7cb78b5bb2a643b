"""``SUITE.search.json``: which settings were tried for each method, what they gave, and which were chosen."""

from __future__ import annotations

import math
from collections.abc import Set
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

RULE = (
    "Each capability's score is divided by its best source's on the search's scenes. Of a method's trials the one with "
    "the highest mean ratio is chosen, the first of equals."
)
FINALS = "The better half of a method's trials goes on to the final length, and the choice is among those."


class SearchMismatch(ValueError):
    """A search file cannot serve its suite."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Trial(_Part):
    """settings: {dotted key: value}; scores and ratios (to the best source): by capability, mean over seeds."""

    settings: dict[str, Any]
    scores: dict[str, float]
    ratios: dict[str, float] = Field(min_length=1)

    @property
    def mean_ratio(self) -> float:
        return sum(self.ratios.values()) / len(self.ratios)


class MethodSearch(_Part):
    """All trials of a method, those that went on, after the final length, and the settings chosen."""

    trials: tuple[Trial, ...] = Field(min_length=1)
    finals: tuple[Trial, ...] = ()
    chosen: dict[str, Any]

    @property
    def edges(self) -> list[str]:
        """Chosen numbers that are the lowest or highest of three or more tried, or of those that went on, in words."""
        found, tried = [], [_numbers(trial.settings) for trial in self.trials]
        went_on = [_numbers(trial.settings) for trial in self.finals]
        for key, value in _numbers(self.chosen).items():
            values = [numbers[key] for numbers in tried if key in numbers]
            if len(set(values)) > 2:
                last = [numbers[key] for numbers in went_on if key in numbers]
                for end, word in ((min, "lowest"), (max, "highest")):
                    if value == end(values):
                        found.append(f"{key} {value:g} is the {word}")
                    elif len(set(last)) > 1 and value == end(last):
                        found.append(f"{key} {value:g} is the {word} that went on")
        return found

    @property
    def holds_together(self) -> bool:
        """Whether what went on and what was chosen is what the scores give."""
        went_on = [trial.settings for trial in self.finals]
        due = [self.trials[index].settings for index in finalists(self.trials)] if self.finals else []
        return went_on == due and self.chosen == choose(self.finals or self.trials).settings


class SearchFile(_Part):
    """The file. fits: of the suite that it belongs to; hashes: of its sources."""

    suite: str
    fits: str
    rule: str
    updates: int | None
    final_updates: int | None = None
    compute: float | None = None
    final_compute: float | None = None
    seeds: tuple[int, ...]
    scenes_seed: int
    scenes_per_task: int
    hashes: dict[str, str]
    methods: dict[str, MethodSearch]

    @property
    def has_finals(self) -> bool:
        return self.final_updates is not None or self.final_compute is not None


def _numbers(settings: dict[str, Any]) -> dict[str, float]:
    """The settings that are numbers, those within others (the weights of a merge) by dotted keys."""
    found: dict[str, float] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": number for inner, number in _numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = value
    return found


def choose(trials: tuple[Trial, ...]) -> Trial:
    """The trial that ``RULE`` chooses."""
    return max(trials, key=lambda trial: trial.mean_ratio)


def finalists(trials: tuple[Trial, ...]) -> list[int]:
    """Where the better half of the trials is, half rounded up; the first of equals."""
    ranked = sorted(range(len(trials)), key=lambda index: -trials[index].mean_ratio)
    return sorted(ranked[: math.ceil(len(trials) / 2)])


def read_search(path: Path, *, fits: str, methods: Set[str]) -> SearchFile:
    """Read a search file, of these methods.

    Raises:
        SearchMismatch: if it is damaged, was made for another recipe or grid, or for these methods as they were, or
            chose against its scores.
    """
    try:
        content = SearchFile.model_validate_json(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValidationError) as error:
        raise SearchMismatch(f"{path} is not a search file: {error}") from error
    again = "search again (danceopd search SUITE)"
    if content.fits != fits or content.methods.keys() != methods:
        raise SearchMismatch(f"{path} was made for another recipe, methods or grid than the suite's; {again}")
    for name, method in content.methods.items():
        if bool(method.finals) != content.has_finals or not method.holds_together:
            raise SearchMismatch(f"{path}: what is chosen for {name!r} is not what its trials give; {again}")
    return content
