"""Runs and their data: manifests train like generators, and what does not fit is refused before training."""

import json

import pytest
import torch

from danceopd.data.images import write_image_file
from danceopd.data.rows import ManifestError
from danceopd.exports import export
from danceopd.fields.weights import read_safetensors
from danceopd.pictures import sample_images
from danceopd.recipe import RecipeError
from danceopd.runs import evaluate, train
from danceopd.training.assemble import assemble
from danceopd.training.checkpoint import RunStateError, checkpoints
from danceopd.world import generator
from danceopd.world.render import render

CPU = torch.device("cpu")


def manifest_recipe(tiny, tmp_path, *lines):
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return tiny(f"routes.0.data={{manifest: {tmp_path / 'm.jsonl'}}}")


def test_manifests_train_like_generators(tiny, tmp_path):
    folder = train(manifest_recipe(tiny, tmp_path, {"prompt": "a red circle"}, {"prompt": "two squares"}))
    assert len(folder.metrics()) == 6


def test_a_finished_run_is_used_without_its_training_data(tiny, tmp_path):
    recipe = manifest_recipe(tiny, tmp_path, {"prompt": "a red circle"})
    folder = train(recipe)
    (tmp_path / "m.jsonl").unlink()
    report = evaluate(folder)
    assert "data of t2i" in report["hashes"]
    options = {"guidance_scale": 1.0, "num_inference_steps": 1, "seed": 0, "out": tmp_path}
    assert sample_images(folder, prompts=["a circle"], image=None, field="edit", **options)[0].exists()
    assert export(folder, tmp_path / "out.safetensors") < 1e-3
    assert read_safetensors(tmp_path / "out.safetensors")[1]["text"] == report["hashes"]["text encoder"]
    with pytest.raises(ManifestError, match="not found"):
        train(recipe, resume=True)
    state = checkpoints(folder.checkpoints)[-1] / "state.json"
    state.write_text(state.read_text().replace(report["hashes"]["shapes:edit"], "0" * 64))
    with pytest.raises(RunStateError, match="so it cannot be evaluated: shapes:edit"):
        evaluate(folder)
    with pytest.raises(RunStateError, match="so it cannot be exported"):
        export(folder, tmp_path / "out.safetensors")


def test_manifest_lines_that_the_family_cannot_take_are_named_before_training(tiny, tmp_path):
    with pytest.raises(RecipeError, match=r"line 2: .*did you mean 'circle'"):
        assemble(manifest_recipe(tiny, tmp_path, {"prompt": "a circle"}, {"prompt": "a circel"}), device=CPU)
    write_image_file(tmp_path / "large.png", torch.zeros(3, 64, 64))
    lines = [{"instruction": "remove the red circle", "source": "large.png"}]
    with pytest.raises(RecipeError, match=r"line 1: source image .*\(3, 64, 64\), needed \(3, 32, 32\)"):
        assemble(manifest_recipe(tiny, tmp_path, *lines), device=CPU)
    lines = [{"prompt": "a circle"}, {"prompt": "a circle", "target": "large.png"}]
    with pytest.raises(RecipeError, match=r"line 2: family 'shapes' has images of 32 x 32, found 64 x 64"):
        assemble(manifest_recipe(tiny, tmp_path, *lines), device=CPU)


def test_data_states_over_a_manifest_without_targets_are_refused_before_training(tiny, tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"prompt": "a circle"}))
    recipe = tiny(f"routes.0.data={{manifest: {tmp_path / 'm.jsonl'}}}", "method=off_policy", "query.states=data")
    with pytest.raises(RecipeError, match=r"line 1: .*'target'"):
        assemble(recipe, device=CPU)


def test_a_negative_prompt_that_generated_data_cannot_have_is_refused_before_training(tiny):
    unknown = tiny("fields.t2i={base: true, guidance_scale: 2.0, negative_prompt: ugly}")
    with pytest.raises(RecipeError, match=r"routes\.\d: .*ugly"):
        assemble(unknown, device=CPU)


def test_a_manifest_that_changed_is_refused_on_resume(tiny, tmp_path):
    recipe = manifest_recipe(tiny, tmp_path, {"prompt": "a red circle"})
    train(recipe)
    changed = manifest_recipe(tiny, tmp_path, {"prompt": "a blue circle"})
    with pytest.raises(RunStateError, match="data of t2i"):
        train(changed.model_copy(update={"train": changed.train.model_copy(update={"steps": 8})}), resume=True)


def test_a_generator_that_changed_is_refused_on_resume(tiny, monkeypatch):
    train(tiny())
    monkeypatch.setattr(generator, "render", lambda scene: 0.5 * render(scene))
    with pytest.raises(RunStateError, match=r"data of edit: .*data of t2i"):
        train(tiny("train.steps=8"), resume=True)
