"""Streaming rollouts through recipe, trainer, checkpoint and comparison."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from danceopd.comparison.runner import comparison_updates
from danceopd.errors import NonFiniteValue
from danceopd.plan import check
from danceopd.recipe import RecipeError
from danceopd.report.page import write_report
from danceopd.runs import evaluate, train
from danceopd.training.assemble import assemble
from danceopd.training.checkpoint import RunStateError, checkpoints, load_checkpoint_state
from danceopd.training.run_folder import RunFolder
from danceopd.training.trainer import Trainer, prepare_recipe

STREAMING = ["rollout={num_inference_steps: 4, mode: streaming, pool: 16}"]


@pytest.mark.parametrize(
    "extra",
    [
        ["train.gradient_accumulation_steps=2", "rollout.staleness_steps=2", "train.precision=bf16"],
        ["routing={per: step}", "fields.edit.guidance_scale=2.0"],
        ["student.lora=null", "train.learning_rate=1e-4"],
    ],
)
def test_cut_and_resumed_equals_uninterrupted(tiny, tmp_path, extra):
    extra = [*STREAMING, *extra, "routes.0.data.size=6", "routes.1.data.size=5"]
    whole = train(tiny(*extra, f"output={tmp_path / 'whole'}"))
    for steps in (3, 6):
        cut = train(tiny(*extra, f"output={tmp_path / 'cut'}", f"train.steps={steps}"), resume=True)
    one, two = (checkpoints(folder.checkpoints)[-1] for folder in (whole, cut))
    for name in ("student", "ema", "optimizer", "method"):
        first, second = (load_file(path / f"{name}.safetensors") for path in (one, two))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    states = [load_checkpoint_state(path).model_dump(exclude={"seconds"}) for path in (one, two)]
    assert states[0] == states[1]
    lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in run.metrics()] for run in (whole, cut)]
    assert lines[0] == lines[1]
    last = lines[0][-1]
    assert last["calls/train"] == sum(last[f"pool/trained_at_step/{j:02d}"] for j in range(4)) == 6 * 4
    assert ("pool/staleness" in last) == ("rollout.staleness_steps=2" in extra)
    if "pool/staleness" in last:
        assert 0 < last["pool/staleness"] < 0.5
    if "routing={per: step}" in extra:
        assert all(sum(key.startswith("samples/") for key in line) == 1 for line in lines[0])


def test_a_damaged_pool_is_refused_by_name(tiny):
    folder = train(tiny(*STREAMING, "train.steps=2"))
    path = checkpoints(folder.checkpoints)[-1] / "method.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "0.seed"}, path)
    with pytest.raises(RunStateError, match=r"method\.safetensors does not fit this run: '0\.seed'"):
        train(tiny(*STREAMING), resume=True)
    path.unlink()
    with pytest.raises(RunStateError, match=r"method\.safetensors does not fit this run"):
        train(tiny(*STREAMING), resume=True)


def test_a_walking_trajectory_that_breaks_stops_the_run_and_no_pool_is_saved_with_it(tiny):
    device = torch.device("cpu")
    recipe = prepare_recipe(tiny(*STREAMING, "train.steps=6", "train.checkpointing_steps=2"), device)
    assembly, folder = assemble(recipe, device=device), RunFolder(Path(recipe.output))
    folder.path.mkdir(parents=True)
    folder.write_recipe(recipe)
    trainer = Trainer(assembly, folder)

    def break_walks(model, args, velocity):
        return velocity * math.nan if trainer.step >= 3 and not torch.is_grad_enabled() else velocity

    hook = assembly.student.model.register_forward_hook(break_walks)
    with pytest.raises(
        NonFiniteValue, match=r"^update 4: .* that was walking, .*; stopped, the newest .* step-000002\."
    ):
        trainer.run()
    hook.remove()
    (saved,) = checkpoints(folder.checkpoints)
    pool = load_file(saved / "method.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in pool.values())
    assert train(recipe, resume=True).metrics()[-1]["step"] == 6


def test_a_report_shows_which_steps_were_trained(tiny):
    folder = train(tiny(*STREAMING, "train.steps=2"))
    evaluate(folder)
    text = write_report(folder).read_text()
    assert text.count('<img alt="which steps were trained" src="data:image/png;base64,') == 1


def test_predicted_and_counted_calls_agree_in_check_metrics_and_comparison(tiny):
    recipe = tiny(*STREAMING, "train.steps=8", "train.batch_size=8", "routing={per: sample, stratified: true}")
    predicted = check(recipe)
    line = train(recipe).metrics()[-1]
    assert line["calls/rollout"] == pytest.approx(8 * predicted.rollout_calls + predicted.calls_once, rel=0.05)
    assert line["calls/field"] == 8 * predicted.field_calls
    assert line["calls/train"] == 8 * predicted.train_calls
    compute = line["calls/rollout"] + line["calls/field"] + 3 * line["calls/train"]
    assert line["forward_equivalents"] == compute
    per_update = predicted.rollout_calls + predicted.field_calls + 3 * predicted.train_calls
    assert line["forward_equivalents/expected"] == pytest.approx(8 * per_update + predicted.calls_once, abs=0.1)
    suite: Any = SimpleNamespace(recipes={"streaming": recipe}, updates=5, compute=compute * 1.01)
    assert comparison_updates(suite, "streaming", assemble(recipe, device=torch.device("cpu"))) == {
        "updates": 5,
        "compute": 8,
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.mode=streaming"], "mode 'streaming' needs a 'pool'"),
        (["rollout.pool=64"], "'pool' and 'staleness_steps' need mode: streaming"),
        (["rollout.mode=straeming"], "rollout.mode: .*'fresh' or 'streaming', found 'straeming'"),
        ([*STREAMING, "query.over=sigma"], "query.over: rollout.mode 'streaming' needs 'step', found 'sigma'"),
        ([*STREAMING, "query.per_rollout=2"], "query.per_rollout: rollout.mode 'streaming' needs 1, found 2"),
        ([*STREAMING, "query.states=data"], "method 'danceopd' on the student's states"),
        ([*STREAMING, "method=soft_mixing"], "belongs to method 'danceopd'.*found soft_mixing"),
    ],
)
def test_settings_that_cannot_stream_are_refused(tiny, overrides, message):
    with pytest.raises(RecipeError, match=message):
        tiny(*overrides)


def test_a_pool_that_is_too_small_is_refused_before_training(tiny):
    recipe = tiny("rollout={mode: streaming, pool: 4, num_inference_steps: 4}", "routing={per: step}")
    with pytest.raises(RecipeError, match="rollout: a pool of 4 is too small: an update may train 4 samples of route"):
        assemble(recipe, device=torch.device("cpu"))
