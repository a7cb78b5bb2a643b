"""Adaptive shares through recipe, trainer, metrics and checkpoint."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from danceopd.plan import check
from danceopd.recipe import RecipeError
from danceopd.runs import train
from danceopd.training.assemble import assemble
from danceopd.training.checkpoint import RunStateError, checkpoints, load_checkpoint_state
from danceopd.training.run_folder import RunFolder
from danceopd.training.trainer import Trainer

GAP = "routing={by: gap, floor: 0.1, power: 0.5, decay: 0.6}"
CURRICULUM = "routing={by: curriculum, end_weights: {t2i: 1, edit: 3}, end_step: 4, stratified: true}"
NAMES = ("t2i", "edit")


def killed_in_update_4(recipe):
    """A run that ends in its fourth update; its newest checkpoint is of the second."""
    folder = RunFolder(Path(recipe.output))
    folder.write_recipe(recipe)
    trainer = Trainer(assemble(recipe, device=torch.device("cpu")), folder)
    update, trainer.update = trainer.update, lambda: update() if trainer.step < 3 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.run()


@pytest.mark.parametrize(
    "extra",
    [
        [GAP, "routing.reweight=true", "train.gradient_accumulation_steps=2"],
        [GAP, "routing.per=step"],
        [CURRICULUM],
    ],
    ids=["gap", "gap per step", "curriculum"],
)
def test_killed_and_resumed_equals_uninterrupted(tiny, tmp_path, extra):
    whole = train(tiny(*extra, f"output={tmp_path / 'whole'}"))
    cut = tiny(*extra, f"output={tmp_path / 'cut'}")
    killed_in_update_4(cut)
    resumed = train(cut, resume=True)
    one, two = (checkpoints(folder.checkpoints)[-1] for folder in (whole, resumed))
    for name in ("student", "ema", "optimizer", "method"):
        first, second = (load_file(path / f"{name}.safetensors") for path in (one, two))
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first), name
    states = [load_checkpoint_state(path).model_dump(exclude={"seconds"}) for path in (one, two)]
    assert states[0] == states[1]
    lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in run.metrics()] for run in (whole, resumed)]
    assert lines[0] == lines[1]


def test_the_metrics_shares_follow_the_metrics_losses(tiny):
    lines = train(tiny(GAP, "train.batch_size=8")).metrics()
    averages: dict[str, float] = {}
    for line in lines:
        expected = dict.fromkeys(NAMES, 0.5)
        if len(averages) == 2 and sum(averages.values()) > 0:
            drawn = {name: average**0.5 for name, average in averages.items()}
            expected = {name: 0.1 + 0.8 * value / sum(drawn.values()) for name, value in drawn.items()}
        assert {name: line[f"share/{name}"] for name in NAMES} == pytest.approx(expected, rel=1e-12)
        for name in NAMES:
            if f"loss/{name}" in line:
                loss = line[f"loss/{name}"]
                averages[name] = 0.6 * averages[name] + 0.4 * loss if name in averages else loss
    assert lines[-1]["share/t2i"] > 0.6  # the student starts from the edit field: the gap is the other route's


def test_a_curriculum_samples_along_its_line(tiny):
    lines = train(tiny(CURRICULUM, "train.batch_size=16")).metrics()
    assert [line["share/edit"] for line in lines] == [0.5, 0.5625, 0.625, 0.6875, 0.75, 0.75]
    assert [line["samples/edit"] for line in lines] == [8, 9, 10, 11, 12, 12]


def test_shares_that_stay_are_not_written_into_every_line(tiny):
    (line,) = train(tiny("routing={by: uniform, per: sample}", "routes.1.weight=1", "train.steps=1")).metrics()
    assert not any(key.startswith("share/") for key in line)


def test_check_says_that_the_shares_are_the_first_ones(tiny):
    assert "t2i: 75% of samples at first, taught by" in check(tiny(GAP, "routes.0.weight=3")).routes[0]
    assert "t2i: 75% of samples, taught by" in check(tiny("routes.0.weight=3")).routes[0]


def test_a_run_without_its_routers_state_is_not_resumed(tiny):
    folder = train(tiny(GAP, "train.steps=2"))
    (checkpoints(folder.checkpoints)[-1] / "method.safetensors").unlink()
    with pytest.raises(RunStateError, match=r"method\.safetensors does not fit this run: 'loss_averages'"):
        train(tiny(GAP), resume=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["routing.by=gab"], r"routing.by: .*found 'gab'"),
        (["routing={floor: 0.1}"], "routing: 'floor' needs by: gap, found by: weighted"),
        (["routing={by: curriculum, reweight: true}"], "'reweight' needs by: gap, found by: curriculum"),
        (["routing={by: gap, end_step: 5}"], "'end_step' needs by: curriculum, found by: gap"),
        (["routing={by: curriculum, end_step: 5}"], "by: curriculum needs 'end_weights' and 'end_step'"),
        (
            ["routing={by: curriculum, end_step: 5, end_weights: {t2i: 1}}"],
            "routing.end_weights: each route needs one, found t2i; routes: t2i, edit",
        ),
        (["routing={by: curriculum, end_step: 5, end_weights: {t2i: 1, edit: 0}}"], "end_weights.edit: .*greater than"),
        (["routing={by: gap, floor: 0.5}"], "routing.floor: 0.5 leaves 2 routes nothing to share; .* below 1/2"),
        (
            ["routing.by=uniform", "routes.0.weight=3"],
            "routes.0.weight: routing.by 'uniform' makes no use of it, found 3",
        ),
        (["routing={by: gap}", "rollout={mode: streaming, pool: 16}"], "needs 'weighted' or 'uniform', found 'gap'"),
        (["routing={by: gap}", "method=joint", "query={}", "rollout={}"], "velocity matching, which 'joint' has not"),
        (
            [CURRICULUM, "method=diffusion_opd", "query={}"],
            "method 'diffusion_opd' holds every .*'uniform', found 'curriculum'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(tiny, overrides, message):
    with pytest.raises(RecipeError, match=message):
        tiny(*overrides)


def test_a_merge_has_no_use_for_a_router(tiny):
    with pytest.raises(RecipeError, match=r"routing.by: it would do nothing here, found 'gap'"):
        tiny(
            "method=weight_merge",
            "student={init: {t2i: 1, edit: 1}, init_mode: merged}",
            "train={steps: 0, precision: fp32}",
            "query={}",
            "rollout={}",
            "routing={by: gap}",
        )
