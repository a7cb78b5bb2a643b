"""The optimiser and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from danceopd.recipe import TrainPart


def make_optimizer(parameters: list[nn.Parameter], part: TrainPart) -> torch.optim.Optimizer:
    """AdamW, or Muon with its update scaled by sqrt(max(1, rows / columns)) (Jordan et al. 2024)."""
    if part.optimizer == "muon":
        return torch.optim.Muon(
            parameters, lr=part.learning_rate, weight_decay=part.weight_decay, adjust_lr_fn="original"
        )
    return torch.optim.AdamW(parameters, lr=part.learning_rate, weight_decay=part.weight_decay)


def learning_rate_factor(step: int, part: TrainPart) -> float:
    """Warm-up from 1 / warmup to 1, then constant, or falling linearly or as a cosine, to 0 after the last update."""
    if step < part.lr_warmup_steps:
        return (step + 1) / part.lr_warmup_steps
    if part.lr_scheduler == "constant":
        return 1.0
    done = (step - part.lr_warmup_steps) / max(1, part.steps - part.lr_warmup_steps)
    return 1 - done if part.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done))
