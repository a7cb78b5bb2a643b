"""How much a LoRA costs: PEFT's own forward against W + B A folded for the call, both over the bare network.

    python benchmarks/folded_lora.py

Times a student's forward and backward pass on the Shapes network, batch 32, bf16 autocast where that is faster, and
prints ratios to the network without a LoRA, measured in turn within this one run.
"""

from __future__ import annotations

import statistics
import time

import torch

from danceopd.families.shapes import ShapesFamily
from danceopd.fields.adapters import AdapterBackbone, AdapterModel
from danceopd.training.assemble import autocast
from danceopd.training.hardware import keep_freed_memory, resolve_precision

REPEATS = 30


def seconds(model: torch.nn.Module, precision: str, z, sigma, condition) -> float:
    """One forward and backward pass."""
    started = time.perf_counter()
    with autocast(z.device, precision):
        loss = model(z, sigma, condition).square().mean()
    loss.backward()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    keep_freed_memory()
    device = torch.device("cpu")
    precision = resolve_precision("auto", device)
    bare = ShapesFamily()
    for parameter in bare.network.parameters():
        parameter.requires_grad_(parameter.ndim == 2)
    models = {"no LoRA": bare.model}
    for name, fold in (("PEFT", False), ("folded", True)):
        family = ShapesFamily()
        backbone = AdapterBackbone(family.network, fold=fold)
        generator = torch.Generator().manual_seed(0)
        backbone.create("student", rank=32, alpha=32, targets=family.lora_targets, generator=generator)
        models[name] = AdapterModel(backbone, family.model, "student")
    z, sigma = torch.randn(32, 3, 32, 32), torch.rand(32)
    condition = bare.encode(["a red circle and a blue square"] * 32, None)
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(REPEATS + 3):
        for name, model in models.items():
            spent = seconds(model, precision, z, sigma, condition)
            if repeat >= 3:
                times[name].append(spent)
    base = statistics.median(times["no LoRA"])
    print(f"{precision}, {torch.get_num_threads()} threads, median of {REPEATS}")
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"{name:8} {middle * 1000:6.1f} ms  {middle / base:.2f} x")


if __name__ == "__main__":
    main()
