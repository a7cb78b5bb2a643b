"""Compiled blocks: the loss of uncompiled ones, and a number of graphs that soon stops growing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shared_backbones import PROMPTS, SHAPE, perturb
from tiny_pipelines import CASES, Case
from torch import nn

import danceopd
import danceopd as d
from danceopd.fields.adapters import AdapterBackbone, AdapterField, AdapterModel
from danceopd.recipe import RecipeError, load_recipe
from danceopd.runs import train
from danceopd.training.assemble import assemble
from recipes import write_recipe

CPU = torch.device("cpu")
TARGETS = ("to_q",)
"""Few adapters: what is switched matters here, and every one of them takes time to trace."""


@pytest.fixture
def graphs(monkeypatch):
    """One entry for every graph that is compiled; they then run uncompiled, so that no compiler is needed."""
    made: list[torch.fx.GraphModule] = []
    plain: Callable[..., None] = nn.Module.compile

    def count(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: plain(module, backend=count, **options))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


def backbone_of(family) -> AdapterBackbone:
    backbone = AdapterBackbone(family.network)
    rng = torch.Generator().manual_seed(5)
    for name in ("teacher", "student"):
        backbone.create(name, rank=2, alpha=2.0, targets=TARGETS, generator=rng)
    perturb(backbone, "teacher", 0.5, seed=6)
    for parameter in backbone.parameters("teacher"):
        parameter.requires_grad_(False)
    backbone.activate("student")
    return backbone


def losses(case: Case, *, compiled: bool, updates: int, after_update: Callable[[], None] = lambda: None):
    """The loss of each update, and the sizes of the batches that the student met."""
    family = case.family(case.pipeline())
    backbone = backbone_of(family)
    if compiled:
        family.compile(family.network)

    def samples(count, generator):
        return d.Samples(condition=family.encode((PROMPTS * count)[:count], None), shape=SHAPE)

    fields = {"base": AdapterField(backbone, family.model), "teacher": AdapterField(backbone, family.model, "teacher")}
    routes = [d.Route(name, field, samples) for name, field in fields.items()]
    method = d.DanceOPD(routes=routes, grid=family.grid(4, shape=SHAPE))
    student = AdapterModel(backbone, family.model, "student")
    sizes = set()
    student.register_forward_pre_hook(lambda module, inputs: sizes.add(len(inputs[0])))
    optimizer = torch.optim.AdamW(backbone.parameters("student"), lr=1e-2)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(updates):
        result = method.step(student, batch_size=6, generator=generator, backward=torch.Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(result.loss))
        after_update()
    return found, sizes


@pytest.mark.parametrize("name", ["sd3", "flux", "z_image"])
def test_compiled_updates_have_the_same_losses_and_soon_compile_nothing_new(name, graphs):
    case, counts = CASES[name], []
    plain, sizes = losses(case, compiled=False, updates=6)
    compiled, _ = losses(case, compiled=True, updates=6, after_update=lambda: counts.append(len(graphs)))
    assert len(sizes) >= 4, "the rollout's batch must shrink for this to show anything"
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=0)
    assert counts[0] > 0
    assert counts[2:] == [counts[2]] * 4


def run(case: Case, name: str, folder: Path, *overrides: str) -> list[float]:
    """The losses of a run of four updates."""
    folder.mkdir()
    route = {"field": "plain", "guidance_scale": 3.0, "data": {"manifest": "prompts.jsonl"}}
    student = {"lora": {"rank": 2, "alpha": 2.0, "targets": list(TARGETS)}}
    changes = {"fields": {"plain": {"base": True}}, "routes": [route], "student": student}
    path = write_recipe(case, name, folder, **changes)
    recipe = load_recipe(path, ["train.steps=4", "train.sample_steps=0", "train.learning_rate=1e-3", *overrides])
    metrics = (train(recipe).path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in metrics]


def test_a_recipe_compiles_with_checkpointed_gradients(tmp_path, graphs):
    case = CASES["flux"]
    plain = run(case, "flux", tmp_path / "plain")
    assert not graphs
    both = run(case, "flux", tmp_path / "both", "train.compile=true", "train.gradient_checkpointing=true")
    assert graphs
    assert len(set(plain)) == 4
    torch.testing.assert_close(both, plain, rtol=1e-4, atol=0)


def test_a_family_without_blocks_to_compile_refuses_it(tmp_path):
    quickstart = Path(danceopd.__file__).parent / "quickstart.yaml"
    recipe = load_recipe(quickstart, ["train.compile=true", f"output={tmp_path / 'run'}"])
    with pytest.raises(RecipeError, match=r"train\.compile: family 'shapes' is too small"):
        assemble(recipe, device=CPU)
