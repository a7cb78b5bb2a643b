"""From a recipe to live values: family, fields, routes, student. Everything that can be wrong is found here."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from danceopd.baselines.diffusion_opd import DiffusionOPD
from danceopd.baselines.flow_opd import FlowOPD
from danceopd.baselines.joint import JointTraining
from danceopd.baselines.merge import merged_loras, merged_weights
from danceopd.baselines.off_policy import off_policy
from danceopd.baselines.soft_mixing import soft_mixing
from danceopd.data.examples import Bucket
from danceopd.distill.mean_velocity import MeanVelocityField
from danceopd.distill.method import Method
from danceopd.distill.objective import OBJECTIVES
from danceopd.distill.query import BANDS, QueryBand
from danceopd.distill.routers import CurriculumRouter, GapRouter, Router, UniformRouter, WeightedRouter
from danceopd.distill.routing import Route
from danceopd.distill.schedule import GridFor
from danceopd.distill.step import DanceOPD
from danceopd.distill.streaming import StreamingDanceOPD
from danceopd.families.family import Family
from danceopd.families.registry import load_family, takes
from danceopd.fields.adapters import AdapterField
from danceopd.fields.field import VelocityField
from danceopd.fields.guidance import GuidedField
from danceopd.fields.mixture import MixtureField
from danceopd.recipe import Recipe, RecipeError
from danceopd.training.fields import FieldInput, FieldLoader, Sources, adapter_backbone
from danceopd.training.inputs import RouteSamples, route_examples, use_cache
from danceopd.training.processes import ALONE, Processes
from danceopd.training.student import Start, Student, full_model


@dataclass(frozen=True, kw_only=True)
class LoadedModels:
    """A recipe's networks, without its data.

    bare: the fields, mixtures aside, without their guidance, and how each of them is told what the user asked for.
    inputs: of the fields that are told something else than the student. models: every network held but a student's own.
    resident: the networks that belong on the accelerator, a student's own among them.
    hashes: SHA-256 of every weight file (and the hub's commits), by what the recipe calls it.
    """

    recipe: Recipe
    family: Family
    base: VelocityField
    bare: dict[str, tuple[VelocityField, FieldInput]]
    fields: dict[str, VelocityField]
    inputs: dict[str, FieldInput]
    models: list[nn.Module]
    resident: list[nn.Module]
    student: Student
    hashes: dict[str, str]

    def settle(self, device: torch.device) -> None:
        """Move the networks to their device, and before them to the CPU what a cache stands in for.

        So an accelerator need not hold encoders and networks at a time.
        """
        for family in [self.family, *(each.family for each in self.inputs.values())]:
            family.release_encoders()
        for model in self.resident:
            model.to(device)


@dataclass(frozen=True, kw_only=True)
class Assembly(LoadedModels):
    """A recipe made live. ``hashes`` holds that of each route's data too."""

    method: Method
    buckets: dict[str, Bucket]


def load_models(recipe: Recipe, *, device: torch.device) -> LoadedModels:
    """Load and check a recipe's weights; its data is not looked at.

    Raises:
        RecipeError, WeightsError, AdapterMismatch: for whatever does not fit.
    """
    loaded = _open_models(recipe, device=device)
    loaded.settle(device)
    return loaded


def _open_models(recipe: Recipe, *, device: torch.device) -> LoadedModels:
    """``load_models`` with the encoders on the device, and the networks still in main memory."""
    sources = Sources()
    opened = partial(open_family, recipe)
    family = sources.base(recipe.base, recipe.family, opened, own=True)
    unfolded = recipe.train.gradient_checkpointing or recipe.train.compile
    backbone = adapter_backbone(family.network, device, unfolded=unfolded)
    loader = FieldLoader(recipe, family, backbone, sources, opened, device)
    plain = {name: part for name, part in recipe.fields.items() if part.mixture is None}
    bare = {name: (loader.load(name, part), loader.input(name, part)) for name, part in plain.items()}
    fields: dict[str, VelocityField] = {
        name: _guided(field, plain[name].guidance_scale, plain[name].negative_prompt, field_input.family)
        for name, (field, field_input) in bare.items()
    }
    mixtures = {name: part.mixture for name, part in recipe.fields.items() if part.mixture is not None}
    fields |= {name: MixtureField([fields[member] for member in mixture]) for name, mixture in mixtures.items()}
    inputs = {name: field_input for name, (_, field_input) in bare.items() if plain[name].told_apart}
    student = Student(recipe, family, backbone, _start(recipe, family, sources))
    family.to(device, network=False)
    use_cache(recipe, list(dict.fromkeys([family, *(each.family for each in inputs.values())])))
    if recipe.train.gradient_checkpointing:
        try:
            family.checkpoint_gradients(student.network)
        except ValueError as error:
            raise RecipeError(f"train.gradient_checkpointing: {error}") from error
    return LoadedModels(
        recipe=recipe,
        family=family,
        base=AdapterField(backbone, family.model),
        bare=bare,
        fields=fields,
        inputs=inputs,
        models=loader.models,
        resident=[*loader.resident, student.model],
        student=student,
        hashes=sources.hashes,
    )


def assemble(recipe: Recipe, *, device: torch.device, processes: Processes = ALONE) -> Assembly:
    """Load and check everything that a run needs.

    processes: this process of the run's; the assembly's recipe is its share of the whole.

    Raises:
        RecipeError, WeightsError, AdapterMismatch, ManifestError: for whatever does not fit, before any training.
    """
    recipe = processes.share(recipe)
    loaded = _open_models(recipe, device=device)
    if recipe.train.compile:
        try:
            loaded.family.compile(loaded.student.network)
        except ValueError as error:
            raise RecipeError(f"train.compile: {error}") from error
    family, inputs = loaded.family, loaded.inputs
    grid = _grids(family, recipe.rollout.num_inference_steps, recipe.rollout.shift)
    buckets, routes = {}, []
    needs_targets = recipe.method == "joint" or recipe.query.needs_targets
    for index, part in enumerate(recipe.routes):
        name = part.name or part.field
        examples = route_examples(
            index,
            part,
            family,
            inputs.get(part.field),
            recipe.guidance(part)[1],
            needs_targets=needs_targets,
            cached=recipe.data_cache is not False,
        )
        seed = recipe.train.seed * 1000 + index
        try:
            buckets[name] = Bucket(examples, seed=seed, rank=processes.rank, count=processes.count)
        except ValueError as error:
            raise RecipeError(f"routes.{index}.data: {error}") from error
        field = loaded.fields[part.field]
        if part.field in loaded.bare:
            bare, field_input = loaded.bare[part.field]
            field = _guided(bare, *recipe.guidance(part), field_input.family)
        routes.append(_route(recipe, index, field, buckets[name], family, inputs.get(part.field), grid))
    loaded.settle(device)
    try:
        method = _method(recipe, routes, grid, loaded.fields, device)
    except RecipeError as error:
        share = f" (each of {processes.count} processes has a share of the pool)" if processes.count > 1 else ""
        raise RecipeError(f"{error}{share}") from error
    hashes = loaded.hashes | {f"data of {name}": bucket.source.digest() for name, bucket in buckets.items()}
    return Assembly(**{**vars(loaded), "hashes": hashes}, method=method, buckets=buckets)


def open_family(recipe: Recipe, name: str, base: str) -> Family:
    """A family on a base, as the recipe wants its families; another one's own keys are not asked of it.

    Raises:
        RecipeError, WeightsError: see ``load_family``.
    """
    options: dict[str, Any] = {"resolution": recipe.resolution, "embedded_guidance": recipe.embedded_guidance}
    if recipe.base_dtype != "auto" or takes(name, "base_dtype"):
        wanted = recipe.train.precision if recipe.base_dtype == "auto" else recipe.base_dtype
        options["base_dtype"] = torch.bfloat16 if wanted == "bf16" else torch.float32
    if name != recipe.family:
        options = {key: value for key, value in options.items() if takes(name, key)}
    return load_family(name, base, options)


def _guided(field: VelocityField, guidance_scale: float, negative_prompt: str, family: Family) -> VelocityField:
    if guidance_scale == 1.0:
        return field
    empty = partial(family.empty, negative_prompt=negative_prompt)
    return GuidedField(field, empty=empty, guidance_scale=guidance_scale, combine=family.guide)


def _route(
    recipe: Recipe,
    index: int,
    field: VelocityField,
    bucket: Bucket,
    family: Family,
    field_input: FieldInput | None,
    grid: GridFor,
) -> Route:
    part = recipe.routes[index]
    if recipe.rollout.substeps > 1:  # no route then has a grid of its own
        field = MeanVelocityField(field, grid=grid, substeps=recipe.rollout.substeps)
    shape = family.latent_shape(*(bucket.source[0].wanted_size or part.resolution or family.size))
    negative = recipe.guidance(part)[1]
    return Route(
        part.name or part.field,
        field,
        RouteSamples(bucket, family, field_input, part.resolution),
        weight=part.weight,
        prompt_dropout=part.prompt_dropout,
        empty=partial(family.empty, negative_prompt=negative),
        field_empty=None if field_input is None else partial(field_input.family.empty, negative_prompt=negative),
        grid=_grids(family, part.num_inference_steps, recipe.rollout.shift) if part.num_inference_steps else None,
        query=_query(recipe, part.per_rollout) if part.per_rollout else None,
        shape=shape,
    )


def _grids(family: Family, steps: int, shift: float | None) -> GridFor:
    """The family's grid by the latents' shape, each made once."""
    return cache(lambda shape: family.grid(steps, shift, shape))


def _query(recipe: Recipe, per_rollout: int) -> QueryBand:
    return BANDS[recipe.query.band](over=recipe.query.over, per_rollout=per_rollout)


def _start(recipe: Recipe, family: Family, sources: Sources) -> Start:
    def source(name: str) -> Start:
        part, lora = recipe.fields[name], None
        if part.lora is not None:
            lora = family.load_lora(sources.file(part.lora, "lora", family))
            lora = replace(lora, alpha=lora.alpha * part.lora_scale)
        return Start(lora, None if part.checkpoint is None else sources.file(part.checkpoint, "checkpoint", family))

    init = recipe.student.init
    if not isinstance(init, dict):
        return Start() if init == "base" else source(init)
    starts = [(source(name), weight) for name, weight in init.items()]
    if all(start.checkpoint is None for start, _ in starts):
        return Start(merged_loras([(start.lora, weight) for start, weight in starts]))
    networks = [(full_model(family, start).get_submodule("network"), weight) for start, weight in starts]
    return Start(average=merged_weights([(network.state_dict(), weight) for network, weight in networks]))


def _method(
    recipe: Recipe, routes: list[Route], grid: GridFor, fields: dict[str, VelocityField], device: torch.device
) -> Method:
    common: dict[str, Any] = {"routes": routes, "grid": grid, "device": device}
    part = recipe.routing
    routing: dict[str, Any] = {"per": part.per, "stratified": part.stratified, "router": _router(recipe)}
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
        "query": _query(recipe, query.per_rollout),
        "objective": OBJECTIVES[recipe.objective],
    }
    if recipe.method == "soft_mixing":
        return soft_mixing(**common, **routing, **matching, **recipe.soft_mixing.model_dump())
    if recipe.rollout.mode == "streaming":
        batch_size = recipe.train.batch_size
        options = {"pool": recipe.rollout.pool, "batch_size": batch_size}
        options["largest_pass"] = batch_size // recipe.train.gradient_accumulation_steps
        try:
            return StreamingDanceOPD(
                **common, **routing, **matching, **options, staleness_updates=recipe.rollout.staleness_steps
            )
        except ValueError as error:
            raise RecipeError(f"rollout: {error}") from error
    if query.states != "student":
        return off_policy(states=query.states, **common, **routing, **matching)
    if query.off_policy_states is not None:
        matching |= {"off_policy_share": query.off_policy_share, "off_policy_states": query.off_policy_states}
    return DanceOPD(**common, **routing, **matching)  # also for weight_merge, which makes no update


def _router(recipe: Recipe) -> Router:
    part = recipe.routing
    if part.by == "uniform":
        return UniformRouter()
    if part.by == "gap":
        return GapRouter(floor=part.floor, power=part.power, decay=part.decay, reweight=part.reweight)
    if part.end_weights is not None and part.end_step is not None:
        return CurriculumRouter([part.end_weights[route.name or route.field] for route in recipe.routes], part.end_step)
    return WeightedRouter()


def autocast(device: torch.device, precision: str):
    """The one precision rule, for student and fields alike: bf16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
