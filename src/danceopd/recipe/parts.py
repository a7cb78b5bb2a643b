"""The parts of a recipe. Every key is documented where it stands."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from danceopd.distill.query import BANDS
from danceopd.recipe.wording import nearest


class Part(BaseModel):
    """Strict: unknown keys fail, and nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _number(**limits: Any) -> Any:
    return Field(allow_inf_nan=False, **limits)


MAX_SEED = 2**32 - 1


def _seed(description: str) -> Any:
    return Field(default=0, ge=0, le=MAX_SEED, description=description)


def _sides(value: Any) -> Any:
    """One number stands for both sides; YAML has lists."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    return tuple(value) if isinstance(value, list) else value


Side = Annotated[int, Field(ge=1)]
Resolution = Annotated[tuple[Side, Side], BeforeValidator(_sides, json_schema_input_type=int | tuple[int, int])]
"""Height and width in pixels; one number for a square."""


class FieldPart(Part):
    """A frozen velocity field: the base, or a LoRA and a full checkpoint over it (one or both), or a mixture.

    References are paths relative to the recipe, FAMILY:NAME, or the hub's ``org/name[@REVISION[/FILE.safetensors]]``.
    """

    base: bool | str = Field(
        default=False,
        description="true: the base model itself. A reference: a base of the field's own, in the same latent space.",
    )
    family: str | None = Field(
        default=None, description="Model family of the field's own base; the recipe's by default."
    )
    lora: str | None = Field(default=None, description="A LoRA over the base, or over the checkpoint.")
    lora_scale: float = _number(default=1.0, gt=0, description="Factor on the LoRA's strength.")
    checkpoint: str | None = Field(default=None, description="A full checkpoint in the place of the base's weights.")
    keep_on: Literal["accelerator", "cpu"] = Field(
        default="accelerator",
        description="cpu: a checkpoint's or own base's network waits in main memory and is moved in for its turn.",
    )
    mixture: tuple[str, ...] | None = Field(
        default=None, strict=False, description="Soft mixing (ablation): fields to average."
    )
    guidance_scale: float = _number(default=1.0, ge=0, description="Classifier-free guidance alpha; 1 is none.")
    negative_prompt: str = Field(default="", description="The prompt of the guidance's empty condition.")
    prompt_prefix: str = Field(
        default="", description="Put before the prompt, with a space, for this field alone: a LoRA's trigger words."
    )

    @property
    def own_base(self) -> str | None:
        """The reference of a base that is not the recipe's."""
        return self.base if isinstance(self.base, str) else None

    @property
    def is_base(self) -> bool:
        """Whether the field is the recipe's base and nothing else."""
        return self.base is True and self.guidance_scale == 1.0 and not self.prompt_prefix

    @property
    def told_apart(self) -> bool:
        """Whether the field hears something else than the user's prompt as the recipe's family encodes it."""
        return bool(self.prompt_prefix) or self.own_base is not None

    @property
    def references(self) -> dict[Literal["lora", "checkpoint", "base"], str]:
        """What it is made of, the topmost first."""
        found = {"lora": self.lora, "checkpoint": self.checkpoint, "base": self.own_base}
        return {kind: reference for kind, reference in found.items() if reference is not None}  # pyright: ignore

    @model_validator(mode="after")
    def _sources_fit(self) -> FieldPart:
        made = bool(self.references)
        if [made, self.base is True, self.mixture is not None].count(True) != 1:
            raise ValueError(
                "needs exactly one of 'base: true', a 'mixture', and weights ('lora', 'checkpoint', 'base: REFERENCE')"
            )
        if self.lora is None and self.lora_scale != 1.0:
            raise ValueError("'lora_scale' needs a 'lora'")
        if self.family is not None and self.own_base is None:
            raise ValueError("'family' needs a 'base: REFERENCE' of that family")
        if self.keep_on == "cpu" and self.checkpoint is None and self.own_base is None:
            raise ValueError("'keep_on: cpu' needs a network of the field's own: a 'checkpoint' or 'base: REFERENCE'")
        if self.mixture is not None and (self.guidance_scale != 1.0 or self.prompt_prefix):
            raise ValueError(
                "a 'mixture' takes no 'guidance_scale' and no 'prompt_prefix'; give them to the fields that are mixed"
            )
        if self.guidance_scale == 1.0 and self.negative_prompt:
            raise ValueError("'negative_prompt' needs a 'guidance_scale' other than 1")
        return self


class LoraPart(Part):
    """The student's LoRA."""

    rank: int = Field(default=32, ge=1, description="LoRA rank.")
    alpha: float = _number(default=32.0, gt=0, description="LoRA alpha; the delta is scaled by alpha / rank.")
    targets: tuple[str, ...] | None = Field(
        default=None, strict=False, description="Module names; the family's by default."
    )


class StudentPart(Part):
    """What is trained, and what it starts from."""

    init: str | dict[str, float] = Field(
        default="base",
        description="'base', the name of a LoRA field to start from (under 'lora: null' also of a checkpoint's), or "
        "{field: weight, ...} for the weight merge of LoRA fields.",
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


COLUMNS = ("prompt", "instruction", "source", "target")
"""What a manifest's row may hold."""


class DataPart(Part):
    """One route's training inputs: a generator, a manifest, or a pack that comes with the package."""

    generator: str | None = Field(default=None, description="A family's generator, such as shapes/t2i.")
    manifest: str | None = Field(
        default=None, description="A .jsonl, .csv or .parquet file, or a folder of images, relative to the recipe."
    )
    columns: dict[str, str] | None = Field(
        default=None, description=f"Which of the manifest's columns is which of {', '.join(COLUMNS)}."
    )
    pack: Literal["t2i", "edit"] | None = Field(
        default=None, description="t2i: prompts. edit: instructions, each for any photo; it needs 'images'."
    )
    images: str | None = Field(default=None, description="Folder of pack edit's source images, relative to the recipe.")
    size: int = Field(default=20_000, ge=1, description="Number of generated training inputs.")
    seed: int = _seed("Seed of the generated inputs; the same for all methods compared.")

    @model_validator(mode="after")
    def _one_source(self) -> DataPart:
        if [self.generator, self.manifest, self.pack].count(None) != 2:
            raise ValueError("needs exactly one of 'generator', 'manifest' and 'pack'")
        defaults = {name: DataPart.model_fields[name].default for name in ("size", "seed")}
        if self.generator is None and (self.size, self.seed) != (defaults["size"], defaults["seed"]):
            raise ValueError("'size' and 'seed' are a generator's; manifests and packs are used whole")
        if self.columns is not None and self.manifest is None:
            raise ValueError("'columns' needs a 'manifest'")
        if (self.pack == "edit") != (self.images is not None):
            raise ValueError("pack 'edit' and 'images', the folder of its source images, belong together")
        return self


class RoutePart(Part):
    """A field and the data it teaches on."""

    field: str = Field(description="Name of the field.")
    name: str | None = Field(default=None, description="The route's name in logs; the field's by default.")
    data: DataPart
    task: Literal["t2i", "edit"] | None = Field(
        default=None, description="What the data must be: t2i has no source images, edit has one on every row."
    )
    weight: float = _number(default=1.0, gt=0, description="Relative share of the samples.")
    guidance_scale: float | None = _number(
        default=None, ge=0, description="In the place of the field's, on this route; 1 is none."
    )
    negative_prompt: str | None = Field(
        default=None, description="In the place of the field's, on this route; it needs guidance."
    )
    resolution: Resolution | None = Field(default=None, description="In the place of the recipe's, on this route.")
    num_inference_steps: int | None = Field(
        default=None, ge=2, description="In the place of rollout.num_inference_steps, on this route."
    )
    per_rollout: int | None = Field(default=None, ge=1, description="In the place of query.per_rollout, on this route.")
    prompt_dropout: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of empty-condition samples; 0.1 by default on guided fields, else 0.",
    )


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
    floor: float = _number(default=0.05, gt=0, lt=1, description="Gap: share that every route keeps.")
    power: float = _number(default=1.0, gt=0, description="Gap: exponent on the gaps; below 1 is more even.")
    decay: float = _number(
        default=0.9, ge=0, lt=1, description="Gap: of the average loss, per update; 0 is the last loss."
    )
    reweight: bool = Field(
        default=False,
        description="Gap: weigh each loss by its route's weight over its share, which keeps the weights' objective. "
        "Otherwise the shares are the objective's weights.",
    )
    end_weights: dict[str, Annotated[float, _number(gt=0)]] | None = Field(
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
    shift: float | None = _number(default=None, gt=0, description="Shift of the sigma grid; the family's by default.")
    mode: Literal["fresh", "streaming"] = Field(
        default="fresh",
        description="Roll each sample out from noise, or keep trajectories in flight that each update moves one step.",
    )
    pool: int | None = Field(
        default=None,
        ge=1,
        description="Streaming: trajectories in flight, at least train.batch_size; twice it is cheap.",
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

    @model_validator(mode="after")
    def _known_band(self) -> QueryPart:
        if self.band not in BANDS:
            raise ValueError(f"unknown band {self.band!r}{nearest(self.band, BANDS)}; known: {', '.join(BANDS)}")
        return self


class JointPart(Part):
    """Settings of ``method: joint``."""

    sigma_mean: float = _number(default=0.0, description="Training sigma is sigmoid(N(mean, std^2)).")
    sigma_std: float = _number(default=1.0, gt=0, description="See sigma_mean.")


class DiffusionOPDPart(Part):
    """Settings of ``method: diffusion_opd``."""

    form: Literal["ode", "sde"] = Field(default="ode", description="Deterministic or stochastic rollout and weights.")
    eta: float = _number(default=0.7, gt=0, description="Noise of the stochastic form.")


class FlowOPDPart(Part):
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


class TrainPart(Part):
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
    seed: int = _seed("Seed of routes, queries, noise, data order and initialisation.")
    checkpointing_steps: int = Field(default=50, ge=1, description="Updates between checkpoints.")
    checkpoints_total_limit: int = Field(default=2, ge=1, description="Checkpoints kept.")
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations again in the backward pass instead of keeping them."
    )
    compile: bool = Field(
        default=False,
        description="Compile the student's network, and with it the fields that share it, by torch.compile.",
    )
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


class EvaluatePart(Part):
    """How the finished student is measured."""

    num_inference_steps: int = Field(default=16, ge=1, description="Sampler steps.")
    shift: float | None = _number(
        default=None, gt=0, description="Shift of the sampler's grid; the family's by default."
    )
    scenes_per_task: int = Field(default=40, ge=2, description="Fresh scenes per task.")
    guidance_scale: float = _number(default=1.0, ge=0, description="Guidance of every model evaluated; 1 is none.")
    seed: int = _seed("Seed of the evaluation scenes and their noise.")
    batch_size: int = Field(default=60, ge=1, description="Images sampled at once.")
