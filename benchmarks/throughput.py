"""Trained samples a second by fresh, streaming and off-policy states, against the textbook loop, in one run.

    python benchmarks/throughput.py                              # Shapes' network, on a CPU
    python benchmarks/throughput.py SD3.5-Medium --micro-batch 4 --gradient-checkpointing      # on a GPU

The textbook loop takes one sample at a time, rolls it out through all steps to keep one state, and asks a model copy of
each teacher's own. Everything else shares one frozen network, by batches, and steps as far as it is asked. Student,
optimiser, precision and sizes are the same for all; weights and conditions are random. The modes take turns, so that a
slow spell meets all; ratios of their medians are printed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer
from published_models import LATENT, MODELS
from torch import Tensor, nn

from danceopd import DanceOPD, ModelField, NetworkCalls, Route, Samples, StreamingDanceOPD, shifted_grid
from danceopd.distill.query import BANDS
from danceopd.distill.solver import euler_step
from danceopd.families.shapes import ShapesFamily
from danceopd.fields.adapters import AdapterField, AdapterModel
from danceopd.states import Query, select, to_device
from danceopd.training.assemble import autocast
from danceopd.training.fields import adapter_backbone
from danceopd.training.hardware import keep_freed_memory, pick_device, resolve_precision

TEACHERS = 2
WARM_UP = 1


@dataclass(frozen=True)
class Network:
    """A frozen network with its canonical call, and what its samples are like."""

    module: Any
    call: Callable[[Any], nn.Module]
    targets: tuple[str, ...]
    shape: tuple[int, ...]
    condition: Callable[[int], Any]


def network(name: str, device: torch.device) -> Network:
    """Shapes' own, or a published one with random weights in bfloat16."""
    if name == "Shapes":
        family = ShapesFamily()
        prompt = family.encode(["a red circle and a blue square"], None)
        return Network(
            family.network,
            lambda module: type(family.model)(module),
            family.lora_targets,
            (3, *family.size),
            lambda count: select(prompt, torch.zeros(count, dtype=torch.int64)),
        )
    found = {published.name: published for published in MODELS}
    if name not in found:
        raise typer.BadParameter(f"found {name!r}, needed Shapes or one of {', '.join(found)}")
    published = found[name]
    with torch.device(device):
        module = published.transformer(**published.config).to(torch.bfloat16)
    torch.manual_seed(0)
    told = to_device(published.condition(1, False), device)
    told = replace(told, prompt_embeds=torch.randn_like(told.prompt_embeds))
    return Network(
        module,
        published.model,
        published.targets,
        LATENT,
        lambda count: select(told, torch.zeros(count, dtype=torch.int64, device=device)),
    )


def textbook_step(
    method: DanceOPD,
    student: nn.Module,
    *,
    batch_size: int,
    generator: torch.Generator,
    backward: Callable[[Tensor], None],
) -> NetworkCalls:
    """``method.step`` as it is first written down: sample by sample, every rollout to its end."""
    calls = NetworkCalls()
    chosen = method.draw_routes(batch_size, generator)
    for batch in method.batches(chosen, generator, query=method.query):
        sigmas = batch.grid.sigmas.to(method.device)
        query = method.query.draw(len(batch.route), batch.grid, generator)
        noise = torch.randn(len(batch.route), *batch.shape, generator=generator).to(method.device)
        for row in range(len(batch.route)):
            one, asked = batch[torch.tensor([row])], query[row : row + 1]
            z = noise[row : row + 1]
            state = z
            with torch.no_grad():
                for step in range(len(sigmas) - 1):
                    state = z if step == int(asked.step) else state
                    here, there = sigmas[step : step + 1], sigmas[step + 1 : step + 2]
                    z = euler_step(z, student(z, here, one.condition).float(), here, there)
            matched = method.match(student, one, state, Query(asked.step, asked.sigma))
            backward(matched.losses.mean() / batch_size)
            calls += NetworkCalls(rollout=len(sigmas) - 1) + matched.calls
    return calls


def updates(
    network: Network,
    *,
    batch_size: int,
    micro_batch: int,
    steps: int,
    band: str,
    gradient_checkpointing: bool,
    device: torch.device,
) -> tuple[dict[str, Callable[[], NetworkCalls]], list[nn.Parameter]]:
    """By mode, what makes the gradient of one update; and the student's parameters."""
    copies = [ModelField(network.call(deepcopy(network.module))) for _ in range(TEACHERS)]
    backbone = adapter_backbone(network.module, device, unfolded=gradient_checkpointing)
    model, generator = network.call(network.module), torch.Generator().manual_seed(0)
    for name in ("student", *(f"teacher {index}" for index in range(TEACHERS))):
        backbone.create(name, rank=32, alpha=32, targets=network.targets, generator=generator)
        for parameter in () if name == "student" else backbone.parameters(name):
            parameter.requires_grad_(False)
    student = AdapterModel(backbone, model, "student")
    adapters = [AdapterField(backbone, model, f"teacher {index}") for index in range(TEACHERS)]

    def samples(count: int, generator: torch.Generator) -> Samples:
        target = torch.randn(count, *network.shape, generator=generator)
        return Samples(condition=network.condition(count), shape=network.shape, target=target)

    def routes(fields: list[Any]) -> list[Route]:
        return [Route(f"route {index}", field, samples) for index, field in enumerate(fields)]

    shared = {
        "grid": shifted_grid(steps=steps, shift=1.0),
        "query": BANDS[band](),
        "stratified": True,
        "device": device,
    }
    fresh = DanceOPD(routes=routes(adapters), **shared)
    streaming = StreamingDanceOPD(
        routes=routes(adapters), **shared, pool=2 * batch_size, batch_size=batch_size, largest_pass=micro_batch
    )
    off_policy = DanceOPD(routes=routes(adapters), **shared, states="data")
    textbook = DanceOPD(routes=routes(list(copies)), **shared)

    def made(method: DanceOPD | StreamingDanceOPD) -> Callable[[], NetworkCalls]:
        def update() -> NetworkCalls:
            results = method.update(
                student,
                batch_size=batch_size,
                micro_batches=batch_size // micro_batch,
                generator=generator,
                backward=torch.Tensor.backward,
            )
            return sum((result.calls for result in results), NetworkCalls())

        return update

    def loop() -> NetworkCalls:
        return textbook_step(
            textbook, student, batch_size=batch_size, generator=generator, backward=torch.Tensor.backward
        )

    modes = {"textbook": loop, "fresh": made(fresh), "streaming": made(streaming), "off-policy": made(off_policy)}
    return modes, backbone.parameters("student")


def main(
    model: Annotated[str, typer.Argument(help="Shapes, or a published model's name.")] = "Shapes",
    batch_size: Annotated[int, typer.Option(min=2, help="Samples of an update.")] = 32,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Samples of a pass; all by default.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of a rollout.")] = 16,
    band: Annotated[str, typer.Option(help="Query band.")] = "low_noise",
    repeats: Annotated[int, typer.Option(min=1, help="Updates of each mode that are timed.")] = 5,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Compute activations again.")] = False,
) -> None:
    """Measure and print."""
    if band not in BANDS:
        raise typer.BadParameter(f"found band {band!r}, needed one of {', '.join(BANDS)}")
    if batch_size % (micro_batch or batch_size):
        raise typer.BadParameter(f"a batch of {batch_size} is no multiple of micro-batches of {micro_batch}")
    keep_freed_memory()
    device = pick_device()
    chosen = network(model, device)
    if gradient_checkpointing:
        chosen.module.enable_gradient_checkpointing()
    precision = resolve_precision("auto", device)
    modes, parameters = updates(
        chosen,
        batch_size=batch_size,
        micro_batch=micro_batch or batch_size,
        steps=steps,
        band=band,
        gradient_checkpointing=gradient_checkpointing,
        device=device,
    )
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    calls = dict.fromkeys(modes, NetworkCalls())
    for repeat in range(repeats + WARM_UP):
        for mode, update in modes.items():
            started = _now(device)
            with autocast(device, precision):
                made = update()
            optimizer.step()
            optimizer.zero_grad()
            if repeat >= WARM_UP:
                seconds[mode].append(_now(device) - started)
                calls[mode] += made
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{model} on {where}, {precision}, batch {batch_size} in passes of {micro_batch or batch_size}, "
        f"{steps} steps, {band}, median of {repeats}"
    )
    slowest = statistics.median(seconds["textbook"])
    for mode, values in seconds.items():
        middle = statistics.median(values)
        spent = calls[mode].forward_equivalents / repeats / batch_size
        print(
            f"{mode:10} {batch_size / middle:8.2f} samples/s  {slowest / middle:5.2f} x the textbook loop  "
            f"{spent:5.1f} forward-equivalents a sample"
        )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    typer.run(main)
