"""The recipe: what a run is, in one strict, versioned YAML file.

Every key is documented where it stands. Unknown keys fail with the nearest known one; nothing is silently ignored.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from danceopd.distill.objective import OBJECTIVES
from danceopd.distill.query import BANDS


class RecipeError(ValueError):
    """A recipe cannot be used; the message names the file, the key, what was found and what is needed."""


RESERVED_NAMES = ("student", "student_start")
"""Names that fields may not have: the student's own, in scores and on the shared backbone."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _number(**limits: Any) -> Any:
    return Field(allow_inf_nan=False, **limits)


class FieldPart(_Part):
    """A frozen velocity field. Exactly one of base, lora, checkpoint and mixture says what it is."""

    base: bool = Field(default=False, description="The base model itself.")
    lora: str | None = Field(default=None, description="A LoRA over the base: FAMILY:NAME or a safetensors file.")
    lora_scale: float = _number(default=1.0, gt=0, description="Factor on the LoRA's strength.")
    checkpoint: str | None = Field(default=None, description="A full checkpoint: FAMILY:NAME or a safetensors file.")
    mixture: tuple[str, ...] | None = Field(
        default=None, strict=False, description="Soft mixing (ablation): fields to average."
    )
    guidance_scale: float = _number(default=1.0, ge=0, description="Classifier-free guidance alpha; 1 is none.")
    negative_prompt: str = Field(default="", description="The prompt of the guidance's empty condition.")

    @model_validator(mode="after")
    def _one_source(self) -> FieldPart:
        given = [self.base, self.lora is not None, self.checkpoint is not None, self.mixture is not None]
        if sum(given) != 1:
            raise ValueError("needs exactly one of 'base: true', 'lora', 'checkpoint' and 'mixture'")
        if self.lora is None and self.lora_scale != 1.0:
            raise ValueError("'lora_scale' needs a 'lora'")
        if self.mixture is not None and self.guidance_scale != 1.0:
            raise ValueError("a 'mixture' takes no 'guidance_scale'; give it to the fields that are mixed")
        if self.guidance_scale == 1.0 and self.negative_prompt:
            raise ValueError("'negative_prompt' needs a 'guidance_scale' other than 1")
        return self


class LoraPart(_Part):
    """The student's LoRA."""

    rank: int = Field(default=32, ge=1, description="LoRA rank.")
    alpha: float = _number(default=32.0, gt=0, description="LoRA alpha; the delta is scaled by alpha / rank.")
    targets: tuple[str, ...] | None = Field(
        default=None, strict=False, description="Module names; the family's by default."
    )


class StudentPart(_Part):
    """What is trained, and what it starts from."""

    init: str | dict[str, float] = Field(
        default="base",
        description="'base', the name of a LoRA field to start from, or {field: weight, ...} for their weight merge.",
    )
    init_mode: Literal["trainable", "merged"] = Field(
        default="trainable",
        description="With a LoRA init: go on training that LoRA, or keep it frozen under a new one.",
    )
    lora: LoraPart | None = Field(default=LoraPart(), description="The student's LoRA; null trains all weights.")

    @model_validator(mode="after")
    def _merged_under_a_lora(self) -> StudentPart:
        if self.init_mode == "merged" and (self.init == "base" or self.lora is None):
            raise ValueError("init_mode 'merged' needs an 'init' other than base and a 'lora' that is trained over it")
        if isinstance(self.init, dict):
            if self.lora is not None and self.init_mode != "merged":
                raise ValueError("an 'init' of several fields needs init_mode: merged")
            if not self.init or not all(0 < weight < float("inf") for weight in self.init.values()):
                raise ValueError(f"an 'init' of several fields needs positive weights, found {self.init}")
        return self


class DataPart(_Part):
    """One route's training inputs: a generator or a JSONL manifest."""

    generator: str | None = Field(default=None, description="A family's generator, such as shapes/t2i.")
    manifest: str | None = Field(default=None, description="A JSONL file, relative to the recipe.")
    size: int = Field(default=20_000, ge=1, description="Number of generated training inputs.")
    seed: int = Field(default=0, ge=0, description="Seed of the generated inputs; the same for all methods compared.")

    @model_validator(mode="after")
    def _one_source(self) -> DataPart:
        if (self.generator is None) == (self.manifest is None):
            raise ValueError("needs exactly one of 'generator' and 'manifest'")
        defaults = {name: DataPart.model_fields[name].default for name in ("size", "seed")}
        if self.manifest is not None and (self.size, self.seed) != (defaults["size"], defaults["seed"]):
            raise ValueError("'size' and 'seed' are a generator's; a manifest is used whole")
        return self


class RoutePart(_Part):
    """A field and the data it teaches on."""

    field: str = Field(description="Name of the field.")
    name: str | None = Field(default=None, description="The route's name in logs; the field's by default.")
    data: DataPart
    weight: float = _number(default=1.0, gt=0, description="Relative share of the samples.")
    prompt_dropout: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of empty-condition samples; 0.1 by default on guided fields, else 0.",
    )


class RoutingPart(_Part):
    """How samples get their route; always hard."""

    per: Literal["sample", "step"] = Field(
        default="sample", description="Draw a route per sample or per optimiser update."
    )
    stratified: bool = Field(default=False, description="Per sample: hold each route's share exactly, up to rounding.")

    @model_validator(mode="after")
    def _stratified_per_sample(self) -> RoutingPart:
        if self.stratified and self.per != "sample":
            raise ValueError("'stratified' needs per: sample")
        return self


class RolloutPart(_Part):
    """The student's rollout."""

    num_inference_steps: int = Field(default=16, ge=2, description="Steps N of the full grid.")
    shift: float | None = Field(default=None, gt=0, description="Shift of the sigma grid; the family's by default.")


class QueryPart(_Part):
    """Which state of the rollout is matched."""

    over: Literal["step", "sigma"] = Field(default="step", description="Lay the band over steps or over sigma.")
    band: str = Field(default="low_noise", description=f"One of {', '.join(BANDS)}.")
    per_rollout: int = Field(default=1, ge=1, description="States K per rollout.")
    states: Literal["student", "teacher", "data"] = Field(
        default="student", description="Whose states: the student's (on-policy), the teacher's, or noised data."
    )

    @model_validator(mode="after")
    def _known_band(self) -> QueryPart:
        if self.band not in BANDS:
            raise ValueError(f"unknown band {self.band!r}{_nearest(self.band, BANDS)}; known: {', '.join(BANDS)}")
        return self


class JointPart(_Part):
    """Settings of ``method: joint``."""

    sigma_mean: float = _number(default=0.0, description="Training sigma is sigmoid(N(mean, std^2)).")
    sigma_std: float = _number(default=1.0, gt=0, description="See sigma_mean.")


class DiffusionOPDPart(_Part):
    """Settings of ``method: diffusion_opd``."""

    form: Literal["ode", "sde"] = Field(default="ode", description="Deterministic or stochastic rollout and weights.")
    eta: float = _number(default=0.7, gt=0, description="Noise of the stochastic form.")


class FlowOPDPart(_Part):
    """Settings of ``method: flow_opd``."""

    gradient: Literal["pathwise", "score", "total"] = Field(
        default="pathwise", description="Which gradient of the rollout's KL cost; see baselines/flow_opd.py."
    )
    eta: float = _number(default=0.7, gt=0, description="Noise of the rollout.")
    group_size: int = Field(default=16, ge=1, description="Rollouts of one condition.")
    normalize: bool = Field(default=True, description="Divide score's advantages by their deviation in the group.")
    advantage_clip: float = _number(default=5.0, gt=0, description="Advantages are clipped to +- this.")
    ratio_clip: float = _number(default=1e-4, gt=0, description="PPO's clip of the probability ratio.")
    anchor: str | None = Field(default=None, description="A field that the student is held near.")
    anchor_weight: float = _number(default=0.0, ge=0, description="Weight of the KL to the anchor.")


METHODS = {
    "danceopd": ("query", "objective"),
    "soft_mixing": ("query", "objective"),
    "off_policy": ("query", "objective"),
    "joint": ("joint",),
    "diffusion_opd": ("diffusion_opd",),
    "flow_opd": ("flow_opd",),
    "weight_merge": (),
}
"""The recipe's names for methods, and the parts of a recipe that are theirs alone."""


class TrainPart(_Part):
    """The optimiser and its loop."""

    steps: int = Field(default=200, ge=0, description="Optimiser updates; 0 for method: weight_merge.")
    batch_size: int = Field(default=32, ge=1, description="Samples per update.")
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="Micro-batches per update; batch_size is their sum."
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon (torch.optim.Muon) needs a LoRA student; its rates are about ten times AdamW's.",
    )
    learning_rate: float = _number(default=1e-3, gt=0, description="The optimiser's peak learning rate.")
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(default="constant", description="After the warm-up.")
    lr_warmup_steps: int = Field(default=10, ge=0, description="Updates of linear warm-up.")
    weight_decay: float = _number(default=0.0, ge=0, description="The optimiser's weight decay.")
    max_grad_norm: float = _number(default=1.0, gt=0, description="Gradient norm is clipped to this.")
    ema_decay: float = _number(default=0.98, ge=0, lt=1, description="Averaging of the student's weights; 0 for none.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto measures which is faster here."
    )
    seed: int = Field(default=0, ge=0, description="Seed of routes, queries, noise, data order and initialisation.")
    checkpointing_steps: int = Field(default=50, ge=1, description="Updates between checkpoints.")
    checkpoints_total_limit: int = Field(default=2, ge=1, description="Checkpoints kept.")
    sample_steps: int = Field(default=100, ge=0, description="Updates between sample grids; 0 for none.")
    gradient_cosine_steps: int = Field(
        default=0, ge=0, description="Updates between route-gradient cosines; 0 for never."
    )

    @model_validator(mode="after")
    def _divides(self) -> TrainPart:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}"
            )
        if self.gradient_cosine_steps and self.gradient_accumulation_steps > 1:
            raise ValueError("gradient_cosine_steps needs gradient_accumulation_steps 1: it compares whole gradients")
        return self


class EvaluatePart(_Part):
    """How the finished student is measured."""

    num_inference_steps: int = Field(default=16, ge=1, description="Sampler steps.")
    shift: float | None = Field(default=None, gt=0, description="Shift of the sampler's grid; the family's by default.")
    scenes_per_task: int = Field(default=40, ge=2, description="Fresh scenes per task.")
    guidance_scale: float = _number(default=1.0, ge=0, description="Guidance of every model evaluated; 1 is none.")
    seed: int = Field(default=0, ge=0, description="Seed of the evaluation scenes and their noise.")
    batch_size: int = Field(default=60, ge=1, description="Images sampled at once.")


class Recipe(_Part):
    """A whole run."""

    version: Literal[1] = Field(description="Version of this format.")
    family: str = Field(description="Model family.")
    base: str = Field(description="Base weights: FAMILY:NAME or a safetensors file, relative to the recipe.")
    fields: dict[str, FieldPart] = Field(min_length=1, description="Frozen fields by name.")
    student: StudentPart = StudentPart()
    method: str = Field(default="danceopd", description=f"One of {', '.join(METHODS)}.")
    routes: tuple[RoutePart, ...] = Field(min_length=1, strict=False, description="One entry per capability.")
    routing: RoutingPart = RoutingPart()
    rollout: RolloutPart = RolloutPart()
    query: QueryPart = QueryPart()
    objective: str = Field(default="velocity_mse", description=f"One of {', '.join(OBJECTIVES)}.")
    joint: JointPart = JointPart()
    diffusion_opd: DiffusionOPDPart = DiffusionOPDPart()
    flow_opd: FlowOPDPart = FlowOPDPart()
    train: TrainPart = TrainPart()
    evaluate: EvaluatePart = EvaluatePart()
    output: str = Field(description="Run folder.")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"unknown objective {self.objective!r}{_nearest(self.objective, OBJECTIVES)}; "
                f"known: {', '.join(OBJECTIVES)}"
            )
        for index, route in enumerate(self.routes):
            if route.field not in self.fields:
                raise ValueError(
                    f"routes.{index}.field: there is no field {route.field!r}{_nearest(route.field, self.fields)}; "
                    f"fields: {', '.join(self.fields)}"
                )
        names = [route.name or route.field for route in self.routes]
        if len(set(names)) != len(names):
            raise ValueError(f"routes need different names, found {', '.join(names)}")
        for name, part in self.fields.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
                raise ValueError(f"fields.{name}: a field's name is letters, digits, '_' and '-', a letter first")
            is_base = part.base and part.guidance_scale == 1.0
            if name in RESERVED_NAMES or (name == "base" and not is_base):
                raise ValueError(f"fields.{name}: this name is taken; choose another")
            for member in part.mixture or ():
                if member not in self.fields or self.fields[member].mixture is not None:
                    raise ValueError(f"fields.{name}.mixture: {member!r} is not a plain field of this recipe")
        init = self.student.init
        for name in init if isinstance(init, dict) else [init] if init != "base" else []:
            is_base = isinstance(init, dict) and name in self.fields and self.fields[name].base
            if not is_base and (name not in self.fields or self.fields[name].lora is None):
                raise ValueError(f"student.init: {name!r} is neither 'base' nor the name of a LoRA field")
        if isinstance(init, dict) and all(self.fields[name].base for name in init):
            raise ValueError("student.init: a merge needs at least one LoRA field")
        self._check_method()
        if self.train.optimizer == "muon" and self.student.lora is None:
            raise ValueError(
                "train.optimizer: 'muon' takes matrices alone and needs a LoRA student, found student.lora null"
            )
        if self.query.per_rollout > self.rollout.num_inference_steps:
            raise ValueError(
                f"query.per_rollout {self.query.per_rollout} exceeds rollout.num_inference_steps "
                f"{self.rollout.num_inference_steps}"
            )
        return self

    def _check_method(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"unknown method {self.method!r}{_nearest(self.method, METHODS)}; known: {', '.join(METHODS)}"
            )
        for part in ("query", "objective", "joint", "diffusion_opd", "flow_opd"):
            if part not in METHODS[self.method] and getattr(self, part) != Recipe.model_fields[part].default:
                raise ValueError(f"{part}: method {self.method!r} makes no use of it")
        if (self.method == "weight_merge") != (self.train.steps == 0):
            raise ValueError(
                f"train.steps: found {self.train.steps}; 0 belongs to method 'weight_merge' and to no other"
            )
        if self.method == "weight_merge" and not isinstance(self.student.init, dict):
            raise ValueError("student.init: method 'weight_merge' needs {field: weight, ...}")
        if self.method == "off_policy" and self.query.states == "student":
            raise ValueError("query.states: method 'off_policy' needs 'data' or 'teacher'")
        if self.method == "soft_mixing" and self.query.states != "student":
            raise ValueError("query.states: method 'soft_mixing' needs 'student'")
        if self.method == "diffusion_opd" and self.routing.per == "step":
            raise ValueError("routing.per: method 'diffusion_opd' holds every route in every update")
        anchor, group = self.flow_opd.anchor, self.flow_opd.group_size
        if anchor is not None and anchor not in self.fields:
            raise ValueError(f"flow_opd.anchor: there is no field {anchor!r}; fields: {', '.join(self.fields)}")
        if (anchor is None) != (self.flow_opd.anchor_weight == 0):
            raise ValueError("flow_opd: 'anchor' and a positive 'anchor_weight' belong together")
        if self.flow_opd.gradient == "score" and group < 2:
            raise ValueError("flow_opd.group_size: gradient 'score' needs groups of at least 2")
        micro_batch = self.train.batch_size // self.train.gradient_accumulation_steps
        if self.method == "flow_opd" and micro_batch % group:
            raise ValueError(
                f"flow_opd.group_size: a micro-batch of {micro_batch} is not a multiple of groups of {group}"
            )


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, apply ``a.b=c`` overrides (values in YAML), and validate it whole.

    Raises:
        RecipeError: for a missing file, broken YAML, or any key or value that does not fit.
    """
    if not path.is_file():
        raise RecipeError(f"recipe not found: {path}")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold a mapping of keys, found {type(content).__name__}")
    for override in overrides or []:
        _override(content, override)
    recipe = parse_recipe(content, where=str(path))
    return _with_absolute_files(recipe, path.parent)


def _with_absolute_files(recipe: Recipe, folder: Path) -> Recipe:
    """Manifests and weight files are relative to the recipe; a run folder's copy must find them from anywhere."""

    def weights(reference: str | None) -> str | None:
        is_file = reference is not None and (reference.endswith(".safetensors") or (folder / reference).exists())
        return str((folder / str(reference)).resolve()) if is_file else reference

    def route(part: RoutePart) -> RoutePart:
        if part.data.manifest is None:
            return part
        manifest = str((folder / part.data.manifest).resolve())
        return part.model_copy(update={"data": part.data.model_copy(update={"manifest": manifest})})

    fields = {
        name: part.model_copy(update={"lora": weights(part.lora), "checkpoint": weights(part.checkpoint)})
        for name, part in recipe.fields.items()
    }
    routes = tuple(route(part) for part in recipe.routes)
    return recipe.model_copy(update={"base": weights(recipe.base), "fields": fields, "routes": routes})


def parse_recipe(content: dict[str, Any], *, where: str) -> Recipe:
    """Validate a recipe's content; ``where`` names it in errors."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{where}: " + "; ".join(_explain(item) for item in error.errors())) from error


def evaluate_part(content: dict[str, Any]) -> EvaluatePart:
    """Validate evaluation settings given outside a recipe.

    Raises:
        RecipeError: for a value that does not fit.
    """
    try:
        return EvaluatePart.model_validate(content)
    except ValidationError as error:
        raise RecipeError("evaluate: " + "; ".join(_explain(item) for item in error.errors())) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe, every default written out, as YAML that loads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once and ``1e-3`` is a number (as in YAML 1.2)."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> Any:
    """YAML in which a key stands once and ``1e-3`` is a number; raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def _override(content: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--set needs KEY=VALUE, found {text!r}")
    try:
        parsed = read_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text}: the value is not valid YAML: {error}") from error
    override(content, key, parsed)


def override(content: dict[str, Any], key: str, value: Any) -> None:
    """Put ``value`` at a dotted key of a recipe's content; numbers index lists, missing parts are made.

    Raises:
        RecipeError: if the key leads nowhere.
    """
    *parents, last = key.split(".")
    here: Any = content
    for parent in parents:
        if isinstance(here, list) and parent.isdigit() and int(parent) < len(here):
            here = here[int(parent)]
        elif isinstance(here, dict):
            if here.get(parent) is None:
                here[parent] = {}
            here = here[parent]
        else:
            raise RecipeError(f"cannot set {key}: {parent!r} is not a part of the recipe")
    if isinstance(here, list) and last.isdigit() and int(last) < len(here):
        here[int(last)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise RecipeError(f"cannot set {key}: {last!r} is not a part of the recipe")


def _explain(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        return f"unknown key {place!r}{_nearest(str(item['loc'][-1]), known)}; known here: {', '.join(known)}"
    if item["type"] == "missing":
        return f"missing key {place!r}"
    message = item["msg"].removeprefix("Value error, ")
    shown = (
        ""
        if isinstance(item["input"], dict | Recipe) or item["type"] == "value_error"
        else f", found {item['input']!r}"
    )
    return f"{place + ': ' if place else ''}{message}{shown}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Keys of the recipe part at a location."""
    parts: dict[str, type[BaseModel]] = {
        "fields": FieldPart,
        "student": StudentPart,
        "lora": LoraPart,
        "routes": RoutePart,
        "data": DataPart,
        "routing": RoutingPart,
        "rollout": RolloutPart,
        "query": QueryPart,
        "joint": JointPart,
        "diffusion_opd": DiffusionOPDPart,
        "flow_opd": FlowOPDPart,
        "train": TrainPart,
        "evaluate": EvaluatePart,
    }
    if not location:
        return list(Recipe.model_fields)
    if location[0] == "fields":
        return list(FieldPart.model_fields)
    named = [str(part) for part in location if str(part) in parts]
    return list(parts[named[-1]].model_fields) if named else []


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
