"""Strict loading of frozen weights: safetensors only, every tensor by name and shape, a hash of every file."""

from __future__ import annotations

import hashlib
import json
import math
import time
import uuid
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from danceopd.errors import UserError
from danceopd.fields.lora import Lora

_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}
_SETTLED = 2_000_000_000
"""Nanoseconds after which another write gives a file another time of change, on any file system."""

PEFT_FILE, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."
"""How PEFT names a LoRA's file and begins its tensors' names."""


class WeightsError(UserError, ValueError):
    """A weight file cannot be used; the message says what was found, what is needed, and where."""


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        WeightsError: if the file is missing, is a pickle, or is damaged.
    """
    metadata = read_metadata(path)
    try:
        return load_file(path), metadata
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; raises as ``read_safetensors``."""
    if not path.is_file():
        raise WeightsError(f"weight file not found: {path}")
    if path.suffix in _PICKLES:
        raise WeightsError(
            f"{path} is a pickle file ({path.suffix}), which can run code when loaded and is never read here; "
            "convert it to safetensors first (safetensors.torch.save_file)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error


def read_shards(index: Path) -> dict[str, Tensor]:
    """Tensors of all the safetensors files that an index (``*.safetensors.index.json``) names, beside it.

    Raises:
        WeightsError: if the index is not such a file, a shard cannot be read, or a tensor is not where it says.
    """
    places = _weight_map(index)
    found: dict[str, Tensor] = {}
    for shard in shards(index):
        found |= read_safetensors(index.parent / shard)[0]
    if set(found) != set(places):
        odd = sorted(set(found) ^ set(places))
        raise WeightsError(f"{index} and its shards disagree about {len(odd)} tensors, first {odd[0]!r}")
    return found


def shards(index: Path) -> list[str]:
    """Names of the files that an index is about, beside it; raises WeightsError if it is no such index."""
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor."""
    try:
        places: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index} is not an index of safetensors files: {error!r}") from error
    for shard in places.values():
        if Path(shard).name != shard:
            raise WeightsError(f"{index} names a shard outside its own folder: {shard!r}")
    return places


def load_checkpoint(network: nn.Module, path: Path) -> None:
    """Load a full checkpoint into ``network``; every tensor must match in name and shape.

    path: a safetensors file, or the index (``*.safetensors.index.json``) of one written in shards.

    Raises:
        WeightsError: naming the tensors that are missing, unknown, or of another shape; nothing is loaded then.
    """
    found = read_shards(path) if path.name.endswith(".index.json") else read_safetensors(path)[0]
    needed = network.state_dict()
    missing = [f"missing {name} {tuple(needed[name].shape)}" for name in needed if name not in found]
    unknown = [f"unknown {name} {tuple(found[name].shape)}" for name in found if name not in needed]
    unlike = [
        f"{name}: found shape {tuple(found[name].shape)}, needed {tuple(needed[name].shape)}"
        for name in needed
        if name in found and found[name].shape != needed[name].shape
    ]
    problems = [missing, unknown, unlike]
    if any(problems):
        listed = "; ".join(problem for kind in problems for problem in kind[:2])
        rest = sum(len(kind[2:]) for kind in problems)
        other = len(unknown) > len(found) // 2
        raise WeightsError(
            f"{path} does not fit the model: {listed}{f'; and {rest} more' if rest else ''}"
            + (f"; most of its {len(found)} tensors have other names: another model's, or another layout" * other)
        )
    network.load_state_dict(found)


def load_lora(path: Path) -> Lora:
    """A LoRA in PEFT's keys, with ``alpha`` in the file's metadata, and ``targets`` where we wrote it.

    Raises:
        WeightsError: if a tensor is no LoRA matrix, a pair is incomplete, ranks differ, alpha is not recorded, or
            the modules are not those recorded.
    """
    weights, metadata = read_safetensors(path)
    strange = [name for name in weights if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if strange or not weights:
        raise WeightsError(f"{path} is not a LoRA in PEFT keys: found {strange[0] if strange else 'no tensors'!r}")
    for name in weights:
        other = name.replace(".lora_A.", ".lora_?.").replace(".lora_B.", ".lora_A.").replace(".lora_?.", ".lora_B.")
        if other not in weights:
            raise WeightsError(f"{path} has {name} but not {other}")
    ranks = {weight.shape[0] for name, weight in weights.items() if ".lora_A." in name}
    if len(ranks) != 1:
        raise WeightsError(f"{path} mixes LoRA ranks {sorted(ranks)}; one rank for all modules is needed")
    try:
        alpha = float(metadata["alpha"])
    except (KeyError, ValueError) as error:
        raise WeightsError(
            f"{path} does not record the LoRA's alpha in its metadata (found {json.dumps(metadata)}); without it the "
            "adapter's strength is unknown"
        ) from error
    if not 0 < alpha < math.inf:
        raise WeightsError(f"{path} records no usable alpha: found {alpha:g}")
    lora = Lora(rank=ranks.pop(), alpha=alpha, weights={name: weight.float() for name, weight in weights.items()})
    require_recorded_targets(path, lora, metadata)
    return lora


def recorded_targets(targets: Iterable[str]) -> str:
    """A LoRA's modules as its file's metadata names them under ``targets``."""
    return " ".join(sorted(targets))


def require_recorded_targets(path: Path, lora: Lora, metadata: Mapping[str, str]) -> None:
    """Raise WeightsError if a file names its modules under ``targets`` and does not hold exactly those."""
    odd = sorted(set(metadata["targets"].split()) ^ set(lora.targets)) if "targets" in metadata else []
    if odd:
        raise WeightsError(
            f"{path} does not hold the modules that it records: they differ in {len(odd)}, first {odd[0]!r}"
        )


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file aside, and rename it.

    Raises:
        WeightsError: if it cannot be written; nothing is left of it.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(
            {name: value.contiguous() for name, value in tensors.items()}, aside, {"format": "pt", **(metadata or {})}
        )
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} could not be written: {error}") from error
    finally:
        aside.unlink(missing_ok=True)


def save_lora(lora: Lora, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a LoRA in PEFT's keys with its rank, alpha and modules in the metadata; see ``write_safetensors``."""
    recorded = {"rank": str(lora.rank), "alpha": repr(lora.alpha), "targets": recorded_targets(lora.targets)}
    write_safetensors(lora.weights, path, recorded | dict(metadata or {}))


def require_free(folder: Path) -> None:
    """Raise WeightsError if something stands where a folder is to be written; an empty folder may."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder} exists already and is not empty; choose another folder, or remove it")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; read once per process for as long as size and time of change stay."""
    found = path.stat()
    if time.time_ns() - found.st_mtime_ns < _SETTLED:
        return _digest(path)
    return _settled_digest(path.resolve(), found.st_size, found.st_mtime_ns)


@cache
def _settled_digest(path: Path, size: int, changed: int) -> str:
    """size, changed: what tells this content of the file from another."""
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_hash(path: Path) -> str:
    """The hash of everything that a weight source consists of: an index with its shards, a LoRA of PEFT's with its
    configuration, or the file alone (whose ``file_hash`` it then is).

    Raises:
        WeightsError: if there is no such file, or it is an index that cannot be read or names a missing shard.
    """
    if not path.is_file():
        raise WeightsError(f"weight file not found: {path}")
    names = [path.name]
    if path.name.endswith(".index.json"):
        names += shards(path)
    elif (config := peft_config(path)) is not None:
        names.append(config.name)
    for name in names:
        if not path.with_name(name).is_file():
            raise WeightsError(f"weight file not found: {path.with_name(name)}")
    digests = [file_hash(path.with_name(name)) for name in names]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def peft_config(path: Path) -> Path | None:
    """PEFT's configuration, which has the alpha, beside a LoRA in PEFT's keys or under its name; None without one."""
    config = path.with_name("adapter_config.json")
    if path.suffix != ".safetensors" or not config.is_file():
        return None
    return config if path.name == PEFT_FILE or has_peft_keys(_tensor_names(path)) else None


def has_peft_keys(names: Iterable[str]) -> bool:
    """Whether a file's tensors are named as PEFT saves them."""
    return any(name.startswith(PEFT_PREFIX) for name in names)


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error


def merge_lora(network: nn.Module, lora: Lora) -> None:
    """Add the LoRA's delta, (alpha / r) B A, to the network's own linear weights, in place.

    The sum is formed in float32 and rounded once to the weights' own type.
    """
    modules = dict(network.named_modules())
    with torch.no_grad():
        for target in lora.targets:
            a, b = lora.weights[f"{target}.lora_A.weight"], lora.weights[f"{target}.lora_B.weight"]
            module = modules.get(target)
            if not isinstance(module, nn.Linear) or module.weight.shape != (b.shape[0], a.shape[1]):
                raise WeightsError(f"the LoRA's module {target!r} does not fit the network")
            delta = lora.alpha / lora.rank * (b.float() @ a.float())
            module.weight.copy_(module.weight + delta.to(module.weight.device))
