"""A LoRA as a value: its tensors under PEFT's keys, and sums of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA as read from a file: PEFT keys ``MODULE.lora_A.weight`` [r, in], ``MODULE.lora_B.weight`` [out, r]."""

    rank: int
    alpha: float
    weights: dict[str, Tensor]

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the modules it adapts."""
        return tuple(sorted({name.rsplit(".lora_", 1)[0] for name in self.weights}))


def combined(parts: Sequence[tuple[Lora, float]]) -> Lora:
    """One LoRA that equals the weighted sum of several: ranks concatenated, alpha = rank, all scales folded into B.

    delta = sum_i w_i (alpha_i / r_i) B_i A_i.
    """
    rank = sum(lora.rank for lora, _ in parts)
    weights: dict[str, Tensor] = {}
    for target in sorted({target for lora, _ in parts for target in lora.targets}):
        shapes = next(lora for lora, _ in parts if target in lora.targets).weights
        like_a, like_b = shapes[f"{target}.lora_A.weight"], shapes[f"{target}.lora_B.weight"]
        side_a, side_b = [], []
        for lora, weight in parts:
            a = lora.weights.get(f"{target}.lora_A.weight", like_a.new_zeros(lora.rank, like_a.shape[1]))
            b = lora.weights.get(f"{target}.lora_B.weight", like_b.new_zeros(like_b.shape[0], lora.rank))
            side_a.append(a.float())
            side_b.append(b.float() * (weight * lora.alpha / lora.rank))
        weights[f"{target}.lora_A.weight"] = torch.cat(side_a)
        weights[f"{target}.lora_B.weight"] = torch.cat(side_b, dim=1)
    return Lora(rank=rank, alpha=float(rank), weights=weights)
