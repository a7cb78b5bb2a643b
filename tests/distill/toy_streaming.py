"""Streaming rollouts small enough for closed forms, and inputs that can be told apart."""

import torch
from closed_forms import GaussianField
from torch import Tensor, nn

import danceopd as d
from danceopd.distill.rollout import rollout

GRID = d.shifted_grid(steps=8, shift=3.0)


class Numbered:
    """A route's data whose conditions [n, 2] are a number of each trajectory's own, and a mark that dropout clears."""

    def __init__(self, size: int = 4, first: int = 0) -> None:
        self.size, self.next = size, first

    def __call__(self, count, generator):
        numbers = torch.arange(self.next, self.next + count).float()
        self.next += count
        return d.Samples(condition=torch.stack([numbers, torch.ones(count)], 1), shape=(self.size,))


class Elementwise(nn.Module):
    """Any size, and a sample's velocity does not depend on its batch to the last bit."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3))

    def forward(self, z, sigma, condition=None):
        return self.a * z + 0.1 * sigma[:, None]


class Recorder:
    """The conditions that a student saw in each update, with gradient and without."""

    def __init__(self, student: nn.Module) -> None:
        self.trained: list[Tensor] = []
        self.walked: list[Tensor] = []
        student.register_forward_hook(self._note)

    def _note(self, module, args, out) -> None:
        (self.trained if torch.is_grad_enabled() else self.walked).append(args[2])


def streaming(*routes, **options):
    return d.StreamingDanceOPD(
        **{"routes": routes, "grid": GRID, "stratified": options.get("per") != "step", "pool": 32, "batch_size": 8}
        | options
    )


def plain(field=None, **options):
    return streaming(d.Route("one", field or GaussianField(0.7, 0.5), Numbered()), **options)


def fresh_states(method, student, group):
    step = group.step[:, None]
    return rollout(student, group.noise(), group.batch.condition, GRID, d.Query(step, GRID.sigmas[step])).states[:, 0]
