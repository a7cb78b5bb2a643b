"""LoRA files as they are found: PEFT's keys, diffusers' keys, and whatever diffusers converts for the pipeline at hand.

A LoRA's delta is (alpha / r) B A. Formats differ in where alpha stands:

- PEFT: ``adapter_config.json`` beside the file, whatever the file is called.
- diffusers: the file's metadata ``lora_adapter_metadata``; files from before it existed have none, and alpha = r.
- this package's own: ``alpha`` in the file's metadata.
- kohya, ComfyUI: a tensor ``MODULE.alpha`` beside each pair; without any, alpha = r.

So a file that records no alpha anywhere has alpha = r, as in diffusers; but one in PEFT's keys, which PEFT never saves
without its configuration, is refused. What the file says twice must agree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from danceopd.fields.lora import Lora
from danceopd.fields.weights import (
    PEFT_PREFIX,
    WeightsError,
    has_peft_keys,
    peft_config,
    read_safetensors,
    require_recorded_targets,
)

SUFFIXES = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".down.weight", ".up.weight"),
)
"""How formats name A and B. The first that fits counts."""
PREFIXES = (PEFT_PREFIX, "transformer.")
"""What PEFT and diffusers put before the names of the transformer's modules."""
CHANGED_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""Values of PEFT's ``init_lora_weights`` whose start takes something out of the base's weights."""
TEXT_ENCODERS = ("text_encoder", "lora_te")

Pairs = dict[str, tuple[Tensor, Tensor]]
"""A [r, in] and B [out, r] by the module that they adapt."""


def read_lora(path: Path, pipeline: Any) -> Lora:
    """One safetensors file as a LoRA for the pipeline's transformer, in float32.

    Modules may differ in rank and in alpha / r. The smaller ones are then filled up with zeros to the largest rank and
    the factors go into B, which changes no delta.

    pipeline: a diffusers pipeline, whose class may have a converter (``lora_state_dict``). Its conversion is tried on
        marked tensors too, and is used only if every pair of the file arrives with its alpha.

    Raises:
        WeightsError: if the file is no plain LoRA (DoRA, LoKr, biases, convolutions), adapts a text encoder, is for
            another model or in a layout that diffusers does not convert for this pipeline, contradicts itself, or is
            PEFT's without its configuration.
    """
    tensors, metadata = read_safetensors(path)
    pairs, alphas = _parse(path, tensors)
    config = _recorded_config(path, metadata)
    if config is None and not alphas and has_peft_keys(tensors):
        raise WeightsError(
            f"{path} is a LoRA in PEFT's keys and records no alpha: needed is the adapter_config.json that PEFT saved "
            "with it, beside it"
        )
    modules = _linear_modules(pipeline.transformer)
    if all(name in modules for name in pairs):
        scales = _scales(path, pairs, alphas, config)
    else:
        if alphas and config is not None:
            raise WeightsError(f"{path} records alpha in tensors and in its metadata, in a layout to be converted")
        pairs = _convert(path, tensors, pairs, alphas, pipeline)
        scales = _scales(path, pairs, {}, config)
    lora = _as_one_rank(pairs, scales)
    require_recorded_targets(path, lora, metadata)
    return lora


def _linear_modules(network: nn.Module) -> set[str]:
    """Names of the network's own linear layers, adapted already or not."""
    found = {name for name, module in network.named_modules() if isinstance(module, nn.Linear | LoraLayer)}
    return {name for name in found if ".lora_" not in name and not name.endswith(".base_layer")}


def _parse(path: Path, tensors: Mapping[str, Tensor]) -> tuple[Pairs, dict[str, float]]:
    """Pairs and alphas by module, as the file names modules but without ``PREFIXES``; nothing may be left over."""
    sides: dict[str, dict[int, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        if key.startswith(TEXT_ENCODERS):
            raise WeightsError(
                f"{path} adapts a text encoder too ({key!r}), which stays as it is here; a LoRA for the transformer "
                "alone is needed"
            )
        module, side = _split(key)
        if side is None:
            raise WeightsError(f"{path} is not a plain LoRA: found {key!r}, {tuple(tensor.shape)}")
        if side == "alpha":
            alphas[module] = float(tensor.reshape(-1)[0])
        elif side in sides.setdefault(module, {}):
            raise WeightsError(f"{path} has two LoRAs for {module!r}, one of them under {key!r}")
        else:
            sides[module][side] = tensor
    if not sides:
        raise WeightsError(f"{path} is not a LoRA: it holds no pair of matrices")
    for module, found in sides.items():
        a, b = found.get(0), found.get(1)
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            shapes = [None if part is None else tuple(part.shape) for part in (a, b)]
            raise WeightsError(f"{path} has no pair A [r, in] and B [out, r] for {module!r}: found {shapes}")
    if alphas and set(alphas) != set(sides):
        odd = sorted(set(alphas) ^ set(sides))[0]
        raise WeightsError(f"{path} has alpha and matrices for different modules, such as {odd!r}")
    return {module: (found[0], found[1]) for module, found in sides.items()}, alphas


def _split(key: str) -> tuple[str, Any]:
    """The module that a key is about, and 0 (A), 1 (B), "alpha" or None (neither)."""
    name = key
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    for suffixes in SUFFIXES:
        for side, suffix in enumerate(suffixes):
            if name.endswith(suffix):
                return name.removesuffix(suffix), side
    return (name.removesuffix(".alpha"), "alpha") if name.endswith(".alpha") else (name, None)


def _convert(
    path: Path, tensors: Mapping[str, Tensor], pairs: Pairs, alphas: Mapping[str, float], pipeline: Any
) -> Pairs:
    """The pairs under the transformer's names, alpha / r in them, by the pipeline class's own converter."""
    network, cls = pipeline.transformer, type(pipeline)
    modules = _linear_modules(network)
    first = next(name for name in pairs if name not in modules)
    refusal = (
        f"{path} cannot be read for a {cls.__name__}: {first!r} is no linear layer of its {type(network).__name__}, "
        "and diffusers converts no such layout for it; the LoRA is for another model, or has to be converted first"
    )
    try:
        converted, left = _parse(path, cls.lora_state_dict(dict(tensors)))
        probe, _ = _parse(path, cls.lora_state_dict(_marked(tensors, list(pairs))))
    except Exception as error:  # converters raise whatever they meet in keys that they do not know
        raise WeightsError(f"{refusal} ({type(error).__name__}: {str(error)[:200]})") from error
    if left or not all(name in modules for name in converted):
        raise WeightsError(refusal)
    arrived = {float(a.flatten()[0] * b.flatten()[0]) for a, b in probe.values()}
    for index, name in enumerate(pairs):
        if (index + 1) * (2.0 if alphas else 1.0) not in arrived:
            raise WeightsError(f"{path} cannot be read: diffusers' conversion loses {name!r} or its alpha")
    return converted


def _marked(tensors: Mapping[str, Tensor], modules: list[str]) -> dict[str, Tensor]:
    """The file's tensors, so that the n-th module (from 1) has a delta of n r everywhere; twice that by its alpha."""
    ranks = {module: tensor.shape[0] for key, tensor in tensors.items() for module, side in [_split(key)] if side == 0}
    marked = {}
    for key, tensor in tensors.items():
        module, side = _split(key)
        value = {0: 1, 1: modules.index(module) + 1, "alpha": 2 * ranks[module]}[side]
        marked[key] = torch.full(tensor.shape, float(value))
    return marked


def _recorded_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The adapter's PEFT configuration (``r``, ``lora_alpha``, ...) where the file or its folder records one."""
    beside = peft_config(path)
    try:
        if "lora_adapter_metadata" in metadata:
            found = dict(json.loads(metadata["lora_adapter_metadata"]))
            config = {key.removeprefix("transformer."): value for key, value in found.items()}
        elif beside is not None:
            config = dict(json.loads(beside.read_text(encoding="utf-8")))
        elif "alpha" in metadata:
            config = {"r": None, "lora_alpha": metadata["alpha"]}
        else:
            return None
        config |= {"lora_alpha": float(config["lora_alpha"]), "r": config["r"]}
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise WeightsError(f"{path} records no readable adapter configuration: {error!r}") from error
    if config.get("use_dora"):
        raise WeightsError(f"{path} is not a plain LoRA: found use_dora in its configuration")
    if str(config.get("init_lora_weights")).startswith(CHANGED_THE_BASE):
        raise WeightsError(
            f"{path} is a LoRA over a base that its start changed: found init_lora_weights "
            f"{config['init_lora_weights']!r}; save it as one over the original "
            "(PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config


def _scales(
    path: Path, pairs: Pairs, alphas: Mapping[str, float], config: Mapping[str, Any] | None
) -> dict[str, float]:
    """The factor before B A, by module: alpha / r, or alpha / sqrt(r) for a rank-stabilised LoRA."""
    scales = {module: alphas.get(module, float(len(a))) / len(a) for module, (a, _) in pairs.items()}
    if config is None:
        return _usable(path, scales)
    ranks, strengths = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for module, (a, _) in pairs.items():
        rank = ranks.get(get_pattern_key(list(ranks), module), config["r"] or len(a))
        if rank != len(a):
            raise WeightsError(f"{path} records rank {rank} for {module!r} and holds rank {len(a)}")
        alpha = strengths.get(get_pattern_key(list(strengths), module), config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if alphas and not math.isclose(scale, scales[module], rel_tol=1e-3):
            raise WeightsError(f"{path} records alpha twice for {module!r}: {alphas[module]:g} and {alpha:g}")
        scales[module] = scale
    return _usable(path, scales)


def _usable(path: Path, scales: dict[str, float]) -> dict[str, float]:
    for module, scale in scales.items():
        if not 0 < scale < math.inf:
            raise WeightsError(f"{path} records no usable alpha for {module!r}: alpha / rank is {scale:g}")
    return scales


def _as_one_rank(pairs: Pairs, scales: Mapping[str, float]) -> Lora:
    """One rank and one alpha for all modules; the matrices are untouched where they have that already."""
    rank, alike = max(len(a) for a, _ in pairs.values()), len(set(scales.values())) == 1
    scale = next(iter(scales.values())) if alike else 1.0
    weights: dict[str, Tensor] = {}
    for module, (a, b) in pairs.items():
        fill = rank - len(a)
        a, b = a.float(), b.float() * (scales[module] / scale)
        weights[f"{module}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, fill))
        weights[f"{module}.lora_B.weight"] = nn.functional.pad(b, (0, fill))
    return Lora(rank=rank, alpha=scale * rank, weights=weights)
