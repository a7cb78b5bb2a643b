import shutil
from pathlib import Path

import pytest
import torch
import typer
from gradient_variance import by_step, load_student, second_moment
from safetensors.torch import load_file

import danceopd
from danceopd.recipe import load_recipe
from danceopd.runs import train
from danceopd.training.assemble import assemble

QUICKSTART = Path(danceopd.__file__).parent / "quickstart.yaml"


def test_the_second_moment_of_a_weighed_gradient_is_that_of_draws():
    """Against a million draws of step j with probability q_j, each gradient weighed by b_j / q_j."""
    generator = torch.Generator().manual_seed(0)
    band, asked, norms = (torch.rand(16, generator=generator, dtype=torch.float64) for _ in range(3))
    band, asked = band / band.sum(), asked / asked.sum()
    drawn = torch.multinomial(asked, 1_000_000, replacement=True, generator=generator)
    weighed = (band[drawn] / asked[drawn]).square() * norms[drawn]
    assert abs(second_moment(band, 3 * asked, norms) - weighed.mean()) < 4 * weighed.std() / 1000
    least = second_moment(band, band * norms.sqrt(), norms)
    torch.testing.assert_close(torch.tensor(least).double(), (band * norms.sqrt()).sum().square())
    assert least < second_moment(band, asked, norms)
    norms[3] = 0.0  # a step without loss is never asked for, and nothing is missed there
    assert second_moment(band, band * norms.sqrt(), norms) == pytest.approx(float((band * norms.sqrt()).sum() ** 2))


def test_losses_and_gradients_are_those_of_each_step():
    """One rollout of the quickstart's student, taken by hand. It starts from the edit source, and is that field yet."""
    assembly = assemble(load_recipe(QUICKSTART, ["train.precision=fp32"]), device=torch.device("cpu"))
    losses, norms = by_step(assembly, 0, 1)
    again = assemble(load_recipe(QUICKSTART, ["train.precision=fp32"]), device=torch.device("cpu"))
    student, generator = again.student.model, torch.Generator().manual_seed(0)
    (batch,) = again.method.batches(torch.tensor([0]), generator)
    z, sigmas = torch.randn(1, *batch.shape, generator=generator), batch.grid.sigmas
    for step in range(batch.grid.steps):
        velocity = student(z, sigmas[step].view(1), batch.condition)
        with torch.no_grad():
            target = again.method.routes[0].field.velocity(z, sigmas[step].view(1), batch.condition)
        loss = (velocity - target).square().mean()
        gradients = torch.autograd.grad(loss, list(again.student.parameters.values()))
        norm = sum(float(gradient.double().square().sum()) for gradient in gradients)
        assert (float(losses[step]), float(norms[step])) == pytest.approx((float(loss.detach()), norm), rel=1e-3)
        z = z + (sigmas[step + 1] - sigmas[step]) * velocity.detach()
    assert len(set(losses.tolist())) == 16
    assert not any(part.any() for part in by_step(assembly, 1, 2))


def test_a_runs_student_is_read_and_nothing_of_the_run_is_changed(tmp_path):
    changes = ["train.steps=2", "train.batch_size=2", "train.precision=fp32"]
    folder = train(load_recipe(QUICKSTART, [*changes, f"output={tmp_path / 'run'}"]))
    before = {file: file.read_bytes() for file in folder.path.rglob("*") if file.is_file()}
    assembly = assemble(folder.read_recipe(), device=torch.device("cpu"))
    load_student(assembly, folder)
    saved = load_file(folder.checkpoints / "step-000002" / "student.safetensors")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in assembly.student.parameters.items())
    assert before == {file: file.read_bytes() for file in folder.path.rglob("*") if file.is_file()}
    shutil.rmtree(folder.checkpoints)
    with pytest.raises(typer.BadParameter, match="run has no checkpoint"):
        load_student(assembly, folder)
