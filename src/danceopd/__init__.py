"""danceopd: one student from several frozen flow-matching experts (DanceOPD, arXiv 2606.27377)."""

from danceopd.baselines.diffusion_opd import DiffusionOPD
from danceopd.baselines.flow_opd import FlowOPD
from danceopd.baselines.joint import JointTraining
from danceopd.baselines.off_policy import off_policy
from danceopd.baselines.soft_mixing import soft_mixing
from danceopd.distill.mean_velocity import MeanVelocityField
from danceopd.distill.method import Method
from danceopd.distill.objective import VelocityMSE
from danceopd.distill.query import BetaQuery, QueryBand, StratifiedQuery
from danceopd.distill.rollout import rollout
from danceopd.distill.routers import CurriculumRouter, GapRouter, Router, UniformRouter, WeightedRouter
from danceopd.distill.routing import Route
from danceopd.distill.schedule import Grid, GridFor, shifted_grid
from danceopd.distill.solver import sample
from danceopd.distill.step import DanceOPD, route_gradient_cosines
from danceopd.distill.streaming import StreamingDanceOPD
from danceopd.fields.field import ModelField, VelocityField
from danceopd.fields.guidance import GuidedField
from danceopd.fields.mixture import MixtureField
from danceopd.states import Condition, ExpectedCalls, NetworkCalls, Query, RouteResult, Samples, StepResult

__version__ = "0.1.0"

__all__ = [
    "BetaQuery",
    "Condition",
    "CurriculumRouter",
    "DanceOPD",
    "DiffusionOPD",
    "ExpectedCalls",
    "FlowOPD",
    "GapRouter",
    "Grid",
    "GridFor",
    "GuidedField",
    "JointTraining",
    "MeanVelocityField",
    "Method",
    "MixtureField",
    "ModelField",
    "NetworkCalls",
    "Query",
    "QueryBand",
    "Route",
    "RouteResult",
    "Router",
    "Samples",
    "StepResult",
    "StratifiedQuery",
    "StreamingDanceOPD",
    "UniformRouter",
    "VelocityField",
    "VelocityMSE",
    "WeightedRouter",
    "off_policy",
    "rollout",
    "route_gradient_cosines",
    "sample",
    "shifted_grid",
    "soft_mixing",
]
