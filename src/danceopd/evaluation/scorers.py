"""Which families' pictures can be scored here, and by what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from danceopd.distill.solver import VelocityFunction
from danceopd.evaluation.pictures import Encoder
from danceopd.evaluation.shapes import ShapesScorer
from danceopd.families.family import Family
from danceopd.recipe import EvaluatePart, RecipeError


class Scorer(Protocol):
    """Measures models of one family."""

    def images(self, part: EvaluatePart) -> int:
        """How many images each model draws."""
        ...

    def evaluate(
        self,
        models: dict[str, VelocityFunction],
        family: Family,
        part: EvaluatePart,
        *,
        encoders: Mapping[str, Encoder] | None = None,
        pictures: Path | None = None,
        on_batch: Callable[[int], None] = lambda count: None,
    ) -> dict[str, Any]:
        """The content of ``evaluation.json``. encoders: of models that are told something else than the student."""
        ...


SCORERS: Mapping[str, Scorer] = {"shapes": ShapesScorer()}


def scorer(family: str) -> Scorer:
    """The family's scorer.

    Raises:
        RecipeError: if it has none, saying what to do instead.
    """
    if family not in SCORERS:
        raise RecipeError(
            f"family {family!r} has no scores here: they exist for {', '.join(SCORERS)} only. `danceopd evaluate RUN` "
            "draws every model's pictures of the routes' prompts side by side; for scores, draw a benchmark's prompts "
            "with `danceopd sample` and hand the images to its own scorer"
        )
    return SCORERS[family]
