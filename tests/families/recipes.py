"""A recipe over a tiny pipeline in a folder: a guided base and a LoRA teacher, prompts, and edits where it edits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tiny_pipelines import Case

from danceopd.data.images import write_image_file
from danceopd.fields.adapters import AdapterBackbone
from danceopd.fields.lora import Lora
from danceopd.fields.weights import save_lora
from danceopd.training.checkpoint import checkpoints
from danceopd.training.run_folder import RunFolder

CPU = torch.device("cpu")
FAMILY = {"kontext": "flux", "omni": "z_image"}
"""A case's family, where its name is another."""
PROMPTS = ["a red circle", "a small blue square beside a green star"]
HEIGHT, WIDTH = 16, 24


def picture(height: int, width: int, seed: int = 4) -> torch.Tensor:
    """Black and white, which 8 bits and bfloat16 keep."""
    return torch.randint(0, 2, (3, height, width), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


def save_teacher(family: Any, path: Path) -> None:
    backbone = AdapterBackbone(family.loaded.own_network())
    backbone.create("teacher", rank=3, alpha=5.0, targets=family.lora_targets, generator=torch.Generator())
    generator = torch.Generator().manual_seed(1)
    weights = {key: torch.randn(w.shape, generator=generator) * 0.3 for key, w in backbone.state("teacher").items()}
    save_lora(Lora(rank=3, alpha=5.0, weights=weights), path)


def final(folder: RunFolder) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a run's last checkpoint."""
    path = checkpoints(folder.checkpoints)[-1]
    return {name: load_file(path / f"{name}.safetensors") for name in ("student", "ema", "optimizer")}


def write_manifest(path: Path, *lines: dict[str, str]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_recipe(case: Case, name: str, folder: Path, **changes: Any) -> Path:
    """``folder/recipe.yaml`` for the family ``name``, all its files beside it; ``changes`` replaces whole keys."""
    pipeline = case.pipeline()
    pipeline.save_pretrained(folder / "base")
    save_teacher(case.family(pipeline), folder / "teacher.safetensors")
    write_manifest(folder / "prompts.jsonl", *({"prompt": prompt} for prompt in PROMPTS))
    write_image_file(folder / "source.png", picture(64, 64))
    write_manifest(folder / "edits.jsonl", {"instruction": "make it blue", "source": "source.png"})
    style = {"manifest": "edits.jsonl" if case.can_edit else "prompts.jsonl"}
    recipe = {
        "version": 1,
        "family": name,
        "base": "base",
        "resolution": [HEIGHT, WIDTH],
        "fields": {"plain": {"base": True}, "style": {"lora": "teacher.safetensors", "lora_scale": 0.5}},
        "student": {"lora": {"rank": 4, "alpha": 6.0}},
        "routes": [
            {"field": "plain", "guidance_scale": 3.0, "data": {"manifest": "prompts.jsonl"}},
            {"field": "style", "data": style},
        ],
        "rollout": {"num_inference_steps": 4},
        "train": {
            "steps": 2,
            "batch_size": 4,
            "learning_rate": 0.1,
            "lr_warmup_steps": 0,
            "ema_decay": 0.0,
            "precision": "fp32",
            "checkpointing_steps": 1,
            "sample_steps": 2,
        },
        "evaluate": {"num_inference_steps": 4},
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes))
    return folder / "recipe.yaml"
