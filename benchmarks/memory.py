"""How much memory training a published model takes, counted without its weights.

    python benchmarks/memory.py      # writes docs/results/memory.json and the tables in docs/*.md

Builds every transformer, encoder and VAE from its published configuration as fake tensors (shapes without data), puts
the recipes' LoRA on it with PEFT, and runs one forward pass of the training code under bfloat16 autocast while autograd
tells what it keeps for the backward pass. ``docs/memory.md`` says what is and is not in the figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from memory_tables import PAGES, page_rows, with_tables
from published_models import LATENT, MODELS, VAE, Published
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from danceopd.fields.adapters import AdapterBackbone, AdapterModel
from danceopd.states import Condition

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results" / "memory.json"
RANK = 128
FAKES = FakeTensorMode(allow_non_fake_inputs=True)


@dataclass
class Kept:
    """Tensors that stay in memory, each storage once, without the model's own weights."""

    weights: set[int]
    tensors: dict[int, Tensor] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> None:
        place = tensor.untyped_storage()._cdata
        if place not in self.weights:
            self.tensors.setdefault(place, tensor)

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


def storage_places(module: nn.Module) -> set[int]:
    """Where a module's own tensors are."""
    return {tensor.untyped_storage()._cdata for tensor in [*module.parameters(), *module.buffers()]}


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """bfloat16 autocast as on a GPU, where norms run in float32; torch's rules for a CPU leave them out."""

    def in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            named = {name: widened(value) for name, value in kwargs.items()}
            return norm(*map(widened, args), **named)

        return run

    def widened(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) else value

    layer_norm, rms_norm = F.layer_norm, F.rms_norm
    F.layer_norm, F.rms_norm = in_float32(layer_norm), in_float32(rms_norm)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        F.layer_norm, F.rms_norm = layer_norm, rms_norm


def activation_bytes(network: nn.Module, student: nn.Module, condition: Condition, batch: int) -> dict[str, int]:
    """What one training pass keeps for its backward pass.

    plain: all that autograd saves. checkpointed: the inputs of every block, what is saved outside of blocks, and the
    largest block, which is computed again while its turn lasts.
    """
    saved, inputs = Kept(storage_places(network)), Kept(storage_places(network))
    in_blocks: list[int] = []
    handles = []

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in [*args, *kwargs.values()]:
            for part in value if isinstance(value, list | tuple) else [value]:
                if isinstance(part, Tensor):
                    inputs.add(part)
        in_blocks.append(-saved.bytes)

    def leave(block: nn.Module, args: Any, output: Any) -> None:
        in_blocks[-1] += saved.bytes

    for blocks in network.children():
        for block in blocks if isinstance(blocks, nn.ModuleList) else []:
            handles += [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]

    def keep(tensor: Tensor) -> Tensor:
        saved.add(tensor)
        return tensor

    with FAKES, gpu_autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        velocity = student(torch.empty(batch, *LATENT), torch.empty(batch), condition)
        loss = (velocity.float() - torch.empty(batch, *LATENT)).square().mean()
    assert loss.requires_grad
    for handle in handles:
        handle.remove()
    outside = saved.bytes - sum(in_blocks)
    return {"plain": saved.bytes, "checkpointed": outside + inputs.bytes + max(in_blocks)}


def without_data(module: nn.Module) -> None:
    """Meta tensors as fake ones of the CPU, which autocast and attention's kernels take for real."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            part._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def elements(tensors: Iterable[Tensor]) -> int:
    """How many numbers tensors hold."""
    return sum(tensor.numel() for tensor in tensors)


def measure(published: Published, batches: tuple[int, ...] = (1, 4)) -> dict[str, Any]:
    """Numbers of parameters, and bytes of activations by task and batch."""
    generator = torch.Generator()
    with torch.device("meta"):
        network = published.transformer(**published.config).to(torch.bfloat16)
        encoders = {name: cls(config) for name, (cls, config) in published.encoders.items()}
        found: dict[str, Any] = {
            "transformer_parameters": elements(network.parameters()),
            "transformer_buffers": elements(network.buffers()),
            "encoder_parameters": {name: elements(encoder.parameters()) for name, encoder in encoders.items()},
            "vae_parameters": elements(AutoencoderKL(**VAE).parameters()),
        }
        backbone = AdapterBackbone(network)
        inject = {"rank": RANK, "alpha": RANK, "targets": published.targets}
        backbone.create("student", **inject, generator=generator)
    found["lora_parameters"] = elements(backbone.parameters("student"))
    with FAKES:
        without_data(network)
    student = AdapterModel(backbone, published.model(network), "student")
    found["activation_bytes"] = {
        task: {
            str(batch): activation_bytes(network, student, published.condition(batch, edit), batch) for batch in batches
        }
        for task, edit in published.tasks.items()
    }
    return found


def main() -> None:
    """Measure, and write."""
    results = {published.name: measure(published) for published in MODELS}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for page in PAGES:
        path = DOCS / page
        path.write_text(with_tables(page, path.read_text(encoding="utf-8"), results), encoding="utf-8")
        print("\n".join(page_rows(results, page)), "\n")


if __name__ == "__main__":
    main()
