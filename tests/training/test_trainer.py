import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import assert_same_run
from safetensors.torch import load_file

from danceopd import exports
from danceopd.data.examples import Example
from danceopd.data.images import read_image_file, write_image_file
from danceopd.errors import NonFiniteValue, UserError
from danceopd.evaluation.pictures import draw, side_by_side
from danceopd.evaluation.shapes import score_model
from danceopd.exports import export
from danceopd.families.shapes import ShapesFamily
from danceopd.fields.adapters import AdapterMismatch
from danceopd.fields.weights import read_safetensors, save_lora
from danceopd.pictures import sample_images
from danceopd.plan import check
from danceopd.recipe import RecipeError, evaluate_part
from danceopd.report.page import write_report
from danceopd.runs import evaluate, model_velocities, quickstart, train
from danceopd.training import checkpoint as checkpoint_module
from danceopd.training import trainer as trainer_module
from danceopd.training.assemble import assemble
from danceopd.training.checkpoint import RunStateError, checkpoints
from danceopd.training.ema import EMA
from danceopd.training.optimizer import learning_rate_factor
from danceopd.training.processes import SeveralProcesses
from danceopd.training.run_folder import RunFolder
from danceopd.training.trainer import Trainer, load_run
from danceopd.world.generator import GeneratedExamples

CPU = torch.device("cpu")


def test_only_the_student_changes_and_the_last_checkpoints_are_kept(tiny):
    recipe = tiny()
    folder = RunFolder(tiny_path(recipe))
    folder.path.mkdir(parents=True)
    assembly = assemble(recipe, device=CPU)
    before = {key: value.clone() for key, value in assembly.family.network.state_dict().items()}
    Trainer(assembly, folder).run()
    after = assembly.family.network.state_dict()
    changed = {key for key in before if not torch.equal(after[key], before[key])}
    assert changed
    assert all(".student." in key for key in changed)
    assert [path.name for path in checkpoints(folder.checkpoints)] == ["step-000004", "step-000006"]
    lines = folder.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss/t2i", "loss/edit", "samples/t2i", "calls/rollout", "gradient_norm"} <= lines[-1].keys()
    assert list((folder.path / "tensorboard").iterdir())


def test_a_launchers_gradient_accumulation_changes_nothing(tiny, tmp_path, monkeypatch):
    plain = train(tiny(f"output={tmp_path / 'plain'}"))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert_same_run(plain, train(tiny(f"output={tmp_path / 'told'}")))


def test_accumulation_averages_micro_batches_and_keeps_one_route_per_update(tiny):
    recipe = tiny(
        "student.init=base",
        "train.gradient_accumulation_steps=4",
        "routing={per: step}",
        "train.batch_size=8",
        "train.max_grad_norm=1e9",
    )
    trainer = Trainer(assemble(recipe, device=CPU), RunFolder(tiny_path(recipe)))
    trainer.optimizer.step = lambda: None
    trainer.optimizer.zero_grad = lambda: None
    metrics = trainer.update()
    assert sum(key.startswith("samples/") for key in metrics) == 1
    got = [parameter.grad.clone() for parameter in trainer.assembly.student.parameters.values()]
    again = assemble(recipe, device=CPU)
    generator = torch.Generator().manual_seed(recipe.train.seed)
    for chosen in again.method.draw_routes(8, generator).chunk(4):
        result = again.method.step(again.student.model, batch_size=2, generator=generator, routes=chosen)
        (result.loss / 4).backward()
    assert any(float(gradient.abs().sum()) > 0 for gradient in got)
    for gradient, parameter in zip(got, again.student.parameters.values(), strict=True):
        assert torch.equal(gradient, parameter.grad)


def test_only_train_runs_as_several_processes(tiny, monkeypatch):
    monkeypatch.setattr(trainer_module.Accelerator, "num_processes", 2)
    with pytest.raises(SeveralProcesses, match="only `danceopd train` runs as several processes, found 2"):
        train(tiny())
    assert issubclass(SeveralProcesses, UserError)


def test_a_non_finite_loss_stops_names_the_route_and_saves_nothing_broken(tiny):
    recipe = tiny("train.steps=100")
    assembly = assemble(recipe, device=CPU)
    folder = RunFolder(tiny_path(recipe))
    folder.path.mkdir(parents=True)
    trainer = Trainer(assembly, folder)
    edit = assembly.method.routes[1].field
    original = edit.velocity
    edit.velocity = lambda z, sigma, condition: original(z, sigma, condition) * (math.nan if trainer.step >= 3 else 1.0)
    with pytest.raises(
        NonFiniteValue, match=r"update 4: non-finite loss on route edit \(nan\).*the newest checkpoint is step-000002\."
    ):
        trainer.run()
    (last,) = checkpoints(folder.checkpoints)
    assert last.name == "step-000002"
    assert all(bool(t.isfinite().all()) for t in load_file(last / "student.safetensors").values())


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tiny, monkeypatch):
    recipe = tiny()
    folder = RunFolder(tiny_path(recipe))
    folder.path.mkdir(parents=True)
    trainer = Trainer(assemble(recipe, device=CPU), folder)
    trainer.update()
    trainer.save()
    trainer.update()
    real = checkpoint_module.save_file

    def full(tensors, path, *args):
        if path.name == "optimizer.safetensors":
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, *args)

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    with pytest.raises(RunStateError, match="No space left on device; the previous one, step-000001, is whole"):
        trainer.save()
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-000001"]
    monkeypatch.undo()
    again = Trainer(assemble(recipe, device=CPU), folder)
    again.resume()
    assert again.step == 1


@pytest.mark.parametrize(
    "settings",
    [
        ["student.init=base"],
        ["student.init=edit"],
        ["student.init=edit", "student.init_mode=merged"],
        ["student.lora=null", "train.learning_rate=1e-4"],
    ],
)
def test_a_student_exports_against_the_original_base_whatever_it_started_from(tiny, tmp_path, settings):
    folder = train(tiny(*settings, "train.steps=3"))
    assert export(folder, tmp_path / "out.safetensors") < 1e-3
    tensors, metadata = read_safetensors(tmp_path / "out.safetensors")
    if "student.lora=null" in settings:
        assert (
            tensors.keys()
            == assemble(tiny(), device=CPU).family.load_model().get_submodule("network").state_dict().keys()
        )
    else:
        assert metadata["rank"] == ("64" if "student.init_mode=merged" in settings else "32")


def test_a_student_starts_as_its_source(tiny):
    for mode in ("trainable", "merged"):
        assembly = assemble(tiny("student.init=edit", f"student.init_mode={mode}"), device=CPU)
        (drawn,) = assembly.method.routes[1].samples(2, torch.Generator())
        condition = drawn.condition
        z, sigma = torch.randn(2, 3, 32, 32), torch.tensor([0.3, 0.8])
        with torch.no_grad():
            expected = assembly.fields["edit"].velocity(z, sigma, condition)
            torch.testing.assert_close(assembly.student.model(z, sigma, condition), expected, rtol=1e-4, atol=1e-4)


def test_an_export_that_does_not_reproduce_the_student_is_refused(tiny, tmp_path, monkeypatch):
    folder = train(tiny("train.steps=2"))
    wrong = lambda lora, path, metadata=None: save_lora(replace(lora, alpha=lora.alpha * 3), path)  # noqa: E731
    monkeypatch.setattr(exports, "save_lora", wrong)
    with pytest.raises(RunStateError, match="does not reproduce the student"):
        export(folder, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("*out.safetensors"))


def test_a_full_student_starts_from_a_merged_source(tiny):
    assembly = assemble(tiny("student.init=edit", "student.lora=null"), device=CPU)
    (drawn,) = assembly.method.routes[1].samples(2, torch.Generator())
    condition = drawn.condition
    z, sigma = torch.randn(2, 3, 32, 32), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        expected = assembly.fields["edit"].velocity(z, sigma, condition)
        torch.testing.assert_close(assembly.student.model(z, sigma, condition), expected, rtol=1e-4, atol=1e-4)


def test_check_predicts_the_calls_that_training_makes(tiny):
    recipe = tiny("train.batch_size=64", "fields.edit.guidance_scale=2.0", "query.band=low_noise")
    plan = check(recipe)
    assert len(plan.routes) == 2
    assert "guidance 2" in plan.routes[1]
    trainer = Trainer(assemble(recipe, device=CPU), RunFolder(tiny_path(recipe)))
    trainer.update()
    trainer.update()
    assert trainer.calls.train == 128
    assert trainer.calls.field == pytest.approx(2 * plan.field_calls)
    assert trainer.calls.rollout == pytest.approx(2 * plan.rollout_calls, rel=0.1)


def test_scores_of_an_earlier_update_make_no_report(tiny):
    folder = train(tiny("train.steps=2"))
    evaluate(folder)
    write_report(folder)
    train(tiny("train.steps=4"), resume=True)
    with pytest.raises(RunStateError, match=r"is of update 2, the run at step-000004; run: danceopd evaluate"):
        write_report(folder)


def test_a_run_that_was_moved_keeps_its_cache_beside_it(tiny, tmp_path):
    moved = train(tiny("train.steps=1")).path.rename(tmp_path / "moved")
    assert RunFolder(moved).read_recipe().output == str(moved)


def test_pictures_are_drawn_a_batch_at_a_time_from_the_same_noise(tiny):
    assembly = assemble(tiny(), device=CPU)
    examples = [Example(prompt=prompt) for prompt in ("a red circle", "a square", "two blue circles")]
    seen, velocity = [], assembly.base.velocity

    def counted(z, sigma, condition):
        seen.append(len(z))
        return velocity(z, sigma, condition)

    parts = [evaluate_part({"num_inference_steps": 2, "batch_size": size}) for size in (2, 60)]
    some, at_once = (draw(counted, assembly.family, examples, part) for part in parts)
    assert seen == [2, 2, 1, 1, 3, 3]
    torch.testing.assert_close(some, at_once, rtol=0, atol=1e-4)


def test_gradient_cosines_are_logged_on_request_and_change_nothing(tiny, tmp_path):
    folders = [
        train(tiny("train.steps=2", f"train.gradient_cosine_steps={n}", f"output={tmp_path / str(n)}")) for n in (0, 2)
    ]
    first, second = folders[1].metrics()
    assert not any("cosine" in key for key in first)
    assert -1 <= second["gradient_cosine/edit/t2i"] <= 1
    one, two = (load_file(checkpoints(folder.checkpoints)[-1] / "student.safetensors") for folder in folders)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-6)


def test_evaluation_reproduces_itself_and_damaged_weights_score_lower(tiny):
    folder = train(tiny("student.init=base", "evaluate.scenes_per_task=8", "evaluate.num_inference_steps=8"))
    first = evaluate(folder)
    folder.evaluation_file.unlink()
    again = evaluate(folder)
    assert first["models"] == again["models"]
    assert set(first["models"]) == {"base", "edit", "student"}
    assembly, _ = load_run(folder, device=CPU)
    assert set(model_velocities(assembly)) == set(first["models"])
    unseen = evaluate(folder, folder.read_recipe().evaluate.model_copy(update={"seed": 5}))
    for name, capability in (("base", "t2i"), ("edit", "edit"), ("student", "t2i"), ("student", "edit")):
        spans = [report["intervals"][name][capability]["overall"] for report in (first, unseen)]
        assert max(low for low, _ in spans) <= min(high for _, high in spans)
    path = checkpoints(folder.checkpoints)[-1] / "ema.safetensors"
    damaged = {name: tensor + torch.randn_like(tensor) for name, tensor in load_file(path).items()}
    checkpoint_module.save_file(damaged, path)
    worse = evaluate(folder)
    assert worse["models"]["student"]["t2i"]["overall"] < first["models"]["student"]["t2i"]["overall"]
    assert worse["models"]["base"] == first["models"]["base"]


def test_the_quickstart_trains_scores_and_reports_and_counts_earlier_training_on_a_resumed_run(tiny):
    recipe = tiny("train.steps=2")
    folder, report = quickstart(recipe)
    assert all((folder.path / name).exists() for name in ("report.html", "overview.png"))
    assert json.loads(folder.evaluation_file.read_text()) == report
    assert report["resumed"] is False
    assert report["seconds"]["total"] >= report["seconds"]["training"] + report["seconds"]["evaluation"]
    state = checkpoints(folder.checkpoints)[-1] / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"seconds": 1000.0}))
    _, again = quickstart(recipe)
    assert again["resumed"] is True
    assert again["seconds"]["training"] == 1000.0
    assert 1000.0 + again["seconds"]["evaluation"] < again["seconds"]["total"] < 1900.0


def test_a_student_that_diverged_scores_zero_and_is_counted(tiny):
    folder = train(tiny("train.steps=2"))
    path = checkpoints(folder.checkpoints)[-1] / "ema.safetensors"
    broken = {name: torch.full_like(tensor, math.nan) for name, tensor in load_file(path).items()}
    checkpoint_module.save_file(broken, path)
    report = evaluate(folder)
    assert report["models"]["student"]["t2i"]["overall"] == 0.0
    assert report["non_finite_images"] == {"t2i/student": 12, "edit/student": 12}


def test_infinite_latents_are_counted_although_decoding_cuts_them_to_an_image():
    part = evaluate_part({"scenes_per_task": 2, "num_inference_steps": 1})
    scored = score_model(lambda z, sigma, condition: torch.full_like(z, math.inf), ShapesFamily(), "t2i", part)
    assert scored.non_finite == 12
    assert float(scored.scores.sum()) == 0.0


def test_targets_that_the_network_lacks_are_refused(tiny):
    with pytest.raises(AdapterMismatch, match=r"named 'to_outt' \(did you mean 'to_out'\?\)"):
        assemble(tiny("student.init=base", "student.lora.targets=[to_qkv, to_outt]"), device=CPU)


def test_samples_are_written_for_prompts_and_edits(tiny, tmp_path):
    folder = train(tiny("train.steps=2"))
    options = {"field": "student", "guidance_scale": 2.0, "num_inference_steps": 2, "seed": 0, "out": tmp_path / "out"}
    paths = sample_images(folder, prompts=["a red circle", "a square"], image=None, **options)
    assert [path.exists() for path in paths] == [True, True]
    assert [path.name for path in paths] == ["student-0-0.png", "student-0-1.png"]
    two = paths[0].read_bytes()

    def again(**changes):
        return sample_images(folder, prompts=["a red circle", "a square"], image=None, **options | changes)

    assert again(num_inference_steps=None)[0].read_bytes() == two  # as the recipe evaluates: in 2
    later = again(num_inference_steps=3)
    assert [path.name for path in later] == ["student-0-4.png", "student-0-5.png"]  # nothing is replaced
    assert later[0].read_bytes() != paths[0].read_bytes() == two
    assert again(guidance_scale=None)[0].read_bytes() == again(guidance_scale=1.0)[0].read_bytes() != two
    edited = sample_images(folder, prompts=["remove the red circle"], image=paths[0], **{**options, "field": "edit"})
    assert edited[0].name == "edit-0-0.png"
    write_image_file(tmp_path / "large.png", torch.zeros(3, 64, 64))
    with pytest.raises(RecipeError, match="images of 32 x 32, found 64 x 64"):
        sample_images(folder, prompts=["remove the circle"], image=tmp_path / "large.png", **options)


def test_sample_grids_are_drawn_by_the_averaged_student(tiny):
    folder = train(tiny("train.steps=4", "train.sample_steps=2", "train.learning_rate=0.02"))
    grids = sorted(folder.samples.glob("*.png"))
    assert [path.name for path in grids] == ["step-000002.png", "step-000004.png"]
    run, _ = load_run(folder, device=CPU)
    sources = [GeneratedExamples(name, size=20_000, seed=0) for name in ("shapes/t2i", "shapes/edit")]
    part, student = run.recipe.evaluate, run.student.model
    rows = [[draw(student, run.family, [source[i]], part)[0] for i in range(4)] for source in sources]
    torch.testing.assert_close(read_image_file(grids[-1]), side_by_side(rows), atol=1 / 127, rtol=0)


def test_ema_warms_up_and_then_decays():
    weight = torch.zeros(1)
    ema = EMA([weight], 0.5)
    weight.fill_(1.0)
    ema.update([weight])
    assert float(ema.average[0]) == pytest.approx(0.9)
    for _ in range(20):
        ema.update([weight])
    weight.fill_(0.0)
    before = float(ema.average[0])
    ema.update([weight])
    assert float(ema.average[0]) == pytest.approx(0.5 * before)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5]),
        ("cosine", [0.5, 1, 1, 0.5 + 0.5**1.5, 0.5]),
    ],
)
def test_learning_rate_schedules(tiny, name, expected):
    part = tiny("train.lr_warmup_steps=2", "train.steps=6", f"train.lr_scheduler={name}").train
    assert [learning_rate_factor(step, part) for step in range(5)] == pytest.approx(expected)


def test_an_update_is_made_at_the_learning_rate_of_the_schedule(tiny):
    recipe = tiny("train.lr_warmup_steps=2", "train.lr_scheduler=linear")
    trainer = Trainer(assemble(recipe, device=CPU), RunFolder(tiny_path(recipe)))
    rates = [(trainer.update()["learning_rate"], trainer.optimizer.param_groups[0]["lr"]) for _ in range(4)]
    assert rates == [(1e-3 * factor, 1e-3 * factor) for factor in (0.5, 1, 1, 0.75)]


def tiny_path(recipe):
    return Path(recipe.output)
