"""Weight merge: the (weighted) average of the sources' weights. Nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from danceopd.fields.lora import Lora, combined


def merged_loras(sources: Sequence[tuple[Lora | None, float]]) -> Lora:
    """The average of LoRA sources over one base, as one LoRA over that base; None stands for the base itself.

    Weights are normalised to sum 1, so that the result equals the average of the sources' full weights.

    Raises:
        ValueError: if there is no LoRA among the sources, or a weight is not positive.
    """
    shares = _shares([weight for _, weight in sources])
    parts = [(lora, share) for (lora, _), share in zip(sources, shares, strict=True) if lora is not None]
    if not parts:
        raise ValueError("a merge of LoRAs needs at least one LoRA")
    return combined(parts)


def merged_weights(sources: Sequence[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    """The average of full checkpoints, computed in float32 and returned in each tensor's own type.

    Raises:
        ValueError: if the checkpoints differ in names or shapes, naming the first difference, or a weight is not
            positive.
    """
    shares = _shares([weight for _, weight in sources])
    first = sources[0][0]
    for other, _ in sources[1:]:
        names = sorted(first.keys() ^ other.keys())
        if names:
            raise ValueError(f"checkpoints to merge differ: {names[0]!r} is not in all of them")
        for name in first:
            found = [tuple(source[name].shape) for source in (first, other)]
            if found[0] != found[1]:
                raise ValueError(f"checkpoints to merge differ at {name!r}: shapes {found[0]} and {found[1]}")
    merged = {}
    for name, tensor in first.items():
        parts = [share * source[name].float() for (source, _), share in zip(sources, shares, strict=True)]
        merged[name] = torch.stack(parts).sum(0).to(tensor.dtype)
    return merged


def _shares(weights: Sequence[float]) -> list[float]:
    if not weights or min(weights) <= 0:
        raise ValueError(f"a merge needs sources with positive weights, found {list(weights)}")
    return [weight / sum(weights) for weight in weights]
