"""The recipes for real models, each on a tiny random pipeline of its own class, without a file or a connection."""

import json
import socket
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from danceopd.cli import app
from danceopd.data.images import write_image_file
from danceopd.fields.adapters import AdapterMismatch
from danceopd.plan import plan
from danceopd.recipe import Recipe, RecipeError, load_recipe
from danceopd.tiny.recipe import tiny_recipe
from danceopd.tiny.runs import check, train
from danceopd.training.assemble import Assembly, assemble

FOLDER = Path(__file__).parent.parent / "recipes"
PIPELINES = {
    "sd35_realism": "StableDiffusion3Pipeline",
    "sd35_two_loras_realism": "StableDiffusion3Pipeline",
    "sd35_cfg": "StableDiffusion3Pipeline",
    "kontext_t2i_edit": "FluxKontextPipeline",
    "z_image_t2i_edit": "ZImageOmniPipeline",
    "z_image_local_global": "ZImageOmniPipeline",
    "z_image_cfg": "ZImagePipeline",
}
STYLES = FOLDER / "sd35_two_loras_realism.yaml"


@pytest.fixture(autouse=True)
def no_connection(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"a connection was asked for: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return unwrapped(result.output)


def unwrapped(text: str) -> str:
    """Without the spaces and line ends at which a narrow terminal breaks it."""
    return "".join(text.split())


def on_stand_ins(folder, *overrides, file=STYLES) -> tuple[Recipe, Recipe]:
    recipe = load_recipe(file, [f"output={folder / 'run'}", *overrides])
    return recipe, tiny_recipe(recipe, folder / "stand-ins")[0]


def assembled(tiny) -> Assembly:
    return assemble(tiny, device=torch.device("cpu"))


def losses(assembly) -> list[float]:
    """Of each route, on the same noise."""
    found = []
    for index, route in enumerate(assembly.method.routes):
        result = assembly.method.step(
            assembly.student.model,
            batch_size=3,
            generator=torch.Generator().manual_seed(0),
            routes=torch.full((3,), index),
        )
        found.append(float(result.routes[route.name].loss.detach()))
    return found


def test_every_recipe_for_a_real_model_is_known_here():
    files = {path.stem: yaml.safe_load(path.read_text()) for path in FOLDER.glob("*.yaml")}
    assert {name for name, content in files.items() if content["family"] != "shapes"} == set(PIPELINES)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_recipe_is_checked_and_trained_on_a_tiny_pipeline_of_its_class(name, tmp_path):
    file = FOLDER / f"{name}.yaml"
    output = tmp_path / "run"
    recipe = load_recipe(file)
    said = run("check", file, "--tiny", "--set", f"output={output}")
    assert unwrapped(f"stand-in for base {recipe.base}: a random {PIPELINES[name]}") in said
    for field in recipe.fields.values():
        assert all(unwrapped(f"{kind} {reference}") in said for kind, reference in field.references.items())
    for route in recipe.routes:
        assert unwrapped(f"route {route.field}: {1 / len(recipe.routes):.0%} of samples") in said
    assert unwrapped("works on tiny stand-ins; its own files were not looked at") in said
    assert not any(tmp_path.iterdir())

    assert unwrapped("trained 2 updates in") in run("train", file, "--tiny", "--set", f"output={output}")
    folder = tmp_path / "run-tiny"
    assert list(tmp_path.iterdir()) == [folder]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
    assert max(line["loss"] for line in metrics) > 0
    exported = load_file(folder / "student" / "pytorch_lora_weights.safetensors")
    ends = {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in exported}
    targets = recipe.student.lora.targets
    assert all(any(end.endswith(f".{target}") for end in ends) for target in targets)
    assert all(any(end.endswith(f".{target}") for target in targets) for end in ends)
    assert any(float(weight.abs().max()) > 0 for key, weight in exported.items() if ".lora_B." in key)
    assert (folder / "samples" / "step-000002.png").is_file()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The plan of the recipe with two styles, and each route's loss."""
    recipe, tiny = on_stand_ins(tmp_path_factory.mktemp("original"))
    assembly = assembled(tiny)
    return plan(assembly, recipe), losses(assembly)


@pytest.mark.parametrize(
    ("change", "routes"),
    [
        ("fields.watercolour.lora_scale=0.5", {0}),
        ("fields.watercolour.lora=loras/another.safetensors", {0}),
        ("fields.linocut.prompt_prefix=another", {1}),
        ("routes.2.guidance_scale=3.0", {2}),
        ("routes.1.resolution=[512, 1024]", {1}),
        ("query.band=high_noise", {0, 1, 2}),
        ("rollout.num_inference_steps=6", {0, 1, 2}),
        ("student.lora.targets=[to_q]", {0, 1, 2}),
        ("routes.1.weight=3", set()),
        ("student.lora.rank=8", set()),
    ],
)
def test_a_changed_setting_changes_the_plan_and_the_losses_it_is_about(change, routes, original, tmp_path):
    recipe, tiny = on_stand_ins(tmp_path, change)
    assembly = assembled(tiny)
    assert plan(assembly, recipe) != original[0]
    found = losses(assembly)
    if "rank" not in change:  # the stand-in LoRAs have the student's
        assert {index for index in range(3) if found[index] != original[1][index]} == routes


def test_stand_ins_are_the_same_for_the_same_names_and_differ_otherwise(tmp_path):
    tensors = []
    for folder in ("one", "two"):
        _, tiny = on_stand_ins(tmp_path / folder)
        tensors.append({name: load_file(field.lora) for name, field in tiny.fields.items()})
    assert tensors[0]["realism"].keys() == tensors[0]["linocut"].keys()
    for name, weights in tensors[0].items():
        assert all(torch.equal(weight, tensors[1][name][key]) for key, weight in weights.items())
    for key, weight in tensors[0]["realism"].items():
        assert not torch.equal(weight, tensors[0]["linocut"][key])


def test_only_files_sizes_and_counts_are_replaced(tmp_path):
    recipe, tiny = on_stand_ins(tmp_path, "train.sample_steps=1", "rollout.shift=2.0")
    for part in ("student", "method", "routing", "query", "objective", "evaluate", "base_dtype", "embedded_guidance"):
        assert getattr(tiny, part) == getattr(recipe, part)
    assert tiny.rollout == recipe.rollout
    changed = {"steps": 2, "sample_steps": 1, "gradient_cosine_steps": 0}
    assert tiny.train == recipe.train.model_copy(update=changed)
    for name, field in recipe.fields.items():
        assert tiny.fields[name].model_copy(update=field.references) == field
    for before, after in zip(recipe.routes, tiny.routes, strict=True):
        assert after.model_copy(update={"data": before.data}) == before


def test_sizes_shrink_by_one_factor(tmp_path):
    changes = ["resolution=[768, 1024]", "routes.1.resolution=512"]
    _, tiny = on_stand_ins(tmp_path, *changes)
    assert (tiny.resolution, tiny.routes[1].resolution, tiny.routes[0].resolution) == ((24, 32), (16, 16), None)


def test_a_manifest_that_is_there_is_used_and_says_whether_it_holds_edits(tmp_path):
    write_image_file(tmp_path / "photo.png", torch.zeros(3, 40, 24))
    (tmp_path / "edits.jsonl").write_text('{"instruction": "make it blue", "source": "photo.png"}\n')
    edits = f"routes.0.data={{manifest: {tmp_path / 'edits.jsonl'}}}"
    with pytest.raises(RecipeError, match=r"family 'sd3' cannot edit, but .*edits\.jsonl holds edits"):
        check(load_recipe(STYLES, [edits]))
    recipe = load_recipe(FOLDER / "z_image_cfg.yaml", [edits])
    found, said = check(recipe)
    assert "a random ZImageOmniPipeline" in said[0]
    assert "edits.jsonl (1 inputs, edits) at 1024 x 1024" in found.routes[0]


def test_a_manifest_that_is_not_there_holds_what_the_task_says():
    nowhere = "routes.1.data={manifest: nowhere.jsonl}"
    found, said = check(load_recipe(FOLDER / "kontext_t2i_edit.yaml", [nowhere]))
    assert "2 edits of random pictures" in said[-1]
    assert "nowhere.jsonl (2 inputs, edits)" in found.routes[1]
    found, _ = check(load_recipe(FOLDER / "kontext_t2i_edit.yaml", [nowhere, "routes.1.task=null"]))
    assert "nowhere.jsonl (2 inputs, text to image)" in found.routes[1]


def test_a_field_of_another_family_has_the_students_vae(tmp_path):
    field = "fields.realism={base: org/dev@main, family: flux}"
    recipe, tiny = on_stand_ins(tmp_path, field)
    assert "taught by base org/dev@main" in plan(assembled(tiny), recipe).routes[2]


def test_targets_are_wanted_where_the_method_needs_them(tmp_path):
    _, tiny = on_stand_ins(tmp_path, "method=joint")
    assembly = assembled(tiny)
    assert all(bucket.source[0].target is not None for bucket in assembly.buckets.values())


def test_a_tiny_run_takes_the_place_of_a_tiny_run_and_of_nothing_else(tmp_path):
    recipe = load_recipe(FOLDER / "sd35_cfg.yaml", [f"output={tmp_path / 'run'}", "train.sample_steps=0"])
    first = train(recipe)
    (first.folder.path / "left-over").write_text("")
    assert train(recipe).difference == first.difference
    assert not (first.folder.path / "left-over").exists()
    (tmp_path / "other-tiny").mkdir()
    (tmp_path / "other-tiny" / "mine.txt").write_text("kept")
    with pytest.raises(RecipeError, match="holds something else than a tiny run"):
        train(recipe.model_copy(update={"output": str(tmp_path / "other")}))
    assert (tmp_path / "other-tiny" / "mine.txt").read_text() == "kept"


def test_what_the_full_size_could_not_do_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"--tiny: family 'shapes' is tiny already"):
        check(load_recipe(FOLDER / "shapes_t2i_edit.yaml"))
    with pytest.raises(RecipeError, match=r"routes\.1\.resolution: .*multiples of 16 .*found 1000 x 1000"):
        check(load_recipe(STYLES, ["routes.1.resolution=1000"]))
    with pytest.raises(AdapterMismatch, match=r"named 'to_qq' \(did you mean 'to_q'\?\)"):
        check(load_recipe(STYLES, ["student.lora.targets=[to_qq]"]))
    with pytest.raises(RecipeError, match="family 'sd3' cannot edit"):
        check(load_recipe(STYLES, ["routes.2.data={pack: edit, images: photos}"]))
    with pytest.raises(RecipeError, match="--tiny and --resume"):
        CliRunner().invoke(app, ["train", str(STYLES), "--tiny", "--resume"], catch_exceptions=False)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(RecipeError, match=r"holds a FluxPipeline; family 'sd3' needs StableDiffusion3Pipeline"):
        check(load_recipe(STYLES, [f"base={tmp_path / 'base'}"]))
