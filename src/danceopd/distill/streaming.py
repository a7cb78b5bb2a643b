"""DanceOPD on streaming rollouts: the pass that trains a state of the student's is also the step that leaves it.

A pool of trajectories is in flight, each at a step of its own. An update trains some of them where they are, and moves
all of them one Euler step on with the velocity that the student was just asked for. A trajectory that is past the query
band is replaced by a new one on its route.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from danceopd.distill.matching import VelocityMatching
from danceopd.distill.pool import Pool, Trajectories, begin
from danceopd.distill.pool_plan import PoolPlan, spread_steps
from danceopd.distill.rollout import Rollout, rollout
from danceopd.distill.routing import Route
from danceopd.distill.schedule import Grid
from danceopd.distill.selection import choose
from danceopd.distill.solver import euler_step
from danceopd.errors import NonFiniteValue
from danceopd.states import ExpectedCalls, NetworkCalls, Query, StepResult


@dataclass(frozen=True, kw_only=True)
class StreamingDanceOPD(VelocityMatching):
    """``DanceOPD`` with ``states="student"``, its rollouts carried along from update to update.

    pool: trajectories in flight, P. A route has its share of them for good (per step: all routes the same), spread
        evenly over the steps.
    batch_size: trained states of an update, A, that ``expected_calls`` and the demands on the pool are about.
    largest_pass: samples of one network call at most (a micro-batch); ``batch_size`` by default.
    staleness_updates: updates between measurements of staleness in ``diagnostics``; 0 for never.

    An update trains as many trajectories of each route as its samples were routed there. One at step j is among them
    with probability min(1, c p(j)), p the query band and c such that the number is exact; see ``selection``.

    Raises:
        ValueError: for a band over sigma or several queries per rollout, a router that changes the shares, or a
            pool that is too small for a route, or so small that the minimum leaves little of the band, or a
            ``largest_pass`` below 1.
    """

    draws_apart: ClassVar[bool] = True  # each from a pool of its own, which has so many of each route

    pool: int
    batch_size: int
    largest_pass: int | None = None
    staleness_updates: int = 0
    trajectories: Pool = field(default_factory=Pool, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_static_shares("streaming rollouts plan the pool for shares that stay")
        if self.query.over != "step":
            raise ValueError(
                f"streaming rollouts need a query band over 'step', found {self.query.over!r}: they train the states "
                "that a trajectory passes, and a sigma between grid points is none"
            )
        for route in self.routes:
            if route.grid is not None or route.query is not None:
                raise ValueError(
                    f"streaming rollouts share one number of steps and one band, and route {route.name!r} has its own"
                )
        if self.query.per_rollout != 1:
            raise ValueError(
                f"streaming rollouts need per_rollout 1, found {self.query.per_rollout}: how often a trajectory is "
                "trained follows from the pool"
            )
        if self.largest_pass is not None and self.largest_pass < 1:
            raise ValueError(f"largest_pass is at least 1, found {self.largest_pass}")
        self.plan.require_enough([route.name for route in self.routes])

    @cached_property
    def plan(self) -> PoolPlan:
        """How the pool is shared out, and which steps it trains; the band is the same for any shape of latents."""
        return PoolPlan(
            pool=self.pool,
            batch_size=self.batch_size,
            band=self.query.step_probabilities(self.routes[0].typical_grid(self.grid)),
            shares=self.shares,
            per=self.per,
            stratified=self.stratified,
        )

    @property
    def _largest_pass(self) -> int:
        return self.largest_pass or self.batch_size

    def most_samples(self, route: int) -> int:
        return self.plan.most_samples(route)

    def expected_calls(self) -> ExpectedCalls:
        """Per trained sample P / A - 1 calls that only walk, less those that would leave a trajectory's last step."""
        ended = self.plan.members.double() / self.plan.length * (1 - self.plan.selection()[:, -1])
        walked = self.pool - self.batch_size - float(ended.sum())
        return ExpectedCalls(
            rollout=walked / self.batch_size,
            field=self.over_routes(_field_calls).field,
            train=1.0,
            once=self.pool * (self.plan.length - 1) / 2,
        )

    def step(
        self,
        student: nn.Module,
        *,
        batch_size: int,
        generator: torch.Generator,
        routes: Tensor | None = None,
        backward: Callable[[Tensor], None] | None = None,
    ) -> StepResult:
        """Loss of one update on the live student; arguments as in ``DanceOPD.step``. All trajectories move one step.

        Raises:
            ValueError: if ``batch_size`` is more than the pool was planned for, or a route has fewer trajectories in
                the band than samples.
            NonFiniteValue: if the student's velocity on a trajectory that only walks is infinite or NaN. The gradients
                and the counts of trained steps have then been added to, and no trajectory has moved.
        """
        if batch_size > self.batch_size:
            raise ValueError(
                f"a pool of {self.pool} was planned for updates of {self.batch_size} samples, found {batch_size}: more "
                "would train steps further from the query band"
            )
        chosen = self.chosen_routes(batch_size, generator, routes)
        calls = NetworkCalls() if len(self.trajectories) else self._fill(student, generator)
        losses = self.losses(batch_size, backward)
        moved = []
        for members, trained in self._select(chosen, generator):
            sigmas = members.batch.grid.sigmas
            sigma, there = sigmas[members.step].to(self.device), sigmas[members.step + 1].to(self.device)
            velocity = torch.zeros_like(members.z)
            for rows in _passes(trained, self._largest_pass):
                part, at = members[rows], Query(members.step[rows, None], sigmas[members.step[rows, None]])
                matched = self.match(student, part.batch, part.z, at)
                losses.add(part.batch.route, matched.losses, at.sigma[:, 0])
                velocity[rows.to(self.device)] = matched.velocity.detach().float()
                calls += matched.calls
            walking = ~trained & (members.step + 1 < self.plan.length)
            for rows in _passes(walking, self._largest_pass):
                part = members[rows]
                with torch.no_grad():
                    v = student(part.z, sigma[rows.to(self.device)], part.batch.condition)
                velocity[rows.to(self.device)] = v.float()
                calls += NetworkCalls(rollout=len(rows))
            self._refuse_non_finite(members, velocity, walking)
            z = euler_step(members.z, velocity, sigma, there)
            moved.append(replace(members, z=z, step=members.step + 1, age=members.age + 1))
        self._replace_ended(moved, generator)
        self.trajectories.updates += 1
        return losses.result(calls)

    def update(
        self,
        student: nn.Module,
        *,
        batch_size: int,
        micro_batches: int,
        generator: torch.Generator,
        routes: Tensor | None = None,
        backward: Callable[[Tensor], None] | None = None,
    ) -> list[StepResult]:
        """One step of all trajectories, however many passes it takes: the choice is made over the whole pool.

        Raises:
            ValueError: if ``largest_pass`` is more than a micro-batch.
        """
        if self._largest_pass > math.ceil(batch_size / micro_batches):
            raise ValueError(
                f"{micro_batches} micro-batches of {batch_size} samples need a largest_pass of "
                f"{math.ceil(batch_size / micro_batches)}, found {self._largest_pass}"
            )
        return [self.step(student, batch_size=batch_size, generator=generator, routes=routes, backward=backward)]

    def state(self) -> dict[str, Tensor]:
        return self.trajectories.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.trajectories.load_state(tensors, self.device, self.grid)
        if not len(self.trajectories):
            return
        groups = self.trajectories.groups
        routes, steps = (torch.cat(parts) for parts in ([g.batch.route for g in groups], [g.step for g in groups]))
        members, found = self.plan.members.tolist(), routes.bincount(minlength=len(self.routes)).tolist()
        if found != members:
            raise ValueError(f"found {found} trajectories of the routes, needed {members}")
        if len(self.trajectories.trained) != len(self.plan.band) or int(steps.max()) >= self.plan.length:
            raise ValueError(
                f"the trajectories are of another grid or band than this one's {len(self.plan.band)} steps"
            )

    def diagnostics(self, student: nn.Module) -> dict[str, float | int]:
        """Mean age; how often each step was trained, and how far that is from the band; staleness where it is due.

        Nothing before the first update.

        band_distance: total variation between the trained steps so far and the query band, in [0, 1].
        staleness: see ``staleness``, mean over the trajectories past step 0; left out where there are none.
        """
        pool = self.trajectories
        if not pool.updates:
            return {}
        trained = pool.trained.double()
        distance = (trained / trained.sum() - self.plan.band).abs().sum() / 2
        figures: dict[str, float | int] = {
            "pool/age": float(torch.cat([group.age for group in pool.groups]).double().mean()),
            "pool/band_distance": float(distance),
        }
        figures |= {f"pool/trained_at_step/{step:02d}": count for step, count in enumerate(pool.trained.tolist())}
        if self.staleness_updates and pool.updates % self.staleness_updates == 0:
            far = torch.cat([staleness(student, group, self._largest_pass).cpu() for group in pool.groups])
            past = torch.cat([group.step for group in pool.groups]) > 0
            if past.any():
                figures["pool/staleness"] = float(far[past].mean())
        return figures

    def _select(self, chosen: Tensor, generator: torch.Generator) -> list[tuple[Trajectories, Tensor]]:
        """The groups of the pool, each with which of it are trained (bool [n]).

        chosen: int64 [A], the route of each trained state.
        """
        pool = self.trajectories
        route = torch.cat([group.batch.route for group in pool.groups])
        step = torch.cat([group.step for group in pool.groups])
        trained = torch.zeros(len(step), dtype=torch.bool)
        for index in chosen.unique().tolist():
            rows = (route == index).nonzero().squeeze(1)
            count, ready = int((chosen == index).sum()), int((self.plan.mass[step[rows]] > 0).sum())
            if count > ready:
                raise ValueError(
                    f"{count} samples of route {self.routes[index].name!r} were asked for, and {ready} of its "
                    f"{len(rows)} trajectories are in the band"
                )
            trained[rows[choose(self.plan.mass[step[rows]], step[rows], count, generator)]] = True
        pool.trained += step[trained].bincount(minlength=len(self.plan.band))
        return list(zip(pool.groups, trained.split([len(group) for group in pool.groups]), strict=True))

    @torch.no_grad()
    def _fill(self, student: nn.Module, generator: torch.Generator) -> NetworkCalls:
        """Start all trajectories, each rolled out afresh to a step of its own, evenly spread for every route."""
        pool, calls = self.trajectories, 0
        pool.trained = torch.zeros(len(self.plan.band), dtype=torch.int64)
        starts = torch.rand(len(self.routes), generator=generator, dtype=torch.float64)
        members = self.plan.members.tolist()
        steps = [spread_steps(count, self.plan.length, start) for count, start in zip(members, starts, strict=True)]
        route = torch.arange(len(steps)).repeat_interleave(self.plan.members)
        for step in range(self.plan.length):
            for new in self._begin(route[torch.cat(steps) == step], generator):
                pool.add(replace(new, step=torch.full_like(new.step, step)))
        for index, group in enumerate(pool.groups):
            rolled = [_fresh(student, part) for part in _in_parts(group, self._largest_pass)]
            pool.groups[index] = replace(group, z=torch.cat([part.states[:, 0] for part in rolled]))
            calls += sum(part.calls for part in rolled)
        return NetworkCalls(rollout=calls)

    def _refuse_non_finite(self, members: Trajectories, velocity: Tensor, walking: Tensor) -> None:
        """No loss is taken of walking trajectories, and a pool that holds a broken one would be saved.

        velocity: [n, ...]; walking: bool [n].
        """
        broken = walking & ~velocity.flatten(1).isfinite().all(1).cpu()
        if broken.any():
            first = int(broken.nonzero()[0])
            name, step = self.routes[int(members.batch.route[first])].name, int(members.step[first])
            raise NonFiniteValue(
                f"non-finite velocity on a trajectory of route {name} that was walking, at step {step} of "
                f"{len(self.plan.band)}"
            )

    def _replace_ended(self, moved: list[Trajectories], generator: torch.Generator) -> None:
        """Keep the trajectories that have steps to come, and begin one anew on the route of every other."""
        going = [group.step < self.plan.length for group in moved]
        ended = [group.batch.route[~kept] for group, kept in zip(moved, going, strict=True)]
        parts = [group[kept.nonzero().squeeze(1)] for group, kept in zip(moved, going, strict=True)]
        self.trajectories.groups = [part for part in parts if len(part)]
        for new in self._begin(torch.cat(ended), generator):
            self.trajectories.add(new)

    def _begin(self, route: Tensor, generator: torch.Generator) -> list[Trajectories]:
        return [begin(batch, generator, self.device) for batch in self.batches(route, generator)]


def _field_calls(route: Route, grid: Grid) -> ExpectedCalls:
    return ExpectedCalls(rollout=0.0, field=route.field.calls_per_velocity, train=1.0)


def staleness(student: nn.Module, trajectories: Trajectories, largest_pass: int) -> Tensor:
    """||z - z'|| / ||z'|| of each state, z' a fresh rollout under the present weights from the same noise: [n]."""
    parts = _in_parts(trajectories, largest_pass)
    fresh = torch.cat([_fresh(student, part).states[:, 0] for part in parts])
    return (trajectories.z - fresh).flatten(1).norm(dim=1) / fresh.flatten(1).norm(dim=1)


def _fresh(student: nn.Module, trajectories: Trajectories) -> Rollout:
    """Each trajectory from its noise to its step, by the student as it is now."""
    step, grid = trajectories.step[:, None], trajectories.batch.grid
    query = Query(step, grid.sigmas[step])
    return rollout(student, trajectories.noise(), trajectories.batch.condition, grid, query)


def _in_parts(trajectories: Trajectories, size: int) -> list[Trajectories]:
    return [trajectories[rows] for rows in torch.arange(len(trajectories)).split(size)]


def _passes(chosen: Tensor, size: int) -> Sequence[Tensor]:
    """Where ``chosen`` (bool [n]) holds, in as few parts of at most ``size`` as possible, all about as large."""
    rows = chosen.nonzero().squeeze(1)
    return rows.chunk(math.ceil(len(rows) / size)) if len(rows) else ()
