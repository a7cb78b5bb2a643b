"""Flow-OPD (arXiv 2605.08063): policy-gradient distillation on a stochastic rollout.

The student's SDE sampler is the policy pi_S(z' | z) = N(mu_S, std^2), the routed field's is pi_T with the same std, and
a step's cost is |dt| KL(pi_S || pi_T) = mean (mu_S - mu_T)^2 / (2 s^2). Three gradients of it are offered:

``pathwise`` (the default) differentiates the cost at each visited state, as the released code does. ``score`` is the
policy gradient with reward log pi_T - log pi_S at the sampled z', which ascends by -grad KL in expectation (with
advantages as they are, not normalised). ``total`` adds to ``pathwise`` what each step does to the costs of the steps
after it (reward-to-go times score): the whole gradient of the rollout's summed cost. What is NOT offered is the cost,
detached, times the score of the same step: given z, the cost does not depend on z', so that product has expectation
zero and teaches nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from danceopd.distill.batch import RoutedBatch, routed_velocity
from danceopd.distill.method import Method
from danceopd.distill.routing import Route
from danceopd.distill.schedule import Grid
from danceopd.distill.sde import SDEStep, sde_step
from danceopd.distill.solver import per_sample
from danceopd.fields.field import VelocityField
from danceopd.states import ExpectedCalls, NetworkCalls, StepResult


@dataclass(frozen=True, kw_only=True)
class FlowOPD(Method):
    """Policy-gradient distillation along an SDE rollout.

    gradient: see the module. eta: the sampler's noise.
    group_size: rollouts of one condition, and so of one route; ``score`` measures its rewards against the mean of the
        group's others. The other gradients make no use of it, and see more conditions with groups of 1.
    normalize: divide ``score``'s advantages by their deviation over the group (as GRPO does), and clip them to
        +- ``advantage_clip`` deviations. Only without it does ``score`` ascend by -grad KL.
    ratio_clip: PPO's clip of the probability ratio; every rollout serves one update, so the ratio is 1 when its
        gradient is taken.
    anchor, anchor_weight: a field that the student is held near: + weight * KL(pi_S || pi_anchor) at every step. It is
        differentiated at the visited states, and is part of ``total``'s costs.

    The update's loss is the sum over the N steps, mean over samples and elements. Normalised advantages multiply
    log-probabilities that are means over elements.

    Raises:
        ValueError: for another gradient, or if the group or the anchor's weight does not fit.
    """

    gradient: Literal["pathwise", "score", "total"] = "pathwise"
    eta: float = 0.7
    group_size: int = 16
    normalize: bool = True
    advantage_clip: float = 5.0
    ratio_clip: float = 1e-4
    anchor: VelocityField | None = None
    anchor_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_velocities("a stochastic step needs the velocity at its state")
        if self.gradient not in ("pathwise", "score", "total"):
            raise ValueError(f"gradient is 'pathwise', 'score' or 'total', found {self.gradient!r}")
        if self.group_size < 1 or (self.gradient == "score" and self.group_size < 2):
            raise ValueError(f"gradient {self.gradient!r} does not work with groups of {self.group_size}")
        if self.anchor_weight < 0 or (self.anchor is None) != (self.anchor_weight == 0):
            raise ValueError(
                f"an anchor field and a positive anchor_weight belong together, found weight {self.anchor_weight} "
                f"and {'no field' if self.anchor is None else 'a field'}"
            )

    def draw_routes(self, count: int, generator: torch.Generator) -> Tensor:
        """A route for each group: int64 [count].

        Raises:
            ValueError: if ``count`` is not a multiple of the group size.
        """
        self._require_groups(count)
        return super().draw_routes(count // self.group_size, generator).repeat_interleave(self.group_size)

    def _require_groups(self, count: int) -> None:
        if count % self.group_size:
            raise ValueError(f"batch_size {count} is not a multiple of group_size {self.group_size}")

    def expected_calls(self) -> ExpectedCalls:
        walks = 2 if self.gradient == "total" else 1
        anchor = 0 if self.anchor is None else self.anchor.calls_per_velocity

        def calls(route: Route, grid: Grid) -> ExpectedCalls:
            return ExpectedCalls(
                rollout=grid.steps * (walks - 1),
                field=grid.steps * walks * (route.field.calls_per_velocity + anchor),
                train=grid.steps,
            )

        return self.over_routes(calls)

    def step(
        self,
        student: nn.Module,
        *,
        batch_size: int,
        generator: torch.Generator,
        routes: Tensor | None = None,
        backward: Callable[[Tensor], None] | None = None,
    ) -> StepResult:
        """Loss of one update; arguments as in ``DanceOPD.step``. A group takes the route of its first sample.

        Raises:
            ValueError: if ``batch_size`` is not a multiple of the group size.
        """
        self._require_groups(batch_size)
        chosen = self.chosen_routes(batch_size, generator, routes)
        losses = self.losses(batch_size, backward)
        calls = NetworkCalls()
        for group in self.batches(chosen[:: self.group_size], generator):
            batch, steps = group.repeated(self.group_size), group.grid.steps
            shape = (steps + 1, len(batch.route), *batch.shape)
            noises = torch.randn(shape, generator=generator).to(self.device)
            to_go = None
            if self.gradient == "total":
                to_go, more = self._costs_to_go(student, batch, noises)
                torch.clear_autocast_cache()  # a guard, as in distill/matching.py
                calls += more
            z = noises[0]
            for j in range(steps):
                loss, z, more = self._transition(student, batch, z, j, noises[j + 1], to_go)
                losses.add(batch.route, steps * loss, batch.grid.sigmas[j].expand(len(z)), share=1 / steps)
                calls += more
        return losses.result(calls)

    def _transition(
        self, student: nn.Module, batch: RoutedBatch, z: Tensor, j: int, noise: Tensor, to_go: Tensor | None
    ) -> tuple[Tensor, Tensor, NetworkCalls]:
        """Step j: its loss [B], the next state, and the calls it took."""
        move, mean, aim, field_calls = self._policies(student, batch, z, j)
        arrived = mean.detach() + per_sample(move.std, z) * noise
        if self.gradient == "score":
            reward = move.log_probability(arrived, aim) - move.log_probability(arrived, mean.detach())
            advantage = group_advantage(reward, self.group_size, self.normalize)
            if self.normalize:
                advantage = advantage.clamp(-self.advantage_clip, self.advantage_clip)
            else:  # reward and log-probability are means over elements; their product is short of one by the number
                advantage = advantage * z[0].numel()
            logp = move.log_probability(arrived, mean)
            loss = -clipped_surrogate(logp, logp.detach(), advantage, self.ratio_clip)
        else:
            loss = _step_size(batch.grid, j) * move.divergence(mean, aim)
        if to_go is not None:
            # The score is of the whole state: the mean over elements times their number.
            loss = loss + to_go[j] * z[0].numel() * move.log_probability(arrived, mean)
        held, more = self._anchor_cost(batch, z, j, move, mean)
        return loss + held, arrived, NetworkCalls(field=field_calls + more, train=len(z))

    def _policies(
        self, student: nn.Module, batch: RoutedBatch, z: Tensor, j: int
    ) -> tuple[SDEStep, Tensor, Tensor, int]:
        """Step j from z: its coefficients, the student's mean, the routed field's, and the field's calls."""
        here, there = (sigma.expand(len(z)) for sigma in batch.grid.sigmas.to(z.device)[j : j + 2])
        move = sde_step(here, there, self.eta)
        target, field_calls = routed_velocity(self.routes, batch, z, here)
        return move, move.mean(z, student(z, here, batch.condition)), move.mean(z, target), field_calls

    def _anchor_cost(
        self, batch: RoutedBatch, z: Tensor, j: int, move: SDEStep, mean: Tensor
    ) -> tuple[Tensor | float, int]:
        """The weighted KL of step j's policy to the anchor's [B], and the anchor's calls; 0 without an anchor."""
        if self.anchor is None:
            return 0.0, 0
        sigma = batch.grid.sigmas[j].to(z.device).expand(len(z))
        anchored = move.mean(z, self.anchor.velocity(z, sigma, batch.condition))
        return self.anchor_weight * move.divergence(mean, anchored), len(z) * self.anchor.calls_per_velocity

    @torch.no_grad()
    def _costs_to_go(self, student: nn.Module, batch: RoutedBatch, noises: Tensor) -> tuple[Tensor, NetworkCalls]:
        """Summed cost of the steps after each, on the trajectories of ``noises``: [N, B]."""
        z, costs, calls = noises[0], [], NetworkCalls()
        for j in range(batch.grid.steps):
            move, mean, aim, field_calls = self._policies(student, batch, z, j)
            held, more = self._anchor_cost(batch, z, j, move, mean)
            costs.append(_step_size(batch.grid, j) * move.divergence(mean, aim) + held)
            z = mean + per_sample(move.std, z) * noises[j + 1]
            calls += NetworkCalls(rollout=len(z), field=field_calls + more)
        stacked = torch.stack(costs)
        return stacked.flip(0).cumsum(0).flip(0) - stacked, calls


def _step_size(grid: Grid, j: int) -> float:
    """|dt| of step j."""
    return float(grid.sigmas[j] - grid.sigmas[j + 1])


def group_advantage(reward: Tensor, group_size: int, normalize: bool) -> Tensor:
    """reward [B], groups side by side: minus the mean of the group's OTHERS, optionally over the group's deviation.

    Leaving a sample's own reward out of its baseline keeps the policy gradient unbiased.
    """
    grouped = reward.view(-1, group_size)
    others = (grouped.sum(1, keepdim=True) - grouped) / (group_size - 1)
    advantage = grouped - others
    if normalize:
        advantage = advantage / (grouped.std(dim=1, keepdim=True) + 1e-8)
    return advantage.flatten()


def clipped_surrogate(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's min(r A, clip(r, 1 - c, 1 + c) A) with r = pi / pi_old: [B]."""
    ratio = (logp - old_logp).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
