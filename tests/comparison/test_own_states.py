"""The figures of docs/own_states.md are what the committed raw scores, pages and one trial's JSON say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_findings import is_rounded, means

from danceopd.comparison import runner
from danceopd.comparison.suite import load_suite
from danceopd.families.shapes import GeneratedExamples
from danceopd.world.generator import evaluation_set
from danceopd.world.render import render
from danceopd.world.scene import Scene
from danceopd.world.tasks import EDIT_TASKS
from danceopd.world.verify import score_edit

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "own_states.md").read_text()
COLORS = ("black", "gray", "pink", "white")
BY_COLOR = re.findall(r"^\| (\w+)" + r" \| ([\d.]+)" * 4 + r" \| (\d+) \| (\d+) \|$", TEXT, re.M)
BY_SEED = re.findall(r"^\| (none|data|teacher) \| ([\d., ]+) \| ([\d., ]+) \|$", TEXT, re.M)
BLANK = "0.604"


def kept(suite, method, seed, updates, measure="scores"):
    """What was taken of a run, as it is committed."""
    folder = suite.run_folder(method, seed=seed, root=DOCS / "results" / "trained")
    files = runner._files(suite, method, runner._kept_weights(folder, updates), [measure])
    return json.loads(files[measure].read_text())["taken"]


def background_changes(name, method, updates):
    """The suite's examples of background changes, and each student's scores on them: [seeds, n]."""
    suite, task = load_suite(DOCS.parent / "suites" / f"{name}.yaml"), EDIT_TASKS.index("background_change")
    evaluate = suite.recipes[method].evaluate
    examples = evaluation_set(EDIT_TASKS, per_task=evaluate.scenes_per_task, seed=evaluate.seed)
    scores = [kept(suite, method, seed, updates)["edit"][task] for seed in suite.seeds]
    return examples[task * evaluate.scenes_per_task :][: evaluate.scenes_per_task], np.array(scores)


def to(color, examples):
    return np.array([example.target.background == color for example in examples])


def blank_scores(color, examples):
    """What pictures of the background alone score."""
    blanks = [(render(Scene((), color, example.target.style)), example) for example in examples]
    return np.array([score_edit(*blank).overall for blank in blanks])


def empties(color, examples, scores):
    """How many pictures of each student, where the background is to be ``color``, score as a blank: [seeds]."""
    asked = to(color, examples)
    return (np.abs(scores[:, asked] - blank_scores(color, examples)[asked]) < 1e-3).sum(1)


@pytest.mark.parametrize(("method", "told"), [(row[0], row[1:]) for row in BY_COLOR])
def test_a_methods_background_changes_score_as_told(method, told):
    examples, scores = background_changes("local_global", method, 150)
    *by_color, stuck, empty = told
    assert by_color == [f"{scores[:, to(color, examples)].mean(1).mean():.3f}" for color in COLORS]
    asked = to("white", examples)
    assert int(stuck) == (scores[:, asked].mean(1) < 0.7).sum()
    blank = blank_scores("white", examples)[asked]
    assert f"{blank.mean():.3f}" == BLANK
    assert int(empty) == (empties("white", examples, scores) == asked.sum()).sum()


@pytest.mark.parametrize(("states", "early", "late"), BY_SEED)
def test_students_with_some_other_states_score_as_told(states, early, late):
    method = {"none": "danceopd", "data": "mixed_data", "teacher": "mixed_teacher"}[states]
    for updates, told in ((150, early), (450, late)):
        examples, scores = background_changes("local_global_longer", method, updates)
        assert told == ", ".join(f"{score:.3f}" for score in scores[:, to("white", examples)].mean(1))


def test_pictures_that_are_told_to_be_empty_score_as_a_blank():
    def counted(suite, method, updates, color="white"):
        return empties(color, *background_changes(suite, method, updates))

    assert (counted("local_global", "streaming", 248) == 30).sum() == 6  # six draw them all empty at 248
    assert [counted("local_global_longer", "danceopd", updates)[2] for updates in (300, 450)] == [30, 30]
    assert [counted("local_global_longer", "mixed_data", updates)[0] for updates in (150, 300)] == [18, 0]
    assert counted("local_global_limits", "global_alone", 150).tolist() == [30] * 3
    for color in ("black", "white"):
        own, noised, from_global = (
            counted("local_global_start", method, 150, color)
            for method in ("danceopd_base", "off_policy_base", "danceopd_global")
        )
        assert noised.max() < own.min()
        assert from_global.max() < noised.min()


def white_inputs():
    """Which of ``exposure``'s inputs of global edits ask for a white background."""
    suite = load_suite(DOCS.parent / "suites" / "local_global_longer.yaml")
    part, seed = suite.measures.exposure, suite.recipes["danceopd"].routes[0].data.seed
    drawn = GeneratedExamples("shapes/global", size=part.inputs_per_route, seed=seed + 1)
    return [i for i in range(len(drawn)) if drawn[i].prompt.endswith("background to white")]


def test_the_white_inputs_hold_a_stuck_students_error_on_noised_data():
    suite, shares = load_suite(DOCS.parent / "suites" / "local_global_unseen.yaml"), []
    for method in ("danceopd", "diffusion_opd"):
        examples, scores = background_changes("local_global_unseen", method, 150)
        for seed, empty in zip(suite.seeds, empties("white", examples, scores), strict=True):
            taken = kept(suite, method, seed, 150, "exposure")
            error = np.array(taken["data"]["error"][taken["routes"].index("global")]).sum(1)
            shares += [error[white_inputs()].sum() / error.sum()] if empty == 30 else []
    assert len(shares) == 7
    assert (int(100 * min(shares)), round(100 * max(shares))) == (94, 98)


def test_the_handed_over_rollouts_end_as_their_json_says():
    told = re.search(r"^\| k \|(.+)\|$\n.+\n^\| score, to white \|(.+)\|$", TEXT, re.M)
    scores = json.loads((DOCS / "own_states.json").read_text())["by_student_steps"]
    assert re.findall(r"[\d.]+", told[2]) == [f"{scores[int(k)]:.3f}" for k in re.findall(r"\d+", told[1])]
    examples, students = background_changes("local_global_longer", "danceopd", 450)
    assert scores[-1] == pytest.approx(students[0, to("white", examples)].mean(), abs=1e-3)  # its own rollout


def test_the_stuck_student_errs_as_told():
    suite = load_suite(DOCS.parent / "suites" / "local_global_longer.yaml")
    taken = kept(suite, "danceopd", 5, 450, "exposure")
    route = taken["routes"].index("global")
    error, size = (np.array(taken["own"][key][route])[white_inputs()].sum(0) for key in ("error", "size"))
    told = re.search(r"^\| off, % \|(.+)\|$", TEXT, re.M)[1]
    assert re.findall(r"[\d.]+", told) == [f"{100 * share:.1f}" for share in error / size]
    errors = [
        np.sum(taken[states]["error"][route]) / np.sum(taken[states]["size"][route]) for states in ("own", "data")
    ]
    assert "{:.1f} % and {:.1f} %".format(*(100 * share for share in errors)) in TEXT


def test_what_the_share_is_worth_is_in_its_page():
    told = re.findall(r"\d\.\d+", TEXT.split("at 450 updates 1.01")[1])
    known = list(means(json.loads((DOCS / "results" / "local_global_longer.json").read_text())))
    assert len(told) == 7
    assert not [number for number in told if not any(is_rounded(number, mean) for mean in known)]


def test_the_tables_are_whole():
    assert {row[0] for row in BY_COLOR} == {"danceopd", "streaming", "diffusion_opd", "flow_opd", "off_policy", "joint"}
    assert [row[0] for row in BY_SEED] == ["none", "data", "teacher"]
    assert re.findall(r"to (\w+) \|", TEXT)[: len(COLORS)] == list(COLORS)
