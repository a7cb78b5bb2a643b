import copy
from pathlib import Path

import pytest
import yaml

import danceopd
from danceopd.recipe import RecipeError, dump_recipe, load_recipe, parse_recipe

PACKAGE = Path(danceopd.__file__).parent
TWO_EXPERTS = Path(__file__).parent / "two_experts.yaml"
RECIPES = [PACKAGE / "quickstart.yaml", *sorted((PACKAGE.parent.parent / "recipes").glob("*.yaml"))]


@pytest.fixture
def content():
    return yaml.safe_load(TWO_EXPERTS.read_text())


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
        ("rollout.shift=.inf", r"rollout.shift: .*finite"),
        ("evaluate.shift=.nan", r"evaluate.shift"),
        ("train.seed=1180591620717411303424", r"train.seed: .*less than or equal to 4294967295"),
        ("evaluate.seed=4294967296", r"evaluate.seed: .*less than or equal to"),
        ("train.gradient_accumulation_steps=5", "not a multiple"),
        ("query.band=low_nois", r"did you mean 'low_noise'"),
        ("query.per_rollout=17", "exceeds rollout.num_inference_steps"),
        ("objective=velocity_mes", r"did you mean 'velocity_mse'"),
        ("routes.0.field=t2", r"routes.0.field: .*did you mean 't2i'"),
        ("routes.0.data.generator=null", "exactly one of 'generator', 'manifest' and 'pack'"),
        ("routes.0.name=edit", "different names"),
        ("routes.0={field: t2i}", "missing key 'routes.0.data'"),
        ("fields.t2i.lora=x", "exactly one of"),
        ("fields.soft={mixture: [t2i, eidt]}", "'eidt' is not a plain field"),
        ("student.init=t2i", "neither 'base' nor the name of a field"),
        ("version=2", "version"),
        ("routes.7.field=x", "not a part of the recipe"),
        ("nonsense", "KEY=VALUE"),
        ("train.learning_rate=true", r"train.learning_rate: .*found True"),
        ("fields.t2i.lora_scale=2.0", "'lora_scale' needs a 'lora'"),
        ("fields.t2i.negative_prompt=x", "'negative_prompt' needs a 'guidance_scale'"),
        ("fields.source={base: true}", "fields.source: this name is taken"),
        ("fields.mixed={mixture: []}", "fields.mixed.mixture: .*at least 1"),
        ("student.lora.targets=[]", "student.lora.targets: .*at least 1"),
        ("fields.soft={mixture: [t2i, edit], guidance_scale: 3.0}", "takes no 'guidance_scale'"),
        ("student={init: base, init_mode: merged}", "init_mode 'merged' needs"),
        ("routing={per: step, stratified: true}", "needs per: sample"),
        ("routes.0.data={manifest: m.jsonl, size: 5}", "a generator's"),
        ("routes.0.data={pack: t2i, columns: {prompt: text}}", "'columns' needs a 'manifest'"),
        ("routes.0.data={pack: t2i, manifest: m.jsonl}", "exactly one of"),
        ("routes.0.data={pack: edit}", "pack 'edit' and 'images'.* belong together"),
        ("routes.0.data={pack: t2i, images: photos}", "pack 'edit' and 'images'.* belong together"),
        ("routes.0.data={pack: t3i}", "routes.0.data.pack: .*found 't3i'"),
        ("train={gradient_cosine_steps: 5, gradient_accumulation_steps: 2}", "gradient_accumulation_steps 1"),
        ("train={gradient_cosine_steps: 5, compile: true}", "gradient_cosine_steps needs compile false"),
        ("fields.student={base: true}", "fields.student: this name is taken"),
        ("fields.base={lora: x}", "fields.base: this name is taken"),
        ("fields.x={family: flux, lora: x}", "fields.x: 'family' needs a 'base: REFERENCE' of that family"),
        (
            "fields.x={base: true, checkpoint: x}",
            "fields.x: needs exactly one of 'base: true', a 'mixture', and weights",
        ),
        ("fields.x={mixture: [t2i, edit], prompt_prefix: x}", "takes no 'guidance_scale' and no 'prompt_prefix'"),
        ("fields.x={lora: x, keep_on: cpu}", "'keep_on: cpu' needs a network of the field's own"),
        (
            "fields={x: {base: y}, t2i: {mixture: [x]}, edit: {lora: z}}",
            "fields.t2i.mixture: field 'x' has a 'prompt_pre",
        ),
        (
            "fields.edit={lora: z, checkpoint: y}",
            "student.init: 'edit' is a full checkpoint, which no LoRA over the base can",
        ),
        ("resolution=0", r"yaml: resolution: Input should be greater than or equal to 1, found 0$"),
        ("resolution=[32]", r"resolution: needs height and width, \[768, 1024\], or one .*, found \[32\]"),
        ("guidance_scale=2", r"unknown key 'guidance_scale' \(a key of evaluate, fields.NAME, routes.N; or did"),
        ("train.embedded_guidance=2", r"'train.embedded_guidance' \(a key of the top level\)"),
        (
            "routes.0.data={generator: shapes/t2i, sizes: 3}",
            r"yaml: unknown key 'routes.0.data.sizes' [^;]*; known [^;]*$",
        ),
        ("routes=[]", r"yaml: routes: needs at least 1, found \[\]$"),
        ("student.init=5", r"yaml: student.init: Input should be a valid string, found 5, or needs keys and values, "),
        ("student.init={edit: a}", r"yaml: student.init.edit: Input should be a valid number, found 'a'"),
        ("fields.1={base: true}", r"fields.1: a name is needed before the colon|fields.1: a field's name"),
        ("student.init=edti", r"student.init: 'edti' is neither .* \(did you mean 'edit'\?\); such fields here: edit$"),
        ("resolution=large", r"resolution: needs height and width, .*, found 'large'"),
        ("routes.0.negative_prompt=blurry", r"routes.0.negative_prompt: needs a 'guidance_scale'"),
        ("routes.0.per_rollout=9", r"routes.0.per_rollout 9 exceeds rollout.num_inference_steps 8"),
        (
            "routes.0={field: t2i, num_inference_steps: 2, per_rollout: 3, data: {generator: x}}",
            r"exceeds routes.0.num",
        ),
        ("embedded_guidance=-1", r"embedded_guidance: .*greater than or equal to 0"),
        ("fields.1x={base: true}", r"fields.1x: a field's name"),
    ],
)
def test_mistakes_are_found_and_named(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(TWO_EXPERTS, [override])


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
    (tmp_path / "listed.yaml").write_text("{[a]: 1}")
    with pytest.raises(RecipeError, match="a key is one word or number"):
        load_recipe(tmp_path / "listed.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "binary.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="found list"):
        load_recipe(tmp_path / "list.yaml")


def test_overrides_reach_into_lists_and_new_parts():
    recipe = load_recipe(TWO_EXPERTS, ["routes.1.weight=3", "train.steps=7", "query.over=sigma"])
    assert (recipe.routes[1].weight, recipe.train.steps, recipe.query.over) == (3.0, 7, "sigma")


def test_a_resolution_is_a_side_or_a_height_and_a_width():
    overrides = ["resolution=512", "routes.0.resolution=[768, 1024]"]
    recipe = load_recipe(TWO_EXPERTS, overrides)
    assert (recipe.resolution, recipe.routes[0].resolution) == ((512, 512), (768, 1024))
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), where="resolved") == recipe


def test_a_routes_settings_that_its_field_or_method_cannot_use_are_refused(content):
    content["fields"]["both"] = {"mixture": ["t2i", "edit"]}
    content["routes"][0] |= {"field": "both", "guidance_scale": 2.0}
    with pytest.raises(RecipeError, match=r"routes.0: a 'mixture' takes no guidance"):
        parse_recipe(content, where="r")
    content["routes"][0] = {**content["routes"][0], "field": "t2i", "per_rollout": 2}
    del content["query"]
    with pytest.raises(RecipeError, match=r"routes.0.per_rollout: method 'diffusion_opd' makes no use of it"):
        parse_recipe(content | {"method": "diffusion_opd"}, where="r")
    content["routes"][0] = {"field": "t2i", "num_inference_steps": 4, "data": {"generator": "shapes/t2i"}}
    with pytest.raises(RecipeError, match=r"routes.0.num_inference_steps: method 'joint' makes no rollout"):
        parse_recipe(content | {"method": "joint"}, where="r")


def test_numbers_may_be_written_without_a_point():
    assert load_recipe(TWO_EXPERTS, ["train.learning_rate=1e-3"]).train.learning_rate == 0.001


def test_weight_files_are_relative_to_the_recipe_too(tmp_path, content):
    content["fields"]["edit"] = {"lora": "edit.safetensors"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.base, recipe.fields["edit"].lora) == ("shapes:base", str(tmp_path / "edit.safetensors"))


def test_manifests_and_folders_of_images_are_relative_to_the_recipe(tmp_path, content):
    content["routes"][0]["data"] = {"manifest": "prompts.jsonl"}
    content["routes"][1]["data"] = {"pack": "edit", "images": "photos"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    first, second = load_recipe(tmp_path / "r.yaml").routes
    assert first.data.manifest == str(tmp_path / "prompts.jsonl")
    assert second.data.images == str(tmp_path / "photos")


def test_a_link_keeps_its_name_and_its_neighbours(tmp_path, content):
    """As in the hub's cache, whose files are links to blobs that are called by their digests."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "3f2a").write_text('{"prompt": "a"}\n')
    for name in ("m.jsonl", "lora.safetensors"):
        (tmp_path / name).symlink_to(tmp_path / "blobs" / "3f2a")
    content["routes"][0]["data"] = {"manifest": "m.jsonl"}
    content["fields"]["edit"] = {"lora": "lora.safetensors"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.routes[0].data.manifest == str(tmp_path / "m.jsonl")
    assert recipe.fields["edit"].lora == str(tmp_path / "lora.safetensors")


def test_what_is_in_the_working_directory_alone_is_no_source(tmp_path, content, monkeypatch):
    (tmp_path / "work" / "models").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(RecipeError, match=r"'models' is in .*work, but a recipe's paths, in --set too, are relative"):
        load_recipe(tmp_path / "recipe.yaml", ["base=models"])


def test_a_cache_is_relative_to_the_recipe_too(tmp_path, content):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    found = [load_recipe(tmp_path / "r.yaml", [f"data_cache={value}"]) for value in ("kept", "/kept", "false", "null")]
    assert [recipe.data_cache for recipe in found] == [str(tmp_path / "kept"), "/kept", False, None]
    assert parse_recipe(yaml.safe_load(dump_recipe(found[0])), where="resolved") == found[0]


def test_references_are_files_beside_the_recipe_or_stay_as_they_are(content, tmp_path):
    content["fields"] = {
        "here": {"lora": "loras/here"},
        "missing": {"checkpoint": "loras/missing.safetensors"},
        "hub": {"lora": "org/name@main/x.safetensors", "checkpoint": "org/name"},
        "own": {"base": "org/other@v1"},
    }
    content |= {"base": "shapes:base", "student": {"init": "here"}}
    for route, name in zip(content["routes"], ("here", "hub"), strict=True):
        route["field"] = name
    (tmp_path / "loras" / "here").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    fields = load_recipe(tmp_path / "recipe.yaml").fields
    assert fields["here"].lora == str((tmp_path / "loras" / "here").resolve())
    assert fields["missing"].checkpoint == str((tmp_path / "loras" / "missing.safetensors").resolve())
    assert fields["hub"].references == {"lora": "org/name@main/x.safetensors", "checkpoint": "org/name"}
    assert fields["own"].own_base == "org/other@v1"
    assert [part.told_apart for part in fields.values()] == [False, False, False, True]


def test_the_guidance_that_is_taught_is_that_of_what_is_asked(content):
    content = copy.deepcopy(content)
    content["fields"]["t2i"]["guidance_scale"] = 3.0
    content["fields"]["mix"] = {"mixture": ["t2i", "edit"]}
    content["routes"][1]["guidance_scale"] = 2.0
    content["routes"].append({"field": "mix", "name": "both", "data": {"generator": "shapes/t2i"}})
    taught = {"t2i": (3.0,), "edit": (2.0,), "both": (3.0, 1.0)}
    assert parse_recipe(content, where="r").taught_guidance() == taught
    averaged = parse_recipe(content | {"method": "soft_mixing"}, where="r").taught_guidance()
    assert averaged == dict.fromkeys(taught, (3.0, 2.0, 3.0, 1.0))
    joint = content | {"method": "joint", "query": {}, "rollout": {}}
    assert parse_recipe(joint, where="r").taught_guidance() == {}
