"""Trajectories in flight: the student's rollouts, each at a step of its own, carried from one update to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from danceopd.distill.batch import RoutedBatch, joined
from danceopd.distill.schedule import Grid, GridFor, grid_of
from danceopd.states import condition_from, condition_tensors

CONDITIONS = ("condition", "field_condition")


@dataclass(frozen=True)
class Trajectories:
    """Trajectories of one shape signature; their routes and conditions are ``batch``.

    z: float32 [n, *shape], the state at ``step``.
    step: where on the grid; age: updates since it began; seed: of its noise. int64 [n], on the CPU.
    """

    batch: RoutedBatch
    z: Tensor
    step: Tensor
    age: Tensor
    seed: Tensor

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, index: Tensor) -> Trajectories:
        there = index.to(self.z.device)
        return Trajectories(self.batch[index], self.z[there], self.step[index], self.age[index], self.seed[index])

    def noise(self) -> Tensor:
        """The pure noise that each began at: float32 [n, *shape]."""
        return noise_from(self.seed, self.batch.shape).to(self.z.device)


def noise_from(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Pure noise of each seed (int64 [n]) alone: float32 [n, *shape], on the CPU."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seed.tolist()])


def begin(batch: RoutedBatch, generator: torch.Generator, device: torch.device | str) -> Trajectories:
    """New trajectories at pure noise, step 0."""
    zeros = torch.zeros_like(batch.route)
    seed = torch.randint(2**32, zeros.shape, generator=generator)  # of the 64 bits of a seed, torch's CPU uses 32
    return Trajectories(batch, noise_from(seed, batch.shape).to(device), step=zeros, age=zeros, seed=seed)


def join(parts: list[Trajectories]) -> Trajectories:
    """Trajectories of one signature, one after another."""
    z, step, age, seed = (torch.cat([getattr(part, name) for part in parts]) for name in ("z", "step", "age", "seed"))
    return Trajectories(joined([part.batch for part in parts]), z, step, age, seed)


@dataclass
class Pool:
    """groups: all trajectories, by shape signature. trained: int64 [N], how often each step was. updates: until now."""

    groups: list[Trajectories] = field(default_factory=list)
    trained: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    updates: int = 0

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def add(self, new: Trajectories) -> None:
        """Put trajectories to those of their signature."""
        for index, group in enumerate(self.groups):
            if group.batch.signature == new.batch.signature:
                self.groups[index] = join([group, new])
                return
        self.groups.append(new)

    def state(self) -> dict[str, Tensor]:
        """All that the next update depends on, as tensors by name; copies on the CPU, of which no two share memory."""
        tensors = {"trained": self.trained, "updates": torch.tensor(self.updates)}
        for index, group in enumerate(self.groups):
            parts = {"route": group.batch.route} | {n: getattr(group, n) for n in ("z", "step", "age", "seed")}
            for kind in CONDITIONS:
                parts |= {f"{kind}.{n}": part for n, part in condition_tensors(getattr(group.batch, kind)).items()}
            tensors |= {f"{index}.{name}": part for name, part in parts.items()}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def load_state(self, tensors: Mapping[str, Tensor], device: torch.device | str, grid: Grid | GridFor) -> None:
        """Continue where ``state`` was taken, on the grid that it was taken on.

        Raises:
            ValueError, KeyError: if that is not the state of a pool.
        """
        self.trained, self.updates, self.groups = tensors["trained"].clone(), int(tensors["updates"]), []
        for index in range(len({name.partition(".")[0] for name in tensors if "." in name})):
            route, z, step, age, seed = (tensors[f"{index}.{name}"] for name in ("route", "z", "step", "age", "seed"))
            condition, field_condition = (
                condition_from(
                    {n.removeprefix(start): part.to(device) for n, part in tensors.items() if n.startswith(start)}
                )
                for start in (f"{index}.{kind}." for kind in CONDITIONS)
            )
            shape = tuple(z.shape[1:])
            batch = RoutedBatch(
                route=route,
                condition=condition,
                shape=shape,
                target=None,
                grid=grid_of(grid, shape),
                query=None,
                field_condition=field_condition,
            )
            self.groups.append(Trajectories(batch, z.to(device), step, age, seed))
