"""danceopd: one student from several frozen flow-matching experts (DanceOPD, arXiv 2606.27377)."""

from danceopd.distill.mean_velocity import MeanVelocityField
from danceopd.distill.objective import VelocityMSE
from danceopd.distill.query import BetaQuery, StratifiedQuery
from danceopd.distill.rollout import rollout
from danceopd.distill.routers import CurriculumRouter, GapRouter, Router, UniformRouter, WeightedRouter
from danceopd.distill.routing import Route
from danceopd.distill.schedule import Grid, shifted_grid
from danceopd.distill.solver import sample
from danceopd.distill.step import DanceOPD, route_gradient_cosines
from danceopd.distill.streaming import StreamingDanceOPD
from danceopd.fields.field import ModelField, VelocityField
from danceopd.fields.guidance import GuidedField
from danceopd.fields.mixture import MixtureField
from danceopd.states import Condition, NetworkCalls, Query, Samples, StepResult

__version__ = "0.1.0"

__all__ = [
    "BetaQuery",
    "Condition",
    "CurriculumRouter",
    "DanceOPD",
    "GapRouter",
    "Grid",
    "GuidedField",
    "MeanVelocityField",
    "MixtureField",
    "ModelField",
    "NetworkCalls",
    "Query",
    "Route",
    "Router",
    "Samples",
    "StepResult",
    "StratifiedQuery",
    "StreamingDanceOPD",
    "UniformRouter",
    "VelocityField",
    "VelocityMSE",
    "WeightedRouter",
    "rollout",
    "route_gradient_cosines",
    "sample",
    "shifted_grid",
]
