"""Every baseline trains a diffusers family as it trains the Shapes network."""

import pytest
import torch
from safetensors.torch import load_file
from shared_backbones import PROMPTS, SHAPE, perturb, shared_backbone
from tiny_pipelines import CASES

import danceopd as d
from danceopd.baselines.diffusion_opd import DiffusionOPD
from danceopd.baselines.flow_opd import FlowOPD
from danceopd.baselines.joint import JointTraining
from danceopd.baselines.merge import merged_loras
from danceopd.baselines.off_policy import off_policy
from danceopd.baselines.soft_mixing import soft_mixing
from danceopd.exports import export
from danceopd.fields.adapters import AdapterField, AdapterModel
from danceopd.fields.lora import Lora
from danceopd.recipe import METHODS, load_recipe
from danceopd.runs import train
from danceopd.training.checkpoint import checkpoints
from recipes import write_manifest, write_recipe

# Flow-OPD's other two losses are surrogates: their gradients mean something, their values do not.
BASELINES = {
    "joint": JointTraining,
    "off_policy, data": off_policy,
    "off_policy, teacher": lambda **options: off_policy(states="teacher", **options),
    "diffusion_opd": DiffusionOPD,
    "diffusion_opd, sde": lambda **options: DiffusionOPD(form="sde", **options),
    "flow_opd": lambda **options: FlowOPD(group_size=2, **options),
    "soft_mixing": soft_mixing,
}


@pytest.mark.parametrize("build", BASELINES.values(), ids=BASELINES.keys())
def test_one_update_of_every_baseline_lowers_its_loss_on_sd3(build):
    family = CASES["sd3"].family(CASES["sd3"].pipeline())
    backbone = shared_backbone(family)

    def samples(count, generator):
        target = torch.linspace(-1, 1, count * 4 * 8 * 12).view(count, *SHAPE)
        return d.Samples(condition=family.encode((PROMPTS * count)[:count], None), shape=SHAPE, target=target)

    routes = [
        d.Route("expert", AdapterField(backbone, family.model, "teacher"), samples),
        d.Route("base", AdapterField(backbone, family.model), samples),
    ]
    method = build(routes=routes, grid=family.grid(4, shape=SHAPE))
    student, parameters = AdapterModel(backbone, family.model, "student"), backbone.parameters("student")
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)

    def loss():
        """On the same data, noise and routes each time."""
        generator = torch.Generator().manual_seed(0)
        chosen = torch.tensor([0, 0, 1, 1])
        return method.step(student, batch_size=4, generator=generator, routes=chosen).loss

    first = loss()
    first.backward()
    optimizer.step()
    assert float(loss().detach()) < float(first.detach())


def test_sd3_loras_merge_into_their_average():
    family = CASES["sd3"].family(CASES["sd3"].pipeline())
    backbone = shared_backbone(family)
    perturb(backbone, "student", 0.3, seed=7)
    one, two = (
        Lora(rank=rank, alpha=alpha, weights={k: v.detach().clone() for k, v in backbone.state(name).items()})
        for name, rank, alpha in (("teacher", 3, 3.0), ("student", 4, 6.0))
    )
    backbone.add("merged", merged_loras([(one, 1.0), (two, 3.0)]))
    target = next(iter(one.targets))
    layer = family.network.get_submodule(target)
    deltas = {name: layer.get_delta_weight(name) for name in ("teacher", "student", "merged")}
    torch.testing.assert_close(deltas["merged"], 0.25 * deltas["teacher"] + 0.75 * deltas["student"])


SETTINGS = {
    "danceopd": [],
    "soft_mixing": [],
    "off_policy": ["query.states=data"],
    "joint": ["rollout={}", "routes.0.guidance_scale=null"],
    "diffusion_opd": ["diffusion_opd.form=sde", "routing.stratified=true"],
    "flow_opd": ["flow_opd.group_size=2"],
    "flow_opd, score": ["flow_opd={gradient: score, group_size: 2}"],
    "flow_opd, total": ["flow_opd={gradient: total, group_size: 1}"],
    "weight_merge": [
        "rollout={}",
        "routes.0.guidance_scale=null",
        "student.init={plain: 1.0, style: 3.0}",
        "student.init_mode=merged",
        "train={steps: 0, precision: fp32}",
    ],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_of_the_recipe_trains_resumes_and_exports_sd3(name, tmp_path):
    path = write_recipe(CASES["sd3"], "sd3", tmp_path)
    write_manifest(tmp_path / "pairs.jsonl", *({"prompt": prompt, "target": "source.png"} for prompt in PROMPTS))
    data = [f"routes.{index}.data.manifest={tmp_path / 'pairs.jsonl'}" for index in (0, 1)]
    settings = [f"method={name.partition(',')[0]}", *SETTINGS[name], *data]
    recipe = load_recipe(path, [*settings, f"output={tmp_path / 'whole'}"])
    whole = train(recipe)
    if recipe.train.steps:
        cut = [*settings, f"output={tmp_path / 'cut'}"]
        train(load_recipe(path, [*cut, "train.steps=1"]))
        resumed = train(load_recipe(path, cut), resume=True)
        one, two = (load_file(checkpoints(run.checkpoints)[-1] / "student.safetensors") for run in (whole, resumed))
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert whole.metrics()[-1]["calls/train"] > 0
    export(whole, tmp_path / "lora")  # which compares the file, loaded afresh, with the student


def test_every_method_is_tried_on_sd3():
    assert {name.partition(",")[0] for name in SETTINGS} == METHODS.keys()
