"""Realism absorption: how much of the reward gap between base and teacher a student closes, unseen.

The reward is the verifiers' own (``world.verify.realism_reward``) on text-to-image pictures. Training matches
velocities and never calls it; only evaluation does.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from danceopd.comparison.results import Results
from danceopd.comparison.statistics import as_json, gap_closed, mean_over_seeds
from danceopd.comparison.suite import Suite
from danceopd.comparison.tables import Plot, Table, percent, score
from danceopd.report.page import figure_url


def measure(suite: Suite, results: Results) -> dict[str, Any]:
    """Rewards of base, teacher and each method at equal updates, and the share of the gap that it closes."""
    part = suite.measures.realism
    assert part is not None
    base, teacher = (results.source(name, "realism") for name in ("base", part.teacher))
    methods = {}
    for method, views in results.views.items():
        reward = results.scores(method, views["updates"], "realism")
        methods[method] = {
            "reward": as_json(mean_over_seeds(reward)),
            "gap_closed": as_json(gap_closed(reward, base, teacher)),
        }
    sources = {name: as_json(mean_over_seeds(results.source(name, "realism")[None])) for name in results.sources}
    return {"teacher": part.teacher, "sources": sources, "methods": methods}


def tables(content: dict[str, Any]) -> list[Table]:
    """One table: who earns which reward, and the share of the gap."""
    rows = [[name, score(reward), ""] for name, reward in content["sources"].items()]
    rows += [[name, score(e["reward"]), percent(e["gap_closed"])] for name, e in content["methods"].items()]
    note = (
        f"Share of the gap: (student - base) / ({content['teacher']} - base), paired by scene. "
        "The reward is never called in training."
    )
    return [Table("Realism reward", ("model", "reward", "share of the gap closed"), rows, note)]


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
    return [Plot("Realism reward", figure_url(figure))]
