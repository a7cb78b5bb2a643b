"""The parts of a recipe that say how it is taught: routing, rollout, query, and the methods' own settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from danceopd.distill.query import BANDS
from danceopd.errors import nearest
from danceopd.recipe.part import Part, number

ROUTER_KEYS = {"gap": ("floor", "power", "decay", "reweight"), "curriculum": ("end_weights", "end_step")}
"""By router, the keys of ``routing`` that are its alone."""


class RoutingPart(Part):
    """How samples get their route; always hard."""

    by: Literal["weighted", "uniform", "gap", "curriculum"] = Field(
        default="weighted",
        description="The routes' shares: their weights; all the same; the more, the further the route is from its "
        "field (the weights multiply that); or from their weights to 'end_weights' in a line.",
    )
    per: Literal["sample", "step"] = Field(
        default="sample", description="Draw a route per sample or per optimiser update."
    )
    stratified: bool = Field(default=False, description="Per sample: hold each route's share exactly, up to rounding.")
    floor: float = number(default=0.05, gt=0, lt=1, description="Gap: share that every route keeps.")
    power: float = number(default=1.0, gt=0, description="Gap: exponent on the gaps; below 1 is more even.")
    decay: float = number(
        default=0.9, ge=0, lt=1, description="Gap: of the average loss, per update; 0 is the last loss."
    )
    reweight: bool = Field(
        default=False,
        description="Gap: weigh each loss by its route's weight over its share, which keeps the weights' objective. "
        "Otherwise the shares are the objective's weights.",
    )
    end_weights: dict[str, Annotated[float, number(gt=0)]] | None = Field(
        default=None, description="Curriculum: the routes' weights, by name, that it ends at."
    )
    end_step: int | None = Field(default=None, ge=1, description="Curriculum: updates until it is there.")

    @property
    def adaptive(self) -> bool:
        """Whether the shares change from update to update."""
        return self.by in ROUTER_KEYS

    @model_validator(mode="after")
    def _keys_of_the_router(self) -> RoutingPart:
        if self.stratified and self.per != "sample":
            raise ValueError("'stratified' needs per: sample")
        for router, keys in ROUTER_KEYS.items():
            for key in keys if router != self.by else ():
                if getattr(self, key) != RoutingPart.model_fields[key].default:
                    raise ValueError(f"'{key}' needs by: {router}, found by: {self.by}")
        if self.by == "curriculum" and None in (self.end_weights, self.end_step):
            raise ValueError("by: curriculum needs 'end_weights' and 'end_step'")
        return self


class RolloutPart(Part):
    """The student's rollout."""

    num_inference_steps: int = Field(default=16, ge=2, description="Steps N of the full grid.")
    shift: float | None = number(default=None, gt=0, description="Shift of the sigma grid; the family's by default.")
    substeps: int = Field(
        default=1,
        ge=1,
        description="Euler steps that a field takes within one of the rollout's. Above 1 the student is taught their "
        "mean velocity, and samples in N steps along the field's path of so many times N.",
    )
    mode: Literal["fresh", "streaming"] = Field(
        default="fresh",
        description="Roll each sample out from noise, or keep trajectories in flight that each update moves one step.",
    )
    pool: int | None = Field(
        default=None,
        ge=1,
        description="Streaming: trajectories in flight. Twice train.batch_size is cheap with stratified routing; "
        "per: step needs as many for each route.",
    )
    staleness_steps: int = Field(
        default=0, ge=0, description="Streaming: updates between measurements of staleness; 0 for never."
    )

    @model_validator(mode="after")
    def _streaming(self) -> RolloutPart:
        if self.mode == "streaming" and self.pool is None:
            raise ValueError("mode 'streaming' needs a 'pool'")
        if self.mode == "fresh" and (self.pool is not None or self.staleness_steps):
            raise ValueError("'pool' and 'staleness_steps' need mode: streaming")
        return self


class QueryPart(Part):
    """Which state of the rollout is matched."""

    over: Literal["step", "sigma"] = Field(default="step", description="Lay the band over steps or over sigma.")
    band: str = Field(default="low_noise", description=f"One of {', '.join(BANDS)}.")
    per_rollout: int = Field(default=1, ge=1, description="States K per rollout.")
    states: Literal["student", "teacher", "data"] = Field(
        default="student", description="Whose states: the student's (on-policy), the teacher's, or noised data."
    )
    off_policy_share: float = number(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the samples that are matched at 'off_policy_states' instead of the student's own; all of "
        "them are method off_policy.",
    )
    off_policy_states: Literal["teacher", "data"] | None = Field(
        default=None, description="Whose states those are; it belongs to 'off_policy_share'."
    )

    @property
    def needs_targets(self) -> bool:
        """Whether target images are noised."""
        return "data" in (self.states, self.off_policy_states)

    @model_validator(mode="after")
    def _known_band(self) -> QueryPart:
        if self.band not in BANDS:
            raise ValueError(f"unknown band {self.band!r}{nearest(self.band, BANDS)}; known: {', '.join(BANDS)}")
        if (self.off_policy_states is None) != (self.off_policy_share == 0):
            raise ValueError("'off_policy_states' and a positive 'off_policy_share' belong together")
        return self


class JointPart(Part):
    """Settings of ``method: joint``."""

    sigma_mean: float = number(default=0.0, description="Training sigma is sigmoid(N(mean, std^2)).")
    sigma_std: float = number(default=1.0, gt=0, description="See sigma_mean.")


class SoftMixingPart(Part):
    """Settings of ``method: soft_mixing``."""

    weights: dict[str, Annotated[float, number(gt=0)]] | None = Field(
        default=None,
        description="Weights of the average by route, the routes' own (which are also their shares) by default.",
    )


class DiffusionOPDPart(Part):
    """Settings of ``method: diffusion_opd``."""

    form: Literal["ode", "sde"] = Field(default="ode", description="Deterministic or stochastic rollout and weights.")
    eta: float = number(default=0.7, gt=0, description="Noise of the stochastic form.")


class FlowOPDPart(Part):
    """Settings of ``method: flow_opd``."""

    gradient: Literal["pathwise", "score", "total"] = Field(
        default="pathwise", description="Which gradient of the rollout's KL cost; see baselines/flow_opd.py."
    )
    eta: float = number(default=0.7, gt=0, description="Noise of the rollout.")
    group_size: int = Field(default=16, ge=1, description="Rollouts of one condition.")
    normalize: bool = Field(default=True, description="Divide score's advantages by their deviation in the group.")
    advantage_clip: float = number(default=5.0, gt=0, description="Normalised advantages are clipped to +- this.")
    ratio_clip: float = number(default=1e-4, gt=0, description="PPO's clip of the probability ratio.")
    anchor: str | None = Field(default=None, description="A field that the student is held near.")
    anchor_weight: float = number(default=0.0, ge=0, description="Weight of the KL to the anchor.")


METHODS = {
    "danceopd": ("query", "objective"),
    "soft_mixing": ("query", "objective", "soft_mixing"),
    "off_policy": ("query", "objective"),
    "joint": ("joint",),
    "diffusion_opd": ("diffusion_opd",),
    "flow_opd": ("flow_opd",),
    "weight_merge": (),
}
"""The recipe's names for methods, and the parts of a recipe that are theirs alone."""
