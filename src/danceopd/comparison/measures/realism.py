"""Realism absorption: how much of the reward gap between base and teacher a student closes, unseen.

The reward is the verifiers' own (``world.verify.realism_reward``) on text-to-image pictures. Training matches
velocities and never calls it; only evaluation does.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from danceopd.comparison.results import Results
from danceopd.comparison.statistics import as_json, gap_closed, mean_over_seeds, paired_difference
from danceopd.comparison.suite import Suite
from danceopd.comparison.tables import Plot, Table, percent, score, signed
from danceopd.report.page import figure_png


def measure(suite: Suite, results: Results) -> dict[str, Any]:
    """Rewards of base, teacher and each method, the share of the gap that it closes, and its lead over the reference.

    Of each method at equal updates, and under ``compute`` at equal compute.
    """
    part = suite.measures.realism
    assert part is not None
    base, teacher = (results.source(name, "realism") for name in ("base", part.teacher))

    def entry(method: str, view: str) -> dict[str, Any]:
        reward = results.scores(method, results.views[method][view], "realism")
        found = {"reward": as_json(mean_over_seeds(reward)), "gap_closed": as_json(gap_closed(reward, base, teacher))}
        if suite.reference in results.views and method != suite.reference:
            theirs = results.scores(suite.reference, results.views[suite.reference][view], "realism")
            found["minus_reference"] = as_json(paired_difference(reward, theirs))
        return found

    methods = {}
    for method, views in results.views.items():
        at_compute = {"compute": entry(method, "compute")} if "compute" in views else {}
        methods[method] = entry(method, "updates") | at_compute
    sources = {name: as_json(mean_over_seeds(results.source(name, "realism")[None])) for name in results.sources}
    return {"teacher": part.teacher, "reference": suite.reference, "sources": sources, "methods": methods}


def estimates(suite: Suite) -> dict[str, Any]:
    """See ``Measure``."""

    def entry(method: str) -> dict[str, Any]:
        lead = ["minus_reference"] if method != suite.reference else []
        return dict.fromkeys(("reward", "gap_closed", *lead))

    at_compute = "compute" in suite.views
    return {"methods": {name: entry(name) | ({"compute": entry(name)} if at_compute else {}) for name in suite.recipes}}


def tables(content: dict[str, Any]) -> list[Table]:
    """A table for each view: who earns which reward, and the share of the gap."""
    note = (
        f"Share of the gap: (student - base) / ({content['teacher']} - base), paired by scene. "
        "The reward is never called in training."
    )
    methods = content["methods"]
    if any("minus_reference" in entry for entry in methods.values()):
        note += f" Δ is the reward's paired difference to {content['reference']}."
    made = [_table("Realism reward", content["sources"], methods, note)]
    if any("compute" in entry for entry in methods.values()):
        at_compute = {name: entry["compute"] for name, entry in methods.items()}
        made.append(_table("Realism reward, at equal compute", content["sources"], at_compute, note))
    return made


def _table(title: str, sources: dict[str, Any], methods: dict[str, Any], note: str) -> Table:
    rows = [[name, score(reward), "", ""] for name, reward in sources.items()]
    rows += [
        [name, score(e["reward"]), percent(e["gap_closed"]), signed(e.get("minus_reference"))]
        for name, e in methods.items()
    ]
    header = ("model", "reward", "share of the gap closed", "Δ")
    if not any("minus_reference" in entry for entry in methods.values()):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Table(title, header, rows, note)


def plots(content: dict[str, Any]) -> list[Plot]:
    """Rewards as bars with intervals."""
    sources, methods = content["sources"], content["methods"]
    rewards = [*sources.values(), *(entry["reward"] for entry in methods.values())]
    figure, axes = plt.subplots(figsize=(1.2 + 1.1 * len(rewards), 3.2))
    value, low, high = (np.array([reward[key] for reward in rewards]) for key in ("value", "low", "high"))
    colors = ["#999"] * len(sources) + ["#3b6fb6"] * len(methods)
    axes.bar(range(len(rewards)), value, yerr=[value - low, high - value], color=colors, capsize=3)
    axes.set_xticks(range(len(rewards)), [*sources, *methods])
    axes.set(ylabel="realism reward", ylim=(0, 1))
    return [Plot("Realism reward", figure_png(figure))]
