import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from tiny_suites import SEARCH, TINY, single_route, write

from danceopd.comparison.suite import (
    _DEFAULTS,
    REVISIONS,
    SuiteError,
    load_suite,
    method_recipe,
    read_suite_file,
    updates_within,
)
from danceopd.recipe import Recipe, read_yaml
from danceopd.training.assemble import assemble

SUITES = sorted((Path(__file__).parents[2] / "suites").glob("*.yaml"))
LEAD = {"method": "danceopd", "over": "joint", "capability": "edit"}
VALUE = {"text": "it holds", "measure": "scores", "at": "views/updates/danceopd/edit/of_best_source"}


def grid(**changes):
    return {"search": {**SEARCH, "grid": {**SEARCH["grid"], **changes}}}


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_shipped_suites_are_valid(path):
    suite = load_suite(path)
    assert suite.reference in suite.recipes
    for name in suite.recipes:
        assemble(suite.recipes[name], device=torch.device("cpu"))


def test_all_methods_read_the_same_training_inputs_in_the_same_order():
    suite = load_suite(next(path for path in SUITES if path.stem == "t2i_edit"))
    read = []
    for method in suite.recipes:
        recipe = suite.run_recipe(method, seed=3, updates=1, root=Path("unused"))
        buckets = assemble(recipe, device=torch.device("cpu")).buckets
        read.append({name: [example.prompt for example in bucket.draw(20)] for name, bucket in buckets.items()})
    assert all(inputs == read[0] for inputs in read)
    other = suite.run_recipe("danceopd", seed=4, updates=1, root=Path("unused"))
    again = assemble(other, device=torch.device("cpu")).buckets["t2i"]
    assert [example.prompt for example in again.draw(20)] != read[0]["t2i"]


def test_settings_that_a_method_has_no_use_for_stay_out_of_its_recipe(tmp_path):
    recipes = load_suite(write(tmp_path)).recipes
    assert {name: recipe.rollout.num_inference_steps for name, recipe in recipes.items()} == {
        "danceopd": 4,
        "joint": 16,
        "merge": 16,
    }
    assert {name: recipe.train.batch_size for name, recipe in recipes.items()} == {
        "danceopd": 4,
        "joint": 4,
        "merge": 32,
    }
    with pytest.raises(SuiteError, match=r"rollout.shift: it would do nothing"):
        load_suite(write(tmp_path, methods={"danceopd": {}, "joint": {"method": "joint", "rollout.shift": 2.0}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "nobody"}, "reference: 'nobody' is none of"),
        ({"sedes": 3}, r"unknown key 'sedes' \(did you mean 'seeds'"),
        ({"points": [0]}, "updates are at least 1"),
        ({"methods": {"danceopd": {"method": "danseopd"}}}, "did you mean 'danceopd'"),
        ({"methods": {"danceopd": {}, "x": {"evaluate.seed": 3}}}, "do not share 'evaluate'"),
        ({"methods": {"danceopd": {}, "x": {"base": "shapes:realism"}}}, "do not share 'base'"),
        ({"methods": {"danceopd": {}, "x": {"family": "sd3"}}}, "do not share 'family'"),
        ({"methods": {"danceopd": {}, "x": {"fields.edit": {"lora": "shapes:local"}}}}, "do not share their sources"),
        ({"methods": {"danceopd": {}, "x": {"routes.0.data.seed": 3}}}, "do not share their training data"),
        ({"methods": {"danceopd": {}, "x": {"routes.0.data.size": 9}}}, "do not share their training data"),
        ({"methods": {"danceopd": {}, "x": {"train.batch_size": 8}}}, "do not share train.batch_size"),
        ({"methods": {"danceopd": {}, "x": {"train.precision": "bf16"}}}, "do not share train.precision"),
        (
            {"methods": {"danceopd": {}, "x": {"train.precision": "auto"}}},
            "'x': train.precision must be 'bf16' or 'fp32'",
        ),
        ({"methods": {"danceopd": {"train.lr_scheduler": "linear"}}}, "must be 'constant'"),
        ({"methods": {"danceopd": {"family.x": 1}}}, "method 'danceopd': cannot set family.x"),
        ({"capabilities": ["t2i", "eidt"]}, r"'eidt' is none of t2i, edit, local, global \(did you mean 'edit'"),
        ({"capabilities": ["edit"], "measures": {"guidance": {"scales": [1.0]}}}, "add t2i to capabilities"),
        ({"measures": {"guidance": {"scales": [2.0, 1.0]}}}, "1 is the first"),
        ({"claims": [{**LEAD, "over": "nobody"}]}, "claims.0: 'nobody' is none of danceopd, joint, merge"),
        ({"claims": [{**LEAD, "capability": "local"}]}, "'local' is none of t2i, edit"),
        ({"claims": [{**LEAD, "view": "compute"}], "compute": None}, "'compute', and this suite has only 'updates'"),
        ({"claims": [{**LEAD, "at_least": 1.0}]}, "a claim is"),
        ({"claims": [VALUE]}, "a claim is"),
        ({"claims": [{**VALUE, "measure": "realism", "at_least": 1.0}]}, "does not measure 'realism'"),
        ({"claims": [{**LEAD, "over": LEAD["method"]}]}, "a claim is"),
        ({"claims": [{**VALUE, "at_least": 1.0, "view": "compute"}]}, "a claim is"),
        ({"claims": [{**VALUE, "at_least": 1.0, "at_most": 2.0}]}, "with one of at_least, at_most and between"),
        ({"claims": [{**VALUE, "between": [1.1, 0.9]}]}, "between is a lower and a higher value"),
        ({"methods": {"danceopd": {}, "../x": {}}}, "'../x' names a folder too"),
        ({"methods": {"danceopd": {"train.seed": 3}}}, "train.seed is not set here"),
        ({"methods": {"danceopd": {"train.steps": 3}}}, "train.steps is not set here"),
        ({"methods": {"danceopd": {"output": "x"}}}, "output is not set here"),
        ({"recipe": TINY["recipe"] | {"output": "x"}}, "output is not set here"),
        (grid(danceopd={"query.band": []}, joint={"method": []}, merge={"method": []}), "at least one, found"),
        (
            grid(danceopd={"query.band": ["low_noise", "low_noise"]}),
            "search.grid.danceopd.query.band: different values",
        ),
        ({"search": {**SEARCH, "seeds": [7, 7]}}, "search.seeds: different numbers"),
        ({"measures": {"guidance": {"scales": [1.0]}}}, "measures.guidance needs one route"),
        ({"measures": {"realism": {"teacher": "t2i"}}}, "teacher 't2i' is none of edit"),
        ({"paper": {"what": "scores", "figures": {"t2i": "0.8"}}}, "paper.figures: 't2i' is none of .*, base, edit;"),
        (grid(joint={"joint.sigma_mean": [0.0]}), "same number of trials, found danceopd 2, joint 1, merge 2"),
        (
            {"search": {**SEARCH, "grid": {"danceopd": {}}}},
            "every method that is trained is searched alike, 'joint' is not",
        ),
        ({"search": {**SEARCH, "final_updates": 1}}, "search.final_updates: needs more than their 1, found 1"),
        (
            {"search": {**SEARCH, "final_compute": 9.0}},
            "search.final_compute: needs search.compute, .*, found 9",
        ),
        ({"search": {**SEARCH, "compute": 9.0}}, "search: updates, or compute, say how long .* found both"),
        ({"search": {**SEARCH, "updates": None}}, "search: updates, or compute, say how long .* found neither"),
        ({"updates": None, "compute": None}, "updates or compute: at one of them"),
        ({"updates": None, "measures": {"staleness": {}}}, "measures.staleness is of equal updates"),
        ({"updates": None, "claims": [LEAD]}, "claims.0.view: 'updates', and this suite has only 'compute'"),
        ({"search": {**SEARCH, "seeds": [0]}}, "seed 0 is one that the suite reports"),
        ({"search": {**SEARCH, "scenes_seed": 0}}, "is the evaluation's own"),
        ({"compute": math.inf}, "compute: .*finite"),
        ({"claims": [{**VALUE, "at_least": math.nan}]}, "at_least: .*finite"),
        ({"claims": [{**VALUE, "between": [0.9, math.inf]}]}, "between.*finite"),
        ({"measures": {"guidance": {"scales": [1.0, math.nan]}}}, "scales.*finite"),
    ],
)
def test_suites_that_compare_unlike_things_or_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(SuiteError, match=message):
        load_suite(write(tmp_path, **changes))


def test_guidance_is_not_measured_of_a_student_that_was_taught_means(tmp_path):
    methods = {"plain": {}, "few": {"rollout.substeps": 2}}
    suite = single_route({"base": True}, methods, measures={"guidance": {"scales": [1.0]}}, capabilities=["t2i"])
    suite["recipe"] = suite["recipe"] | {"evaluate": {"scenes_per_task": 2, "num_inference_steps": 4}}
    with pytest.raises(SuiteError, match=r"guidance compares velocities, and rollout\.substeps teaches their means"):
        load_suite(write(tmp_path, suite))


@pytest.mark.parametrize(
    ("field", "evaluate", "message"),
    [
        ({"base": True, "negative_prompt": "blurry", "guidance_scale": 2.0}, {}, "'teacher' is not the base, or has a"),
        ({"lora": "shapes:edit", "guidance_scale": 2.0}, {}, "'teacher' is not the base"),
        ({"base": True}, {"guidance_scale": 2.0}, r"needs evaluate\.guidance_scale 1, found 2"),
    ],
)
def test_guidance_is_measured_along_the_bases_own_direction_alone(tmp_path, field, evaluate, message):
    suite = single_route(field, {"plain": {}}, measures={"guidance": {"scales": [1.0]}}, capabilities=["t2i"])
    suite["recipe"] = suite["recipe"] | {"evaluate": suite["recipe"]["evaluate"] | evaluate}
    with pytest.raises(SuiteError, match=message):
        load_suite(write(tmp_path, suite))


def test_exposure_needs_inputs_that_can_be_drawn_apart(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"prompt": "a red circle"}\n')
    recipe = {**TINY["recipe"], "routes": [{"field": "t2i", "data": {"manifest": "m.jsonl"}}]}
    with pytest.raises(SuiteError, match="draws inputs apart from the training's, and needs generators"):
        load_suite(write(tmp_path, recipe=recipe, measures={"exposure": {}}, methods={"danceopd": {}}))


def test_a_shared_query_stays_out_of_methods_that_ask_for_none(tmp_path):
    shared = TINY["recipe"] | {"query": {"band": "high_noise"}, "joint": {"sigma_mean": 0.8}}
    recipes = load_suite(write(tmp_path, recipe=shared)).recipes
    assert (recipes["danceopd"].query.band, recipes["joint"].joint.sigma_mean) == ("high_noise", 0.8)
    assert recipes["joint"].query == recipes["merge"].query != recipes["danceopd"].query
    changed = method_recipe(
        path := write(tmp_path, recipe=shared),
        read_suite_file(path),
        "joint",
        {"method": "off_policy", "query.states": "data"},
    )
    assert changed.query.band == "high_noise"  # what a trial's own method shares is kept


def test_files_that_are_no_suites_are_refused(tmp_path):
    with pytest.raises(SuiteError, match="suite not found"):
        load_suite(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("version: 1\nversion: 2\n")
    with pytest.raises(SuiteError, match="stands twice"):
        load_suite(broken)


def test_a_budget_that_pays_for_no_update_is_refused():
    assert updates_within(300.0, 12.0, "joint") == 25
    with pytest.raises(SuiteError, match="method 'joint' needs 12 forward-equivalents an update; the budget of 10"):
        updates_within(10.0, 12.0, "joint")
    assert updates_within(300.0, 12.0, "streaming", once=60.0) == 20
    with pytest.raises(
        SuiteError, match="12 forward-equivalents an update and 295 before the first; the budget of 300"
    ):
        updates_within(300.0, 12.0, "streaming", once=295.0)


def test_what_a_run_is_cached_by(tmp_path):
    suite = load_suite(write(tmp_path))
    same = load_suite(write(tmp_path, updates=9, seeds=4, title="other"))
    assert suite.fingerprint("danceopd") == same.fingerprint("danceopd")
    other = load_suite(write(tmp_path, methods={**TINY["methods"], "danceopd": {"train.learning_rate": 2e-3}}))
    assert suite.fingerprint("danceopd") != other.fingerprint("danceopd")
    said = load_suite(write(tmp_path, methods={**TINY["methods"], "danceopd": {"train.max_grad_norm": 1.0}}))
    assert suite.fingerprint("danceopd") == said.fingerprint("danceopd")  # so a new key with a default orphans no run


def defaults():
    schema = Recipe.model_json_schema()
    return {
        f"{part}.{key}": value["default"]
        for part, content in {"Recipe": schema, **schema["$defs"]}.items()
        for key, value in content["properties"].items()
        if not isinstance(value.get("default", {}), dict) and part != "EvaluatePart"
    }


def test_a_changed_default_makes_every_run_another():
    """Fingerprints leave defaults out. New keys may come; a default that changed needs the next ``_DEFAULTS``."""
    file = Path(__file__).with_name("defaults.json")
    recorded, now = json.loads(file.read_text()), defaults()
    assert recorded["number"] == _DEFAULTS
    assert {key: now[key] for key in recorded["defaults"] if key in now} == recorded["defaults"]


def test_a_method_whose_code_was_revised_has_other_runs_and_the_others_keep_theirs(tmp_path, monkeypatch):
    suite = load_suite(write(tmp_path))
    before = {name: suite.fingerprint(name) for name in suite.recipes}
    monkeypatch.setitem(REVISIONS, "joint", 1)
    after = {name: suite.fingerprint(name) for name in suite.recipes}
    assert {name for name in before if before[name] != after[name]} == {"joint"}


def test_a_suites_files_are_relative_to_the_suite(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red circle"}\n')
    recipe = TINY["recipe"] | {"routes": [{"field": "t2i", "data": {"manifest": "prompts.jsonl"}}]}
    found = load_suite(write(tmp_path, recipe=recipe, methods={"danceopd": {}})).recipes["danceopd"]
    assert found.routes[0].data.manifest == str(tmp_path / "prompts.jsonl")


def test_guidance_is_measured_of_the_recipes_own_base_alone(tmp_path):
    (cfg,) = (path for path in SUITES if path.name == "cfg.yaml")
    content = read_yaml(cfg.read_text())
    content["recipe"]["fields"]["guided_2"] |= {"base": "other/base.safetensors"}
    path = tmp_path / "cfg.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(SuiteError, match=r"the base's own guidance, and field 'guided_2' is not the base"):
        load_suite(path)
