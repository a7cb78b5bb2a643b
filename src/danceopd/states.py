"""Values that cross stages, and the one convention they follow.

sigma in [0, 1]: 1 is pure noise, 0 is data. ``z_sigma = (1 - sigma) x + sigma eps``; velocity ``v = dz/dsigma =
eps - x``. Latents are unpacked: [B, C, H, W] (images) or [B, C, T, H, W] (video). sigma is per sample, [B]. Model
families translate to and from this; nobody else does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What a velocity network is told besides z and sigma. Every tensor's first axis is the batch.

    prompt_embeds: text token embeddings [B, L, D].
    pooled_embeds: one text vector per sample [B, P], where the family has one.
    source: clean latents [B, C, H, W] of the image to edit, or None for text-to-image.
    """

    prompt_embeds: Tensor
    pooled_embeds: Tensor | None = None
    source: Tensor | None = None


def select(condition: Any, index: Tensor) -> Any:
    """The samples ``index`` (int64 [b]) of a condition."""
    if condition is None:
        return None
    return condition[index] if isinstance(condition, Tensor) else _map(condition, lambda tensor: tensor[index])


def to_device(condition: Any, device: torch.device | str) -> Any:
    """The condition with all its tensors on ``device``."""
    if condition is None:
        return None
    return condition.to(device) if isinstance(condition, Tensor) else _map(condition, lambda tensor: tensor.to(device))


def concatenate(conditions: Sequence[Any]) -> Any:
    """Conditions of one signature, one after another along the batch.

    Raises:
        ValueError: if a part is missing in one and present in another.
    """
    first = conditions[0]
    if len(conditions) == 1:
        return first
    if any(condition is None for condition in conditions):
        if all(condition is None for condition in conditions):
            return None
        raise ValueError("samples with and without a condition cannot share a batch")
    if isinstance(first, Tensor):
        return torch.cat(list(conditions))
    merged: dict[str, Tensor | None] = {}
    for field in fields(first):
        parts = [getattr(condition, field.name) for condition in conditions]
        present = [part for part in parts if part is not None]
        if present and len(present) != len(parts):
            raise ValueError(f"conditions with and without {field.name!r} cannot share a batch")
        merged[field.name] = torch.cat(present) if present else None
    return type(first)(**merged)


def signature(condition: Any) -> tuple[Any, ...]:
    """Kind and per-sample shapes of all parts: conditions of equal signature can share a batch."""
    if condition is None:
        return ()
    if isinstance(condition, Tensor):
        return (tuple(condition.shape[1:]),)
    parts = (getattr(condition, field.name) for field in fields(condition))
    return type(condition), *(None if part is None else tuple(part.shape[1:]) for part in parts)


def count(condition: Any) -> int:
    """Number of samples.

    Raises:
        ValueError: if there is no condition to tell it by.
    """
    if isinstance(condition, Tensor):
        return len(condition)
    if condition is not None:
        return next(len(part) for field in fields(condition) if (part := getattr(condition, field.name)) is not None)
    raise ValueError("samples of several shapes need a condition, which says how many there are of each; found none")


def replace_where(condition: Any, mask: Tensor, change: Callable[[Any], Any]) -> Any:
    """The condition with ``change`` applied to the samples where ``mask`` (bool [B]) holds, order kept."""
    if not mask.any():
        return condition
    kept, changed = (~mask).nonzero().squeeze(1), mask.nonzero().squeeze(1)
    order = torch.cat([kept, changed]).argsort()
    return select(concatenate([select(condition, kept), change(select(condition, changed))]), order)


def condition_tensors(condition: Any) -> dict[str, Tensor]:
    """All tensors of a condition by name, from which ``condition_from`` makes it again.

    Raises:
        TypeError: unless it is a tensor, a ``Condition`` of any kind, or None.
    """
    if condition is None:
        return {}
    if isinstance(condition, Tensor):
        return {"tensor": condition}
    if not isinstance(condition, Condition):
        raise TypeError(f"only tensors and danceopd.Condition can be saved, found a {type(condition).__name__}")
    parts = {field.name: getattr(condition, field.name) for field in fields(condition)}
    return {f"{type(condition).__name__}.{name}": part for name, part in parts.items() if part is not None}


def condition_from(tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of ``condition_tensors``.

    Raises:
        ValueError: for a kind of condition that is not known here.
    """
    if not tensors:
        return None
    if "tensor" in tensors:
        return tensors["tensor"]
    name = next(iter(tensors)).partition(".")[0]
    kinds = {kind.__name__: kind for kind in _kinds(Condition)}
    if name not in kinds:
        raise ValueError(f"there is no condition {name!r} here; known: {', '.join(kinds)}")
    return kinds[name](**{key.partition(".")[2]: part for key, part in tensors.items()})


def _kinds(kind: type[Condition]) -> list[type[Condition]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _kinds(child))]


def _map(condition: Any, function: Callable[[Tensor], Tensor]) -> Any:
    parts = {field.name: getattr(condition, field.name) for field in fields(condition)}
    return type(condition)(**{name: None if part is None else function(part) for name, part in parts.items()})


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A batch of training inputs of one route: what to condition on and how large the latents are.

    condition: B samples' conditions.
    shape: the shape of one latent, without the batch axis.
    target: clean latents [B, *shape] where the data has them (needed by ``states="data"``), else None.
    field_condition: B samples' conditions as the route's field is told them, where it is told something else than the
        student (a trigger word before the prompt, another family's encoding); None where it is told the same.
    """

    condition: Any
    shape: tuple[int, ...]
    target: Tensor | None = None
    field_condition: Any = None


@dataclass(frozen=True)
class Query:
    """Which states of a rollout are asked for, K per sample, in the order of the rollout.

    step: int64 [B, K]; the last grid point at or before the state (0 is pure noise).
    sigma: float32 [B, K]; the state's noise level, at most the grid's sigma at ``step``.
    """

    step: Tensor
    sigma: Tensor

    def __getitem__(self, index: Tensor) -> Query:
        return Query(self.step[index], self.sigma[index])


@dataclass(frozen=True)
class NetworkCalls:
    """Network evaluations of one update: one for each sample of each call; a guided field makes two at a time."""

    rollout: int = 0
    field: int = 0
    train: int = 0

    @property
    def forward_equivalents(self) -> int:
        """Forward passes, a backward pass counting two."""
        return self.rollout + self.field + 3 * self.train

    def __add__(self, other: NetworkCalls) -> NetworkCalls:
        return NetworkCalls(self.rollout + other.rollout, self.field + other.field, self.train + other.train)


@dataclass(frozen=True, kw_only=True)
class ExpectedCalls:
    """Network evaluations that one training sample costs, in expectation.

    once: rollout evaluations that a whole run costs besides, before its first update.
    """

    rollout: float
    field: float
    train: float
    once: float = 0.0

    @property
    def forward_equivalents(self) -> float:
        """Forward passes per training sample, a backward pass counting two; ``once`` is not in it."""
        return self.rollout + self.field + 3 * self.train

    def after(self, samples: int) -> float:
        """Forward-equivalents of a run's first ``samples`` training samples, with ``once``; 0 for none."""
        return samples * self.forward_equivalents + self.once if samples else 0.0


@dataclass(frozen=True, kw_only=True)
class RouteResult:
    """One route's part in an update. ``loss`` is the mean over its samples and still carries the graph."""

    loss: Tensor
    samples: int
    mean_sigma: float


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One update, before the optimiser acts.

    loss: scalar, mean over elements and samples. routes: by name, only routes that had samples.
    """

    loss: Tensor
    routes: dict[str, RouteResult]
    calls: NetworkCalls

    def detached(self) -> StepResult:
        """The same figures without their graph, on the CPU."""
        routes = {name: replace(route, loss=route.loss.detach().cpu()) for name, route in self.routes.items()}
        return replace(self, loss=self.loss.detach().cpu(), routes=routes)
