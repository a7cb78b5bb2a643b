import pytest
import torch

from danceopd.plan import check, plan
from danceopd.training.activations import Activations
from danceopd.training.assemble import assemble


def test_each_storage_is_counted_once_and_weights_not_at_all():
    first, second = torch.zeros(6, 5, requires_grad=True), torch.zeros(4, 6, requires_grad=True)
    counted = Activations([first, second])
    with counted.counted():
        x = torch.ones(7, 5)
        y = x @ first.T  # keeps x, for the weight's gradient
        z = (y * y) @ second.T  # keeps y, twice; then the square and the weight
        counted.end_pass(z.sum())
        counted.end_pass((torch.ones(2, 5) @ first.T).sum())  # a smaller pass
    assert counted.peak == 4 * (7 * 5 + 7 * 6 + 7 * 6)


def test_check_predicts_what_an_update_keeps(tiny):
    recipe = tiny("train.batch_size=12", "train.gradient_accumulation_steps=2", "train.precision=fp32")
    assembly = assemble(recipe, device=torch.device("cpu"))
    counted = Activations(weight for model in assembly.models for weight in model.parameters())
    with counted.counted():
        assembly.method.step(
            assembly.student.model,
            batch_size=6,
            generator=torch.Generator().manual_seed(0),
            routes=torch.ones(6, dtype=torch.int64),  # edits, with the source's tokens beside the image's
            backward=counted.end_pass,
        )
    predicted = check(recipe).activation_megabytes
    assert predicted == pytest.approx(counted.peak / 2**20, rel=0.01)
    assert predicted > 1


def test_muon_keeps_one_moment_and_adamw_two(tiny):
    plans = [plan(assemble(tiny(f"train.optimizer={name}"), device=torch.device("cpu"))) for name in ("muon", "adamw")]
    (trained,) = {each.trained_parameters for each in plans}
    assert plans[1].megabytes - plans[0].megabytes == pytest.approx(trained * 4 / 2**20)
