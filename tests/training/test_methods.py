"""Every method of the recipe through the one trainer."""

import pytest
import torch
from safetensors.torch import load_file

from danceopd.baselines.merge import merged_loras
from danceopd.distill.objective import VelocityMSE
from danceopd.distill.schedule import shifted_grid
from danceopd.exports import export
from danceopd.fields.adapters import AdapterBackbone
from danceopd.fields.weights import load_lora
from danceopd.plan import check
from danceopd.recipe import METHODS, RecipeError
from danceopd.runs import evaluate, train
from danceopd.training.assemble import assemble
from danceopd.training.checkpoint import checkpoints
from danceopd.training.trainer import load_run

CPU = torch.device("cpu")
PLAIN = "query={}"
FOUR = "evaluate.num_inference_steps=4"
SETTINGS = {
    "danceopd": [],
    "soft_mixing": [],
    "off_policy": ["query.states=data"],
    "joint": [PLAIN, "rollout={}"],
    "diffusion_opd": [PLAIN, "diffusion_opd.form=sde"],
    "flow_opd": [PLAIN, "flow_opd.group_size=2"],
    "weight_merge": [
        PLAIN,
        "rollout={}",
        "routing={}",
        "student={init: {t2i: 1.0, edit: 3.0}, init_mode: merged}",
        "train={steps: 0, precision: fp32}",
    ],
}

MERGE = ["method=weight_merge", *SETTINGS["weight_merge"]]


def settings(method):
    return [f"method={method}", *SETTINGS[method]]


def test_every_method_is_tried_here():
    assert SETTINGS.keys() == METHODS.keys()


VARIANTS = [
    ["method=off_policy", "query.states=teacher"],
    ["query={off_policy_share: 0.5, off_policy_states: data}"],
    ["query={off_policy_share: 0.5, off_policy_states: teacher}"],
    [*settings("flow_opd"), "flow_opd.gradient=score"],
    [*settings("flow_opd"), "flow_opd.gradient=total", "flow_opd.anchor=t2i", "flow_opd.anchor_weight=0.1"],
]


@pytest.mark.parametrize(
    "chosen", [*(settings(name) for name in METHODS if name != "weight_merge"), *VARIANTS], ids=str
)
def test_a_method_trains_the_student_and_resumes_exactly(tiny, tmp_path, chosen):
    whole = train(tiny(*chosen, f"output={tmp_path / 'whole'}", "train.steps=4"))
    train(tiny(*chosen, f"output={tmp_path / 'cut'}", "train.steps=2"))
    cut = train(tiny(*chosen, f"output={tmp_path / 'cut'}", "train.steps=4"), resume=True)
    one, two = (load_file(checkpoints(run.checkpoints)[-1] / "student.safetensors") for run in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)
    start = load_file(checkpoints(whole.checkpoints)[0] / "student.safetensors")
    assert not all(torch.equal(one[name], start[name]) for name in one)
    assert whole.metrics()[-1]["calls/train"] > 0


@pytest.mark.parametrize("method", ["danceopd", "soft_mixing", "diffusion_opd", "flow_opd", "off_policy", "joint"])
def test_only_methods_of_noised_targets_mind_what_the_targets_show(tiny, tmp_path, method):
    students = {}
    for data in ("", "_mismatched"):
        routes = [f"routes.{index}.data.generator=shapes/{kind}{data}" for index, kind in enumerate(("t2i", "edit"))]
        folder = train(tiny(f"output={tmp_path / (method + data)}", f"method={method}", *SETTINGS[method], *routes))
        students[data] = load_file(checkpoints(folder.checkpoints)[-1] / "student.safetensors")
    same = all(torch.equal(weight, students["_mismatched"][name]) for name, weight in students[""].items())
    assert same == (method not in ("off_policy", "joint"))


def test_muon_trains_and_resumes_exactly(tiny, tmp_path):
    muon = ["train.optimizer=muon", "train.learning_rate=0.01"]
    whole = train(tiny(*muon, f"output={tmp_path / 'whole'}", "train.steps=4"))
    train(tiny(*muon, f"output={tmp_path / 'cut'}", "train.steps=2"))
    cut = train(tiny(*muon, f"output={tmp_path / 'cut'}", "train.steps=4"), resume=True)
    one, two = (load_file(checkpoints(run.checkpoints)[-1] / "student.safetensors") for run in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_weight_merge_is_the_average_of_its_sources(tiny, tmp_path):
    recipe = tiny(*settings("weight_merge"))
    folder = train(recipe)
    assembly, state = load_run(folder, device=CPU)
    assert state.step == 0
    family = assemble(tiny(), device=CPU).family
    backbone = AdapterBackbone(family.network)
    edit = load_lora(family.resolve("shapes:edit"))
    backbone.add("merged", merged_loras([(None, 1.0), (edit, 3.0)]))
    condition = family.encode(["a red circle", "two squares"], None)
    z, sigma = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.4, 0.9])
    with torch.no_grad(), backbone.use("merged"):
        expected = family.model(z, sigma, condition)
    with torch.no_grad():
        got = assembly.student.model(z, sigma, condition)
        base = assembly.base.velocity(z, sigma, condition)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert float((got - base).abs().max()) > 0.01
    assert export(folder, tmp_path / "merged.safetensors") < 1e-3
    assert evaluate(folder)["trained_steps"] == 0


def test_resuming_a_finished_merge_changes_nothing(tiny):
    folder = train(tiny(*settings("weight_merge")))
    before = {file: file.stat().st_mtime_ns for file in folder.checkpoints.rglob("*")}
    train(tiny(*settings("weight_merge")), resume=True)
    assert {file: file.stat().st_mtime_ns for file in folder.checkpoints.rglob("*")} == before


def test_check_predicts_each_methods_cost(tiny):
    plans = {name: check(tiny(*settings(name))) for name in METHODS}
    assert (plans["joint"].rollout_calls, plans["joint"].field_calls, plans["joint"].train_calls) == (0, 0, 4)
    assert (plans["flow_opd"].field_calls, plans["flow_opd"].train_calls) == (16, 16)
    group = check(tiny("method=flow_opd", PLAIN, "train.batch_size=16"))  # the default group_size, 16
    assert (group.field_calls, group.train_calls) == (64, 64)
    assert plans["off_policy"].rollout_calls == 0 < plans["danceopd"].rollout_calls
    assert plans["soft_mixing"].field_calls == 2 * plans["danceopd"].field_calls
    mixed = check(tiny("query={off_policy_share: 0.5, off_policy_states: data}"))
    assert mixed.rollout_calls == pytest.approx(check(tiny(PLAIN)).rollout_calls / 2)
    assert all("a share of 0.5 at noised data" in sentence for sentence in mixed.routes)
    few = check(tiny("rollout.substeps=3", FOUR))
    assert few.field_calls == 3 * plans["danceopd"].field_calls
    assert all("3 of its steps in one" in sentence for sentence in few.routes)


SHIFTED = [shifted_grid(steps=steps, shift=3.0).sigmas.tolist() for steps in (4, 6)]


@pytest.mark.parametrize(
    ("overrides", "found", "value"),
    [
        (["objective=velocity_mse_kl"], lambda m: m.objective, VelocityMSE("kl")),
        (
            [*settings("joint"), "joint={sigma_mean: 0.7, sigma_std: 0.4}"],
            lambda m: (m.sigma_mean, m.sigma_std),
            (0.7, 0.4),
        ),
        (
            [*settings("soft_mixing"), "routes.0.weight=3", "soft_mixing={weights: {edit: 3, t2i: 1}}"],
            lambda m: [route.field.weights for route in m.routes],
            [(0.25, 0.75), (0.25, 0.75)],
        ),
        ([*settings("diffusion_opd"), "diffusion_opd.eta=0.5"], lambda m: (m.form, m.eta), ("sde", 0.5)),
        (
            ["rollout.shift=3.0", "routes.1.num_inference_steps=6"],
            lambda m: [grid((3, 32, 32)).sigmas.tolist() for grid in (m.grid, m.routes[1].grid)],
            SHIFTED,
        ),
    ],
)
def test_a_methods_settings_reach_it(tiny, overrides, found, value):
    assert found(assemble(tiny(*overrides), device=CPU).method) == value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=danseopd"], r"did you mean 'danceopd'"),
        (["method=joint"], "query: method 'joint' makes no use of it"),
        (["method=joint", PLAIN, "flow_opd.eta=0.5"], "flow_opd: method 'joint' makes no use"),
        (["method=joint", PLAIN], "rollout.num_inference_steps: it would do nothing here, found 4"),
        (["method=joint", PLAIN, "rollout={shift: 3.0}"], "rollout.shift: it would do nothing here"),
        (["method=joint", PLAIN, "rollout={substeps: 2}"], "rollout.substeps: it would do nothing here, found 2"),
        (["method=flow_opd", PLAIN, "rollout.substeps=2"], "with form: ode, found flow_opd"),
        (
            ["method=diffusion_opd", PLAIN, "diffusion_opd.form=sde", "rollout.substeps=2"],
            "rollout.substeps: .*, found diffusion_opd with form: sde",
        ),
        (
            ["rollout.substeps=2", "query.over=sigma"],
            r"query.over: rollout.substeps needs .* \('step'\), found 'sigma'",
        ),
        (["rollout.substeps=2"], r"evaluate.num_inference_steps: .* steps of the rollout .* 4\).*, found 2"),
        (["rollout.substeps=2", FOUR, "evaluate.shift=2.0"], "evaluate.shift: .* None.*, found 2.0"),
        (["rollout.substeps=2", "objective=velocity_mse_kl"], "objective: 'velocity_mse_kl' weighs velocities"),
        (["rollout.substeps=2", "routes.1.num_inference_steps=8"], r"routes\.1\.num_inference_steps: .* one number"),
        (
            [*MERGE, "train={steps: 0, learning_rate: 0.01}"],
            "train.learning_rate: it would do nothing",
        ),
        ([*MERGE, "routing.stratified=true"], "routing.stratified: it would do nothing"),
        (["method=diffusion_opd", PLAIN, "diffusion_opd.eta=0.5"], "diffusion_opd.eta: it would do nothing"),
        (["method=flow_opd", PLAIN, "flow_opd={group_size: 2, ratio_clip: 0.1}"], "flow_opd.ratio_clip: it would do"),
        (["joint.sigma_mean=1.0"], "joint: method 'danceopd' makes no use"),
        (["method=off_policy"], "needs 'data' or 'teacher'"),
        (["method=soft_mixing", "query.states=data"], "'soft_mixing' asks at the student's own states, found 'data'"),
        (["method=soft_mixing", "soft_mixing={weights: {t2i: 1}}"], "one for each route, edit, t2i; found t2i"),
        (["method=soft_mixing", "soft_mixing={weights: {t2i: 1, edit: 0}}"], "soft_mixing.weights.edit"),
        (["soft_mixing={weights: {t2i: 1, edit: 1}}"], "soft_mixing: method 'danceopd' makes no use of it"),
        (["query.states=teacher"], "'danceopd' asks at the student's own states, found 'teacher'; .* 'off_policy'"),
        (["query.off_policy_share=0.5"], "'off_policy_states' and a positive 'off_policy_share' belong together"),
        (["query={off_policy_share: 1.0, off_policy_states: data}"], "off_policy_share: .*less than 1"),
        (["query.off_policy_states=data"], "'off_policy_states' and a positive 'off_policy_share' belong together"),
        (
            ["method=off_policy", "query={states: data, off_policy_share: 0.5, off_policy_states: teacher}"],
            "off_policy_share: belongs to method 'danceopd' with fresh rollouts, found method 'off_policy'",
        ),
        (
            ["rollout={mode: streaming, pool: 8}", "query={off_policy_share: 0.5, off_policy_states: data}"],
            "off_policy_share: belongs to .*, found rollout.mode 'streaming'",
        ),
        (["train.steps=0"], "0 belongs to method 'weight_merge'"),
        (["method=weight_merge", PLAIN, "train.steps=0"], "needs {field: weight, ...}"),
        (["method=flow_opd", PLAIN], "not a multiple of groups of 16"),
        (
            ["method=flow_opd", PLAIN, "flow_opd={group_size: 2, anchor: nobody, anchor_weight: 1.0}"],
            "no field 'nobody'",
        ),
        (["method=flow_opd", PLAIN, "flow_opd={group_size: 2, anchor_weight: 1.0}"], "belong together"),
        (["method=flow_opd", PLAIN, "flow_opd={group_size: 1, gradient: score}"], "groups of at least 2"),
        (["method=diffusion_opd", PLAIN, "routing={per: step}"], "holds every route"),
        (["student={init: {t2i: 1.0}, init_mode: merged}"], "at least one field with weights of its own"),
        (["student={init: {edit: 1.0}}"], "init_mode: merged"),
        (["train.optimizer=muon", "student={lora: null}"], "needs a LoRA student"),
        (["student={init: {edit: -1.0}, init_mode: merged}"], "positive weights"),
        (["student={init: {edti: 1.0}, init_mode: merged}"], "'edti' is neither"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(tiny, overrides, message):
    with pytest.raises(RecipeError, match=message):
        tiny(*overrides)
