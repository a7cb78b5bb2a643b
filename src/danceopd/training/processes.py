"""The processes of one run, one on each device: what each of them trains, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import distributed, nn

from danceopd.errors import FailedElsewhere, UserError
from danceopd.recipe import Recipe, RecipeError, parse_recipe

Value = TypeVar("Value")

EXCHANGED = 2**26
"""Gradients that are exchanged in one go, in numbers: what is held twice for that moment."""
PATIENCE = timedelta(days=1)
"""How long processes wait for one that encodes all data, say; one that ends is noticed at once."""


SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_DEEPSPEED")
"""What Accelerate's launcher sets for engines that cut networks up, which its state only shows later."""


class SeveralProcesses(UserError, RuntimeError):
    """A launcher started as several processes what runs as one, or in a way that is not supported."""


@dataclass(frozen=True)
class Processes:
    """One process of a run's ``count``. Each trains its share of every update, from trajectories, data and random
    numbers of its own; gradients are averaged, so that all hold the same student.

    group: over which values go from process to process, in main memory; None without others.

    Every method but ``share`` and ``generator`` is called by all processes at the same point.
    """

    rank: int = 0
    count: int = 1
    group: distributed.ProcessGroup | None = None

    @classmethod
    @contextmanager
    def launched(cls) -> Iterator[Processes]:
        """As the launcher (torchrun, accelerate launch) says, joined until the end; one process without a launcher.

        Raises:
            SeveralProcesses: if the launcher asks for sharded networks or another engine.
        """
        state = PartialState(cpu=not torch.cuda.is_available())
        if state.num_processes == 1:
            yield ALONE
            return
        sharded = [name for name in SHARDED if os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")]
        if sharded or state.distributed_type not in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            asked = ", ".join(sharded) or state.distributed_type.value
            raise SeveralProcesses(
                f"the launcher asks for {asked}; every process holds all networks whole: launch plain processes "
                "(accelerate launch --multi_gpu, or torchrun)"
            )
        group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(group, distributed.ProcessGroup)  # every process is a member
        try:
            yield cls(state.process_index, state.num_processes, group)
        finally:  # or the interpreter may abort at its end when another process has gone before
            distributed.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes files and reports."""
        return self.rank == 0

    def share(self, recipe: Recipe) -> Recipe:
        """The recipe of one process: its part of the batch, and of the pool of streaming rollouts.

        No micro-batch becomes larger by that, and there are as few as that allows.

        Raises:
            RecipeError: if they cannot be shared out evenly, or a part does not fit the rest of the recipe.
        """
        if self.count == 1 or recipe.train.steps == 0:
            return recipe
        if recipe.train.gradient_cosine_steps:
            raise RecipeError(
                "train.gradient_cosine_steps compares whole gradients, and each process has a part; set it to 0"
            )
        content = recipe.model_dump(mode="json")
        for part, key in (("train", "batch_size"), ("rollout", "pool")):
            whole = content[part][key]
            if whole is not None and whole % self.count:
                raise RecipeError(f"{part}.{key}: {whole} cannot be shared out evenly among {self.count} processes")
            if whole is not None:
                content[part][key] = whole // self.count
        largest = recipe.train.batch_size // recipe.train.gradient_accumulation_steps
        batch = recipe.train.batch_size // self.count
        group = recipe.flow_opd.group_size if recipe.method == "flow_opd" else 1
        sizes = [size for size in range(largest, 0, -1) if batch % size == 0 and size % group == 0]
        if not sizes:
            raise RecipeError(
                f"train.batch_size: the {batch} samples of each of {self.count} processes do not divide into "
                f"micro-batches of at most {largest} that are multiples of flow_opd.group_size {group}"
            )
        content["train"]["gradient_accumulation_steps"] = batch // sizes[0]
        return parse_recipe(content, where=f"on each of {self.count} processes, with its share of batch and pool")

    def generator(self, seed: int) -> torch.Generator:
        """A stream of random numbers of this process's own; the first one's is the seed's."""
        generator = torch.Generator().manual_seed(seed)
        if self.rank:
            seeds = torch.randint(2**32, (self.rank,), generator=generator)
            generator.manual_seed(int(seeds[-1]))
        return generator

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, in their order. Tensors in it are on the CPU."""
        found = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(found, value, group=self.group)
        return found

    def gather_on_main(self, value: Value) -> list[Value]:
        """The same on the first process, and nothing on the others."""
        if self.count == 1:
            return [value]
        found = [value] * self.count if self.main else None
        distributed.gather_object(value, found, dst=0, group=self.group)
        return found or []

    def first(self, value: Value) -> Value:
        """The first process's value."""
        held = [value]
        if self.count > 1:
            distributed.broadcast_object_list(held, src=0, group=self.group)
        return held[0]

    def together(self, work: Callable[[], Value]) -> list[Value]:
        """What ``work`` gives on every process; if it fails on one, all fail, and the first that did says why.

        ``work`` exchanges nothing itself.

        Raises:
            FailedElsewhere: on all other processes.
        """
        done: list[Value] = []
        failure: Exception | None = None
        try:
            done.append(work())
        except Exception as error:
            failure = error
        found = self.gather((done, None if failure is None else str(failure)))
        for rank, (_, message) in enumerate(found):
            if message is not None and failure is not None and rank == self.rank:
                raise failure
            if message is not None:
                raise FailedElsewhere(f"process {rank}: {message}") from failure
        return [value for values, _ in found for value in values]

    def on_main(self, work: Callable[[], object]) -> None:
        """Do ``work`` on the first process while the others wait; if it fails, all fail.

        Raises:
            FailedElsewhere: on all other processes.
        """

        def done() -> None:
            if self.main:
                work()

        self.together(done)

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
        gradients = []
        for parameter, found in zip(parameters, reached.tolist(), strict=True):
            if found and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        for group in _grouped(gradients):
            flat = torch.cat([gradient.flatten() for gradient in group])
            distributed.all_reduce(flat)
            flat /= self.count
            for gradient, mean in zip(group, flat.split([gradient.numel() for gradient in group]), strict=True):
                gradient.copy_(mean.view_as(gradient))


ALONE = Processes()
"""A run of one process."""


def _grouped(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors in their order, together of at most ``EXCHANGED`` numbers, or a single larger one."""
    group: list[torch.Tensor] = []
    held = 0
    for tensor in tensors:
        if group and held + tensor.numel() > EXCHANGED:
            yield group
            group, held = [], 0
        group.append(tensor)
        held += tensor.numel()
    if group:
        yield group
