"""The recipe: what a run is, whole, and what its parts ask of each other."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from danceopd.distill.objective import OBJECTIVES
from danceopd.errors import nearest
from danceopd.recipe.part import Part, Resolution
from danceopd.recipe.sources import FieldPart, RoutePart, StudentPart
from danceopd.recipe.teaching import (
    METHODS,
    DiffusionOPDPart,
    FlowOPDPart,
    JointPart,
    QueryPart,
    RolloutPart,
    RoutingPart,
    SoftMixingPart,
)
from danceopd.recipe.training import EvaluatePart, TrainPart
from danceopd.recipe.wording import NAME

RESERVED_NAMES = ("student", "student_start", "source")
"""Names that fields may not have: the student's own, in scores and on the shared backbone, and an edit's picture's."""


IDLE: dict[str, dict[str, tuple[str, ...]]] = {
    "joint": {"rollout": tuple(RolloutPart.model_fields)},
    "weight_merge": {
        "rollout": tuple(RolloutPart.model_fields),
        "routing": tuple(RoutingPart.model_fields),
        "train": tuple(key for key in TrainPart.model_fields if key not in ("steps", "seed", "precision")),
    },
}
"""By method, the keys of shared parts that it makes no use of: joint training has no rollout, a merge no training."""


class Recipe(Part):
    """A whole run."""

    version: Literal[1] = Field(description="Version of this format.")
    family: str = Field(description="Model family.")
    base: str = Field(
        description="The base: FAMILY:NAME, or a path relative to the recipe, or org/name[@REVISION] on the hub."
    )
    base_dtype: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="Type of the frozen weights, the student's LoRA being float32; auto is bf16 where train.precision "
        "is. For families over diffusers.",
    )
    resolution: Resolution | None = Field(
        default=None,
        description="Height and width (or one number) of images made of text alone, and the area to which pictures are "
        "brought; the family's by default.",
    )
    embedded_guidance: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="What a guidance-distilled FLUX is told in every pass; 3.5 by default, as in its pipelines.",
    )
    fields: dict[str, FieldPart] = Field(min_length=1, description="Frozen fields by name.")
    student: StudentPart = StudentPart()
    method: str = Field(default="danceopd", description=f"One of {', '.join(METHODS)}.")
    routes: tuple[RoutePart, ...] = Field(min_length=1, strict=False, description="One entry per capability.")
    routing: RoutingPart = RoutingPart()
    rollout: RolloutPart = RolloutPart()
    query: QueryPart = QueryPart()
    objective: str = Field(default="velocity_mse", description=f"One of {', '.join(OBJECTIVES)}.")
    joint: JointPart = JointPart()
    soft_mixing: SoftMixingPart = SoftMixingPart()
    diffusion_opd: DiffusionOPDPart = DiffusionOPDPart()
    flow_opd: FlowOPDPart = FlowOPDPart()
    train: TrainPart = TrainPart()
    evaluate: EvaluatePart = EvaluatePart()
    data_cache: str | Literal[False] | None = Field(
        default=None,
        description="Folder of encoded prompts and images, which runs may share, relative to the recipe; by default "
        "'cache' beside the run folder, false for none. A family whose encoding costs next to nothing has none.",
    )
    output: str = Field(description="Run folder.")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"unknown objective {self.objective!r}{nearest(self.objective, OBJECTIVES)}; "
                f"known: {', '.join(OBJECTIVES)}"
            )
        for index, route in enumerate(self.routes):
            if route.field not in self.fields:
                raise ValueError(
                    f"routes.{index}.field: there is no field {route.field!r}{nearest(route.field, self.fields)}; "
                    f"fields: {', '.join(self.fields)}"
                )
            self._check_route(index, route)
        names = [route.name or route.field for route in self.routes]
        if len(set(names)) != len(names):
            raise ValueError(f"routes need different names, found {', '.join(names)}")
        for name, part in self.fields.items():
            if not re.fullmatch(NAME, name):
                raise ValueError(f"fields.{name}: a field's name is letters, digits, '_' and '-', a letter first")
            if name in RESERVED_NAMES or (name == "base" and not part.is_base):
                raise ValueError(f"fields.{name}: this name is taken; choose another")
            for member in part.mixture or ():
                if member not in self.fields or self.fields[member].mixture is not None:
                    raise ValueError(f"fields.{name}.mixture: {member!r} is not a plain field of this recipe")
                self._require_told_alike(f"fields.{name}.mixture", member)
        init = self.student.init
        for name in init if isinstance(init, dict) else [init] if init != "base" else []:
            self._check_start(name, merged=isinstance(init, dict))
        if isinstance(init, dict) and all(self.fields[name].base for name in init):
            raise ValueError("student.init: a merge needs at least one field with weights of its own")
        self._check_method()
        if self.train.optimizer == "muon" and self.student.lora is None:
            raise ValueError(
                "train.optimizer: 'muon' takes matrices alone and needs a LoRA student, found student.lora null"
            )
        return self

    def _require_told_alike(self, place: str, name: str) -> None:
        if self.fields[name].told_apart:
            raise ValueError(
                f"{place}: field {name!r} has a 'prompt_prefix' or a base of its own and so a condition of its own; "
                "here every field is given the sample's"
            )

    def _check_start(self, name: str, *, merged: bool) -> None:
        """Refuse an init that cannot become the student's weights. merged: one of several."""
        made = None if name not in self.fields else list(self.fields[name].references)
        if made == ["lora"] or (made == [] and merged and self.fields[name].base):
            return
        if made in (["checkpoint"], ["lora", "checkpoint"]):
            if self.student.lora is None:
                return
            raise ValueError(
                f"student.init: {name!r} is a full checkpoint, which no LoRA over the base can start from; train all "
                "weights (student.lora: null)"
            )
        starts = [field for field, part in self.fields.items() if "base" not in part.references and part.references]
        raise ValueError(
            f"student.init: {name!r} is neither 'base' nor the name of a field of this recipe's base with weights of "
            f"its own ('lora' or 'checkpoint'){nearest(name, starts)}; such fields here: {', '.join(starts) or 'none'}"
        )

    def _check_route(self, index: int, route: RoutePart) -> None:
        field = self.fields[route.field]
        if field.mixture is not None and (route.guidance_scale, route.negative_prompt) != (None, None):
            raise ValueError(f"routes.{index}: a 'mixture' takes no guidance; give it to the fields that are mixed")
        if self.guidance(route)[0] == 1.0 and route.negative_prompt is not None:
            raise ValueError(f"routes.{index}.negative_prompt: needs a 'guidance_scale' other than 1")
        if route.num_inference_steps is not None and self.method in ("joint", "weight_merge"):
            raise ValueError(f"routes.{index}.num_inference_steps: method {self.method!r} makes no rollout")
        if route.per_rollout is not None and "query" not in METHODS.get(self.method, ()):
            raise ValueError(f"routes.{index}.per_rollout: method {self.method!r} makes no use of it")
        states, steps = self.states_and_steps(route)
        if states > steps:
            place = "query" if route.per_rollout is None else f"routes.{index}"
            where = "rollout" if route.num_inference_steps is None else f"routes.{index}"
            raise ValueError(f"{place}.per_rollout {states} exceeds {where}.num_inference_steps {steps}")

    def guidance(self, route: RoutePart) -> tuple[float, str]:
        """Guidance scale and negative prompt on a route: its own, else its field's."""
        field = self.fields[route.field]
        scale = field.guidance_scale if route.guidance_scale is None else route.guidance_scale
        negative = field.negative_prompt if route.negative_prompt is None else route.negative_prompt
        return scale, "" if scale == 1.0 else negative

    def taught_guidance(self) -> dict[str, tuple[float, ...]]:
        """By route the guidance of its teacher, several where fields are averaged; empty where no field is asked."""
        if self.method in ("joint", "weight_merge"):
            return {}
        found = {}
        for route in self.routes:
            members = self.fields[route.field].mixture
            scales = [self.guidance(route)[0]] if members is None else [self.fields[m].guidance_scale for m in members]
            found[route.name or route.field] = tuple(scales)
        if self.method == "soft_mixing":
            everything = tuple(scale for scales in found.values() for scale in scales)
            return dict.fromkeys(found, everything)
        return found

    def states_and_steps(self, route: RoutePart) -> tuple[int, int]:
        """States K per rollout and steps N of the grid, on a route."""
        return (
            route.per_rollout or self.query.per_rollout,
            route.num_inference_steps or self.rollout.num_inference_steps,
        )

    def _check_method(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"unknown method {self.method!r}{nearest(self.method, METHODS)}; known: {', '.join(METHODS)}"
            )
        for part in ("query", "objective", "joint", "soft_mixing", "diffusion_opd", "flow_opd"):
            if part not in METHODS[self.method] and getattr(self, part) != Recipe.model_fields[part].default:
                raise ValueError(f"{part}: method {self.method!r} makes no use of it")
        if (self.method == "weight_merge") != (self.train.steps == 0):
            raise ValueError(
                f"train.steps: found {self.train.steps}; 0 belongs to method 'weight_merge' and to no other"
            )
        if self.method == "weight_merge" and not isinstance(self.student.init, dict):
            raise ValueError("student.init: method 'weight_merge' needs {field: weight, ...}")
        self._check_streaming()
        self._check_substeps()
        if self.method == "off_policy" and self.query.states == "student":
            raise ValueError("query.states: method 'off_policy' needs 'data' or 'teacher'")
        if self.method in ("danceopd", "soft_mixing") and self.query.states != "student":
            raise ValueError(
                f"query.states: method {self.method!r} asks at the student's own states, found {self.query.states!r}; "
                "the same loss at noised data or on a field's rollout is method 'off_policy'"
            )
        if self.query.off_policy_share and (self.method != "danceopd" or self.rollout.mode == "streaming"):
            found = "rollout.mode 'streaming'" if self.method == "danceopd" else f"method {self.method!r}"
            raise ValueError(f"query.off_policy_share: belongs to method 'danceopd' with fresh rollouts, found {found}")
        if self.method == "diffusion_opd" and self.routing.per == "step":
            raise ValueError("routing.per: method 'diffusion_opd' holds every route in every update")
        if self.method == "soft_mixing":
            for route in self.routes:
                self._require_told_alike("method 'soft_mixing'", route.field)
        names, weights = {route.name or route.field for route in self.routes}, self.soft_mixing.weights
        if weights is not None and weights.keys() != names:
            raise ValueError(
                f"soft_mixing.weights: needs one for each route, {', '.join(sorted(names))}; "
                f"found {', '.join(sorted(weights)) or 'none'}"
            )
        anchor, group = self.flow_opd.anchor, self.flow_opd.group_size
        if anchor is not None and anchor not in self.fields:
            raise ValueError(f"flow_opd.anchor: there is no field {anchor!r}; fields: {', '.join(self.fields)}")
        if anchor is not None:
            self._require_told_alike("flow_opd.anchor", anchor)
        if (anchor is None) != (self.flow_opd.anchor_weight == 0):
            raise ValueError("flow_opd: 'anchor' and a positive 'anchor_weight' belong together")
        if self.flow_opd.gradient == "score" and group < 2:
            raise ValueError("flow_opd.group_size: gradient 'score' needs groups of at least 2")
        micro_batch = self.train.batch_size // self.train.gradient_accumulation_steps
        if self.method == "flow_opd" and micro_batch % group:
            raise ValueError(
                f"flow_opd.group_size: a micro-batch of {micro_batch} is not a multiple of groups of {group}"
            )
        self._refuse_idle_keys()
        self._check_routing()

    def _check_routing(self) -> None:
        routing, names = self.routing, [route.name or route.field for route in self.routes]
        if routing.by == "uniform":
            for index, route in enumerate(self.routes):
                if route.weight != 1.0:
                    raise ValueError(
                        f"routes.{index}.weight: routing.by 'uniform' makes no use of it, found {route.weight:g}"
                    )
        if routing.by == "curriculum" and set(routing.end_weights or {}) != set(names):
            raise ValueError(
                f"routing.end_weights: each route needs one, found {', '.join(routing.end_weights or {})}; "
                f"routes: {', '.join(names)}"
            )
        if routing.by == "gap" and routing.floor * len(names) >= 1:
            raise ValueError(
                f"routing.floor: {routing.floor:g} leaves {len(names)} routes nothing to share; it must be below "
                f"1/{len(names)}"
            )
        if routing.by == "gap" and "query" not in METHODS[self.method]:
            raise ValueError(f"routing.by: 'gap' goes by the loss of velocity matching, which {self.method!r} has not")
        if routing.adaptive and self.method == "diffusion_opd":
            raise ValueError(
                "routing.by: method 'diffusion_opd' holds every route's exact share in every update and needs "
                f"'weighted' or 'uniform', found {routing.by!r}"
            )
        if routing.adaptive and self.rollout.mode == "streaming":
            raise ValueError(
                "routing.by: rollout.mode 'streaming' plans its pool for shares that stay and needs "
                f"'weighted' or 'uniform', found {routing.by!r}"
            )

    def _check_streaming(self) -> None:
        if self.rollout.mode == "fresh":
            return
        if self.method != "danceopd" or self.query.states != "student":
            found = self.method if self.method != "danceopd" else f"{self.method} with query.states {self.query.states}"
            raise ValueError(
                f"rollout.mode: 'streaming' belongs to method 'danceopd' on the student's states, found {found}"
            )
        if self.query.over != "step":
            raise ValueError(f"query.over: rollout.mode 'streaming' needs 'step', found {self.query.over!r}")
        if self.query.per_rollout != 1:
            raise ValueError(f"query.per_rollout: rollout.mode 'streaming' needs 1, found {self.query.per_rollout}")

    def _check_substeps(self) -> None:
        if self.rollout.substeps == 1 or self.method in ("joint", "weight_merge"):  # which make no rollout: see IDLE
            return
        stochastic = self.method == "diffusion_opd" and self.diffusion_opd.form == "sde"
        if self.method not in ("danceopd", "off_policy", "diffusion_opd") or stochastic:
            found = "diffusion_opd with form: sde" if stochastic else self.method
            raise ValueError(
                "rollout.substeps: a mean velocity can be taught by 'danceopd', 'off_policy' and 'diffusion_opd' with "
                f"form: ode, found {found}"
            )
        if "query" in METHODS[self.method] and self.query.over != "step":
            raise ValueError(
                f"query.over: rollout.substeps needs states at whole steps ('step'), found {self.query.over!r}"
            )
        if self.objective == "velocity_mse_kl":
            raise ValueError("objective: 'velocity_mse_kl' weighs velocities, and rollout.substeps teaches their means")
        for index, route in enumerate(self.routes):
            if route.num_inference_steps is not None:
                raise ValueError(
                    f"routes.{index}.num_inference_steps: rollout.substeps teaches one number of steps, the rollout's"
                )
        for key in ("num_inference_steps", "shift"):
            taught, evaluated = getattr(self.rollout, key), getattr(self.evaluate, key)
            if taught != evaluated:
                raise ValueError(
                    f"evaluate.{key}: rollout.substeps teaches the steps of the rollout ({key} {taught}), and others "
                    f"would be taken, found {evaluated}"
                )

    def _refuse_idle_keys(self) -> None:
        idle = dict(IDLE.get(self.method, {}))
        if self.diffusion_opd.form == "ode":
            idle["diffusion_opd"] = ("eta",)
        if self.flow_opd.gradient != "score":
            idle["flow_opd"] = ("normalize", "advantage_clip", "ratio_clip")
        elif not self.flow_opd.normalize:
            idle["flow_opd"] = ("advantage_clip",)
        for name, keys in idle.items():
            part = getattr(self, name)
            for key in keys:
                if getattr(part, key) != type(part).model_fields[key].default:
                    raise ValueError(f"{name}.{key}: it would do nothing here, found {getattr(part, key)!r}")
