"""How much quieter a student's gradient would be if its states were asked for where it is furthest from its field.

    python benchmarks/gradient_variance.py RECIPE
    python benchmarks/gradient_variance.py --run FOLDER

Importance sampling over the steps of a rollout: step j is asked for with probability q_j in place of the band's b_j,
and its gradient weighed by b_j / q_j, which leaves the expected gradient as it is. Its second moment is then
sum_j b_j^2 / q_j E|g_j|^2, g_j the gradient of one sample's loss at step j of its rollout. Prints, for each route and
band, that of q_j in proportion to b_j sqrt(E loss_j), as a share of the band's own (q = b), and the least that any q
gives (q_j in proportion to b_j sqrt(E|g_j|^2)).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from danceopd.distill.matching import VelocityMatching
from danceopd.distill.query import BANDS
from danceopd.distill.rollout import rollout
from danceopd.recipe import load_recipe
from danceopd.states import Query
from danceopd.training.assemble import Assembly, assemble, autocast
from danceopd.training.checkpoint import check_hashes, latest_checkpoint, load_checkpoint_state, load_tensors
from danceopd.training.hardware import keep_freed_memory, pick_device, resolve_precision
from danceopd.training.run_folder import RunFolder

SHOWN = ("high_noise", "low_noise", "uniform")


def by_step(assembly: Assembly, route: int, rollouts: int) -> tuple[Tensor, Tensor]:
    """Mean loss, and mean squared norm of the student's gradient, at each step: float64 [N] each."""
    recipe, method, student = assembly.recipe, assembly.method, assembly.student.model
    parameters = list(assembly.student.parameters.values())
    generator = torch.Generator().manual_seed(0)
    precision = resolve_precision(recipe.train.precision, method.device)
    losses, norms = [], []
    for batch in method.batches(torch.full((rollouts,), route), generator):
        steps = torch.arange(batch.grid.steps).expand(len(batch.route), -1)
        noise = torch.randn(len(batch.route), *batch.shape, generator=generator).to(method.device)
        with autocast(method.device, precision):
            states = rollout(student, noise, batch.condition, batch.grid, Query(steps, batch.grid.sigmas[steps])).states
        for row in range(len(batch.route)):
            sample = batch[torch.tensor([row])]
            for step in range(batch.grid.steps):
                at = Query(torch.tensor([[step]]), batch.grid.sigmas[step].view(1, 1))
                with autocast(method.device, precision):
                    loss = method.match(student, sample, states[row : row + 1, step], at).losses.sum()
                gradients = torch.autograd.grad(loss, parameters)
                losses.append(loss.detach().double())
                norms.append(sum(gradient.double().square().sum() for gradient in gradients))
    loss, norm = (torch.stack(found).view(rollouts, -1).mean(0).cpu() for found in (losses, norms))
    return loss, norm


def load_student(assembly: Assembly, folder: RunFolder) -> None:
    """The student of a run's newest checkpoint, as it was trained (not averaged)."""
    path = latest_checkpoint(folder.checkpoints)
    if path is None:
        raise typer.BadParameter(f"{folder.path} has no checkpoint")
    check_hashes(load_checkpoint_state(path).hashes, assembly.hashes, "measured")
    load_tensors(path, "student", dict(assembly.student.parameters))


def second_moment(band: Tensor, asked: Tensor, norms: Tensor) -> float:
    """Of a gradient asked for by ``asked`` (sums to anything) and weighed by ``band / asked``: float64 [N] each.

    Steps that are never asked for count nothing: here those are without mass or without loss, and so without gradient.
    """
    asked, there = asked / asked.sum(), asked > 0
    return float((band[there].square() / asked[there] * norms[there]).sum())


def main(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe, for its student untrained.")] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder, for the student as it was left there.")] = None,
    rollouts: Annotated[int, typer.Option(min=2, help="Rollouts a route.")] = 24,
) -> None:
    """Measure and print."""
    keep_freed_memory()
    if (recipe is None) == (run is None):
        raise typer.BadParameter("needs a recipe or --run, one of them")
    assembly = assemble(RunFolder(run).read_recipe() if run else load_recipe(recipe), device=pick_device())
    if not isinstance(assembly.method, VelocityMatching):
        raise typer.BadParameter(f"method {assembly.recipe.method!r} asks for no single states")
    if run is not None:
        load_student(assembly, RunFolder(run))
    print(f"{'route':10} {'band':12} {'by the loss':>12} {'the least':>10}")
    for index, route in enumerate(assembly.method.routes):
        losses, norms = by_step(assembly, index, rollouts)
        if not norms.any():
            print(f"{route.name:10} the student is its field: no gradient")
            continue
        for name in SHOWN:
            band = BANDS[name]().step_probabilities(route.typical_grid(assembly.method.grid))
            plain = second_moment(band, band, norms)
            by_loss = second_moment(band, band * losses.sqrt(), norms) / plain
            least = second_moment(band, band * norms.sqrt(), norms) / plain
            print(f"{route.name:10} {name:12} {by_loss:12.2f} {least:10.2f}")


if __name__ == "__main__":
    typer.run(main)
