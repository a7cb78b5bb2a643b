import json
from pathlib import Path

import pytest
import yaml

from danceopd.comparison.compare import compare, write_pages
from danceopd.comparison.runner import ComparisonError
from danceopd.comparison.suite import SuiteError, load_suite, updates_within
from danceopd.training.checkpoint import CheckpointFailure

SUITES = sorted((Path(__file__).parents[2] / "suites").glob("*.yaml"))
TINY = {
    "version": 1,
    "title": "tiny",
    "reference": "danceopd",
    "updates": 2,
    "compute": 300.0,
    "seeds": 1,
    "recipe": {
        "version": 1,
        "family": "shapes",
        "base": "shapes:base",
        "fields": {"t2i": {"base": True}, "edit": {"lora": "shapes:edit"}},
        "student": {"init": "edit"},
        "routes": [
            {"field": "t2i", "data": {"generator": "shapes/t2i"}},
            {"field": "edit", "data": {"generator": "shapes/edit"}},
        ],
        "rollout": {"num_inference_steps": 4},
        "train": {"batch_size": 4, "precision": "fp32", "sample_steps": 0},
        "evaluate": {"scenes_per_task": 2, "num_inference_steps": 2},
    },
    "methods": {
        "danceopd": {},
        "joint": {"method": "joint"},
        "merge": {
            "method": "weight_merge",
            "student": {"init": {"t2i": 1.0, "edit": 1.0}, "init_mode": "merged"},
            "train.steps": 0,
        },
    },
}


def write(tmp_path, **changes):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_shipped_suites_are_valid(path):
    suite = load_suite(path)
    assert suite.reference in suite.recipes


def test_a_suite_is_compared_and_never_recomputed(tmp_path):
    path, out = write(tmp_path), tmp_path / "out"
    compare(path, out=out, only=["joint"])
    first = {file: file.stat().st_mtime_ns for file in out.rglob("points/*.json")}
    assert len(first) == 2  # one run, scored at equal updates and at equal compute
    with pytest.raises(ComparisonError, match="already holds a comparison; go on with --resume"):
        compare(path, out=out)
    compare(path, out=out, resume=True)
    assert all(file.stat().st_mtime_ns == time for file, time in first.items())
    summary = json.loads((out / "comparison.json").read_text())
    updates = {
        view: {name: entry["updates"] for name, entry in methods.items()} for view, methods in summary["views"].items()
    }
    assert updates["updates"] == {"danceopd": 2, "joint": 2, "merge": 0}
    assert updates["compute"]["joint"] == 300 // 12
    assert 1 <= updates["compute"]["danceopd"] < updates["compute"]["joint"]
    joint = summary["views"]["compute"]["joint"]
    assert joint["compute"] == 300
    assert joint["t2i"]["minus_reference"]["low"] <= joint["t2i"]["minus_reference"]["value"]
    page = (out / "comparison.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("data:image/png;base64,") == 3
    assert "| **danceopd** | 2 |" in (out / "comparison.md").read_text()
    text = (out / "comparison.md").read_text()
    write_pages(out)
    assert (out / "comparison.md").read_text() == text  # the page is a function of the JSON


def test_a_cached_run_whose_sources_changed_is_refused(tmp_path):
    path, out = write(tmp_path, methods={"danceopd": {}}), tmp_path / "out"
    compare(path, out=out)
    last = max(out.rglob("points/*.json"))
    whole = last.read_text()
    last.write_text(whole.replace(json.loads(whole)["hashes"]["shapes:edit"], "0" * 64))
    with pytest.raises(ComparisonError, match="other sources or data"):
        compare(path, out=out, resume=True)
    last.unlink()
    for state in out.rglob("state.json"):
        content = json.loads(state.read_text())
        content["hashes"]["shapes:edit"] = "0" * 64
        state.write_text(json.dumps(content))
    with pytest.raises(CheckpointFailure, match="shapes:edit"):
        compare(path, out=out, resume=True)
    first = min(out.rglob("points/*.json"))
    first.unlink()
    with pytest.raises(ComparisonError, match="was never scored at 2; remove that folder"):
        compare(path, out=out, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "nobody"}, "reference 'nobody' is none of"),
        ({"sedes": 3}, "sedes"),
        ({"methods": {"danceopd": {"method": "danseopd"}}}, "did you mean 'danceopd'"),
        ({"methods": {"danceopd": {}, "x": {"evaluate.seed": 3}}}, "do not share 'evaluate'"),
        ({"methods": {"danceopd": {}, "x": {"fields.edit": {"lora": "shapes:local"}}}}, "do not share their sources"),
        ({"methods": {"danceopd": {}, "x": {"routes.0.data.seed": 3}}}, "do not share their training data"),
        ({"methods": {"danceopd": {}, "x": {"train.batch_size": 8}}}, "do not share train.batch_size"),
        ({"methods": {"danceopd": {"train.lr_scheduler": "linear"}}}, "must be 'constant'"),
    ],
)
def test_suites_that_compare_unlike_things_are_refused(tmp_path, changes, message):
    with pytest.raises(SuiteError, match=message):
        load_suite(write(tmp_path, **changes))


def test_a_budget_that_pays_for_no_update_is_refused(tmp_path):
    assert updates_within(300.0, 12.0, "joint") == 25
    with pytest.raises(SuiteError, match="does not pay for one"):
        updates_within(10.0, 12.0, "joint")
    with pytest.raises(ComparisonError, match="no method 'nobody'"):
        compare(write(tmp_path), out=tmp_path / "out", only=["nobody"])
