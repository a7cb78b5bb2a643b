"""From a recipe to live values: family, fields, routes, student. Everything that can be wrong is found here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from danceopd.baselines.diffusion_opd import DiffusionOPD
from danceopd.baselines.flow_opd import FlowOPD
from danceopd.baselines.joint import JointTraining
from danceopd.baselines.merge import merged_loras
from danceopd.baselines.soft_mixing import soft_mixing
from danceopd.data.examples import Bucket, ExampleSource
from danceopd.data.manifest import Manifest
from danceopd.distill.method import Method
from danceopd.distill.objective import OBJECTIVES
from danceopd.distill.query import BANDS
from danceopd.distill.routing import Route
from danceopd.distill.schedule import Grid
from danceopd.distill.step import DanceOPD
from danceopd.families.family import Family
from danceopd.families.shapes import ShapesFamily
from danceopd.fields.adapters import AdapterBackbone, AdapterField, AdapterModel, Lora, combined
from danceopd.fields.field import ModelField, VelocityField
from danceopd.fields.guidance import GuidedField
from danceopd.fields.mixture import MixtureField
from danceopd.fields.teachers import file_hash, merge_lora
from danceopd.recipe import FieldPart, Recipe, RecipeError, RoutePart
from danceopd.states import Samples

FAMILIES: dict[str, Callable[[str], Family]] = {"shapes": ShapesFamily}
STUDENT, START = "student", "student_start"
"""Adapter names on the shared backbone: the trained one, and the frozen one it may stand on."""


class RouteSamples:
    """A bucket behind a route: draws examples in the bucket's own order and encodes them."""

    def __init__(self, bucket: Bucket, family: Family) -> None:
        self.bucket, self.family = bucket, family

    def __call__(self, count: int, generator: torch.Generator) -> Samples:
        return self.family.samples(self.bucket.draw(count))


class Student:
    """What is trained: a LoRA on the fields' own backbone, or a network of its own.

    ``model(z, sigma, condition)`` is the student outside every field's call.
    """

    def __init__(self, recipe: Recipe, family: Family, backbone: AdapterBackbone, start: Lora | None) -> None:
        part = recipe.student
        self.start = start if part.lora is None or part.init_mode == "merged" else None
        """The LoRA that stands, frozen or merged, under what is trained."""
        self._backbone = backbone
        self._lora = part.lora
        self.model: nn.Module
        if part.lora is None:
            self.model = family.load_model()
            network = self.model.get_submodule("network")
            if start is not None:
                merge_lora(network, start)
            self.network = network
            network.requires_grad_(True)
            self.parameters: dict[str, nn.Parameter] = dict(network.named_parameters())
            return
        self.network = family.network
        if self.start is not None:
            backbone.add(START, self.start)
        backbone.create(
            STUDENT,
            rank=part.lora.rank,
            alpha=part.lora.alpha,
            targets=part.lora.targets or family.lora_targets,
            generator=torch.Generator().manual_seed(recipe.train.seed),
            start=start if part.init_mode == "trainable" else None,
        )
        adapters = [STUDENT] if self.start is None else [START, STUDENT]
        backbone.activate(*adapters)
        self.model = AdapterModel(backbone, family.model, *adapters)
        self.parameters = dict(backbone.named_parameters(STUDENT))

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained weights as they export: a LoRA's under PEFT's keys, or the whole network's."""
        return self._backbone.state(STUDENT) if self._lora is not None else dict(self.network.state_dict())

    def lora(self) -> Lora | None:
        """The student as one LoRA over the ORIGINAL base, whatever it started from; None for a full student."""
        if self._lora is None:
            return None
        own = {name: weight.detach().clone().float().cpu() for name, weight in self.weights().items()}
        trained = Lora(rank=self._lora.rank, alpha=self._lora.alpha, weights=own)
        return trained if self.start is None else combined([(self.start, 1.0), (trained, 1.0)])

    @contextmanager
    def using(self, weights: list[torch.Tensor] | None) -> Iterator[None]:
        """The student under other trained weights (its EMA), put back afterwards."""
        if weights is None:
            yield
            return
        live = [parameter.detach().clone() for parameter in self.parameters.values()]
        _copy(self.parameters, weights)
        try:
            yield
        finally:
            _copy(self.parameters, live)


def _copy(parameters: dict[str, nn.Parameter], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters.values(), values, strict=True):
            parameter.copy_(value)


@dataclass(frozen=True)
class Assembly:
    """A recipe made live. ``hashes``: SHA-256 of every weight file and manifest, by what the recipe calls it."""

    recipe: Recipe
    family: Family
    base: VelocityField
    fields: dict[str, VelocityField]
    method: Method
    student: Student
    buckets: dict[str, Bucket]
    hashes: dict[str, str]


def assemble(recipe: Recipe, *, device: torch.device) -> Assembly:
    """Load and check everything that a run needs.

    Raises:
        RecipeError, CheckpointError, AdapterMismatch, ManifestError: for whatever does not fit, before any training.
    """
    if recipe.family not in FAMILIES:
        raise RecipeError(f"unknown family {recipe.family!r}; known: {', '.join(FAMILIES)}")
    family = FAMILIES[recipe.family](recipe.base)
    references = [recipe.base]
    backbone = AdapterBackbone(family.network, fold=device.type == "cpu")
    fields: dict[str, VelocityField] = {}
    for name, part in recipe.fields.items():
        if part.mixture is None:
            fields[name] = _field(name, part, family, backbone, device)
            references += [reference for reference in (part.lora, part.checkpoint) if reference is not None]
    for name, part in recipe.fields.items():
        if part.mixture is not None:
            fields[name] = MixtureField([fields[member] for member in part.mixture])
    start = _start(recipe, family)
    student = Student(recipe, family, backbone, start)
    family.to(device)
    student.model.to(device)
    buckets, routes = {}, []
    needs_targets = recipe.method == "joint" or recipe.query.states == "data"
    for index, part in enumerate(recipe.routes):
        name = part.name or part.field
        buckets[name] = Bucket(_examples(index, part, family, needs_targets), seed=recipe.train.seed * 1000 + index)
        routes.append(
            Route(
                name,
                fields[part.field],
                RouteSamples(buckets[name], family),
                weight=part.weight,
                prompt_dropout=part.prompt_dropout,
                empty=partial(family.empty, negative_prompt=recipe.fields[part.field].negative_prompt),
            )
        )
    grid = family.grid(recipe.rollout.num_inference_steps, recipe.rollout.shift)
    method = _method(recipe, routes, grid, fields, device)
    hashes = {reference: file_hash(family.resolve(reference)) for reference in references}
    hashes |= {name: file_hash(path) for name, path in family.files.items()}
    hashes |= {
        f"data of {name}": bucket.source.digest()
        for name, bucket in buckets.items()
        if isinstance(bucket.source, Manifest)
    }
    return Assembly(recipe, family, AdapterField(backbone, family.model), fields, method, student, buckets, hashes)


def _field(
    name: str, part: FieldPart, family: Family, backbone: AdapterBackbone, device: torch.device
) -> VelocityField:
    field: VelocityField
    if part.lora is not None:
        backbone.add(name, family.load_lora(family.resolve(part.lora)), scale=part.lora_scale)
        field = AdapterField(backbone, family.model, name)
    elif part.checkpoint is not None:
        field = ModelField(family.load_model(family.resolve(part.checkpoint)).to(device))
    else:
        field = AdapterField(backbone, family.model)
    if part.guidance_scale == 1.0:
        return field
    return GuidedField(
        field,
        empty=partial(family.empty, negative_prompt=part.negative_prompt),
        guidance_scale=part.guidance_scale,
        combine=family.guide,
    )


def _start(recipe: Recipe, family: Family) -> Lora | None:
    """What the student starts from, as one LoRA over the base; None is the base itself."""

    def source(name: str) -> Lora | None:
        part = recipe.fields[name]
        if part.lora is None:
            return None
        lora = family.load_lora(family.resolve(part.lora))
        return replace(lora, alpha=lora.alpha * part.lora_scale)

    init = recipe.student.init
    if isinstance(init, dict):
        return merged_loras([(source(name), weight) for name, weight in init.items()])
    return None if init == "base" else source(init)


def _method(
    recipe: Recipe, routes: list[Route], grid: Grid, fields: dict[str, VelocityField], device: torch.device
) -> Method:
    common: dict[str, Any] = {"routes": routes, "grid": grid, "device": device}
    routing: dict[str, Any] = {"per": recipe.routing.per, "stratified": recipe.routing.stratified}
    if recipe.method == "joint":
        return JointTraining(**common, **routing, **recipe.joint.model_dump())
    if recipe.method == "diffusion_opd":
        return DiffusionOPD(**common, **recipe.diffusion_opd.model_dump())
    if recipe.method == "flow_opd":
        anchor = recipe.flow_opd.anchor
        options: dict[str, Any] = recipe.flow_opd.model_dump() | {"anchor": None if anchor is None else fields[anchor]}
        return FlowOPD(**common, **routing, **options)
    query = recipe.query
    matching: dict[str, Any] = {
        "query": BANDS[query.band](over=query.over, per_rollout=query.per_rollout),
        "objective": OBJECTIVES[recipe.objective],
    }
    if recipe.method == "soft_mixing":
        return soft_mixing(**common, **routing, **matching)
    # off_policy differs in its states alone; weight_merge makes no update.
    return DanceOPD(**common, **routing, **matching, states=query.states)


def _examples(index: int, part: RoutePart, family: Family, needs_targets: bool) -> ExampleSource:
    if part.data.generator is not None:
        try:
            return family.generator(part.data.generator, size=part.data.size, seed=part.data.seed)
        except ValueError as error:
            raise RecipeError(f"routes.{index}.data.generator: {error}") from error
    manifest = Manifest(Path(part.data.manifest or ""))
    if manifest.edits and not family.can_edit:
        raise RecipeError(f"routes.{index}: family {family.name!r} cannot edit, but {manifest.path} holds edits")
    for position in range(len(manifest)):
        if needs_targets and manifest.lines[position].target is None:
            raise RecipeError(
                f"{manifest.path}, line {manifest.numbers[position]}: noising data needs a 'target' on every line"
            )
        try:
            family.samples([manifest[position]])
        except ValueError as error:
            raise RecipeError(f"{manifest.path}, line {manifest.numbers[position]}: {error}") from error
    return manifest


def autocast(device: torch.device, precision: str):
    """The one precision rule, for student and fields alike: bf16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
