"""The committed pages are what the committed raw scores and the suites, as they are, give."""

import json
from pathlib import Path

import pytest
from PIL import Image

from danceopd.comparison import runner
from danceopd.comparison.claims import settle, stated
from danceopd.comparison.compare import read_comparison
from danceopd.comparison.measures import measured, scores
from danceopd.comparison.page import markdown
from danceopd.comparison.results import Point, Results
from danceopd.comparison.search_file import FINALS, RULE
from danceopd.comparison.suite import load_suite

RESULTS, SUITES = Path(__file__).parents[2] / "docs" / "results", Path(__file__).parents[2] / "suites"
OTHER_JSON = {"world.json", "world_rebuilt.json", "memory.json"}
"""Files of docs/results that no comparison made."""


def test_text_to_image_and_editing_have_their_plane_beside_the_first_two_capabilities():
    def planes(name):
        plots = scores.plots(read_comparison(RESULTS / f"{name}.json")["measures"]["scores"])
        return [plot.title.removesuffix(", at equal updates (stars: sources)") for plot in plots[1:-1]]

    assert planes("t2i_edit") == ["Text to image and editing"]
    assert planes("local_global") == ["Local edits and global edits", "Text to image and editing"]


def test_every_committed_result_has_the_page_that_its_json_makes():
    unmade = set()
    for file in sorted(RESULTS.glob("*.json")):
        summary = read_comparison(file)
        if summary is None:
            unmade.add(file.name)
            continue
        assert file.stem == summary["suite"]
        page, picture = file.with_suffix(".md").read_text(encoding="utf-8"), f"{file.stem}.png"
        assert page == markdown(summary, picture=picture), f"danceopd pages {file}"
        assert Image.open(RESULTS / picture).width > 600
    assert unmade == OTHER_JSON


PUBLISHED = sorted({file.stem for file in RESULTS.glob("*.md")} - {"README"})


def test_all_raw_scores_are_of_a_published_suite():
    suites = [load_suite(SUITES / f"{name}.yaml") for name in PUBLISHED]
    known = {f"{method}-{suite.fingerprint(method)}" for suite in suites for method in suite.recipes}
    assert {folder.name for folder in (RESULTS / "trained").iterdir() if folder.is_dir()} == known


def _results(suite, summary):
    """The results that were summarised, from the committed raw scores."""
    found = summary["measures"]["scores"]

    def points(method, updates):
        key = runner._key(suite, method, "scores")
        for seed in suite.seeds:
            folder = suite.run_folder(method, seed=seed, root=RESULTS / "trained")
            content = json.loads((folder / "points" / f"{updates:06d}-scores-{key}.json").read_text())
            yield Point(content["updates"], content["compute"], content["seconds"], {"scores": content["taken"]})

    views = {view: found["views"][view] for view in found["views"]}
    return Results(
        points={
            method: {int(updates): list(points(method, int(updates))) for updates in runs}
            for method, runs in found["runs"].items()
        },
        views={method: {view: views[view][method]["updates"] for view in views} for method in suite.recipes},
        sources=json.loads(runner._sources_file(suite, RESULTS / "trained").read_text())["scores"],
        expected={
            method: {view: views[view][method]["expected_compute"] for view in views} for method in suite.recipes
        },
    )


def _leaves(content, path=""):
    """Nested JSON as {where: number} and {where: any other value}."""
    if not isinstance(content, dict | list | tuple):
        return ({path: content}, {}) if isinstance(content, int | float) else ({}, {path: content})
    numbers, others = {}, {}
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        for found, of_value in zip((numbers, others), _leaves(value, f"{path}/{key}"), strict=True):
            found |= of_value
    return numbers, others


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_committed_result_is_of_its_suite_as_it_is(name):
    summary, suite = read_comparison(RESULTS / f"{name}.json"), load_suite(SUITES / f"{name}.yaml")
    told = [{key: claim[key] for key in ("text", "paper", "holds", "kind")} for claim in summary["claims"]]
    assert told == [stated(claim) for claim in suite.claims]
    assert (summary["title"], summary["part"]) == (suite.title, None)
    assert summary["seeds"] == len(suite.seeds)
    assert summary["scenes_per_task"] == suite.recipes[suite.reference].evaluate.scenes_per_task
    assert list(summary["measures"]) == list(measured(suite))
    assert list(summary["measures"]["scores"]["views"]["updates"]) == list(suite.recipes)
    results = _results(suite, summary)
    again = {"scores": scores.measure(suite, results), "claims": settle(suite, results, summary["measures"])}
    kept = {"scores": summary["measures"]["scores"], "claims": summary["claims"]}
    numbers, others = _leaves(again)
    assert (numbers, others) == (pytest.approx(_leaves(kept)[0], rel=0, abs=1.1e-4), _leaves(kept)[1])
    if suite.searched is not None:
        finals = RULE if suite.searched.final_updates is None else f"{RULE} {FINALS}"
        assert suite.searched.rule == summary["searched"]["rule"] == finals
        edges = {name: found.edges for name, found in suite.searched.methods.items() if found.edges}
        assert summary["searched"]["edges"] == edges
    chosen = {} if suite.searched is None else {name: found.chosen for name, found in suite.searched.methods.items()}
    assert (summary["searched"] or {"chosen": {}})["chosen"] == chosen
