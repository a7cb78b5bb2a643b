"""The local folder of a diffusers pipeline: read whole, in safetensors, and never from a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from danceopd.fields.weights import PEFT_FILE, WeightsError, read_metadata, shards

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA_WEIGHTS = ("pytorch_lora_weights.safetensors", PEFT_FILE)
"""The names that diffusers and PEFT give a LoRA's file."""

SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt"}
"""Of the files that the parts of a pipeline are read from."""

Choices = tuple[tuple[str, ...], ...]
"""Files of which one group has to be there."""
TOKENIZER: tuple[Choices, ...] = (
    (("tokenizer_config.json",),),
    (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",)),
)


def weight_file(reference: str | Path) -> Path:
    """The weights that a reference means: the file itself, or in a folder the transformer's weights (those of a
    pipeline, or its own), their shard index, or a LoRA.

    Raises:
        WeightsError: if a folder holds none of these in safetensors, or several files and none of the known names.
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
        raise WeightsError(f"{folder} holds {len(others)} safetensors files ({listed}); name the one that is meant")
    raise WeightsError(
        f"no transformer weights in {folder}: needed is {WEIGHTS}, or {WEIGHTS}.index.json{_variant(folder)}"
    )


def _variant(folder: Path) -> str:
    """What an error adds where weights are there under the name of a variant."""
    found = sorted(path.name for path in folder.glob("*.fp16.*"))
    return f"; found {found[0]}, a variant: save it without one" if found else ""


def part_files(part: Path) -> list[Path]:
    """Every file in a part's folder, at any depth, that the part may be read from."""
    return sorted(path for path in part.rglob("*") if path.suffix in SUFFIXES and path.is_file())


def other_files(folder: Path) -> dict[str, Path]:
    """Every weight file and configuration of a pipeline's folder but the one that ``weight_file`` names, by its place
    there.

    A scheduler's configuration changes the grid, a tokenizer's the prompts: they count as weights do.
    """
    base = weight_file(folder)
    parts = [name for name, part in read_index(folder).items() if isinstance(part, list)]
    found = [folder / INDEX, *(path for part in parts for path in part_files(folder / part))]
    return {path.relative_to(folder).as_posix(): path for path in found if path != base}


def read_folder(folder: Path, classes: Mapping[str, type], family: str, dtype: torch.dtype) -> Any:
    """The pipeline in a local folder.

    Raises:
        WeightsError: if the folder is not a whole pipeline of one of ``classes``, naming the file that is missing or
            damaged, or else the part that cannot be loaded.
    """
    if not (folder / INDEX).is_file():
        raise WeightsError(
            f"family {family!r} needs the local folder of a diffusers pipeline, found no {INDEX} in {folder}; in a "
            "recipe, paths are relative to its own folder. hf download ORG/NAME --local-dir FOLDER makes one (a recipe "
            "may also name org/name itself)"
        )
    index = read_index(folder)
    found = str(index.get("_class_name"))
    if found not in classes:
        raise WeightsError(f"{folder} holds a {found}; family {family!r} needs {' or '.join(classes)}")
    parts = {name: tuple(part) for name, part in index.items() if isinstance(part, list) and part[0] is not None}
    missing = [name for name in parts if not (folder / name).is_dir()]
    if missing:
        raise WeightsError(f"{folder} is not whole: its {INDEX} names {', '.join(missing)}, which is not there")
    weight_file(folder)
    for name, (library, part_class) in parts.items():
        _require_whole(folder, name, _needed(library, part_class))
    cls: Any = classes[found]
    try:
        return cls.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype)
    except Exception as error:  # whatever diffusers and transformers meet
        reason = _first_failure(folder, parts) or f"{type(error).__name__}: {error}"
        raise WeightsError(f"{folder} cannot be loaded as a {found}: {reason}") from error


def _needed(library: str, part_class: str) -> tuple[Choices, ...]:
    """The files without which a part is not read, or is read as another one."""
    if part_class.endswith(("Tokenizer", "TokenizerFast")):
        return TOKENIZER
    if "Processor" in part_class or part_class.endswith("FeatureExtractor"):
        return ((("preprocessor_config.json",),),)
    if part_class.endswith("Scheduler"):
        return ((("scheduler_config.json",),),)
    weights = WEIGHTS if library == "diffusers" else "model.safetensors"
    return (("config.json",),), ((weights,), (f"{weights}.index.json",))


def _require_whole(folder: Path, name: str, needed: tuple[Choices, ...]) -> None:
    part = folder / name
    for choices in needed:
        chosen = next((files for files in choices if all((part / file).is_file() for file in files)), None)
        if chosen is None:
            listed = ", or ".join(" and ".join(files) for files in choices)
            raise WeightsError(f"{folder} is not whole: its {name} lacks {listed}{_variant(part)}")
        for file in chosen:
            if file.endswith(".index.json"):
                for shard in shards(part / file):
                    read_metadata(part / shard)
            elif file.endswith(".safetensors"):
                read_metadata(part / file)
    for path in part_files(part):
        if path.suffix == ".json":
            _read_json(path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from error


def _first_failure(folder: Path, parts: Mapping[str, tuple[str, ...]]) -> str | None:
    """The first part that cannot be loaded by itself either, and why."""
    for name, (library, part_class) in parts.items():
        try:
            cls: Any = getattr(import_module(library), part_class)
            cls.from_pretrained(folder / name, local_files_only=True)
        except Exception as error:
            return f"{name}: {type(error).__name__}: {error}"
    return None


def read_index(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder says of itself.

    Raises:
        WeightsError: if its index is no JSON object.
    """
    try:
        index = dict(json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{folder / INDEX} is not a pipeline's index: {error}") from error
    for name, part in index.items():
        if isinstance(part, list) and Path(name).name != name:
            raise WeightsError(f"{folder / INDEX} names a part that is no folder beside it: {name!r}")
    return index
