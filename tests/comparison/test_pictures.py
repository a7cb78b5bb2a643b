"""What a comparison's pictures show is what its JSON says."""

from pathlib import Path

import numpy as np
import pytest

from danceopd.comparison.compare import read_comparison
from danceopd.comparison.measures import scores

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture
def content():
    return read_comparison(RESULTS / "t2i_edit.json")["measures"]["scores"]


@pytest.fixture
def figures(content, monkeypatch):
    """The figures of scores against compute, of the T2I-edit plane, and of the tasks."""
    made = []
    monkeypatch.setattr(scores, "figure_png", lambda figure: made.append(figure) or b"")
    scores.plots(content)
    assert len(made) == 3
    return made


def points(container):
    """Where an error bar's marks are: [n, 2]."""
    return container.lines[0].get_xydata()


def spans(container):
    """The lower and upper ends of an error bar's vertical spans: [n, 2]."""
    return np.array([segment[:, 1] for segment in container.lines[2][-1].get_segments()])


def test_scores_stand_at_their_compute_with_their_intervals(content, figures):
    for axes, capability in zip(figures[0].axes, ("t2i", "edit"), strict=True):
        shown = {container.get_label(): container for container in axes.containers}
        untrained = {line.get_label() for line in axes.lines if line.get_linestyle() == "--"}
        assert shown.keys() | untrained == content["curve"].keys()
        assert untrained == {"weight_merge", "even_merge"}
        for name, container in shown.items():
            told = sorted(content["curve"][name], key=lambda point: point["compute"])
            drawn, compute = points(container), [point["compute"] for point in told]
            np.testing.assert_allclose(drawn[:, 0], compute, rtol=0.05)  # methods at one compute are drawn apart
            np.testing.assert_allclose(drawn[:, 1], [point[capability]["value"] for point in told])
            ends = [[point[capability][end] for end in ("low", "high")] for point in told]
            np.testing.assert_allclose(spans(container), ends)


def test_the_plane_has_every_method_with_its_intervals_and_every_source_marked(content, figures):
    (axes,) = figures[1].axes
    stars = {tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "*"}
    assert stars == {(told["t2i"]["value"], told["edit"]["value"]) for told in content["sources"].values()}
    assert {text.get_text() for text in axes.texts} == content["sources"].keys()
    shown = {container.get_label(): container for container in axes.containers}
    assert shown.keys() == content["views"]["updates"].keys()
    for name, container in shown.items():
        t2i, edit = (content["views"]["updates"][name][capability]["overall"] for capability in ("t2i", "edit"))
        np.testing.assert_allclose(points(container), [[t2i["value"], edit["value"]]])
        np.testing.assert_allclose(spans(container), [[edit["low"], edit["high"]]])


def test_every_task_has_a_bar_of_each_method_with_its_interval(content, figures):
    for axes, capability in zip(figures[2].axes, ("t2i", "edit"), strict=True):
        bars = {container.get_label(): container for container in axes.containers if hasattr(container, "patches")}
        assert bars.keys() == content["views"]["updates"].keys()
        for name, container in bars.items():
            tasks = content["views"]["updates"][name][capability]["tasks"]
            assert [label.get_text() for label in axes.get_xticklabels()] == list(tasks)
            heights = [bar.get_height() for bar in container.patches]
            np.testing.assert_allclose(heights, [told["value"] for told in tasks.values()])
            ends = [[told["low"], told["high"]] for told in tasks.values()]
            np.testing.assert_allclose(spans(container.errorbar), ends)
