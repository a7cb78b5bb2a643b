"""The content of a suite's file. Every key is documented where it stands."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from danceopd.comparison.results import GROUPS
from danceopd.errors import nearest
from danceopd.recipe import MAX_SEED
from danceopd.recipe.part import Part
from danceopd.recipe.wording import NAME

Finite = Annotated[float, Field(allow_inf_nan=False)]
View = Literal["updates", "compute"]
VIEWS: tuple[View, ...] = ("updates", "compute")
"""At equal what methods are compared: optimiser updates, forward-equivalents."""


class GuidancePart(Part):
    """Measure the students' effective guidance, and their scores under external guidance."""

    scales: tuple[Finite, ...] = Field(
        min_length=1, strict=False, description="External guidance scales beta; 1 first."
    )
    prompts_per_task: int = Field(default=16, ge=2, description="Prompts per task of the regression, drawn apart.")

    @model_validator(mode="after")
    def _unguided_first(self) -> GuidancePart:
        if self.scales[0] != 1.0 or len(set(self.scales)) != len(self.scales) or min(self.scales) <= 0:
            raise ValueError(f"scales are different positive numbers of which 1 is the first, found {self.scales}")
        return self


class RealismPart(Part):
    """Measure the share of the realism gap between base and teacher that the students close."""

    teacher: str = Field(description="The field that was tuned for the reward.")


class StalenessPart(Part):
    """Show the staleness of streaming rollouts beside the scores."""


class ExposurePart(Part):
    """Measure how far students are from their fields on their own states and on noised data."""

    inputs_per_route: int = Field(default=32, ge=2, description="Inputs of each route, drawn apart.")


class MeasuresPart(Part):
    """What is measured besides the scores."""

    guidance: GuidancePart | None = Field(default=None, description="Absorbed guidance.")
    realism: RealismPart | None = Field(default=None, description="Absorbed realism.")
    exposure: ExposurePart | None = Field(default=None, description="Exposure bias.")
    staleness: StalenessPart | None = Field(default=None, description="Staleness of streaming rollouts.")


class SearchPart(Part):
    """The settings search: every method's grid has the same number of trials, on seeds and scenes of its own.

    A method without training (``train.steps: 0``) may stay as the suite has it.
    """

    updates: int | None = Field(default=None, ge=1, description="Optimiser updates of a trial; or compute.")
    final_updates: int | None = Field(
        default=None, description="Updates to which the better half of a method's trials goes on, to choose among them."
    )
    compute: Finite | None = Field(default=None, gt=0, description="Forward-equivalents of a trial; or updates.")
    final_compute: Finite | None = Field(default=None, description="As final_updates, in forward-equivalents.")
    seeds: tuple[int, ...] = Field(min_length=1, strict=False, description="Training seeds; never the suite's own.")
    scenes_seed: int = Field(ge=0, le=MAX_SEED, description="Seed of the scenes that decide; never the evaluation's.")
    scenes_per_task: int = Field(ge=2, description="Scenes per task that decide.")
    capabilities: tuple[str, ...] = Field(
        min_length=1, strict=False, description="Capabilities whose ratios to their best source decide."
    )
    grid: dict[str, dict[str, list[Any]]] = Field(
        min_length=1, description="Each method's {dotted key: values}; all combinations are tried."
    )

    @property
    def has_finals(self) -> bool:
        return self.final_updates is not None or self.final_compute is not None


class ClaimPart(Part):
    """A claim and where its interval must lie.

    Either a method over another (``method``, ``over``, ``capability``, ``view``), which holds above 0; or a measured
    value (``text``, ``measure``, ``at``) with ``at_least``, ``at_most`` or ``between``.
    """

    method: str | None = Field(default=None, description="The method that should lead.")
    over: str | None = Field(default=None, description="The method that it should lead.")
    capability: str | None = Field(default=None, description="In which capability.")
    view: View = Field(default="updates", description="At equal updates or equal compute.")
    text: str | None = Field(default=None, description="The claim in words.")
    measure: Literal["scores", "guidance", "realism", "exposure"] | None = Field(
        default=None, description="Whose value."
    )
    at: str | None = Field(default=None, description="Where in the measure's JSON: names joined by '/'.")
    at_least: Finite | None = Field(default=None, description="The value that it should reach.")
    at_most: Finite | None = Field(default=None, description="The value that it should not exceed.")
    between: tuple[Finite, Finite] | None = Field(
        default=None, strict=False, description="The values that it should lie between."
    )
    paper: str | None = Field(default=None, description="What the paper reports.")

    @model_validator(mode="after")
    def _one_kind(self) -> ClaimPart:
        leads = [self.method, self.over, self.capability]
        value = [self.text, self.measure, self.at]
        bounds = [self.at_least, self.at_most, self.between]
        if None not in leads and value == [None] * 3 and bounds == [None] * 3 and self.method != self.over:
            return self
        viewed = "view" in self.model_fields_set
        if None not in value and leads == [None] * 3 and bounds.count(None) == 2 and not viewed:
            if self.between is not None and not self.between[0] < self.between[1]:
                raise ValueError(f"between is a lower and a higher value, found {self.between}")
            return self
        raise ValueError(
            "a claim is {method, over, capability, view} of two methods, or {text, measure, at} with one of at_least, "
            "at_most and between"
        )


class PaperPart(Part):
    """The paper's figures, put beside ours."""

    what: str = Field(description="What the figures are.")
    figures: dict[str, str] = Field(description="By method or source.")


class SuiteFile(Part):
    """The content of a suite's YAML file."""

    version: int = Field(ge=1, le=1, description="Version of this format.")
    title: str = Field(description="A line for the report.")
    recipe: dict[str, Any] = Field(description="The recipe that all methods share; output is the suite's own.")
    updates: int | None = Field(default=None, ge=1, description="Optimiser updates at which methods are compared.")
    compute: Finite | None = Field(
        default=None, gt=0, description="Forward-equivalents of a run at which they are compared; or too."
    )
    points: tuple[int, ...] = Field(default=(), strict=False, description="Further updates to score, for the curve.")
    seeds: int = Field(ge=1, description="How many training seeds.")
    first_seed: int = Field(default=0, ge=0, description="The first of them; the others follow it.")
    reference: str = Field(description="The method that all others are compared with.")
    capabilities: tuple[str, ...] = Field(
        default=("t2i", "edit"), min_length=1, strict=False, description=f"Of {', '.join(GROUPS)}; what is scored."
    )
    measures: MeasuresPart = MeasuresPart()
    search: SearchPart | None = Field(default=None, description="The settings search; see SearchPart.")
    claims: tuple[ClaimPart, ...] = Field(default=(), strict=False, description="What the paper claims.")
    paper: PaperPart | None = Field(default=None, description="The paper's figures.")
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="Each method's changes to the shared recipe, {dotted key: value}; shared ones that would do "
        "nothing for it are left out.",
    )

    @property
    def views(self) -> tuple[View, ...]:
        """At what methods are compared."""
        return tuple(view for view in VIEWS if getattr(self, view) is not None)

    @property
    def training_seeds(self) -> tuple[int, ...]:
        return tuple(range(self.first_seed, self.first_seed + self.seeds))

    @model_validator(mode="after")
    def _consistent(self) -> SuiteFile:
        _require_known("reference", [self.reference], self.methods)
        _require_known("capabilities", self.capabilities, GROUPS)
        for name in self.methods:
            if not re.fullmatch(NAME, name):
                raise ValueError(f"methods: {name!r} names a folder too: letters, digits, '_' and '-', a letter first")
        if not self.views:
            raise ValueError("updates or compute: at one of them, or both, methods are compared; found none")
        taken = [name for name, part in self.measures if part is not None]
        if self.updates is None and taken:
            raise ValueError(f"measures.{taken[0]} is of equal updates, and this suite has no updates")
        if any(count < 1 for count in self.points):
            raise ValueError(f"points: updates are at least 1, found {self.points}")
        on_prompts = self.measures.guidance is not None or self.measures.realism is not None
        if on_prompts and "t2i" not in self.capabilities:
            raise ValueError("measures: guidance and realism are measured on text to image; add t2i to capabilities")
        for index, claim in enumerate(self.claims):
            methods = [name for name in (claim.method, claim.over) if name is not None]
            _require_known(f"claims.{index}", methods, self.methods)
            _require_known(f"claims.{index}.capability", [claim.capability or self.capabilities[0]], self.capabilities)
            if claim.method is not None and claim.view not in self.views:
                raise ValueError(f"claims.{index}.view: {claim.view!r}, and this suite has only {self.views[0]!r}")
            if claim.measure not in (None, "scores") and getattr(self.measures, claim.measure) is None:
                raise ValueError(f"claims.{index}.measure: this suite does not measure {claim.measure!r}")
        if self.search is not None:
            _check_search(self.search, self)
        return self


def _check_search(search: SearchPart, suite: SuiteFile) -> None:
    _require_known("search.grid", search.grid, suite.methods)
    _require_known("search.capabilities", search.capabilities, suite.capabilities)
    if len(set(search.seeds)) != len(search.seeds) or min(search.seeds) < 0:
        raise ValueError(f"search.seeds: different numbers from 0, found {search.seeds}")
    if (search.updates is None) == (search.compute is None):
        found = "neither" if search.updates is None else "both"
        raise ValueError(f"search: updates, or compute, say how long a trial is; found {found}")
    for view in VIEWS:
        first, final = getattr(search, view), getattr(search, f"final_{view}")
        if final is not None and (first is None or final <= first):
            needed = f"search.{view}, how long the trials are" if first is None else f"more than their {first:g}"
            raise ValueError(f"search.final_{view}: needs {needed}, found {final:g}")
    for name, grid in search.grid.items():
        for key, values in grid.items():
            if not values or any(value in values[:index] for index, value in enumerate(values)):
                raise ValueError(f"search.grid.{name}.{key}: different values, at least one, found {values}")
    counts = {name: math.prod(len(values) for values in grid.values()) for name, grid in search.grid.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"search.grid: every method gets the same number of trials, found {listed}")
    shared = sorted(set(search.seeds) & set(suite.training_seeds))
    if shared:
        raise ValueError(f"search.seeds: seed {shared[0]} is one that the suite reports; choose others")


def _require_known(where: str, found: Iterable[str], known: Collection[str]) -> None:
    for name in found:
        if name not in known:
            raise ValueError(f"{where}: {name!r} is none of {', '.join(known)}{nearest(name, known)}")
