import pytest
from tiny_suites import single_route, write

from danceopd.comparison.compare import compare, read_comparison
from danceopd.comparison.suite import load_suite
from danceopd.evaluation import shapes
from danceopd.runs import train
from danceopd.world import verify


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
    realism = summary["measures"]["realism"]
    assert set(realism["sources"]) == {"base", "teacher"}
    assert realism["sources"]["teacher"]["value"] > realism["sources"]["base"]["value"]
    closed = realism["methods"]["danceopd"]["gap_closed"]
    reward = realism["methods"]["danceopd"]["reward"]["value"]
    base, teacher = (realism["sources"][name]["value"] for name in ("base", "teacher"))
    assert closed["value"] == pytest.approx((reward - base) / (teacher - base), abs=1e-3)
    assert summary["claims"][0]["verdict"] == "not reproduced"  # after two updates
    assert "| danceopd |" in out.with_suffix(".md").read_text().split("## Realism reward")[1]


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
    assert methods["moving"]["age"] > 0
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
