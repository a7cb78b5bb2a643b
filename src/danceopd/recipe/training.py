"""The parts of a recipe that say how the student is optimised and measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from danceopd.recipe.part import Part, number, seed_field


class TrainPart(Part):
    """The optimiser and its loop."""

    steps: int = Field(default=200, ge=0, description="Optimiser updates; 0 for method: weight_merge.")
    batch_size: int = Field(default=32, ge=1, description="Samples per update, of all processes together.")
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="Micro-batches per update; batch_size is their sum."
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon (torch.optim.Muon) needs a LoRA student; its rates are about ten times AdamW's.",
    )
    learning_rate: float = number(default=1e-3, gt=0, description="The optimiser's peak learning rate.")
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(default="constant", description="After the warm-up.")
    lr_warmup_steps: int = Field(default=10, ge=0, description="Updates of linear warm-up.")
    weight_decay: float = number(default=0.0, ge=0, description="The optimiser's weight decay.")
    max_grad_norm: float = number(default=1.0, gt=0, description="Gradient norm is clipped to this.")
    ema_decay: float = number(default=0.98, ge=0, lt=1, description="Averaging of the student's weights; 0 for none.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto measures which is faster here."
    )
    seed: int = seed_field("Seed of routes, queries, noise, data order and initialisation.")
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
        if self.gradient_cosine_steps and self.compile:
            raise ValueError(
                "gradient_cosine_steps needs compile false: it goes through the graph once for each route, and a "
                "compiled network's graph gives up its buffers at the first"
            )
        return self


class EvaluatePart(Part):
    """How the finished student is measured."""

    num_inference_steps: int = Field(default=16, ge=1, description="Sampler steps.")
    shift: float | None = number(
        default=None, gt=0, description="Shift of the sampler's grid; the family's by default."
    )
    scenes_per_task: int = Field(default=40, ge=2, description="Fresh scenes per task.")
    guidance_scale: float = number(default=1.0, ge=0, description="Guidance of every model evaluated; 1 is none.")
    seed: int = seed_field("Seed of the evaluation scenes and their noise.")
    batch_size: int = Field(default=60, ge=1, description="Images sampled at once.")
