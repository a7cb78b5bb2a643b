"""The local folder of a diffusers pipeline: read whole, in safetensors, and never from a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from danceopd.fields.teachers import CheckpointError

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA_WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""The names that diffusers and PEFT give a LoRA's file."""


def weight_file(reference: str | Path) -> Path:
    """The weights that a reference means: the file itself, or in a folder the transformer's weights (those of a
    pipeline, or its own), their shard index, or a LoRA.

    Raises:
        CheckpointError: if a folder holds none of these in safetensors, or several files and none of the known names.
    """
    path = Path(reference)
    if not path.is_dir():
        return path
    whole = (path / INDEX).is_file()
    folder = path / "transformer" if whole else path
    for name in (WEIGHTS, f"{WEIGHTS}.index.json", *(() if whole else LORA_WEIGHTS)):
        if (folder / name).is_file():
            return folder / name
    others = [] if whole else sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    if others:
        listed = ", ".join(other.name for other in others[:4])
        raise CheckpointError(f"{folder} holds {len(others)} safetensors files ({listed}); name the one that is meant")
    raise CheckpointError(f"no transformer weights in {folder}: needed is {WEIGHTS}, or {WEIGHTS}.index.json")


def other_files(folder: Path) -> dict[str, Path]:
    """Every weight file and configuration of a pipeline's folder but the one that ``weight_file`` names, by its place
    there.

    A scheduler's configuration changes the grid, a tokenizer's the prompts: they count as weights do.
    """
    base = weight_file(folder)
    endings = ("*.safetensors", "*.json", "*.txt", "*.model")
    found = sorted(path for part in read_index(folder) for ending in endings for path in (folder / part).glob(ending))
    return {path.relative_to(folder).as_posix(): path for path in found if path != base}


def read_folder(folder: Path, classes: Mapping[str, type], family: str, dtype: torch.dtype) -> Any:
    """The pipeline in a local folder.

    Raises:
        CheckpointError: if the folder is not a whole pipeline of one of ``classes``.
    """
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"family {family!r} needs the local folder of a diffusers pipeline, found no {INDEX} in {folder}; "
            "nothing is downloaded by itself (huggingface-cli download ORG/NAME --local-dir FOLDER)"
        )
    parts = read_index(folder)
    found = str(parts.get("_class_name"))
    if found not in classes:
        raise CheckpointError(f"{folder} holds a {found}; family {family!r} needs {' or '.join(classes)}")
    needed = [name for name, part in parts.items() if isinstance(part, list) and part[0] is not None]
    missing = [name for name in needed if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(f"{folder} is not whole: its {INDEX} names {', '.join(missing)}, which is not there")
    weight_file(folder)
    cls: Any = classes[found]
    try:
        return cls.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded as a {found}: {error}") from error


def read_index(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder says of itself.

    Raises:
        CheckpointError: if its index is no JSON object.
    """
    try:
        return dict(json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} is not a pipeline's index: {error}") from error
