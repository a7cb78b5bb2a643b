"""The parts of a recipe that say who teaches, on which data, and who is taught. Every key says what it does."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from danceopd.recipe.part import Part, Resolution, number, seed_field


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
    lora_scale: float = number(default=1.0, gt=0, description="Factor on the LoRA's strength.")
    checkpoint: str | None = Field(default=None, description="A full checkpoint in the place of the base's weights.")
    keep_on: Literal["accelerator", "cpu"] = Field(
        default="accelerator",
        description="cpu: a checkpoint's or own base's network waits in main memory and is moved in for its turn.",
    )
    mixture: tuple[str, ...] | None = Field(
        default=None, min_length=1, strict=False, description="Soft mixing (ablation): fields to average."
    )
    guidance_scale: float = number(default=1.0, ge=0, description="Classifier-free guidance alpha; 1 is none.")
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
    alpha: float = number(default=32.0, gt=0, description="LoRA alpha; the delta is scaled by alpha / rank.")
    targets: tuple[str, ...] | None = Field(
        default=None, min_length=1, strict=False, description="Module names; the family's by default."
    )


class StudentPart(Part):
    """What is trained, and what it starts from."""

    init: str | dict[str, float] = Field(
        default="base",
        description="'base', the name of a field to start from, or {field: weight, ...} for a weight merge. Fields of "
        "full checkpoints need 'lora: null'.",
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
    seed: int = seed_field("Seed of the generated inputs; the same for all methods compared.")

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
    weight: float = number(default=1.0, gt=0, description="Relative share of the samples.")
    guidance_scale: float | None = number(
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
