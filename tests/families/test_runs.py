"""From a recipe to an export that others load, on every family over diffusers."""

import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import CASES
from typer.testing import CliRunner

from danceopd.cli import app
from danceopd.data.examples import Example
from danceopd.data.images import read_image_file, write_image_file
from danceopd.evaluation.pictures import draw
from danceopd.exports import export
from danceopd.fields.guidance import GuidedField
from danceopd.fields.weights import WeightsError
from danceopd.plan import check
from danceopd.recipe import RecipeError, load_recipe
from danceopd.runs import evaluate, train
from danceopd.training.assemble import assemble
from danceopd.training.checkpoint import RunStateError
from danceopd.training.run_folder import RunFolder
from danceopd.training.trainer import load_run, load_run_models
from recipes import CPU, FAMILY, HEIGHT, PROMPTS, WIDTH, final, picture, write_recipe


@pytest.fixture(params=list(CASES))
def recipe_file(request, tmp_path):
    return write_recipe(CASES[request.param], FAMILY.get(request.param, request.param), tmp_path)


@pytest.fixture
def sd3(tmp_path):
    return lambda **changes: write_recipe(CASES["sd3"], "sd3", tmp_path, **changes)


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def fresh_pipeline(family, folder, out, form):
    """What a user of diffusers makes of an export."""
    cls, options = type(family.pipeline), {"local_files_only": True}
    if form == "merged":
        options["transformer"] = type(family.network).from_pretrained(out)
    pipeline = cls.from_pretrained(folder / "base", **options)
    if form == "lora":
        pipeline.load_lora_weights(out)
    elif form == "peft":
        pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, out).get_base_model()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_images(pipeline, case, family, **options):
    size = {"height": HEIGHT, "width": WIDTH}
    options = {"prompt": list(PROMPTS), **size, **case.plain, "num_inference_steps": 4, "output_type": "pt", **options}
    options["max_sequence_length"] = family.max_sequence_length
    return pipeline(generator=torch.Generator().manual_seed(2), **options).images


def test_a_recipe_is_checked_trained_resumed_sampled_and_exported(recipe_file, request, tmp_path):
    case = CASES[request.node.callspec.params["recipe_file"]]
    assert "guidance 3" in run("check", recipe_file)
    run("train", recipe_file)
    whole = RunFolder(tmp_path / "run")
    assert (whole.samples / "step-000002.png").exists()
    cut = f"output={tmp_path / 'cut'}"
    run("train", recipe_file, "--set", cut, "--set", "train.steps=1")
    run("train", recipe_file, "--set", cut, "--resume")
    one, two = final(whole), final(RunFolder(tmp_path / "cut"))
    for name, tensors in one.items():
        assert tensors.keys() == two[name].keys()
        assert all(torch.equal(tensor, two[name][key]) for key, tensor in tensors.items()), name

    assembly, _ = load_run(whole, device=CPU)
    family, student = assembly.family, assembly.student.model
    part = assembly.recipe.evaluate.model_copy(update={"seed": 2})
    ours = draw(student, family, [Example(prompt=prompt) for prompt in PROMPTS], part)
    options = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--num-inference-steps", 4, "--seed", 2]
    run("sample", whole.path, *options, "--out", tmp_path / "drawn")
    for index, image in enumerate(ours):
        written = read_image_file(tmp_path / "drawn" / f"student-2-{index}.png")
        torch.testing.assert_close(written, image, rtol=0, atol=1 / 127)
    base = draw(assembly.base.velocity, family, [Example(prompt=prompt) for prompt in PROMPTS], part)
    assert float((ours - base).abs().max()) > 1e-3
    for form in ("lora", "peft", "merged"):
        out = tmp_path / form
        assert "differs from the student by at most" in run("export", whole.path, "--out", out, "--format", form)
        pipeline = fresh_pipeline(family, tmp_path, out, form)
        found = pipeline_images(pipeline, case, family)
        torch.testing.assert_close(ours / 2 + 0.5, found, rtol=0, atol=1e-5)
        card = (out / "README.md").read_text()
        assert str(tmp_path) not in card
        assert all(digest in card for digest in assembly.hashes.values())
        size = {"height": HEIGHT, "width": WIDTH}
        told = {**size, "num_inference_steps": part.num_inference_steps, **family.call_options(1.0)}
        call = ", ".join(f"{name}={value!r}" for name, value in told.items())
        assert f'image = pipe(prompt="...", {call}).images[0]' in card
    strong = part.model_copy(update={"guidance_scale": 3.0})
    ours = draw(student, family, [Example(prompt=prompt) for prompt in PROMPTS], strong)
    found = pipeline_images(pipeline, case, family, **family.call_options(3.0))
    torch.testing.assert_close(ours / 2 + 0.5, found, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("mode", "rank", "exported"), [("trainable", 3, 3), ("merged", 4, 3 + 4)])
def test_a_student_that_starts_from_a_field_exports_over_the_original_base(
    recipe_file, request, tmp_path, mode, rank, exported
):
    case = CASES[request.node.callspec.params["recipe_file"]]
    student = {"init": "style", "init_mode": mode, "lora": {"rank": rank, "alpha": 6.0}}
    folder = train(load_recipe(recipe_file, [f"student={json.dumps(student)}", "train.steps=1"]))
    export(folder, tmp_path / "export")
    assembly, _ = load_run(folder, device=CPU)
    family, examples = assembly.family, [Example(prompt=prompt) for prompt in PROMPTS]
    part = assembly.recipe.evaluate.model_copy(update={"seed": 2})
    ours = draw(assembly.student.model, family, examples, part)
    for other in (assembly.base, assembly.fields["style"]):
        assert float((ours - draw(other.velocity, family, examples, part)).abs().max()) > 1e-3
    assert family.load_lora(family.resolve(str(tmp_path / "export"))).rank == exported
    found = pipeline_images(fresh_pipeline(family, tmp_path, tmp_path / "export", "lora"), case, family)
    torch.testing.assert_close(ours / 2 + 0.5, found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["kontext", "omni"])
def test_edits_of_an_exported_student_are_ours(name, tmp_path):
    recipe = load_recipe(write_recipe(CASES[name], FAMILY[name], tmp_path))
    folder = train(recipe)
    out = tmp_path / "export"
    export(folder, out)
    assembly, _ = load_run(folder, device=CPU)
    source = picture(64, 64)
    part = assembly.recipe.evaluate.model_copy(update={"seed": 2})
    ours = draw(assembly.student.model, assembly.family, [Example(prompt=PROMPTS[0], source=source)], part)
    assert ours.shape == (1, 3, 64, 64)
    pipeline = fresh_pipeline(assembly.family, tmp_path, out, "lora")
    options = {"prompt": [PROMPTS[0]], "height": 64, "width": 64, "image": source[None] / 2 + 0.5}
    if name == "kontext":
        options |= {"max_area": 64 * 64, "_auto_resize": False}
    else:  # its pipeline hands its VAE the source in bfloat16
        pipeline.vae.encoder.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
        options["image"] = Image.open(tmp_path / "source.png")
    found = pipeline_images(pipeline, CASES[name], assembly.family, **options)
    torch.testing.assert_close(ours / 2 + 0.5, found, rtol=0, atol=1e-5)
    asked = ("sample", folder.path, "--prompt", PROMPTS[0], "--out", tmp_path / "drawn", "--image")
    run(*asked, tmp_path / "source.png", "--height", "64", "--width", "64")
    assert read_image_file(tmp_path / "drawn" / "student-0-0.png").shape == (3, 64, 64)
    write_image_file(tmp_path / "odd.png", torch.zeros(3, 171, 133))
    run(*asked, tmp_path / "odd.png")  # brought to a size that training would bring it to
    height, width = read_image_file(tmp_path / "drawn" / "student-0-1.png").shape[1:]
    assert (height, width) == assembly.family.buckets(assembly.family.size).size_for(171, 133)


def test_evaluation_without_a_scorer_draws_every_model_instead(tmp_path):
    recipe_file = write_recipe(CASES["kontext"], "flux", tmp_path)
    folder = train(load_recipe(recipe_file))
    said = run("evaluate", folder.path)
    assert "columns: source | base | style | student" in said
    assert "row 3: make it blue" in said
    assert "no scores: they exist for shapes only" in said
    assert read_image_file(folder.samples / "evaluation.png").shape == (3, 3 * HEIGHT, 4 * WIDTH)
    with pytest.raises(RecipeError, match=r"'flux' has no scores here: they exist for shapes only"):
        evaluate(folder)
    with pytest.raises(RecipeError, match="has no scores here"):
        CliRunner().invoke(app, ["report", str(folder.path)], catch_exceptions=False)
    with pytest.raises(RecipeError, match="--scenes-per-task: family 'flux'"):
        CliRunner().invoke(app, ["evaluate", str(folder.path), "--scenes-per-task", "3"], catch_exceptions=False)


def test_routes_have_their_own_guidance_size_steps_and_states(tmp_path):
    routes = [
        {"field": "plain", "data": {"manifest": "prompts.jsonl"}},
        {
            "field": "plain",
            "name": "large",
            "data": {"manifest": "prompts.jsonl"},
            "guidance_scale": 1.0,
            "resolution": 32,
            "num_inference_steps": 6,
            "per_rollout": 2,
            "prompt_dropout": 0.5,
        },
    ]
    fields = {"plain": {"base": True, "guidance_scale": 2.0, "negative_prompt": "blurry"}}
    recipe = load_recipe(write_recipe(CASES["flux"], "flux", tmp_path, routes=routes, fields=fields))
    assembly = assemble(recipe, device=CPU)
    small, large = assembly.method.routes
    assert (small.shape, large.shape) == ((4, 8, 12), (4, 16, 16))
    assert isinstance(small.field, GuidedField)
    assert not isinstance(large.field, GuidedField)
    assert (small.dropout, large.dropout) == (0.1, 0.5)
    grids = [route.typical_grid(assembly.method.grid) for route in (small, large)]
    for grid, route, steps in zip(grids, (small, large), (4, 6), strict=True):
        assert torch.equal(grid.sigmas, assembly.family.grid(steps, shape=route.shape).sigmas)
    generator = torch.Generator().manual_seed(0)
    result = assembly.method.step(
        assembly.student.model, batch_size=4, generator=generator, routes=torch.tensor([0, 1, 0, 1])
    )
    assert result.calls.train == 2 + 2 * 2
    assert result.calls.field == 2 * 2 + 2 * 2
    assert "large: 50% of samples, taught by base, on " in check(recipe).routes[1]


def test_a_routes_negative_prompt_guidance_and_weight_are_what_it_teaches_with(tmp_path):
    data = {"manifest": "prompts.jsonl"}
    routes = [
        {"field": "plain", "data": data, "weight": 3.0},
        {"field": "plain", "name": "sharp", "data": data, "guidance_scale": 4.0, "negative_prompt": "blurry"},
    ]
    fields = {"plain": {"base": True, "guidance_scale": 2.0, "negative_prompt": "dark"}}
    path = write_recipe(CASES["sd3"], "sd3", tmp_path, routes=routes, fields=fields)
    assembly = assemble(load_recipe(path), device=CPU)
    family, base, method = assembly.family, assembly.base, assembly.method
    generator = torch.Generator().manual_seed(0)
    z, sigma, condition = torch.randn(2, 4, 8, 12, generator=generator), torch.ones(2), family.encode(PROMPTS, None)
    conditional, taught = base.velocity(z, sigma, condition), []
    for route, alpha, negative in zip(method.routes, (2.0, 4.0), ("dark", "blurry"), strict=True):
        unwanted = family.empty(condition, negative)
        assert torch.equal(route.empty(condition).prompt_embeds, unwanted.prompt_embeds)
        empty = base.velocity(z, sigma, unwanted)
        taught.append(route.field.velocity(z, sigma, condition))
        torch.testing.assert_close(taught[-1], empty + alpha * (conditional - empty))
        other = base.velocity(z, sigma, family.empty(condition, ""))
        assert float((taught[-1] - other - alpha * (conditional - other)).abs().max()) > 1e-3
    assert float((taught[0] - taught[1]).abs().max()) > 1e-3
    assert method.shares.tolist() == [0.75, 0.25]
    drawn = method.draw_routes(4000, generator)
    assert float((drawn == 0).float().mean()) == pytest.approx(0.75, abs=0.03)


def test_frozen_weights_may_be_bf16_under_a_float32_student(recipe_file):
    frugal = load_recipe(recipe_file, ["base_dtype=bf16", "train.gradient_checkpointing=true"])
    assembly = assemble(frugal, device=CPU)
    assert {p.dtype for p in assembly.student.parameters.values()} == {torch.float32}
    frozen = [p for name, p in assembly.family.network.named_parameters() if ".lora_" not in name]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert assembly.family.network.is_gradient_checkpointing
    assert {tensor.dtype for tensor in final(train(frugal))["optimizer"].values()} == {torch.float32}
    auto = load_recipe(recipe_file, ["base_dtype=auto", "train.precision=bf16"])
    assert next(assemble(auto, device=CPU).family.network.parameters()).dtype == torch.bfloat16


def test_a_full_student_exports_its_whole_transformer(sd3, tmp_path):
    folder = train(load_recipe(sd3(), ["student.lora=null", "base_dtype=bf16", "train.learning_rate=1e-3"]))
    assembly, _ = load_run(folder, device=CPU)
    assert {p.dtype for p in assembly.student.parameters.values()} == {torch.float32}
    assert export(folder, tmp_path / "export") <= 1e-5
    saved = load_file(tmp_path / "export" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in assembly.student.network.state_dict().items())
    with pytest.raises(RecipeError, match=r"--format lora: this student is no LoRA"):
        export(folder, tmp_path / "again", form="lora")
    with pytest.raises(WeightsError, match="exists already"):
        export(folder, tmp_path / "export")


def test_an_export_of_another_student_is_not_written(sd3, tmp_path, monkeypatch):
    folder = train(load_recipe(sd3()))
    original = load_run_models

    def stronger(*args, **options):
        run, state = original(*args, **options)
        lora = run.student.lora()
        run.student.lora = lambda: replace(lora, alpha=lora.alpha * 3)
        return run, state

    monkeypatch.setattr("danceopd.exports.load_run_models", stronger)
    for form in ("lora", "peft", "merged"):
        with pytest.raises(WeightsError, match="does not give back the student"):
            export(folder, tmp_path / form, form=form)
        assert not (tmp_path / form).exists()


def test_a_base_id_that_no_hub_has_and_a_type_of_what_is_not_merged_are_refused(sd3, tmp_path):
    folder = train(load_recipe(sd3()))
    with pytest.raises(
        RecipeError, match="--base-id needs the base's id on the hub, ORG/NAME, found 'lab/model/medium'"
    ):
        export(folder, tmp_path / "export", base_id="lab/model/medium")
    with pytest.raises(RecipeError, match="--dtype is for merged weights"):
        export(folder, tmp_path / "export", dtype="bf16")
    assert not (tmp_path / "export").exists()


def test_a_student_of_a_half_precision_base_merges_in_float32(sd3, tmp_path):
    folder = train(load_recipe(sd3(base_dtype="bf16")))
    export(folder, tmp_path / "whole", form="merged", dtype="fp32")
    export(folder, tmp_path / "lora")
    whole = SD3Transformer2DModel.from_pretrained(tmp_path / "whole")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "base", torch_dtype=torch.float32)
    rounded = SD3Transformer2DModel.from_pretrained(tmp_path / "base" / "transformer", torch_dtype=torch.bfloat16)
    pipeline.transformer.load_state_dict(rounded.float().state_dict())
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = pipeline.transformer.state_dict()
    for name, weight in whole.state_dict().items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, fused[name], rtol=0, atol=1e-6)


def test_a_forgotten_merge_is_refused_whatever_the_types(sd3, tmp_path, monkeypatch):
    """The bare base in the place of a student over a bf16 base, also of one whose change is within the roundings of a
    call, and of a full float32 student over one."""

    def forgotten(run, dtype=None):
        return run.family.load_model().get_submodule("network").float()

    lora, full = {"lora": {"rank": 4}}, {"lora": None}
    for name, student, dtype, rate in (
        ("lora", lora, "fp32", 0.1),
        ("slight", lora, "fp32", 1e-3),
        ("full", full, None, 0.1),
    ):
        changes = [f"output={tmp_path / name}", f"student={json.dumps(student)}", f"train.learning_rate={rate}"]
        folder = train(load_recipe(sd3(base_dtype="bf16"), changes))
        with monkeypatch.context() as patch:
            patch.setattr("danceopd.exports._merged", forgotten)
            with pytest.raises(WeightsError, match="does not give back the student"):
                export(folder, tmp_path / "export", form="merged", dtype=dtype)
        export(folder, tmp_path / f"{name}-merged", form="merged", dtype=dtype)


def test_a_student_exports_after_its_data_is_gone(sd3, tmp_path):
    folder = train(load_recipe(sd3()))
    (tmp_path / "prompts.jsonl").unlink()
    export(folder, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "on images of about the area of 16 x 24 (plain), 16 x 24 (style) pixels" in card
    assert "| data of plain | " in card


def test_a_changed_file_of_the_base_refuses_to_resume_by_name(tmp_path):
    recipe = load_recipe(write_recipe(CASES["z_image"], "z_image", tmp_path))
    train(recipe)
    changes = {
        "model_index.json": (tmp_path / "base" / "model_index.json").read_text() + " ",
        "tokenizer/chat_template.jinja": "{{ messages }}",
        "tokenizer/additional_chat_templates/tool.jinja": "{{ messages }}",
    }
    for name, content in changes.items():
        path = tmp_path / "base" / name
        before = path.read_text() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        with pytest.raises(RunStateError, match=rf"cannot be resumed: {re.escape(name)}: "):
            train(recipe, resume=True)
        path.unlink() if before is None else path.write_text(before)


def test_what_a_family_cannot_do_is_refused_by_name_before_training(sd3, tmp_path):
    path = sd3()
    with pytest.raises(RecipeError, match=r"routes\.1: family 'sd3' cannot edit, but .*edits\.jsonl holds edits"):
        check(load_recipe(path, ["routes.1.data.manifest=edits.jsonl"]))
    with pytest.raises(RecipeError, match=r"multiples of 4, found 18 x 16"):
        check(load_recipe(path, ["resolution=[18, 16]"]))
    with pytest.raises(RecipeError, match=r"routes\.0\.resolution: .*multiples of 4, found 17 x 17"):
        check(load_recipe(path, ["routes.0.resolution=17"]))
    with pytest.raises(RecipeError, match=r"embedded_guidance: family 'sd3' takes none"):
        check(load_recipe(path, ["embedded_guidance=3.5"]))
    with pytest.raises(RecipeError, match=r"routes\.0\.data\.generator: family 'sd3' has no generated data"):
        check(load_recipe(path, ["routes.0.data={generator: shapes/t2i}"]))
    with pytest.raises(WeightsError, match=r"no model_index\.json in .*elsewhere"):
        check(load_recipe(path, ["base=elsewhere"]))
    with pytest.raises(WeightsError, match=r"holds a StableDiffusion3Pipeline; family 'flux' needs"):
        check(load_recipe(path, ["family=flux"]))


def test_the_recorded_recipe_finds_its_files_from_anywhere(sd3, tmp_path, monkeypatch):
    recipe = load_recipe(sd3())
    folder = train(recipe)
    monkeypatch.chdir("/")
    recorded = yaml.safe_load(folder.recipe_file.read_text())
    assert recorded["base"] == str(tmp_path / "base")
    assert recorded["resolution"] == [HEIGHT, WIDTH]
    assert train(load_recipe(folder.recipe_file, ["train.steps=3"]), resume=True).metrics()[-1]["step"] == 3
