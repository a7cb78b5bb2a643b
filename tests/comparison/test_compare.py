import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_suites import SEARCH, TINY, write

from danceopd.comparison import runner
from danceopd.comparison.compare import compare, read_comparison, write_pages
from danceopd.comparison.page import html, markdown
from danceopd.comparison.runner import ComparisonError
from danceopd.comparison.suite import SuiteError, load_suite
from danceopd.families.shapes import WEIGHTS
from danceopd.runs import train
from danceopd.training.assemble import assemble
from danceopd.training.trainer import Trainer

CLAIMS = [
    {"method": "danceopd", "over": "joint", "capability": "edit", "paper": "+15.8 %"},
    {"method": "danceopd", "over": "joint", "capability": "t2i", "view": "compute"},
    {
        "text": "as good as the edit source",
        "measure": "scores",
        "at": "views/updates/danceopd/edit/of_best_source",
        "at_least": 1.0,
    },
]


def measured_files(out):
    return {file: file.stat().st_mtime_ns for file in out.rglob("points/*.json")}


def without_seconds(content):
    if isinstance(content, dict):
        return {key: without_seconds(value) for key, value in content.items() if key != "seconds"}
    return [without_seconds(value) for value in content] if isinstance(content, list) else content


def test_a_suite_is_compared_and_never_recomputed(tmp_path):
    paper = {"what": "GEditBench / GenEval", "figures": {"joint": "4.617 / 0.808"}}
    path, out = write(tmp_path, points=[1, 2], claims=CLAIMS, paper=paper), tmp_path / "out"
    compare(path, out=out, only=["joint"])
    first = measured_files(out)
    part = out / path.stem / "part.md"
    assert "A part of the suite: without danceopd, merge." in part.read_text()
    assert len(first) == 3  # one run: a further point, equal updates (a point too) and equal compute
    with pytest.raises(ComparisonError, match="already holds files; go on with --resume"):
        compare(path, out=out)
    compare(path, out=out, resume=True)
    assert all(file.stat().st_mtime_ns == time for file, time in first.items())
    whole = (out / path.stem / "comparison.json").read_text()
    compare(path, out=out, only=["joint"], resume=True)
    assert (out / path.stem / "comparison.json").read_text() == whole  # a part replaces no whole
    summary = read_comparison(out / path.stem / "comparison.json")
    scores = summary["measures"]["scores"]
    updates = {
        view: {name: entry["updates"] for name, entry in methods.items()} for view, methods in scores["views"].items()
    }
    assert updates["updates"] == {"danceopd": 2, "joint": 2, "merge": 0}
    assert updates["compute"]["joint"] == 108 // 12
    assert 1 <= updates["compute"]["danceopd"] < updates["compute"]["joint"]
    assert [point["updates"] for point in scores["curve"]["joint"]] == [1, 2, 9]
    assert [point["updates"] for point in scores["curve"]["merge"]] == [0]
    joint = scores["views"]["compute"]["joint"]
    assert joint["compute"] == 108
    assert joint["t2i"]["minus_reference"]["low"] <= joint["t2i"]["minus_reference"]["value"]
    assert "minus_reference" not in scores["views"]["compute"]["danceopd"]["t2i"]
    assert summary["part"] is None
    lead, behind = summary["claims"][0]["estimate"], scores["views"]["updates"]["joint"]["edit"]["minus_reference"]
    mirrored = {"value": -behind["value"], "low": -behind["high"], "high": -behind["low"]}
    assert lead == mirrored | {"detectable": behind["detectable"]}  # verdicts and tables say the same
    page = (out / path.stem / "comparison.html").read_text()
    assert "http" not in page
    assert page.count("data:image/png;base64,") == 3
    text = (out / path.stem / "comparison.md").read_text()
    assert "| **danceopd** | 2 |" in text
    assert "| danceopd leads joint: editing, equal updates | +15.8 % |" in text
    assert "| 4.617 / 0.808 |" in text
    assert (markdown(summary), html(summary)[:500]) == (text, page[:500])  # pages are a function of the JSON


def test_a_killed_comparison_goes_on_and_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    path = write(tmp_path, compute=None, updates=4, recipe=_saved_often(), methods={"danceopd": {}, "joint": JOINT})
    compare(path, out=tmp_path / "whole")
    update, made = Trainer.update, []

    def killed(trainer):
        if len(made) == 6:
            raise KeyboardInterrupt
        made.append(trainer.folder.path.parent.name)
        return update(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(path, out=tmp_path / "cut")
    first = measured_files(tmp_path / "cut")
    assert len(first) == 1
    made.clear()
    monkeypatch.setattr(Trainer, "update", lambda trainer: made.append(trainer) or update(trainer))
    compare(path, out=tmp_path / "cut", resume=True)
    assert len(made) == 2  # joint's last two updates and none of danceopd's
    assert all(file.stat().st_mtime_ns == time for file, time in first.items())
    whole, cut = (read_comparison(tmp_path / name / path.stem / "comparison.json") for name in ("whole", "cut"))
    assert without_seconds(cut) == without_seconds(whole)


JOINT = {"method": "joint"}


def test_suites_share_the_runs_of_equal_recipes(tmp_path, monkeypatch):
    path, out = write(tmp_path, compute=None, methods={"joint": JOINT}, reference="joint"), tmp_path / "out"
    compare(path, out=out)
    other = path.rename(tmp_path / "other.yaml")
    monkeypatch.setattr(Trainer, "update", lambda trainer: pytest.fail("trained again"))
    assert compare(other, out=out) == out / "other" / "comparison.json"
    results = [read_comparison(out / name / "comparison.json") for name in ("tiny", "other")]
    assert results[0]["measures"] == results[1]["measures"]


def _saved_often():
    return TINY["recipe"] | {"train": TINY["recipe"]["train"] | {"checkpointing_steps": 1}}


def test_everything_that_was_made_with_other_sources_is_refused_at_once(tmp_path, monkeypatch):
    lora = shutil.copyfile(WEIGHTS / "edit.safetensors", tmp_path / "edit.safetensors")
    recipe = TINY["recipe"] | {"fields": {"t2i": {"base": True}, "edit": {"lora": str(lora)}}}
    path, out = write(tmp_path, recipe=recipe, compute=None), tmp_path / "out"
    compare(path, out=out)
    shutil.copyfile(WEIGHTS / "local.safetensors", lora)
    monkeypatch.setattr(Trainer, "update", lambda trainer: pytest.fail("trained"))
    with pytest.raises(ComparisonError, match=r"^made with other sources or data: .*put back .*edit") as refused:
        compare(path, out=out, resume=True)
    made = {file.name for file in (out / "trained").iterdir()}
    assert {name.partition("-")[0] for name in made} == {"danceopd", "joint", "merge", "sources"}
    assert all(name in str(refused.value) for name in made)
    for file in out.rglob("points/*.json"):
        file.unlink()
    for file in out.rglob("sources-*.json"):
        file.unlink()
    with pytest.raises(ComparisonError, match=r"^made with other sources .*danceopd-.*joint-.*merge-") as refused:
        compare(path, out=out, resume=True)  # the weights are of other sources too
    assert "sources-" not in str(refused.value)
    shutil.copyfile(WEIGHTS / "edit.safetensors", lora)
    compare(path, out=out, resume=True)


def test_sources_that_change_in_between_are_refused(tmp_path, monkeypatch):
    lora = shutil.copyfile(WEIGHTS / "edit.safetensors", tmp_path / "edit.safetensors")
    recipe = TINY["recipe"] | {"fields": {"t2i": {"base": True}, "edit": {"lora": str(lora)}}}
    path = write(tmp_path, recipe=recipe, compute=None, methods={"danceopd": {}, "joint": JOINT})

    def replace_and_train(*args, **kwargs):
        shutil.copyfile(WEIGHTS / "local.safetensors", lora)
        return train(*args, **kwargs)

    monkeypatch.setattr(runner, "train", replace_and_train)
    with pytest.raises(ComparisonError, match=r"^made with other sources .*danceopd-.*joint-.*put back .*edit"):
        compare(path, out=tmp_path / "out")
    assert not list(tmp_path.rglob("comparison.json"))


def test_a_run_that_diverges_says_which(tmp_path):
    methods = {"danceopd": {"train.learning_rate": 1e38}}
    path = write(tmp_path, methods=methods, updates=4, compute=None)
    with pytest.raises(ComparisonError, match=r"danceopd, seed 0, in .*seed-0: update \d: non-finite loss on route"):
        compare(path, out=tmp_path / "out")


def test_a_search_is_held_to_the_contents_of_its_sources_wherever_they_lie(tmp_path):
    suite = load_suite(Path(__file__).parents[2] / "suites" / "local_global.yaml")
    hashes = {suite.reference: {f"/elsewhere/{name}": found for name, found in suite.searched.hashes.items()}}
    runner._require_searched_with(suite, hashes)
    there = hashes[suite.reference]
    local, other = "/elsewhere/shapes:local", "/elsewhere/shapes:global"
    for changed in (there | {local: "0" * 64}, there | {local: there[other], other: there[local]}):
        with pytest.raises(ComparisonError, match="made with other sources"):
            runner._require_searched_with(suite, {suite.reference: changed})


def test_equal_compute_buys_as_many_updates_as_predicted_and_is_spent(tmp_path):
    """Fresh rollouts are of random depth; a pool is paid for once."""
    methods = {
        "danceopd": {},
        "streaming": {"rollout.mode": "streaming", "rollout.pool": 8, "routing.stratified": True},
    }
    path = write(tmp_path, methods=methods, updates=1, compute=700.0)
    entries = read_comparison(compare(path, out=tmp_path / "out"))["measures"]["scores"]["views"]["compute"]
    for name, recipe in load_suite(path).recipes.items():
        calls = assemble(recipe, device=torch.device("cpu")).method.expected_calls()
        assert (calls.once > 0) == (name == "streaming")
        assert entries[name]["updates"] == int((700 - calls.once) / (4 * calls.forward_equivalents))
        assert entries[name]["expected_compute"] == pytest.approx(
            entries[name]["updates"] * 4 * calls.forward_equivalents + calls.once, abs=0.05
        )
        assert entries[name]["compute"] == pytest.approx(entries[name]["expected_compute"], rel=0.08)
        assert entries[name]["compute"] == pytest.approx(700, rel=0.08)


def test_more_scenes_and_further_measures_train_nothing_again(tmp_path, monkeypatch):
    path, out = write(tmp_path, methods={"danceopd": {}}), tmp_path / "out"
    first = read_comparison(compare(path, out=out))
    monkeypatch.setattr(Trainer, "update", lambda trainer: pytest.fail("trained again"))
    early = next(file for file in out.rglob("points/000002-*.json"))
    whole = early.read_text()
    early.unlink()
    compare(path, out=out, resume=True)
    assert early.read_text() == whole  # taken again from the weights of that update, though the run is further on
    recipe = TINY["recipe"] | {"evaluate": {"scenes_per_task": 3, "num_inference_steps": 2, "seed": 1}}
    summary = read_comparison(
        compare(
            write(tmp_path, methods={"danceopd": {}}, recipe=recipe, measures={"staleness": {}}), out=out, resume=True
        )
    )
    assert summary["scenes_per_task"] == 3
    for view, entries in first["measures"]["scores"]["views"].items():
        again, entry = summary["measures"]["scores"]["views"][view]["danceopd"], entries["danceopd"]
        assert (again["updates"], again["compute"]) == (entry["updates"], entry["compute"])
    assert set(summary["measures"]) == {"scores", "staleness"}
    monkeypatch.setattr(runner, "SCORING", 1)
    before = len(list(out.rglob("points/*-scores-*.json")))
    compare(path, out=out, resume=True)  # other code would have scored: all points are scored again
    assert len(list(out.rglob("points/*-scores-*.json"))) == before + len(first["measures"]["scores"]["views"])


def test_a_stop_while_the_weights_of_a_point_are_kept_loses_nothing(tmp_path, monkeypatch):
    path, out = write(tmp_path, compute=None, methods={"joint": JOINT}, reference="joint"), tmp_path / "out"
    copy = shutil.copyfile

    def stopped(source, target):
        if source.name == "state.json":
            raise KeyboardInterrupt
        copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", stopped)
        with pytest.raises(KeyboardInterrupt):
            compare(path, out=out)
    assert not list(out.rglob("points/000002"))
    monkeypatch.setattr(Trainer, "update", lambda trainer: pytest.fail("trained again"))
    compare(path, out=out, resume=True)


def test_runs_that_went_past_a_point_are_all_named_before_anything_is_trained(tmp_path, monkeypatch):
    methods = {"danceopd": {}, "joint": JOINT, "other": JOINT | {"joint.sigma_mean": 0.5}}
    only = {"compute": None, "recipe": _saved_often(), "methods": methods, "reference": "joint"}
    out = tmp_path / "out"
    suite = load_suite(write(tmp_path, **only))
    for name in ("joint", "other"):
        train(suite.run_recipe(name, seed=0, updates=6, root=out / "trained"))
    past = r"joint-\w+/seed-0 is already at update 6 and its weights at 2 were not kept; .*other-\w+/seed-0 is already"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", lambda trainer: pytest.fail("trained before all was known"))
        with pytest.raises(ComparisonError, match=past + ".*; remove these to train again"):
            compare(write(tmp_path, **only), out=out)
        with pytest.raises(ComparisonError, match="at 2 were not kept; remove it to train again"):
            compare(write(tmp_path, **only), out=out, only=["joint"], resume=True)
    compare(write(tmp_path, **only, updates=5), out=out, resume=True)  # whose checkpoints are still there


def test_a_point_that_was_measured_asks_for_no_weights(tmp_path):
    only = {"compute": None, "recipe": _saved_often(), "methods": {"joint": JOINT}, "reference": "joint"}
    path, out = write(tmp_path, **only), tmp_path / "out"
    compare(path, out=out)
    (kept,) = out.rglob("points/000002")
    shutil.rmtree(kept)
    train(load_suite(path).run_recipe("joint", seed=0, updates=6, root=out / "trained"), resume=True)
    compare(path, out=out, resume=True)
    with pytest.raises(ComparisonError, match="its weights at 2 were not kept"):  # of which other scenes know nothing
        compare(write(tmp_path, **only | {"capabilities": ["edit"]}), out=out, resume=True)


def test_sources_are_scored_once_whatever_students_are_trained_on(tmp_path, capsys):
    out = tmp_path / "out"
    for name, routes in (("tiny", TINY["recipe"]["routes"]), ("other", TINY["recipe"]["routes"][1:])):
        path = write(tmp_path, compute=None, methods={"danceopd": {}}, recipe=TINY["recipe"] | {"routes": routes})
        compare(path.rename(tmp_path / f"{name}.yaml"), out=out)
    assert len(list(out.glob("trained/sources-*.json"))) == 1


def test_unknown_methods_poor_budgets_and_claims_about_nothing_are_refused(tmp_path):
    with pytest.raises(ComparisonError, match="no method 'nobody'; it has danceopd, joint, merge"):
        compare(write(tmp_path), out=tmp_path / "out", only=["nobody"])
    with pytest.raises(SuiteError, match=r"method 'danceopd' needs .*the budget of 13 does not pay for one"):
        compare(write(tmp_path, compute=13.0), out=tmp_path / "out")
    assert not list((tmp_path / "out").rglob("metrics.jsonl"))
    nowhere = {**CLAIMS[2], "at": "views/updates/danceopd/edit/of_best_sauce"}
    with pytest.raises(SuiteError, match=r"no 'of_best_sauce' there; it has overall"):
        compare(write(tmp_path, claims=[nowhere]), out=tmp_path / "new")
    itself = {**CLAIMS[2], "at": "views/updates/danceopd/edit/minus_reference"}
    with pytest.raises(SuiteError, match=r"no 'minus_reference' there; it has overall, of_best_source, tasks"):
        compare(write(tmp_path, claims=[itself]), out=tmp_path / "new")
    short = {**CLAIMS[2], "at": "views/updates/danceopd/edit"}
    with pytest.raises(SuiteError, match=r"this is no estimate; it has overall, of_best_source"):
        compare(write(tmp_path, claims=[short]), out=tmp_path / "new")
    assert not (tmp_path / "new").exists()  # before anything is trained


def test_seeds_may_begin_anywhere_and_a_part_begins_there_too(tmp_path):
    only = {"compute": None, "methods": {"joint": JOINT}, "reference": "joint", "seeds": 2, "first_seed": 3}
    path, out = write(tmp_path, **only), tmp_path / "out"
    summary = read_comparison(compare(path, out=out, seeds=1))
    assert (summary["seeds"], summary["part"]) == (1, "seeds 3 to 3 of 2")
    assert [folder.name for folder in out.glob("trained/joint-*/*")] == ["seed-3"]
    with pytest.raises(SuiteError, match=r"search\.seeds: seed 4 is one that the suite reports"):
        load_suite(write(tmp_path, **only, search={**SEARCH, "seeds": [4], "grid": {"joint": SEARCH["grid"]["joint"]}}))


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"updates": 2}', b"\xff"])
def test_figures_that_were_damaged_are_named(tmp_path, damage):
    path, out = write(tmp_path, compute=None, methods={"joint": JOINT}, reference="joint"), tmp_path / "out"
    compare(path, out=out)
    for file in (*out.rglob("points/*.json"), *out.glob("trained/sources-*.json")):
        kept = file.read_bytes()
        file.write_bytes(damage)
        with pytest.raises(ComparisonError, match=rf"{file.name} is damaged: .*; remove it to measure again"):
            compare(path, out=out, resume=True)
        file.write_text(json.dumps({**json.loads(kept), "hashes": None}))
        with pytest.raises(ComparisonError, match=rf"{file.name} is damaged: "):
            compare(path, out=out, resume=True)
        file.write_bytes(kept)
    broken = tmp_path / "comparison.json"
    broken.write_text('{"kind": "comparison", "suite": "x"}')
    with pytest.raises(ComparisonError, match="is damaged: it has no claims, measures"):
        write_pages(broken, tmp_path)


def test_a_claim_against_a_reference_that_was_left_out_is_not_measured(tmp_path):
    against = {**CLAIMS[2], "at": "views/updates/joint/edit/minus_reference"}
    out = compare(write(tmp_path, claims=[against], compute=None), out=tmp_path / "out", only=["joint"])
    (claim,) = read_comparison(out)["claims"]
    assert (claim["estimate"], claim["verdict"]) == (None, None)
