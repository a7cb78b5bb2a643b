import json

import pytest
import torch
import yaml
from tiny_suites import SEARCH, TINY, write

from danceopd.comparison.compare import compare, read_comparison, search
from danceopd.comparison.runner import ComparisonError
from danceopd.comparison.search_file import FINALS, RULE, MethodSearch, Trial, choose, finalists
from danceopd.comparison.suite import SuiteError, load_suite
from danceopd.training.assemble import assemble
from danceopd.training.trainer import Trainer


def trial(name, *ratios):
    return Trial(settings={"name": name}, scores={}, ratios={str(index): ratio for index, ratio in enumerate(ratios)})


def chosen(*trials):
    return choose(trials).settings["name"]


def test_the_best_mean_is_chosen():
    assert chosen(trial("even", 0.8, 0.8), trial("better", 0.7, 0.95)) == "better"
    assert chosen(trial("even", 0.8, 0.8), trial("one-sided", 0.6, 1.2)) == "one-sided"
    assert chosen(trial("first", 0.5, 0.7), trial("second", 0.7, 0.5)) == "first"


def test_the_better_half_goes_on():
    trials = (
        trial("a", 0.5, 0.7),
        trial("b", 0.1, 1.0),
        trial("c", 0.8, 0.8),
        trial("d", 0.6, 0.9),
        trial("e", 0.3, 0.4),
    )
    assert finalists(trials) == [0, 2, 3]
    assert finalists((*trials[:2], trial("as b", 1.0, 0.1))) == [0, 1]
    assert finalists(trials[:4]) == [2, 3]
    assert finalists(trials[:1]) == [0]


def test_finalists_go_on_and_the_choice_is_among_them(tmp_path, monkeypatch):
    grid = SEARCH["grid"] | {
        "danceopd": {"query.band": ["low_noise", "mid_noise", "high_noise"]},
        "joint": {"joint.sigma_mean": [0.0, 0.8, 1.6]},
        "merge": {"student.init": [{"t2i": 1.0, "edit": float(share)} for share in (1, 2, 3)]},
    }
    part = SEARCH | {"grid": grid, "final_updates": 2}
    path, updates, update = write(tmp_path, search=part, compute=None), [], Trainer.update
    monkeypatch.setattr(Trainer, "update", lambda trainer: updates.append(trainer.step) or update(trainer))
    found = search(path, out=tmp_path / "searched")
    assert sorted(updates) == [0] * 6 + [1] * 4  # two methods that train: three trials each, of which two go on
    content = json.loads(found.read_text())
    assert content["rule"] == f"{RULE} {FINALS}"
    whole = write(tmp_path, search=part | {"updates": 2, "final_updates": None}, compute=None)
    at_once = json.loads(search(whole, out=tmp_path / "whole").read_text())["methods"]
    for name, method in content["methods"].items():
        settings = [trial["settings"] for trial in method["trials"]]
        assert [len(method["trials"]), len(method["finals"])] == [3, 2]
        for final in method["finals"]:
            assert final == at_once[name]["trials"][settings.index(final["settings"])]
    path, losers = write(tmp_path, search=part, compute=None), content["methods"]["joint"]
    found.write_text(json.dumps(content))
    page = compare(path, out=tmp_path / "compared", only=["merge"]).with_suffix(".md").read_text()
    assert "3 trials of 1 updates for each of these, the better half of them of 2, on seeds" in page
    for finals in (losers["finals"][:1], []):
        losers["finals"] = finals
        found.write_text(json.dumps(content))
        with pytest.raises(SuiteError, match="what is chosen for 'joint' is not what its trials give"):
            load_suite(path)


def test_trials_may_have_equal_compute_and_so_lengths_of_their_own(tmp_path, monkeypatch):
    part = SEARCH | {"updates": None, "compute": 55.0, "final_compute": 110.0}
    path, updates, update = write(tmp_path, search=part, updates=None, compute=110.0), [], Trainer.update

    def counted(trainer):
        updates.append((trainer.assembly.recipe.method, trainer.step))
        return update(trainer)

    monkeypatch.setattr(Trainer, "update", counted)
    found = search(path, out=tmp_path / "searched")
    per_update = {
        name: 4 * assemble(recipe, device=torch.device("cpu")).method.expected_calls().forward_equivalents
        for name, recipe in load_suite(path, with_search=False).recipes.items()
        if name != "merge"
    }
    assert per_update["danceopd"] > 1.5 * per_update["joint"]
    expected = [(name, step) for name in per_update for step in range(int(55 / per_update[name]))] * 2
    expected += [
        (name, step) for name, calls in per_update.items() for step in range(int(55 / calls), int(110 / calls))
    ]
    assert sorted(updates) == sorted(expected)
    content = json.loads(found.read_text())
    assert (content["updates"], content["compute"], content["final_compute"]) == (None, 55.0, 110.0)
    page = compare(path, out=tmp_path / "compared").with_suffix(".md").read_text()
    assert "2 trials of 55 forward-equivalents for each of these, the better half of them of 110, on seeds" in page
    assert "At equal compute" in page
    assert "equal updates" not in page


def test_a_search_is_run_once_resumed_and_applied(tmp_path, monkeypatch):
    path = write(tmp_path, search=SEARCH, compute=None)
    with pytest.raises(ComparisonError, match="first: danceopd search"):
        compare(path, out=tmp_path / "compared")
    update, made = Trainer.update, []

    def counted(trainer):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(trainer.assembly.recipe)
        return update(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", counted)
        with pytest.raises(KeyboardInterrupt):
            search(path, out=tmp_path / "searched")
    assert {recipe.train.seed for recipe in made} == {7}
    assert {(recipe.evaluate.seed, recipe.evaluate.scenes_per_task) for recipe in made} == {(5, 3)}
    found = search(path, out=tmp_path / "searched", resume=True)
    assert found == tmp_path / "tiny.search.json"
    content = json.loads(found.read_text())
    assert content["rule"] == RULE
    assert [len(method["trials"]) for method in content["methods"].values()] == [2, 2, 2]
    assert content["methods"]["joint"]["trials"][1]["settings"] == {"joint.sigma_mean": 0.8}
    assert content["methods"]["merge"]["trials"][1]["settings"] == {"student.init": {"t2i": 1.0, "edit": 2.0}}
    files = list((tmp_path / "searched").rglob("points/*.json"))
    times = [file.stat().st_mtime_ns for file in files]
    assert len(files) == 6
    search(path, out=tmp_path / "searched", resume=True)
    assert [file.stat().st_mtime_ns for file in files] == times

    suite = load_suite(path)
    assert suite.recipes["danceopd"].query.band == content["methods"]["danceopd"]["chosen"]["query.band"]
    assert suite.recipes["danceopd"].evaluate.seed == 0
    with pytest.raises(ComparisonError, match="seed 7 chose the settings of suite 'tiny'"):
        compare(path, out=tmp_path / "compared", seeds=8)
    page = compare(path, out=tmp_path / "compared", only=["danceopd"])
    band = content["methods"]["danceopd"]["chosen"]["query.band"]
    assert f"| danceopd | query.band: {band} |" in page.with_suffix(".md").read_text()

    content["hashes"]["shapes:edit"] = "0" * 64
    found.write_text(json.dumps(content))
    with pytest.raises(ComparisonError, match="was made with other sources"):
        compare(path, out=tmp_path / "compared", resume=True)
    losing = next(t for t in content["methods"]["merge"]["trials"] if t["settings"] != _chosen(content, "merge"))
    content["methods"]["merge"]["chosen"] = losing["settings"]
    found.write_text(json.dumps(content))
    with pytest.raises(SuiteError, match="what is chosen for 'merge' is not what its trials give"):
        load_suite(path)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"search": {**SEARCH, "updates": 2}}))
    with pytest.raises(SuiteError, match="made for another recipe, methods or grid"):
        load_suite(path)
    content["methods"]["merge"]["trials"] = []
    for damaged in (json.dumps(content), "{}"):
        found.write_text(damaged)
        with pytest.raises(SuiteError, match="is not a search file"):
            load_suite(path)


def test_a_value_more_in_a_grid_trains_nothing_that_was_tried_again(tmp_path, monkeypatch):
    grid = {"danceopd": {"query.band": ["low_noise", "mid_noise"]}, "joint": {"joint.sigma_mean": [0.0, 0.8]}}
    methods = {name: TINY["methods"][name] for name in grid}
    search(write(tmp_path, search=SEARCH | {"grid": grid}, compute=None, methods=methods), out=tmp_path / "searched")
    more = {"danceopd": ["high_noise", "low_noise", "mid_noise"], "joint": [-0.8, 0.0, 0.8]}
    longer = {name: dict.fromkeys(grid[name], values) for name, values in more.items()}
    trained, update = [], Trainer.update

    def counted(trainer):
        trained.append(trainer.assembly.recipe)
        return update(trainer)

    monkeypatch.setattr(Trainer, "update", counted)
    path = write(tmp_path, search=SEARCH | {"grid": longer}, compute=None, methods=methods)
    search(path, out=tmp_path / "searched", resume=True)
    assert [recipe.method for recipe in trained] == ["danceopd", "joint"]
    assert trained[0].query.band == "high_noise"


def test_trials_that_are_one_recipe_are_refused(tmp_path):
    twice = SEARCH["grid"] | {"danceopd": {"query": [{"band": "low_noise"}, {"band": "low_noise", "per_rollout": 1}]}}
    with pytest.raises(SuiteError, match=r"search.grid.danceopd: trials danceopd-0 and danceopd-1 are the same recipe"):
        search(write(tmp_path, search=SEARCH | {"grid": twice}, compute=None), out=tmp_path / "searched")
    assert not (tmp_path / "searched").exists()


def _chosen(content, method):
    return content["methods"][method]["chosen"]


def test_what_is_not_trained_may_stay_as_the_suite_has_it(tmp_path):
    even = TINY["methods"]["merge"]
    methods = {"even": even, **TINY["methods"]}
    path = write(tmp_path, search=SEARCH, compute=None, methods=methods, reference="even")
    search(path, out=tmp_path / "searched")
    part = compare(path, out=tmp_path / "compared", only=["even"]).with_suffix(".md").read_text()
    assert "Settings chosen by the search" not in part
    found = read_comparison(compare(path, out=tmp_path / "compared", resume=True))
    assert set(found["searched"]["chosen"]) == {"danceopd", "joint", "merge"}
    assert set(found["measures"]["scores"]["views"]["updates"]) == {"danceopd", "joint", "merge", "even"}
    write(tmp_path, search=SEARCH, compute=None)
    assert load_suite(path).searched is not None  # what was not searched is no part of what the search depends on
    shared = TINY["recipe"] | {
        "method": "weight_merge",
        "student": even["student"],
        "train": {"steps": 0, "precision": "fp32"},
    }
    merges = {"even": {}, "odd": {"student.init": {"t2i": 1.0, "edit": 3.0}}}
    part = SEARCH | {"grid": {"odd": SEARCH["grid"]["merge"]}}
    path = write(tmp_path, recipe=shared, methods=merges, search=part, reference="even")
    assert load_suite(path, with_search=False).search is not None


def test_a_search_serves_methods_whose_routes_have_other_names(tmp_path):
    recipe = TINY["recipe"] | {"fields": TINY["recipe"]["fields"] | {"guided": {"base": True, "guidance_scale": 2.0}}}
    methods = {"danceopd": {}, "guided": {"routes.0.field": "guided"}}
    band = {"query.band": ["low_noise", "mid_noise"]}
    part = SEARCH | {"grid": dict.fromkeys(methods, band)}
    path = write(tmp_path, recipe=recipe, methods=methods, compute=None, search=part)
    search(path, out=tmp_path / "searched")
    found = read_comparison(compare(path, out=tmp_path / "compared"))
    assert set(found["searched"]["chosen"]) == set(methods)


def test_a_trial_that_would_set_what_the_suite_sets_is_refused(tmp_path):
    grid = SEARCH["grid"] | {"danceopd": {"train.seed": [1, 2]}}
    with pytest.raises(SuiteError, match=r"method .danceopd.: train\.seed is not set here"):
        search(write(tmp_path, search=SEARCH | {"grid": grid}), out=tmp_path / "searched")


def test_a_suite_without_a_search_cannot_be_searched(tmp_path):
    with pytest.raises(SuiteError, match="declares no search"):
        search(write(tmp_path), out=tmp_path / "searched")


def test_a_choice_at_the_edge_of_what_was_tried_is_said():
    tried = [
        {"rate": rate, "band": band, "eta": eta}
        for rate in (1e-3, 2e-3, 4e-3)
        for band in ("low", "mid", "high")
        for eta in (0.3, 0.7)
    ]
    trials = tuple(Trial(settings=settings, scores={}, ratios={"edit": 1.0}) for settings in tried)

    def edges(**chosen):
        return MethodSearch(trials=trials, chosen={"band": "low", "eta": 0.3} | chosen).edges

    assert edges(rate=1e-3) == ["rate 0.001 is the lowest"]
    assert edges(rate=4e-3) == ["rate 0.004 is the highest"]
    assert edges(rate=2e-3) == []


def test_a_choice_at_the_edge_of_what_went_on_is_said():
    """A rate too high for the whole length may win the first half of it, and so be the lowest that is left."""
    trials = tuple(
        Trial(settings={"rate": rate}, scores={}, ratios={"edit": score})
        for rate, score in ((1e-3, 0.1), (2e-3, 0.2), (4e-3, 0.8), (7e-3, 0.9), (1e-2, 0.7), (2e-2, 0.3))
    )

    def edges(best):
        finals = (replaced(trial, 1.0 if trial.settings["rate"] == best else 0.5) for trial in trials[2:5])
        return MethodSearch(trials=trials, finals=tuple(finals), chosen={"rate": best}).edges

    def replaced(trial, score):
        return trial.model_copy(update={"ratios": {"edit": score}})

    assert edges(4e-3) == ["rate 0.004 is the lowest that went on"]
    assert edges(7e-3) == []
    assert edges(1e-2) == ["rate 0.01 is the highest that went on"]


def test_a_merges_weights_have_ends_too():
    tried = [{"init": {"t2i": 1.0, "edit": share}} for share in (1.0, 4.0, 16.0)] + [{"init": "edit"}]
    trials = tuple(Trial(settings=settings, scores={}, ratios={"edit": 1.0}) for settings in tried)
    ends = [MethodSearch(trials=trials, chosen=settings).edges for settings in tried]
    assert ends == [["init.edit 1 is the lowest"], [], ["init.edit 16 is the highest"], []]
