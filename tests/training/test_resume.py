"""Killed and resumed == never interrupted, bit for bit."""

import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from processes import assert_same_run, final, finish, kill_at, start, wait_for_step
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from danceopd.errors import Interrupted
from danceopd.evaluation.shapes import ShapesScorer
from danceopd.exports import export
from danceopd.pictures import sample_images
from danceopd.recipe import RecipeError
from danceopd.runs import evaluate, train
from danceopd.training.assemble import assemble
from danceopd.training.checkpoint import RunStateError, checkpoints, load_checkpoint_state
from danceopd.training.run_folder import RunFolder, RunFolderBusy
from danceopd.training.trainer import Trainer


@pytest.mark.parametrize("routes", ["routing.per=sample", "routing={per: step, stratified: false}"])
def test_a_weight_that_no_gradient_has_reached_has_no_optimiser_state_to_restore(tiny, tmp_path, routes):
    one_route = ["routes=[{field: t2i, data: {generator: shapes/t2i}}]", routes]  # the mark of a source is never used
    full = ["student.lora=null", "train.learning_rate=1e-4", *one_route]
    whole = train(tiny(f"output={tmp_path / 'whole'}", *full))
    cut = train(tiny(f"output={tmp_path / 'cut'}", *full, "train.steps=3"))
    train(tiny(f"output={tmp_path / 'cut'}", *full), resume=True)
    assert_same_run(whole, cut)


@pytest.mark.parametrize("student", ["lora", "full"])
def test_killed_and_resumed_equals_uninterrupted(tiny, tmp_path, student):
    extra = ["student.lora=null", "train.learning_rate=1e-4"] if student == "full" else []
    extra += ["train.gradient_accumulation_steps=2", "train.steps=12", "routing.stratified=false"]
    extra += ["routes.0.data.size=6", "routes.1.data.size=5"]  # prompts come again, and epochs end
    whole = tiny(f"output={tmp_path / 'whole'}", *extra)
    assert finish(start(whole, tmp_path / "whole.yaml"))[0] == 0
    cut = tiny(f"output={tmp_path / 'cut'}", *extra)
    folder = RunFolder(tmp_path / "cut")
    for step in (1, 5, 8):
        kill_at(step, cut, tmp_path / "cut.yaml")
    assert 0 < load_checkpoint_state(checkpoints(folder.checkpoints)[-1]).step < 12
    code, _, err = finish(start(cut, tmp_path / "cut.yaml", "--resume"))
    assert code == 0, err
    assert_same_run(RunFolder(tmp_path / "whole"), folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_finish_the_update_save_and_say_so(tiny, tmp_path, number, code):
    recipe = tiny("train.steps=500", "train.checkpointing_steps=400")
    folder = RunFolder(tmp_path / "run")
    process = start(recipe, tmp_path / "r.yaml")
    wait_for_step(folder, 2)
    process.send_signal(number)
    returned, _, err = finish(process)
    assert returned == code
    assert "--resume" in err
    state, _ = final(folder)
    assert state.step == len(folder.metrics()) >= 2
    resumed = tiny(f"train.steps={state.step + 1}", "train.checkpointing_steps=400")
    assert finish(start(resumed, tmp_path / "r.yaml", "--resume"))[0] == 0
    assert final(folder)[0].step == state.step + 1


def test_a_signal_between_checkpoint_and_sample_grid_is_saved_too(tiny):
    recipe = tiny("train.sample_steps=1", "train.checkpointing_steps=100")
    folder = RunFolder(Path(recipe.output))
    folder.path.mkdir(parents=True)
    interrupt = lambda assembly, step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None  # noqa: E731
    with pytest.raises(Interrupted, match="stopped after update 3, which is saved") as stopped:
        Trainer(assemble(recipe, device=torch.device("cpu")), folder, on_samples=interrupt).run()
    assert stopped.value.exit_code == 143
    assert load_checkpoint_state(checkpoints(folder.checkpoints)[-1]).step == 3


def test_updates_that_are_made_again_stand_once_in_tensorboard(tiny):
    recipe = tiny()
    folder = RunFolder(Path(recipe.output))
    folder.write_recipe(recipe)
    trainer = Trainer(assemble(recipe, device=torch.device("cpu")), folder)
    update, trainer.update = trainer.update, lambda: update() if trainer.step < 3 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.run()  # update 3 is logged, and the newest checkpoint is of update 2
    train(recipe, resume=True)
    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_a_run_is_the_same_however_its_folder_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tiny("output=run"))
    train(tiny("output=./run", "train.steps=8"), resume=True)
    folder = train(tiny(f"output={tmp_path / 'run'}", "train.steps=9"), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [line["step"] for line in folder.metrics()] == list(range(1, 10))


def test_damaged_checkpoints_are_refused_by_name(tiny):
    folder = train(tiny())
    path = checkpoints(folder.checkpoints)[-1]
    whole = load_file(path / "student.safetensors")
    name = sorted(whole)[0]
    for broken in (
        {**whole, name: torch.ones(1)},
        {k: v for k, v in whole.items() if k != name},
        {**whole, "x": whole[name].clone()},
    ):
        save_file(broken, path / "student.safetensors")
        with pytest.raises(RunStateError, match=r"student\.safetensors does not fit this run at"):
            train(tiny("train.steps=8"), resume=True)
    save_file(whole, path / "student.safetensors")
    moments = load_file(path / "optimizer.safetensors")
    moments.pop("0.exp_avg")
    save_file(moments, path / "optimizer.safetensors")
    with pytest.raises(RunStateError, match=r"at '0.exp_avg': found nothing, needed \("):
        train(tiny("train.steps=8"), resume=True)
    without = {key: value for key, value in moments.items() if not key.startswith("0.")}
    save_file(without, path / "optimizer.safetensors")
    with pytest.raises(RunStateError, match=r"at '0\.exp_avg': found nothing, needed \("):
        train(tiny("train.steps=8"), resume=True)
    (path / "optimizer.safetensors").write_bytes(b"half")
    with pytest.raises(RunStateError, match=r"optimizer\.safetensors cannot be read"):
        train(tiny("train.steps=8"), resume=True)
    (path / "state.json").write_text("{")
    with pytest.raises(RunStateError, match=r"state\.json cannot be read"):
        train(tiny("train.steps=8"), resume=True)


def test_a_checkpoint_that_is_only_half_removed_is_none(tiny, monkeypatch):
    monkeypatch.setattr("shutil.rmtree", lambda path, **options: None)  # as if it were killed before
    folder = train(tiny("train.steps=6", "train.checkpointing_steps=2", "train.checkpoints_total_limit=1"))
    assert [path.name for path in checkpoints(folder.checkpoints)] == ["step-000006"]
    monkeypatch.undo()
    train(tiny("train.steps=8", "train.checkpointing_steps=2", "train.checkpoints_total_limit=1"), resume=True)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-000008"]


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in ("step-999999", "step-1000000", "step-000002"):
        (tmp_path / step).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002", "step-999999", "step-1000000"]


def test_checkpoints_without_a_recipe_are_not_taken_over(tiny):
    folder = train(tiny())
    folder.recipe_file.unlink()
    with pytest.raises(RecipeError, match="already holds a run"):
        train(tiny())
    with pytest.raises(RecipeError, match=r"no recipe\.yaml"):
        train(tiny("train.steps=8"), resume=True)


def test_a_second_process_on_a_run_folder_is_refused(tiny, tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.owned(), pytest.raises(RunFolderBusy, match=f"in use by process {os.getpid()}"):
        train(tiny())


def test_a_run_folder_is_held_while_it_is_evaluated_and_read(tiny, tmp_path, monkeypatch):
    folder = train(tiny("train.steps=1"))

    def scored(*arguments, **options):
        with pytest.raises(RunFolderBusy):
            train(tiny("train.steps=2"), resume=True)
        return {"seconds": {}}

    monkeypatch.setattr(ShapesScorer, "evaluate", scored)
    assert evaluate(folder)["trained_steps"] == 1
    with folder.owned(), pytest.raises(RunFolderBusy):
        export(folder, tmp_path / "out.safetensors")
    with folder.owned(), pytest.raises(RunFolderBusy):
        sample(folder, out=tmp_path)
    with pytest.raises(RecipeError, match="not a run folder"):
        sample(RunFolder(tmp_path / "mistyped"), out=tmp_path)
    assert not (tmp_path / "mistyped").exists()


def sample(folder, out):
    options = {"field": "student", "guidance_scale": 1.0, "num_inference_steps": 1, "seed": 0}
    return sample_images(folder, prompts=["a red circle"], image=None, out=out, **options)


def test_a_field_that_is_none_is_refused_before_anything_is_loaded(tiny, tmp_path, monkeypatch):
    folder = train(tiny("train.steps=1"))
    monkeypatch.delattr("danceopd.pictures.load_run_models")
    options = {"guidance_scale": 1.0, "num_inference_steps": 1, "seed": 0}
    with pytest.raises(
        RecipeError, match=r"no field 'edti' \(did you mean 'edit'\?\); it has student, base, t2i, edit"
    ):
        sample_images(folder, prompts=["a red circle"], image=None, out=tmp_path, field="edti", **options)


def test_a_finished_or_other_run_is_not_overwritten(tiny, tmp_path):
    train(tiny())
    with pytest.raises(RecipeError, match="already holds a run"):
        train(tiny())
    with pytest.raises(RecipeError, match=r'recipe \(query.band: "mid_noise" there, "low_noise" now\); only'):
        train(tiny("query.band=low_noise"), resume=True)
    with pytest.raises(RecipeError, match=r"recipe \(routes.1.weight: 1.0 there, 3.0 now\); only"):
        train(tiny("routes.1.weight=3"), resume=True)
    longer = train(tiny("train.steps=8"), resume=True)
    assert [line["step"] for line in longer.metrics()] == list(range(1, 9))
    with pytest.raises(RecipeError, match="already at update 8, found 7; a run goes on, never back"):
        train(tiny("train.steps=7"), resume=True)
    assert longer.read_recipe().train.steps == 8


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_whose_learning_rate_falls_to_zero_is_not_made_longer(tiny, schedule):
    train(tiny(f"train.lr_scheduler={schedule}"))
    with pytest.raises(RecipeError, match=rf"begun with 6, found 8; its {schedule} lr_scheduler"):
        train(tiny(f"train.lr_scheduler={schedule}", "train.steps=8"), resume=True)
    train(tiny(f"train.lr_scheduler={schedule}", "evaluate.seed=3"), resume=True)


def test_a_source_that_changed_is_refused_on_resume(tiny):
    folder = train(tiny())
    path = checkpoints(folder.checkpoints)[-1] / "state.json"
    path.write_text(path.read_text().replace(load_checkpoint_state(path.parent).hashes["shapes:edit"], "0" * 64))
    with pytest.raises(RunStateError, match="shapes:edit"):
        train(tiny("train.steps=8"), resume=True)
    assert folder.read_recipe().train.steps == 6  # what was refused is not recorded either


def test_the_resolved_recipe_is_recorded(tiny):
    folder = train(tiny("train.precision=auto"))
    assert yaml.safe_load(folder.recipe_file.read_text())["train"]["precision"] in ("fp32", "bf16")
