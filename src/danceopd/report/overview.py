"""``overview.png``: every model's picture of the same prompts, as one image to show."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from danceopd.training.run_folder import RunFolder


def write_overview(folder: RunFolder) -> Path:
    """A row per task (its words, the source image of an edit, every model's picture), text-to-image beside editing."""
    evaluation = folder.evaluation()
    models = list(evaluation["models"])
    halves = [
        ([row for row in evaluation["shown"] if row["capability"] == "t2i"], models),
        ([row for row in evaluation["shown"] if row["capability"] == "edit"], ["source", *models]),
    ]
    widths = [2.2, *[1.0] * len(models), 0.3, 2.4, *[1.0] * (len(models) + 1)]
    height = max(len(rows) for rows, _ in halves)
    figure, axes = plt.subplots(
        height, len(widths), figsize=(sum(widths), height * 1.02), width_ratios=widths, squeeze=False
    )
    for cell in axes.flat:
        cell.axis("off")
    first = 0
    for rows, columns in halves:
        for index, row in enumerate(rows):
            words = textwrap.fill(row["text"], 24, break_long_words=False, break_on_hyphens=False)
            axes[index, first].text(1.0, 0.5, words, ha="right", va="center", fontsize=8)
            for column, name in enumerate(columns, start=first + 1):
                cell = axes[index, column]
                cell.imshow(plt.imread(folder.samples / "evaluation" / row["files"][name]), interpolation="nearest")
                if index == 0:
                    cell.set_title(name, fontsize=9, fontweight="bold" if name == "student" else "normal")
        first += 2 + len(columns)
    path = folder.path / "overview.png"
    figure.subplots_adjust(wspace=0.06, hspace=0.06, left=0.0, right=0.99, top=0.95, bottom=0.01)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
