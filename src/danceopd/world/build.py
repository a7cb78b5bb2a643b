"""Train the world's own sources from a seed: text encoder, base, realism, edit, local and global experts.

Nothing here is special: the base is flow matching on scenes and prompts from scratch, every other source is ordinary
LoRA fine-tuning of that base on its own data, the edit sources with a share of text-to-image batches among it. Whatever
the sources forget, they forget by that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from danceopd.errors import UserError
from danceopd.fields.lora import Lora
from danceopd.fields.weights import file_hash, read_metadata, recorded_targets, write_safetensors
from danceopd.world.generator import DATA_VERSION, SOURCE_TRAINING
from danceopd.world.network import LORA_TARGETS, ShapesTransformer
from danceopd.world.render import render
from danceopd.world.tasks import (
    GLOBAL_EDITS,
    HARD_T2I_OFTENER,
    LOCAL_EDITS,
    LOCAL_EDITS_OFTENER,
    T2I_TASKS,
    draw_edit,
    draw_text_to_image,
)
from danceopd.world.text import SentenceReader, TextEncoder, phrase_targets, slot_targets, tokenize

CHECKPOINT_SECONDS = 60.0
CAPTION_DROPOUT = 0.1
SIGMA_SPREAD = 1.2


class BuildError(UserError, ValueError):
    """The build folder holds sources that were made in another way."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """How one source is trained.

    tasks: the tasks drawn, uniformly (a task named n times is drawn n times as often): all text-to-image, or all edits.
    start: the source whose weights it starts from; None starts from scratch.
    rank: LoRA rank (alpha equals it), or 0 to train all weights. LoRA runs folded, through W + B A.
    learning_rate: of AdamW; the matrices of a LoRA, or of the transformer blocks when ``rank`` is 0, take Muon at ten
        times this.
    decay: share of the steps, at the end, over which the learning rate falls linearly to 0.
    sigma_center: training noise levels are sigma = sigmoid(N(center, 1.2^2)), weighted to where layouts are decided.
    replay: share of batches that are the base's own text-to-image data, as edit models such as FLUX.1 Kontext are
        trained on both.
    style: forced scene style, or None.
    """

    name: str
    tasks: tuple[str, ...]
    steps: int
    learning_rate: float
    start: str | None = "base"
    rank: int = 32
    batch_size: int = 64
    sigma_center: float = 0.8
    replay: float = 0.0
    style: str | None = None
    decay: float = 1.0
    ema: float = 0.999


STAGES = (
    Stage(name="first", tasks=T2I_TASKS, steps=13000, learning_rate=2e-3, rank=0, start=None),
    Stage(
        name="base",
        tasks=HARD_T2I_OFTENER,
        steps=12000,
        learning_rate=1.2e-3,
        rank=0,
        start="first",
        sigma_center=1.0,
    ),
    Stage(name="edit", tasks=LOCAL_EDITS_OFTENER, steps=7200, learning_rate=1e-3, replay=0.25),
    Stage(name="local", tasks=LOCAL_EDITS, steps=3000, learning_rate=1e-3, replay=0.1),
    Stage(name="global", tasks=GLOBAL_EDITS, steps=500, learning_rate=1e-3, replay=0.1),
    Stage(name="realism", tasks=T2I_TASKS, steps=300, learning_rate=5e-4, style="shaded"),
)
"""In order; ``first`` is the base half-way and is not shipped."""
TEXT_STEPS = 1200


def draw_batch(rng: np.random.Generator, stage: Stage) -> tuple[Tensor, Tensor | None, list[str]]:
    """Targets [B, 3, 32, 32], source images (or None) and captions, 10 % of which are empty."""
    targets, sources, captions = [], [], []
    tasks = HARD_T2I_OFTENER if rng.random() < stage.replay else stage.tasks
    for _ in range(stage.batch_size):
        task = tasks[rng.integers(len(tasks))]
        if task in T2I_TASKS:
            example = draw_text_to_image(rng, task, stage.style)
            targets.append(render(example.scene))
            captions.append(example.prompt)
        else:
            edit = draw_edit(rng, task)
            targets.append(render(edit.target))
            sources.append(render(edit.source))
            captions.append(edit.instruction)
    captions = ["" if rng.random() < CAPTION_DROPOUT else caption for caption in captions]
    as_tensor: Callable[[list], Tensor] = lambda images: torch.from_numpy(np.stack(images))  # noqa: E731
    return as_tensor(targets), as_tensor(sources) if sources else None, captions


def train_text_encoder(seed: int, device: torch.device, report: Callable[[str], None]) -> TextEncoder:
    """Train the encoder to read sentences: their words by category and, at each noun, what is said of its object."""
    with _seeded(seed):
        encoder, reader = TextEncoder().to(device), SentenceReader().to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *reader.parameters()], lr=2e-3, weight_decay=0.01)
    rng = np.random.default_rng([SOURCE_TRAINING, seed, 0])
    accuracy = 0.0
    for step in range(TEXT_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * _schedule(step, TEXT_STEPS, 0.4)
        sentences = [
            draw_text_to_image(rng).prompt if rng.random() < 0.5 else draw_edit(rng).instruction for _ in range(128)
        ]
        tokens, pooled = encoder(tokenize(sentences).to(device))
        slots, phrases = slot_targets(sentences).to(device), phrase_targets(sentences).to(device)
        loss = reader.loss(tokens, pooled, slots, phrases)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 400 == 0:
            accuracy = reader.accuracy(tokens, pooled, slots, phrases)
            report(f"text {step + 1}/{TEXT_STEPS} loss {loss.item():.4f} sentences read {accuracy:.1%}")
    if accuracy < 0.99:
        raise RuntimeError(f"the text encoder reads only {accuracy:.1%} of sentences after {TEXT_STEPS} steps")
    return encoder.requires_grad_(False).eval()


def new_lora(network: nn.Module, rank: int, generator: torch.Generator) -> dict[str, nn.Parameter]:
    """A LoRA for the network's default targets under PEFT's keys: A uniform in +-1 / sqrt(in), B zero."""
    lora = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LORA_TARGETS:
            fresh = torch.rand(rank, module.in_features, generator=generator) * 2 - 1
            lora[f"{name}.lora_A.weight"] = nn.Parameter((fresh / module.in_features**0.5).to(module.weight.device))
            lora[f"{name}.lora_B.weight"] = nn.Parameter(module.weight.new_zeros(module.out_features, rank))
    return lora


def folded(network: nn.Module, lora: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The network's adapted weights with the LoRA (alpha = rank) added, by parameter name."""
    weights = dict(network.named_parameters())
    targets = [name.removesuffix(".lora_A.weight") for name in lora if name.endswith(".lora_A.weight")]
    return {
        f"{name}.weight": weights[f"{name}.weight"] + lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
        for name in targets
    }


def train_stage(
    stage: Stage,
    network: nn.Module,
    trained: dict[str, nn.Parameter],
    encoder: TextEncoder,
    *,
    seed: int,
    device: torch.device,
    resume_file: Path,
    report: Callable[[str], None],
    made_by: str,
    autocast: bool = True,
) -> dict[str, Tensor]:
    """Flow matching on the stage's data: loss = mean |v(z_sigma, sigma, c) - (eps - x)|^2, sigma logit-normal.

    ``trained`` is the network's own parameters or a LoRA's. Continues from ``resume_file`` where it exists and writes
    it every minute; ``made_by`` must be what it records. Returns the averaged (EMA) trained weights by name.
    """
    average = {name: weight.detach().clone() for name, weight in trained.items()}
    optimizers = _optimizers(stage, trained)
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng([SOURCE_TRAINING, seed, 1 + [item.name for item in STAGES].index(stage.name)])
    step, losses, started, saved = 0, [], time.monotonic(), time.monotonic()
    if resume_file.exists():
        state = torch.load(resume_file, weights_only=True, map_location=device)
        _require_made_by(resume_file, state["made_by"], made_by)
        step = state["step"]
        for name, weight in trained.items():
            weight.data.copy_(state["weights"][name])
        average = state["average"]
        for optimizer, content in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        generator.set_state(state["generator"].cpu())
        rng.bit_generator.state = json.loads(state["numpy"])
    first = step
    while step < stage.steps:
        scale = _schedule(step, stage.steps, stage.decay)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
        clean, source, captions = draw_batch(rng, stage)
        sigma = torch.sigmoid(torch.randn(len(clean), generator=generator) * SIGMA_SPREAD + stage.sigma_center)
        noise = torch.randn(clean.shape, generator=generator)
        scale_z = sigma.view(-1, 1, 1, 1)
        z = ((1 - scale_z) * clean + scale_z * noise).to(device)
        with torch.no_grad():
            tokens, pooled = encoder(tokenize(captions).to(device))
        weights = folded(network, trained) if stage.rank else {}
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            inputs = (z, sigma.to(device), tokens, pooled, None if source is None else source.to(device))
            velocity = functional_call(network, weights, inputs)
        loss = ((velocity - (noise - clean).to(device)) ** 2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        decay = min(stage.ema, (1 + step) / (10 + step))
        for name, weight in trained.items():
            average[name].lerp_(weight.detach(), 1 - decay)
        losses.append(loss.item())
        if step % 100 == 0 or step == stage.steps:
            rate = (time.monotonic() - started) / (step - first)
            left = (stage.steps - step) * rate / 60
            report(
                f"{stage.name} {step}/{stage.steps} loss {np.mean(losses[-100:]):.4f} "
                f"{rate:.3f} s/step, {left:.0f} min left"
            )
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            content = {
                "made_by": made_by,
                "step": step,
                "weights": {name: weight.detach() for name, weight in trained.items()},
                "average": average,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "generator": generator.get_state(),
                "numpy": json.dumps(rng.bit_generator.state),
            }
            aside = resume_file.with_suffix(".tmp")
            torch.save(content, aside)
            aside.replace(resume_file)
            saved = time.monotonic()
    return average


def build(
    folder: Path,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    stages: tuple[Stage, ...] = STAGES,
    report: Callable[[str], None] = print,
) -> None:
    """Build every source that ``folder`` does not hold yet: NAME.safetensors for each, resumable at any point.

    Each file records, besides its settings, the SHA-256 of the text encoder (``text``) and of the source that it
    started from (``start``).

    Raises:
        BuildError: if a file of ``folder`` was made in another way.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    text_file, text_made_by = folder / "text.safetensors", f"{TEXT_STEPS} steps, seed {seed}, data {DATA_VERSION}"
    if text_file.exists():
        _require_made_by(text_file, read_metadata(text_file).get("made_by"), text_made_by)
    else:
        _save(train_text_encoder(seed, device, report).state_dict(), text_file, {"made_by": text_made_by})
    encoder = TextEncoder().to(device)
    encoder.load_state_dict(load_file(text_file))
    encoder.requires_grad_(False).eval()
    for stage in stages:
        target, sources = folder / f"{stage.name}.safetensors", {"text": file_hash(text_file)}
        if stage.start is not None:
            sources["start"] = file_hash(folder / f"{stage.start}.safetensors")
        made_by = fingerprint(stage, seed, sources)
        if target.exists():
            _require_made_by(target, read_metadata(target).get("made_by"), made_by)
            report(f"{stage.name}: already built")
            continue
        with _seeded(seed):
            network = ShapesTransformer().to(device)
        if stage.start is not None:
            network.load_state_dict(load_file(folder / f"{stage.start}.safetensors"))
        resume_file = folder / f"{stage.name}.resume"
        trained = dict(network.named_parameters())
        if stage.rank:
            network.requires_grad_(False)
            trained = new_lora(network, stage.rank, torch.Generator().manual_seed(seed))
        average = train_stage(
            stage,
            network,
            trained,
            encoder,
            seed=seed,
            device=device,
            resume_file=resume_file,
            report=report,
            made_by=made_by,
        )
        metadata = {"made_by": made_by, **sources}
        if stage.rank:
            lora = Lora(rank=stage.rank, alpha=stage.rank, weights=average)
            targets = recorded_targets(lora.targets)
            metadata |= {"rank": str(stage.rank), "alpha": str(stage.rank), "targets": targets}
        _save(average, target, metadata)
        resume_file.unlink(missing_ok=True)
        report(f"{stage.name}: built")


def fingerprint(stage: Stage, seed: int, sources: dict[str, str]) -> str:
    """What a source was made by: its stage's settings, the seed, the data's version, and the files it rests on."""
    return json.dumps({**asdict(stage), "seed": seed, "data": DATA_VERSION, "sources": sources}, sort_keys=True)


def _require_made_by(path: Path, found: str | None, needed: str) -> None:
    if found != needed:
        raise BuildError(
            f"{path} was made in another way, and is not continued or built upon: found {found}, needed {needed}; "
            "choose another folder, or remove the file"
        )


def quick(stages: tuple[Stage, ...] = STAGES, steps: int = 2, batch_size: int = 4) -> tuple[Stage, ...]:
    """The same stages cut to a few steps, for trying the pipeline."""
    return tuple(replace(stage, steps=steps, batch_size=batch_size) for stage in stages)


def _save(weights: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write bfloat16 safetensors, whole or not at all."""
    content = {name: weight.detach().to("cpu", torch.bfloat16) for name, weight in weights.items()}
    write_safetensors(content, path, metadata)


def _optimizers(stage: Stage, trained: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon on a LoRA's matrices or the blocks', AdamW on everything else."""
    matrices = [
        weight
        for name, weight in trained.items()
        if stage.rank or (weight.ndim == 2 and name.startswith("blocks.") and "modulation" not in name)
    ]
    chosen = {id(weight) for weight in matrices}
    rest = [weight for weight in trained.values() if id(weight) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=10 * stage.learning_rate, weight_decay=0.0, adjust_lr_fn="original")
    ]
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=0.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _schedule(step: int, steps: int, decay: float) -> float:
    """50 steps of warm-up, constant, then linear decay over the last ``decay`` share."""
    return min(1.0, (step + 1) / 50, (steps - step) / max(1.0, decay * steps))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initialise modules from ``seed`` (torch's initialisers take no generator), global state restored after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
