"""The committed pages are what the committed raw scores and the suites, as they are, give."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from danceopd.comparison import runner
from danceopd.comparison.claims import settle, stated
from danceopd.comparison.compare import read_comparison
from danceopd.comparison.measures import MEASURES, measured, scores
from danceopd.comparison.page import markdown
from danceopd.comparison.results import Point, Results
from danceopd.comparison.search_file import FINALS, RULE
from danceopd.comparison.suite import load_suite
from danceopd.training.assemble import assemble

RESULTS, SUITES = Path(__file__).parents[2] / "docs" / "results", Path(__file__).parents[2] / "suites"
OTHER_JSON = {"world.json", "world_rebuilt.json", "memory.json"}
"""Files of docs/results that no comparison made."""
NOT_KEPT = {("cfg", "guidance"), *((name, "exposure") for name in ("mismatched", "t2i_edit", "unseen_style"))}
"""Measures of suites of which what was taken of the runs is not committed."""


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


def _again(suite):
    """The measures that are made anew from what was taken of the runs."""
    return [name for name in measured(suite) if (suite.name, name) not in NOT_KEPT]


def _results(suite):
    """What was summarised: the committed raw scores, at the lengths and for the compute that the suite gives."""
    methods = {name: assemble(recipe, device=torch.device("cpu")) for name, recipe in suite.recipes.items()}
    lengths = {name: runner.comparison_updates(suite, name, method) for name, method in methods.items()}
    further = {name: suite.points if recipe.train.steps else () for name, recipe in suite.recipes.items()}

    def point(method, updates, seed):
        folder, taken = suite.run_folder(method, seed=seed, root=RESULTS / "trained"), {}
        for name in _again(suite):
            here = MEASURES[name].everywhere or updates == lengths[method].get("updates")
            if MEASURES[name].take is not None and here:
                files = runner._files(suite, method, runner._kept_weights(folder, updates), [name])
                content = json.loads(files[name].read_text())
                taken[name] = content["taken"]
        return Point(content["updates"], content["compute"], content["seconds"], taken)

    return Results(
        points={
            method: {
                updates: [point(method, updates, seed) for seed in suite.seeds]
                for updates in sorted({*lengths[method].values(), *further[method]})
            }
            for method in suite.recipes
        },
        views=lengths,
        sources=json.loads(runner._sources_file(suite, RESULTS / "trained").read_text())["scores"],
        expected={name: runner.expected_compute(lengths[name], method) for name, method in methods.items()},
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


def _estimates(content, path=""):
    """Where nested JSON, or what says so of it, has intervals."""
    if content is None or (isinstance(content, dict) and {"value", "low", "high"} <= content.keys()):
        return {path}
    parts = content.items() if isinstance(content, dict) else ()
    return {found for key, value in parts for found in _estimates(value, f"{path}/{key}")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_claims_may_be_about_every_interval_of_a_method_and_nothing_else(name):
    suite, kept = load_suite(SUITES / f"{name}.yaml"), read_comparison(RESULTS / f"{name}.json")["measures"]
    for measure, content in kept.items():
        told = MEASURES[measure].estimates(suite)
        assert _estimates(told)
        assert _estimates({part: content[part] for part in told}) == _estimates(told)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_committed_result_is_of_its_suite_as_it_is(name):
    summary, suite = read_comparison(RESULTS / f"{name}.json"), load_suite(SUITES / f"{name}.yaml")
    told = [{key: claim[key] for key in ("text", "paper", "holds", "kind")} for claim in summary["claims"]]
    assert told == [stated(claim) for claim in suite.claims]
    assert (summary["title"], summary["part"]) == (suite.title, None)
    assert summary["seeds"] == len(suite.seeds)
    assert summary["scenes_per_task"] == suite.recipes[suite.reference].evaluate.scenes_per_task
    assert list(summary["measures"]) == list(measured(suite))
    results, kept = _results(suite), summary["measures"]
    again = kept | {name: MEASURES[name].measure(suite, results) for name in _again(suite)}
    numbers, others = _leaves({"measures": again, "claims": settle(suite, results, again)})
    numbers_kept, others_kept = _leaves({"measures": kept, "claims": summary["claims"]})
    assert (numbers, others) == (pytest.approx(numbers_kept, rel=0, abs=1.1e-4), others_kept)
    if suite.searched is not None:
        finals = f"{RULE} {FINALS}" if suite.searched.has_finals else RULE
        assert suite.searched.rule == summary["searched"]["rule"] == finals
        edges = {name: found.edges for name, found in suite.searched.methods.items() if found.edges}
        assert summary["searched"]["edges"] == edges
    chosen = {} if suite.searched is None else {name: found.chosen for name, found in suite.searched.methods.items()}
    assert (summary["searched"] or {"chosen": {}})["chosen"] == chosen
