"""The tables of docs/own_states.md are what the committed raw scores say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from danceopd.comparison import runner
from danceopd.comparison.suite import load_suite
from danceopd.world.generator import evaluation_set
from danceopd.world.tasks import EDIT_TASKS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "own_states.md").read_text()
COLORS = ("black", "gray", "pink", "white")
BY_COLOR = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", TEXT, re.M)
BY_SEED = re.findall(r"^\| (none|data|teacher) \| ([\d., ]+) \| ([\d., ]+) \|$", TEXT, re.M)
STUCK_BELOW = 0.7


def scores_by_color(suite, method, updates):
    """Each student's mean score where the background is to be of a colour, by colour: [seeds]."""
    suite, task = load_suite(ROOT / "suites" / f"{suite}.yaml"), EDIT_TASKS.index("background_change")
    evaluate = suite.recipes[method].evaluate
    examples = evaluation_set(EDIT_TASKS, per_task=evaluate.scenes_per_task, seed=evaluate.seed)
    examples = examples[task * evaluate.scenes_per_task :][: evaluate.scenes_per_task]
    asked = np.array([example.target.background for example in examples])
    scores = []
    for seed in suite.seeds:
        folder = suite.run_folder(method, seed=seed, root=ROOT / "docs" / "results" / "trained")
        file = folder / "points" / f"{updates:06d}-scores-{runner._key(suite, method, 'scores')}.json"
        scores.append(json.loads(file.read_text())["taken"]["edit"][task])
    return {color: np.array(scores)[:, asked == color].mean(1) for color in COLORS}


@pytest.mark.parametrize(("method", "told"), [(row[0], row[1:]) for row in BY_COLOR])
def test_a_methods_background_changes_score_as_told(method, told):
    found = scores_by_color("local_global", method, 150)
    *means, stuck = told
    assert means == [f"{found[color].mean():.3f}" for color in COLORS]
    assert int(stuck) == (found["white"] < STUCK_BELOW).sum()


@pytest.mark.parametrize(("states", "early", "late"), BY_SEED)
def test_students_with_some_other_states_score_as_told(states, early, late):
    method = {"none": "danceopd", "data": "mixed_data", "teacher": "mixed_teacher"}[states]
    for updates, told in ((150, early), (450, late)):
        found = scores_by_color("local_global_longer", method, updates)["white"]
        assert told == ", ".join(f"{score:.3f}" for score in found)


def test_the_tables_are_whole():
    assert {row[0] for row in BY_COLOR} == {"danceopd", "streaming", "diffusion_opd", "flow_opd", "off_policy", "joint"}
    assert [row[0] for row in BY_SEED] == ["none", "data", "teacher"]
    assert re.findall(r"to (\w+) \|", TEXT)[: len(COLORS)] == list(COLORS)
