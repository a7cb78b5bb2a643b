"""What a suite measures of its students: one file each, all of one shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from danceopd.comparison.measures import exposure, guidance, realism, scores, staleness
from danceopd.comparison.results import Results
from danceopd.comparison.suite import Suite
from danceopd.comparison.tables import Plot, Table
from danceopd.training.assemble import Assembly


@dataclass(frozen=True)
class Measure:
    """One measure.

    take: ``take(assembly, model, suite)``: what is kept, as JSON, of each student at a point of its run, where
        ``assembly.recipe.train.steps`` is the point's updates; None where the scores' own record tells it already.
    everywhere: take it at every point, not at equal updates alone.
    settings: what ``take`` depends on besides the run and its evaluation scenes, as JSON.
    measure: the figures of all runs together, as JSON; pages are made of it alone.
    estimates: where that JSON has intervals that a claim may be about, nested as they are there; None stands for one.
    tables, plots: that JSON for readers.
    """

    take: Callable[[Assembly, str, Suite], dict[str, Any]] | None
    everywhere: bool
    settings: Callable[[Suite], Any]
    measure: Callable[[Suite, Results], dict[str, Any]]
    estimates: Callable[[Suite], dict[str, Any]]
    tables: Callable[[dict[str, Any]], list[Table]]
    plots: Callable[[dict[str, Any]], list[Plot]]


def _own_part(name: str) -> Callable[[Suite], Any]:
    """Settings that are all of the measure's part of the suite."""
    return lambda suite: getattr(suite.measures, name).model_dump(mode="json")


def _nothing(suite: Suite) -> None:
    """No settings beside the run itself."""


MEASURES = {
    "scores": Measure(
        scores.take, True, scores.settings, scores.measure, scores.estimates, scores.tables, scores.plots
    ),
    "guidance": Measure(
        guidance.take,
        False,
        _own_part("guidance"),
        guidance.measure,
        guidance.estimates,
        guidance.tables,
        guidance.plots,
    ),
    "staleness": Measure(
        staleness.take, False, _nothing, staleness.measure, staleness.estimates, staleness.tables, staleness.plots
    ),
    "exposure": Measure(
        exposure.take,
        False,
        _own_part("exposure"),
        exposure.measure,
        exposure.estimates,
        exposure.tables,
        exposure.plots,
    ),
    "realism": Measure(None, False, _nothing, realism.measure, realism.estimates, realism.tables, realism.plots),
}


def measured(suite: Suite) -> list[str]:
    """Names of what a suite measures; the scores always."""
    return ["scores", *(name for name, part in suite.measures if part is not None)]
