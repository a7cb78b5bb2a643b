"""How much memory training a published model takes, counted without its weights.

    python benchmarks/memory.py      # writes docs/results/memory.json and the tables in docs/*.md

Builds every transformer, encoder and VAE from its published configuration as fake tensors (shapes without data), puts
the recipes' LoRA on it with PEFT, and runs one forward pass of the training code under bfloat16 autocast while autograd
tells what it keeps for the backward pass. ``docs/memory.md`` says what is and is not in the figures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, ZImageTransformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    T5Config,
    T5EncoderModel,
)

from danceopd.families.flux import FluxCondition, FluxFamily, FluxModel
from danceopd.families.sd3 import SD3Family, SD3Model
from danceopd.families.z_image import ZImageCondition, ZImageFamily, ZImageModel, ZImageOmniModel
from danceopd.fields.adapters import AdapterBackbone, AdapterModel
from danceopd.states import Condition

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results" / "memory.json"

GIB = 2**30
RANK = 128
TEACHERS = 2
CARDS = (24, 48, 80)
FILLED = 0.9
CONTEXT_BYTES = GIB
TRAINED_BYTES = 4 + 4 + 8 + 4
"""Of one trained parameter: the weight, its gradient, AdamW's two moments, the EMA; all float32."""
FAKES = FakeTensorMode(allow_non_fake_inputs=True)
LATENT = (16, 128, 128)
"""Of a 1024 x 1024 picture."""

SD35_MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE = {
    "sample_size": 128,
    "num_layers": 38,
    "num_attention_heads": 38,
    "attention_head_dim": 64,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
FLUX_DEV = {"guidance_embeds": True}
Z_IMAGE = {"axes_lens": [1536, 512, 512]}
OMNI = Z_IMAGE | {"siglip_feat_dim": 1152}

CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
)
CLIP_G = CLIPTextConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
)
T5_XXL = T5Config(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)
QWEN3_4B = Qwen3Config(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
SIGLIP2 = Siglip2VisionConfig(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, num_patches=256
)
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SD3_ENCODERS = {
    "CLIP-L": (CLIPTextModelWithProjection, CLIP_L),
    "CLIP-G": (CLIPTextModelWithProjection, CLIP_G),
    "T5-XXL": (T5EncoderModel, T5_XXL),
}
FLUX_ENCODERS = {"CLIP-L": (CLIPTextModel, CLIP_L), "T5-XXL": (T5EncoderModel, T5_XXL)}
Z_IMAGE_ENCODERS = {"Qwen3-4B": (Qwen3Model, QWEN3_4B)}
OMNI_ENCODERS = Z_IMAGE_ENCODERS | {"SigLIP2": (Siglip2VisionModel, SIGLIP2)}


def sd3_condition(batch: int, edit: bool) -> Condition:
    """The longest prompts: CLIP's 77 tokens and T5's 256."""
    return Condition(prompt_embeds=torch.empty(batch, 77 + 256, 4096), pooled_embeds=torch.empty(batch, 2048))


def flux_condition(batch: int, edit: bool) -> FluxCondition:
    """512 T5 tokens; a source of the target's size for an edit."""
    return FluxCondition(
        prompt_embeds=torch.empty(batch, 512, 4096),
        pooled_embeds=torch.empty(batch, 768),
        guidance=torch.empty(batch),
        source=torch.empty(batch, *LATENT) if edit else None,
    )


def z_image_condition(batch: int, edit: bool) -> ZImageCondition:
    """512 Qwen tokens; for an edit a source of the target's size and its 256 vision tokens."""
    return ZImageCondition(
        prompt_embeds=torch.empty(batch, 512, 2560),
        lengths=torch.tensor([[32, 448, 32] if edit else [512]] * batch),
        source=torch.empty(batch, *LATENT) if edit else None,
        vision=torch.empty(batch, 16, 16, 1152) if edit else None,
    )


@dataclass(frozen=True)
class Published:
    """A published model. tasks: whether each is an edit. model: the canonical call around the transformer."""

    name: str
    guide: str
    transformer: type
    config: dict[str, Any]
    model: Callable[[Any], nn.Module]
    targets: tuple[str, ...]
    condition: Callable[[int, bool], Condition]
    encoders: dict[str, tuple[Any, Any]]
    tasks: dict[str, bool] = field(default_factory=lambda: {"text to image": False})


EDITING = {"text to image": False, "edit": True}
MODELS = [
    Published(
        "SD3.5-Medium",
        "sd3.md",
        SD3Transformer2DModel,
        SD35_MEDIUM,
        SD3Model,
        SD3Family.lora_targets,
        sd3_condition,
        SD3_ENCODERS,
    ),
    Published(
        "SD3.5-Large",
        "sd3.md",
        SD3Transformer2DModel,
        SD35_LARGE,
        SD3Model,
        SD3Family.lora_targets,
        sd3_condition,
        SD3_ENCODERS,
    ),
    Published(
        "FLUX.1-dev, Kontext-dev",
        "flux.md",
        FluxTransformer2DModel,
        FLUX_DEV,
        FluxModel,
        FluxFamily.lora_targets,
        flux_condition,
        FLUX_ENCODERS,
        EDITING,
    ),
    Published(
        "Z-Image",
        "z_image.md",
        ZImageTransformer2DModel,
        Z_IMAGE,
        ZImageModel,
        ZImageFamily.lora_targets,
        z_image_condition,
        Z_IMAGE_ENCODERS,
    ),
    Published(
        "Z-Image Omni",
        "z_image.md",
        ZImageTransformer2DModel,
        OMNI,
        ZImageOmniModel,
        ZImageFamily.lora_targets,
        z_image_condition,
        OMNI_ENCODERS,
        EDITING,
    ),
]


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


def gib(number: int) -> str:
    """Bytes in GiB."""
    return f"{number / GIB:.1f}"


def frozen_bytes(found: dict[str, Any]) -> int:
    """The bfloat16 transformer."""
    return 2 * (found["transformer_parameters"] + found["transformer_buffers"])


def totals(found: dict[str, Any], activations: int) -> dict[str, int]:
    """Bytes at the peak of an update: with LoRA teachers alone, and with a full checkpoint beside them.

    On the accelerator a checkpoint adds its weights; kept in main memory it is there in its turn only, when the
    student's activations are not.
    """
    frozen = frozen_bytes(found)
    resting = frozen + found["lora_parameters"] * (TRAINED_BYTES + 4 * TEACHERS) + CONTEXT_BYTES
    return {
        "loras": resting + activations,
        "checkpoint": resting + activations + frozen,
        "checkpoint_on_cpu": resting + max(activations, frozen),
    }


def smallest_card(needed: int) -> str:
    """The smallest card that the bytes fit in with room to spare."""
    fitting = [card for card in CARDS if needed <= FILLED * card * GIB]
    return f"{gib(needed)} ({f'{fitting[0]} GB' if fitting else 'none'})"


def memory_rows(results: dict[str, Any], guide: str) -> list[str]:
    """The table of one guide."""
    head = ["model, task", "batch", "checkpointing", "activations", "LoRA teachers", "+ a checkpoint", "+ it on cpu"]
    rows = [head, ["---"] * len(head)]
    for published in MODELS:
        if published.guide != guide:
            continue
        found = results[published.name]
        for task, batches in found["activation_bytes"].items():
            for batch, kinds in batches.items():
                for kind, said in (("plain", "no"), ("checkpointed", "yes")):
                    sums = totals(found, kinds[kind])
                    cells = [f"{published.name}, {task}", batch, said, gib(kinds[kind])]
                    rows.append(cells + [smallest_card(needed) for needed in sums.values()])
    return [f"| {' | '.join(row)} |" for row in rows]


def parameter_rows(results: dict[str, Any]) -> list[str]:
    """The table of what models are made of."""
    head = ["model", "transformer", "its LoRA", "encoders", "VAE", "frozen, bf16", "LoRA trained", "while encoding"]
    rows = [head, ["---"] * len(head)]
    for name, found in results.items():
        encoders, frozen = found["encoder_parameters"], frozen_bytes(found)
        others = 2 * (sum(encoders.values()) + found["vae_parameters"])
        rows.append(
            [
                name,
                f"{found['transformer_parameters']:,}",
                f"{found['lora_parameters']:,}",
                ", ".join(f"{encoder} {count / 1e9:.2f} B" for encoder, count in encoders.items()),
                f"{found['vae_parameters'] / 1e6:.0f} M",
                gib(frozen),
                gib(found["lora_parameters"] * TRAINED_BYTES),
                smallest_card(others + CONTEXT_BYTES),
            ]
        )
    return [f"| {' | '.join(row)} |" for row in rows]


def with_tables(page: str, text: str, results: dict[str, Any]) -> str:
    """A page's text with the table between its two marks written anew."""
    rows = parameter_rows(results) if page == "memory.md" else memory_rows(results, page)
    start, end = "<!-- benchmarks/memory.py -->\n", "<!-- end -->"
    return re.sub(f"{start}.*?{end}", lambda found: start + "\n".join(rows) + "\n" + end, text, flags=re.DOTALL)


PAGES = ("memory.md", *dict.fromkeys(published.guide for published in MODELS))


def main() -> None:
    """Measure, and write."""
    results = {published.name: measure(published) for published in MODELS}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for page in PAGES:
        path = DOCS / page
        path.write_text(with_tables(page, path.read_text(encoding="utf-8"), results), encoding="utf-8")
        print("\n".join(parameter_rows(results) if page == "memory.md" else memory_rows(results, page)), "\n")


if __name__ == "__main__":
    main()
