"""Strict loading of frozen weights: safetensors only, every tensor by name and shape, a hash of every file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from danceopd.fields.adapters import Lora

_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}


class CheckpointError(ValueError):
    """A weight file cannot be used; the message says what was found, what is needed, and where."""


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: if the file is missing, is a pickle, or is damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"weight file not found: {path}")
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{path} is a pickle file ({path.suffix}), which can run code when loaded and is never read here; "
            "convert it to safetensors first (safetensors.torch.save_file)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        return load_file(path), metadata
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def read_shards(index: Path) -> dict[str, Tensor]:
    """Tensors of all the safetensors files that an index (``*.safetensors.index.json``) names, beside it.

    Raises:
        CheckpointError: if the index is not such a file, a shard cannot be read, or a tensor is not where it says.
    """
    try:
        places: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files: {error!r}") from error
    found: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names a shard outside its own folder: {shard!r}")
        found |= read_safetensors(index.parent / shard)[0]
    if set(found) != set(places):
        odd = sorted(set(found) ^ set(places))
        raise CheckpointError(f"{index} and its shards disagree about {len(odd)} tensors, first {odd[0]!r}")
    return found


def load_checkpoint(network: nn.Module, path: Path) -> None:
    """Load a full checkpoint into ``network``; every tensor must match in name and shape.

    path: a safetensors file, or the index (``*.safetensors.index.json``) of one written in shards.

    Raises:
        CheckpointError: naming the tensors that are missing, unknown, or of another shape; nothing is loaded then.
    """
    found = read_shards(path) if path.name.endswith(".index.json") else read_safetensors(path)[0]
    needed = network.state_dict()
    problems = [f"missing {name} {tuple(needed[name].shape)}" for name in needed if name not in found]
    problems += [f"unknown {name} {tuple(found[name].shape)}" for name in found if name not in needed]
    problems += [
        f"{name}: found shape {tuple(found[name].shape)}, needed {tuple(needed[name].shape)}"
        for name in needed
        if name in found and found[name].shape != needed[name].shape
    ]
    if problems:
        listed = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise CheckpointError(f"{path} does not fit the model: {listed}")
    network.load_state_dict(found)


def load_lora(path: Path) -> Lora:
    """A LoRA in PEFT's keys, with ``rank`` and ``alpha`` in the file's metadata.

    Raises:
        CheckpointError: if a tensor is no LoRA matrix, a pair is incomplete, ranks differ, or alpha is not recorded.
    """
    weights, metadata = read_safetensors(path)
    strange = [name for name in weights if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if strange or not weights:
        raise CheckpointError(f"{path} is not a LoRA in PEFT keys: found {strange[0] if strange else 'no tensors'!r}")
    for name in weights:
        other = name.replace(".lora_A.", ".lora_?.").replace(".lora_B.", ".lora_A.").replace(".lora_?.", ".lora_B.")
        if other not in weights:
            raise CheckpointError(f"{path} has {name} but not {other}")
    ranks = {weight.shape[0] for name, weight in weights.items() if ".lora_A." in name}
    if len(ranks) != 1:
        raise CheckpointError(f"{path} mixes LoRA ranks {sorted(ranks)}; one rank for all modules is needed")
    try:
        alpha = float(metadata["alpha"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not record the LoRA's alpha in its metadata (found {json.dumps(metadata)}); without it the "
            "adapter's strength is unknown"
        ) from error
    return Lora(rank=ranks.pop(), alpha=alpha, weights={name: weight.float() for name, weight in weights.items()})


def save_lora(lora: Lora, path: Path) -> None:
    """Write a LoRA in PEFT's keys with its rank and alpha in the metadata; aside and then renamed."""
    aside = path.with_suffix(".tmp")
    save_file(
        {name: weight.contiguous() for name, weight in lora.weights.items()},
        aside,
        {"format": "pt", "rank": str(lora.rank), "alpha": repr(lora.alpha)},
    )
    aside.replace(path)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def merge_lora(network: nn.Module, lora: Lora) -> None:
    """Add the LoRA's delta, (alpha / r) B A, to the network's own linear weights, in place."""
    modules = dict(network.named_modules())
    with torch.no_grad():
        for target in lora.targets:
            a, b = lora.weights[f"{target}.lora_A.weight"], lora.weights[f"{target}.lora_B.weight"]
            module = modules.get(target)
            if not isinstance(module, nn.Linear) or module.weight.shape != (b.shape[0], a.shape[1]):
                raise CheckpointError(f"the LoRA's module {target!r} does not fit the network")
            module.weight += (lora.alpha / lora.rank * (b.float() @ a.float())).to(module.weight)
