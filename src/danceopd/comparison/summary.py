"""From results to what is said of them: the content of ``comparison.json``."""

from __future__ import annotations

from typing import Any

from danceopd.comparison import claims
from danceopd.comparison.measures import MEASURES, measured
from danceopd.comparison.results import Results
from danceopd.comparison.suite import Suite

KIND = "comparison"
"""What marks a JSON file as one that ``compare`` made."""
PARTS = {"suite", "title", "seeds", "part", "scenes_per_task", "searched", "paper", "measures", "claims"}
"""What else it has."""


def summarise(suite: Suite, results: Results, part: str | None) -> dict[str, Any]:
    """Everything that the pages show: each measure's JSON, the verdicts, and where the settings come from.

    part: what of the suite this is, in words; None for all of it.
    """
    measures = {name: MEASURES[name].measure(suite, results) for name in measured(suite)}
    searched = None
    if suite.searched is not None:
        of_methods = {name: suite.searched.methods[name] for name in results.views if name in suite.searched.methods}
        searched = {
            "rule": suite.searched.rule,
            "updates": suite.searched.updates,
            "final_updates": suite.searched.final_updates,
            "compute": suite.searched.compute,
            "final_compute": suite.searched.final_compute,
            "trials": len(next(iter(suite.searched.methods.values())).trials),
            "chosen": {name: found.chosen for name, found in of_methods.items()},
            "edges": {name: found.edges for name, found in of_methods.items() if found.edges},
        }
    return {
        "kind": KIND,
        "suite": suite.name,
        "title": suite.title,
        "seeds": len(suite.seeds),
        "part": part,
        "scenes_per_task": suite.recipes[suite.reference].evaluate.scenes_per_task,
        "searched": searched,
        "paper": None if suite.paper is None else suite.paper.what,
        "measures": measures,
        "claims": claims.settle(suite, results, measures),
    }
