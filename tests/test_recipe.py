import copy
from pathlib import Path

import pytest
import yaml

import danceopd
from danceopd.recipe import RecipeError, dump_recipe, load_recipe, parse_recipe

PACKAGE = Path(danceopd.__file__).parent
RECIPES = [PACKAGE / "quickstart.yaml", *sorted((PACKAGE.parent.parent / "recipes").glob("*.yaml"))]


@pytest.fixture
def content():
    return yaml.safe_load((PACKAGE / "quickstart.yaml").read_text())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_load_and_resolve_to_themselves(path):
    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), where="resolved") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=5", r"unknown key 'train.stepz' \(did you mean 'steps'\?\)"),
        ("objectve=velocity_mse", r"unknown key 'objectve' \(did you mean 'objective'\?\)"),
        ("fields.t2i.lroa=x", r"did you mean 'lora'"),
        ("routes.0.data.genrator=x", r"did you mean 'generator'"),
        ("student.lora.rnak=4", r"did you mean 'rank'"),
        ("train.steps=many", r"train.steps: .*integer, found 'many'"),
        ("train.steps=2.5", r"train.steps: .*integer, found 2.5"),
        ("train.learning_rate=-1", r"train.learning_rate: .*greater than 0"),
        ("train.learning_rate=.nan", r"train.learning_rate"),
        ("train.gradient_accumulation_steps=5", "not a multiple"),
        ("query.band=low_nois", r"did you mean 'low_noise'"),
        ("query.per_rollout=17", "exceeds rollout.num_inference_steps"),
        ("objective=velocity_mes", r"did you mean 'velocity_mse'"),
        ("routes.0.field=t2", r"routes.0.field: .*did you mean 't2i'"),
        ("routes.0.data.generator=null", "exactly one of 'generator' and 'manifest'"),
        ("routes.0.name=edit", "different names"),
        ("routes.0={field: t2i}", "missing key 'routes.0.data'"),
        ("routes=[]", "routes: "),
        ("fields.t2i.lora=x", "exactly one of"),
        ("fields.soft={mixture: [t2i, eidt]}", "'eidt' is not a plain field"),
        ("student.init=t2i", "neither 'base' nor the name of a LoRA field"),
        ("version=2", "version"),
        ("routes.7.field=x", "not a part of the recipe"),
        ("nonsense", "KEY=VALUE"),
        ("train.learning_rate=true", r"train.learning_rate: .*found True"),
        ("fields.t2i.lora_scale=2.0", "'lora_scale' needs a 'lora'"),
        ("fields.t2i.negative_prompt=x", "'negative_prompt' needs a 'guidance_scale'"),
        ("fields.soft={mixture: [t2i, edit], guidance_scale: 3.0}", "takes no 'guidance_scale'"),
        ("student={init: base, init_mode: merged}", "init_mode 'merged' needs"),
        ("routing={per: step, stratified: true}", "needs per: sample"),
        ("routes.0.data={manifest: m.jsonl, size: 5}", "a generator's"),
        ("train={gradient_cosine_steps: 5, gradient_accumulation_steps: 2}", "gradient_accumulation_steps 1"),
        ("fields.student={base: true}", "fields.student: this name is taken"),
        ("fields.base={lora: x}", "fields.base: this name is taken"),
        ("fields.1x={base: true}", r"fields.1x: a field's name"),
    ],
)
def test_mistakes_are_found_and_named(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(PACKAGE / "quickstart.yaml", [override])


def test_a_missing_key_and_a_missing_or_broken_file_are_named(content, tmp_path):
    broken = copy.deepcopy(content)
    del broken["output"]
    with pytest.raises(RecipeError, match=r"r.yaml: missing key 'output'"):
        parse_recipe(broken, where="r.yaml")
    with pytest.raises(RecipeError, match="recipe not found"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "twice.yaml").write_text("train: {steps: 1, steps: 2}")
    with pytest.raises(RecipeError, match="key 'steps' stands twice"):
        load_recipe(tmp_path / "twice.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "binary.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="found list"):
        load_recipe(tmp_path / "list.yaml")


def test_overrides_reach_into_lists_and_new_parts():
    recipe = load_recipe(PACKAGE / "quickstart.yaml", ["routes.1.weight=3", "train.steps=7", "query.over=sigma"])
    assert (recipe.routes[1].weight, recipe.train.steps, recipe.query.over) == (3.0, 7, "sigma")


def test_numbers_may_be_written_without_a_point():
    assert load_recipe(PACKAGE / "quickstart.yaml", ["train.learning_rate=1e-3"]).train.learning_rate == 0.001


def test_weight_files_are_relative_to_the_recipe_too(tmp_path, content):
    content["fields"]["edit"] = {"lora": "edit.safetensors"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.base, recipe.fields["edit"].lora) == ("shapes:base", str(tmp_path / "edit.safetensors"))


def test_manifests_are_relative_to_the_recipe(tmp_path, content):
    content["routes"][0]["data"] = {"manifest": "prompts.jsonl"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    assert load_recipe(tmp_path / "r.yaml").routes[0].data.manifest == str(tmp_path / "prompts.jsonl")
