import itertools

import numpy as np
import pytest
from tiny_suites import single_route, write

from danceopd.comparison.claims import settle
from danceopd.comparison.compare import compare, read_comparison
from danceopd.comparison.measures import exposure, realism, scores
from danceopd.comparison.results import Point, Results, scores_of
from danceopd.comparison.suite import load_suite
from danceopd.evaluation import shapes
from danceopd.runs import train
from danceopd.world import verify


def results_of(taken, **sources):
    """Results of one seed: {method: {updates: what was taken}}; the last updates are of equal compute."""
    return Results(
        points={
            method: {updates: [Point(updates, 108.0, 1.0, found)] for updates, found in points.items()}
            for method, points in taken.items()
        },
        views={method: {"updates": min(points), "compute": max(points)} for method, points in taken.items()},
        sources=sources,
        expected={method: {"updates": 100.0, "compute": 110.0} for method in taken},
    )


def test_points_of_one_cost_are_drawn_apart_in_their_order():
    costs = {"a": [100.0, 200.0], "b": [100.5], "c": [0.0], "d": [100.0, 300.0]}
    places = scores.apart(costs)
    assert (places["a"][1], places["c"][0], places["d"][1]) == pytest.approx((200.0, 0.0, 300.0))
    near = [places["a"][0], places["d"][0], places["b"][0]]
    assert [after / before for before, after in itertools.pairwise(near)] == pytest.approx([scores.APART] * 2)
    assert np.prod(near) == pytest.approx(100.0 * 100.0 * 100.5)


def test_more_methods_than_colours_are_still_drawn_unlike_each_other():
    looks = scores.looks([f"method_{index}" for index in range(40)])
    assert len({(look.color, look.marker) for look in looks.values()}) == len(looks) == 40
    assert len({(look.color, look.hatch) for look in looks.values()}) == 40


def edits(value):
    return {"edit": [[value] * 2] * 6}


def test_a_view_compares_methods_where_each_is_in_it_and_with_the_best_source(tmp_path):
    lead = {"method": "danceopd", "over": "joint", "capability": "edit"}
    suite = load_suite(write(tmp_path, capabilities=["edit"], claims=[lead, lead | {"view": "compute"}]))
    values = {"danceopd": {2: 0.4, 5: 0.8}, "joint": {2: 0.7, 9: 0.7}}
    taken = {method: {at: {"scores": edits(value)} for at, value in of.items()} for method, of in values.items()}
    results = results_of(taken, weak=edits(0.5), strong=edits(0.9))
    content = scores.measure(suite, results)
    assert content["best_source"] == {"edit": "strong"}
    views = content["views"]
    assert [views[view]["joint"]["edit"]["of_best_source"]["value"] for view in views] == [0.7778, 0.7778]
    assert [views[view]["danceopd"]["edit"]["of_best_source"]["value"] for view in views] == [0.4444, 0.8889]
    assert [views[view]["joint"]["edit"]["minus_reference"]["value"] for view in views] == [0.3, -0.1]
    settled = settle(suite, results, {"scores": content})
    assert [claim["estimate"]["value"] for claim in settled] == [-0.3, 0.1]
    assert [claim["verdict"] for claim in settled] == ["not reproduced", "reproduced"]


def test_exposure_is_the_error_on_own_states_over_that_on_data():
    errors = {"own": [1.0, 5.0], "data": [1.0, 3.0]}  # at the two steps, alike for two inputs of one route
    found = {states: {"error": [[at] * 2], "size": [[[4.0, 16.0]] * 2]} for states, at in errors.items()}
    taken = {"exposure": {"routes": ["edit"], "sigma": [1.0, 0.5], **found}}
    route = exposure.measure(None, results_of({"danceopd": {2: taken}}))["methods"]["danceopd"]["edit"]
    assert [route[name]["value"] for name in ("own", "data", "own_over_data")] == [0.3, 0.2, 1.5]
    assert route["at_step"] == {"own": [0.25, 0.3125], "data": [0.25, 0.1875]}
    assert route["by_seed"] == {"own": [0.3], "data": [0.2]}


def test_a_capability_has_the_scores_of_its_own_tasks():
    taken = {"edit": [[task] * 2 for task in range(6)]}
    assert scores_of(taken, "global").tolist() == [[4, 4], [5, 5]]
    assert scores_of(taken, "local").tolist() == taken["edit"][:4]


def test_guidance_is_measured_of_a_student_that_is_the_base(tmp_path):
    """Taught by the base from the base, a student stays the base: beta acts as itself, exactly."""
    field = {"base": True, "guidance_scale": 3.0}
    suite = single_route(
        field,
        {"plain": {"routes.0.field": "base"}, "alpha_3": {}},
        measures={"guidance": {"scales": [1, 2], "prompts_per_task": 2}},
        capabilities=["t2i"],
        claims=[
            {
                "text": "beta 2 on the base acts as 2",
                "measure": "guidance",
                "at": "methods/plain/scales/2/over_product",
                "between": [0.9, 1.1],
                "paper": "product law",
            }
        ],
    )
    suite["recipe"]["fields"] = {"base": {"base": True}, "teacher": field}
    out = compare(write(tmp_path, suite), out=tmp_path / "out")
    summary = read_comparison(out)
    plain, guided = (summary["measures"]["guidance"]["methods"][name] for name in ("plain", "alpha_3"))
    assert (plain["alpha"], plain["prompt_dropout"]) == (1.0, 0.0)
    assert plain["empty"] == {"value": 0.0, "low": 0.0, "high": 0.0, "detectable": 0.0}
    for scale in ("1", "2"):
        found = plain["scales"][scale]
        assert found["guidance"]["value"] == pytest.approx(float(scale), abs=1e-4)
        assert (found["over_product"]["value"], found["unexplained"]) == (1.0, 0.0)
        assert found["over_absorbed"]["value"] == pytest.approx(1.0, abs=1e-4)
    assert plain["at_step"]["guidance"] == [1.0, 1.0]
    assert sum(plain["at_step"]["weight"]) == pytest.approx(1.0, abs=1e-3)
    assert "teacher" not in plain  # the base without guidance is no guided teacher
    assert (guided["alpha"], guided["prompt_dropout"], guided["teacher"]["name"]) == (3.0, 0.1, "teacher")
    assert (guided["scales"]["1"]["calls"], guided["scales"]["2"]["calls"], guided["teacher"]["calls"]) == (2, 4, 4)
    assert guided["scales"]["2"]["product"] == 6.0
    acts_as = guided["scales"]["2"]["guidance"]["value"]
    assert guided["scales"]["2"]["over_product"]["value"] == pytest.approx(acts_as / 6, abs=1e-4)
    student, teacher = guided["scales"]["1"]["score"]["value"], guided["teacher"]["score"]["value"]
    assert guided["teacher"]["student_minus_teacher"]["value"] == pytest.approx(student - teacher, abs=1e-4) != 0
    assert (
        guided["scales"]["1"]["score"] == summary["measures"]["scores"]["views"]["updates"]["alpha_3"]["t2i"]["overall"]
    )
    assert summary["claims"][0]["verdict"] == "reproduced"
    text = out.with_suffix(".md").read_text()
    assert "| plain | 0 | 2 | 2 | 2.00 (2.00 to 2.00) | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) | 0.00 |" in text
    assert "editing" not in text  # and no edit was sampled
    assert out.with_suffix(".html").read_text().count("data:image/png;base64,") == 4


def refused(*arguments):
    raise AssertionError("the realism reward was called")


def test_realism_is_absorbed_without_a_call_of_its_reward(tmp_path, monkeypatch):
    suite = single_route(
        {"lora": "shapes:realism"},
        {"danceopd": {}},
        measures={"realism": {"teacher": "teacher"}},
        claims=[
            {
                "text": "the student closes the gap",
                "measure": "realism",
                "at": "methods/danceopd/gap_closed",
                "at_least": 0.853,
                "paper": "85.3 %",
            }
        ],
    )
    suite["recipe"]["train"]["sample_steps"] = 1
    path = write(tmp_path, suite)
    recipe = load_suite(path).run_recipe("danceopd", seed=0, updates=2, root=tmp_path / "out" / "trained")
    with monkeypatch.context() as patch:
        for module, name in ((shapes, "realism_reward"), (verify, "realism_reward"), (verify, "_realism")):
            patch.setattr(module, name, refused)
        folder = train(recipe)  # two updates with a sample grid after each
        assert len(list(folder.samples.glob("*.png"))) == 2
        with pytest.raises(AssertionError, match="reward was called"):
            compare(path, out=tmp_path / "out", resume=True)
    out = compare(path, out=tmp_path / "out", resume=True)
    summary = read_comparison(out)
    found = summary["measures"]["realism"]
    assert set(found["sources"]) == {"base", "teacher"}
    assert found["sources"]["teacher"]["value"] > found["sources"]["base"]["value"]
    closed = found["methods"]["danceopd"]["gap_closed"]
    reward = found["methods"]["danceopd"]["reward"]["value"]
    base, teacher = (found["sources"][name]["value"] for name in ("base", "teacher"))
    assert closed["value"] == pytest.approx((reward - base) / (teacher - base), abs=1e-3)
    assert summary["claims"][0]["verdict"] == "not reproduced"  # after two updates
    assert "| danceopd |" in out.with_suffix(".md").read_text().split("## Realism reward")[1]


def test_realism_is_compared_in_each_view(tmp_path):
    measures = {"realism": {"teacher": "teacher"}}
    suite = load_suite(
        write(tmp_path, single_route({"lora": "shapes:realism"}, {"one": {}, "two": {}}, measures=measures))
    )

    def rewards(value):
        return {"realism": [[value] * 2] * 6}

    values = {"one": {2: 0.4, 5: 0.8}, "two": {2: 0.5, 9: 0.5}}
    taken = {method: {at: {"scores": rewards(value)} for at, value in of.items()} for method, of in values.items()}
    content = realism.measure(suite, results_of(taken, base=rewards(0.3), teacher=rewards(0.8)))
    two = content["methods"]["two"]
    assert [entry["gap_closed"]["value"] for entry in (two, two["compute"])] == [0.4, 0.4]
    assert [entry["minus_reference"]["value"] for entry in (two, two["compute"])] == [0.1, -0.3]
    assert content["methods"]["one"]["compute"]["gap_closed"]["value"] == 1.0
    tables = realism.tables(content)
    assert [table.title for table in tables] == ["Realism reward", "Realism reward, at equal compute"]
    assert [row[-1][:6] for row in tables[1].rows] == ["", "", "", "-0.300"]


def test_staleness_stands_beside_the_scores(tmp_path):
    streaming = {"rollout.mode": "streaming", "rollout.pool": 16, "rollout.staleness_steps": 1}
    still = {**streaming, "train.learning_rate": 1e-9}
    moving = {**streaming, "train.learning_rate": 1e-2}
    suite = single_route(
        {"base": True, "guidance_scale": 3.0},
        {"fresh": {}, "still": still, "moving": moving},
        measures={"staleness": {}},
        capabilities=["t2i"],
        updates=4,
    )
    out = compare(write(tmp_path, suite), out=tmp_path / "out")
    methods = read_comparison(out)["measures"]["staleness"]["methods"]
    assert "staleness" not in methods["fresh"]
    assert methods["still"]["staleness"] < 1e-4 < methods["moving"]["staleness"]  # fresh weights leave nothing stale
    assert 0 < methods["moving"]["band_distance"] < 1
    text = out.with_suffix(".md").read_text().split("## Staleness beside quality")[1]
    assert f"| {methods['moving']['staleness']:.4f} |" in text
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    for file in moved.rglob("points/*-staleness-*.json"):
        file.unlink()
    again = compare(tmp_path / "tiny.yaml", out=moved, resume=True)
    assert read_comparison(again)["measures"]["staleness"]["methods"] == methods


def test_exposure_is_measured_on_own_states_and_on_noised_data(tmp_path):
    still = {"train.learning_rate": 1e-9}
    changes = {"measures": {"exposure": {"inputs_per_route": 3}}, "compute": None, "seeds": 2}
    methods = {"still": still, "moving": {"train.learning_rate": 3e-2}}
    path = write(tmp_path, methods=methods, reference="still", updates=3, **changes)
    out = compare(path, out=tmp_path / "out")
    found = read_comparison(out)["measures"]["exposure"]
    assert len(found["sigma"]) == 2  # the evaluation's own grid
    still, moving = found["methods"]["still"], found["methods"]["moving"]
    assert still["edit"]["own"]["value"] < 1e-6 < moving["edit"]["own"]["value"]  # it starts as that field
    assert still["edit"]["data"]["value"] < 1e-6 < still["t2i"]["data"]["value"]
    at_step = still["t2i"]["at_step"]
    assert at_step["own"][0] == pytest.approx(at_step["data"][0])  # both begin at the same noise
    table = out.with_suffix(".md").read_text().split("## Where students stray")[1]
    assert table.count("| still |") == table.count("| moving |") == 2
    assert len(set(moving["edit"]["by_seed"]["own"])) == 2  # seeds differ, and the mean lies between them
    assert (
        min(moving["edit"]["by_seed"]["own"]) < moving["edit"]["own"]["value"] < max(moving["edit"]["by_seed"]["own"])
    )
    each = ", ".join(f"{100 * error:.1f}" for error in moving["edit"]["by_seed"]["own"])
    assert f" {each} |" in table
