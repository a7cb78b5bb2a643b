"""The processes of one run, one on each device: what each of them trains, and what they tell each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed, nn

from danceopd.recipe import Recipe, RecipeError, parse_recipe

Value = TypeVar("Value")

EXCHANGED = 2**26
"""Gradients that are exchanged in one go, in numbers: what is held twice for that moment."""


class SeveralProcesses(RuntimeError):
    """A launcher started as several processes what runs as one."""


class FailedElsewhere(RuntimeError):
    """Another process of the run failed, and says why."""


@dataclass(frozen=True)
class Processes:
    """One process of a run's ``count``. Each trains its share of every update, from trajectories, data and random
    numbers of its own; gradients are averaged, so that all hold the same student.

    Every method but ``share`` and ``generator`` is called by all processes at the same point.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def launched(cls) -> Processes:
        """As the launcher (torchrun, accelerate launch) says; one without a launcher. It joins the processes."""
        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes files and reports."""
        return self.rank == 0

    def share(self, recipe: Recipe) -> Recipe:
        """The recipe of one process: its part of the batch, and of the pool of streaming rollouts.

        Raises:
            RecipeError: if they cannot be shared out evenly, or a part does not fit the rest of the recipe.
        """
        if self.count == 1:
            return recipe
        content = recipe.model_dump(mode="json")
        where = f"on {self.count} processes, of which each has its share of train.batch_size and rollout.pool"
        for part, key in (("train", "batch_size"), ("rollout", "pool")):
            whole = content[part][key]
            if whole is not None and whole % self.count:
                raise RecipeError(f"{part}.{key}: {whole} cannot be shared out evenly among {self.count} processes")
            if whole is not None:
                content[part][key] = whole // self.count
        return parse_recipe(content, where=where)

    def generator(self, seed: int) -> torch.Generator:
        """A stream of random numbers of this process's own; the first one's is the seed's."""
        generator = torch.Generator().manual_seed(seed)
        if self.rank:
            seeds = torch.randint(2**32, (self.rank,), generator=generator)
            generator.manual_seed(int(seeds[-1]))
        return generator

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, in their order. Tensors in it are on the CPU."""
        return [value] if self.count == 1 else gather_object([value])

    def first(self, value: Value) -> Value:
        """The first process's value."""
        return value if self.count == 1 else broadcast_object_list([value])[0]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Leave together: if a process fails within, all fail, and the first that did says why.

        Raises:
            FailedElsewhere: on all other processes.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failures = self.gather(None if failure is None else str(failure))
        failed = [rank for rank, found in enumerate(failures) if found is not None]
        if failed and failed[0] == self.rank and failure is not None:
            raise failure
        if failed:
            raise FailedElsewhere(f"process {failed[0]}: {failures[failed[0]]}")

    def alike(self, error: Exception) -> Exception:
        """What to raise where all processes fail alike: the error on the first, so that it is told once."""
        return error if self.main else FailedElsewhere(str(error))

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """The mean of every process's gradients on all of them; a missing one counts as 0 where another has it."""
        if self.count == 1:
            return
        reached = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        reached = reached.to(parameters[0].device)
        distributed.all_reduce(reached, op=distributed.ReduceOp.MAX)
        held = [parameter for parameter, found in zip(parameters, reached.tolist(), strict=True) if found]
        for parameter in held:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for group in _grouped(held):
            gradients = [parameter.grad for parameter in group if parameter.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            distributed.all_reduce(flat)
            flat /= self.count
            for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))


ALONE = Processes()
"""A run of one process."""


def _grouped(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in their order, together of at most ``EXCHANGED`` numbers, or a single larger one."""
    group: list[nn.Parameter] = []
    for parameter in parameters:
        if group and sum(each.numel() for each in [*group, parameter]) > EXCHANGED:
            yield group
            group = []
        group.append(parameter)
    if group:
        yield group
