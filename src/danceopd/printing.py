"""What the command line prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from danceopd.plan import Plan
    from danceopd.tiny.runs import TinyRun

console = Console(markup=False, highlight=False)


def print_plan(plan: Plan, updates: int, *, tiny: bool) -> None:
    """What a recipe will do, its network calls and its memory."""
    for sentence in plan.routes:
        console.print(Text.assemble(("route ", "bold"), sentence))
    console.print(Text.assemble(("student ", "bold"), plan.student))
    for label, sentence in (("guidance ", plan.guidance), ("rollouts ", plan.rollout)):
        if sentence is not None:
            console.print(Text.assemble((label, "bold"), sentence))
    total = plan.rollout_calls + plan.field_calls + 3 * plan.train_calls
    console.print(
        f"per update: {plan.rollout_calls:.0f} rollout + {plan.field_calls:.0f} field network calls, "
        f"{plan.train_calls:.0f} trained states = {total:.0f} forward-equivalents; "
        f"{updates} updates = {total * updates + plan.calls_once:.3g}"
        + (f", {plan.calls_once:.0f} of them once, to fill the pool" if plan.calls_once else ""),
    )
    console.print(
        f"{plan.trained_parameters:,} trained parameters; weights, gradients and optimiser {plan.megabytes:.0f} MiB, "
        + _activations(plan.activation_megabytes)
        + (f", trajectories {plan.carried_megabytes:.1f} MiB" if plan.rollout is not None else "")
        + (" (of the tiny stand-ins)" if tiny else ""),
    )


def _activations(megabytes: float | None) -> str:
    if megabytes is None:
        return "activations (checkpointed, not counted) beside them"
    return f"activations of a micro-batch {megabytes:.0f} MiB"


def print_tiny_run(done: TinyRun) -> None:
    """What a run on stand-ins did."""
    print_stand_ins(done.stand_ins)
    for number, losses in enumerate(done.losses, start=1):
        told = ", ".join(f"{route} {loss:.3g}" for route, loss in losses.items())
        console.print(f"update {number}: loss of {told}")
    console.print(
        f"trained {len(done.losses)} updates in {done.folder.path} and exported the student to {done.export}; "
        f"reloaded, it differs by at most {done.difference:.1e}",
    )


def print_stand_ins(sentences: list[str]) -> None:
    """What stands in the place of a recipe's own files."""
    for sentence in sentences:
        console.print(f"stand-in for {sentence}")


def print_scores(report: dict) -> None:
    """Every model's scores with their intervals."""
    table = Table(title=f"{report['scenes_per_task']} scenes per task, 95 % intervals")
    table.add_column("model")
    capabilities = list(next(iter(report["models"].values())))
    for capability in capabilities:
        table.add_column(capability, justify="right")
    for model, scores in report["models"].items():
        cells = []
        for capability in capabilities:
            low, high = report["intervals"][model][capability]["overall"]
            cells.append(f"{scores[capability]['overall']:.3f} ({low:.2f}-{high:.2f})")
        table.add_row(model, *cells)
    console.print(table)
