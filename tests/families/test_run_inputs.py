"""What a run is fed on every family over diffusers: data of the route's task, buckets, the cache, the conditions."""

from itertools import groupby

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from tiny_pipelines import CASES
from transformers import PreTrainedModel

from danceopd.data.images import write_image_file
from danceopd.families.flux import FluxFamily
from danceopd.plan import check
from danceopd.recipe import RecipeError, load_recipe
from danceopd.runs import train
from danceopd.training.assemble import assemble, load_models
from recipes import CPU, FAMILY, final, picture, write_manifest, write_recipe


@pytest.mark.parametrize(
    ("index", "task", "message"),
    [
        (0, "edit", r"routes\.0\.task: route 'plain' is 'edit', but .*prompts\.jsonl, line 1\) holds text to image"),
        (1, "t2i", r"routes\.1\.task: route 'style' is 't2i', but .*edits\.jsonl, line 1\) holds edits"),
    ],
)
def test_data_of_another_kind_than_the_routes_task_is_refused(tmp_path, index, task, message):
    path = write_recipe(CASES["kontext"], "flux", tmp_path)
    with pytest.raises(RecipeError, match=message):
        check(load_recipe(path, [f"routes.{index}.task={task}"]))
    sentences = check(load_recipe(path, ["routes.0.task=t2i", "routes.1.task=edit"])).routes
    assert "(2 inputs, text to image)" in sentences[0]
    assert "(1 inputs, edits)" in sentences[1]


def test_pictures_are_brought_to_buckets_of_their_routes_size(tmp_path):
    path = write_recipe(CASES["kontext"], "flux", tmp_path)
    for index, size in enumerate([(48, 80), (80, 48), (500, 500)]):
        write_image_file(tmp_path / f"{index}.png", picture(*size))
    lines = [{"instruction": "make it blue", "source": f"{index}.png"} for index in range(3)]
    write_manifest(tmp_path / "edits.jsonl", *lines)
    assembly = assemble(load_recipe(path, ["routes.1.resolution=32"]), device=CPU)
    drawn = assembly.method.routes[1].samples(3, torch.Generator())
    assert {samples.shape for samples in drawn} == {(4, 16, 16), (4, 12, 22), (4, 22, 12)}
    assert all(samples.condition.source.shape[1:] == samples.shape for samples in drawn)
    result = assembly.method.step(
        assembly.student.model, batch_size=6, generator=torch.Generator(), routes=torch.ones(6, dtype=torch.int64)
    )
    assert result.routes["style"].samples == 6


@pytest.mark.parametrize("name", ["kontext", "omni"])
def test_training_from_a_full_cache_encodes_nothing_and_is_the_same(name, tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(CASES[name], FAMILY[name], tmp_path), ["routes.0.prompt_dropout=0.5"])
    first = final(train(recipe))
    cls = type(assemble(recipe, device=CPU).family)
    for method in ("encode_prompts", "add_sources", "encode_images"):
        monkeypatch.setattr(cls, method, None)
    again = final(train(recipe.model_copy(update={"output": str(tmp_path / "again")})))
    assert all(torch.equal(tensor, again["student"][key]) for key, tensor in first["student"].items())
    assert list((tmp_path / "cache").glob("*/*.safetensors"))
    with pytest.raises(TypeError):
        train(recipe.model_copy(update={"output": str(tmp_path / "uncached"), "data_cache": False}))


@pytest.mark.parametrize(
    ("make", "cache", "stages"),
    [
        (assemble, "null", ["encoders", "encoding", "encoders", "networks"]),
        (assemble, "false", ["encoders", "encoding", "networks"]),
        (load_models, "null", ["encoders", "networks"]),
    ],
)
def test_networks_come_to_the_accelerator_when_the_encoders_have_left(tmp_path, monkeypatch, make, cache, stages):
    """There is one device here: what is asked of the modules, and when, tells where they would be."""
    overrides = ["fields.whole={checkpoint: base/transformer/diffusion_pytorch_model.safetensors}"]
    overrides += ["student.lora=null", f"data_cache={cache}"]
    recipe = load_recipe(write_recipe(CASES["kontext"], "flux", tmp_path), overrides)
    order, networks = [], []
    original, encode = torch.nn.Module.to, FluxFamily.encode_prompts

    def moved(module, *args, **options):
        found = [part for part in module.modules() if isinstance(part, FluxTransformer2DModel)]
        networks.extend(found)
        if found or isinstance(module, PreTrainedModel | AutoencoderKL):
            order.append("networks" if found else "encoders")
        return original(module, *args, **options)

    def encoded(*args, **options):
        order.append("encoding")
        return encode(*args, **options)

    monkeypatch.setattr(torch.nn.Module, "to", moved)
    monkeypatch.setattr(FluxFamily, "encode_prompts", encoded)
    loaded = make(recipe, device=CPU)
    assert [stage for stage, _ in groupby(order)] == stages
    whole = loaded.fields["whole"].model.backbone.module
    assert set(networks) == {loaded.family.network, loaded.student.network, whole}


@pytest.mark.parametrize(("cache", "encoded"), [("null", 4), ("false", 2)])
def test_without_a_cache_one_row_of_each_shape_is_encoded_to_see_that_it_fits(tmp_path, monkeypatch, cache, encoded):
    path = write_recipe(CASES["kontext"], "flux", tmp_path)
    for index, size in enumerate([(64, 64), (48, 80), (64, 64), (48, 80)]):
        write_image_file(tmp_path / f"{index}.png", picture(*size, seed=index))
    lines = [{"instruction": f"make it {index}", "source": f"{index}.png"} for index in range(4)]
    write_manifest(tmp_path / "edits.jsonl", *lines)
    asked, encode = [], FluxFamily.encode_prompts

    def counted(family, prompts, *, edits):
        asked.extend(prompts if edits else [])
        return encode(family, prompts, edits=edits)

    monkeypatch.setattr(FluxFamily, "encode_prompts", counted)
    assembly = assemble(load_recipe(path, [f"data_cache={cache}", "routes.1.resolution=32"]), device=CPU)
    assert [prompt for prompt in asked if prompt] == [f"make it {index}" for index in range(encoded)]
    assert len(assembly.buckets["style"].source) == 4


def test_embedded_guidance_comes_from_the_recipe(tmp_path):
    path = write_recipe(CASES["flux"], "flux", tmp_path)
    conditions = [
        assemble(load_recipe(path, overrides), device=CPU).method.routes[0].samples(1, torch.Generator())[0].condition
        for overrides in ([], ["embedded_guidance=1.5"])
    ]
    assert [float(condition.guidance[0]) for condition in conditions] == [3.5, 1.5]
