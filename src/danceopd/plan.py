"""What a recipe will do, tried on small batches before hours are spent."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from danceopd.distill.mean_velocity import MeanVelocityField
from danceopd.distill.method import Method
from danceopd.distill.streaming import StreamingDanceOPD
from danceopd.recipe import METHODS, FieldPart, Recipe
from danceopd.training.activations import Activations
from danceopd.training.assemble import Assembly, assemble, autocast
from danceopd.training.hardware import pick_device
from danceopd.training.trainer import prepare_recipe


@dataclass(frozen=True)
class Plan:
    """What a recipe will do; routes, student, guidance and streaming rollouts in a sentence each. The calls are
    expected ones per update, and once per run. carried_megabytes: of what the method carries from update to update."""

    routes: tuple[str, ...]
    student: str
    rollout_calls: float
    field_calls: float
    train_calls: float
    calls_once: float
    trained_parameters: int
    megabytes: float
    activation_megabytes: float | None = None
    carried_megabytes: float = 0.0
    rollout: str | None = None
    guidance: str | None = None


def plan(assembly: Assembly, asked: Recipe | None = None) -> Plan:
    """Predicted network calls and memory of an assembled recipe.

    asked: the recipe whose references and sizes are named, where stand-ins were assembled in its place.
    """
    recipe, method = asked or assembly.recipe, assembly.method
    shares = method.shares.tolist()
    batch = recipe.train.batch_size
    sentences = [_route_sentence(assembly, recipe, index, share) for index, share in enumerate(shares)]
    calls = method.expected_calls()
    trained = sum(parameter.numel() for parameter in assembly.student.parameters.values())
    # Trained weights carry a gradient, the optimiser's moments and an average, all float32.
    moments = 1 if recipe.train.optimizer == "muon" else 2
    return Plan(
        tuple(sentences),
        _student_sentence(assembly, recipe),
        batch * calls.rollout,
        batch * calls.field,
        batch * calls.train,
        calls.once,
        trained,
        (_weight_bytes(assembly) + trained * 4 * (2 + moments)) / 2**20,
        rollout=_rollout_sentence(method),
        guidance=_guidance_sentence(recipe),
    )


def _rollout_sentence(method: Method) -> str | None:
    if not isinstance(method, StreamingDanceOPD):
        return None
    return (
        f"streaming: {method.pool} trajectories of {method.plan.length} steps; the steps that are trained are "
        f"{method.plan.band_distance():.1%} from the query band (total variation)"
    )


def _guidance_sentence(recipe: Recipe) -> str | None:
    """What the routes teach and the pictures are drawn under, where it may not be what is meant."""
    taught, drawn = recipe.taught_guidance(), recipe.evaluate.guidance_scale
    scales = {scale for several in taught.values() for scale in several}
    if scales <= {1.0} or (len(scales) == 1 and drawn == 1.0):
        return None

    def words(several: tuple[float, ...]) -> str:
        return " and ".join("none" if scale == 1.0 else f"{scale:g}" for scale in dict.fromkeys(several))

    absorbed = ", ".join(f"{name} {words(several)}" for name, several in taught.items())
    besides = "none" if drawn == 1.0 else f"{drawn:g}, on top of what was absorbed"
    return f"absorbed by route: {absorbed}; pictures are drawn under {besides} (evaluate.guidance_scale)"


def _route_sentence(assembly: Assembly, recipe: Recipe, index: int, share: float) -> str:
    route, part = assembly.method.routes[index], recipe.routes[index]
    field, data = recipe.fields[part.field], part.data
    at_first = " at first" if assembly.method.router.adaptive else ""
    words = [f"{route.name}: {share:.0%} of samples{at_first}, taught by {_taught_by(field)}"]
    if field.prompt_prefix:
        words.append(f'told "{field.prompt_prefix}" first')
    if route.guidance is not None:
        negative = recipe.guidance(part)[1]
        words.append(f"guidance {route.guidance.guidance_scale:g}" + (f' against "{negative}"' if negative else ""))
    if isinstance(route.field, MeanVelocityField):
        words.append(f"{route.field.substeps} of its steps in one")
    pack = f"pack {data.pack}" + (f" on {data.images}" if data.images else "")
    size = part.resolution or recipe.resolution
    inputs = assembly.buckets[route.name].source
    kind = "text to image" if inputs[0].source is None else "edits"
    words.append(
        f"on {data.generator or data.manifest or pack} ({len(inputs)} inputs, {kind})"
        + (f" at {size[0]} x {size[1]}" if size else "")
    )
    words.append(f"prompt dropout {route.dropout:g}")
    if "query" in METHODS[recipe.method]:
        states, steps = recipe.states_and_steps(part)
        words.append(f"{states} of {steps} steps ({recipe.query.band} over {recipe.query.over})")
        if recipe.query.off_policy_states is not None:
            elsewhere = {"data": "noised data", "teacher": "the field's own rollouts"}
            words.append(f"a share of {recipe.query.off_policy_share:g} at {elsewhere[recipe.query.off_policy_states]}")
    return ", ".join(words)


def _taught_by(field: FieldPart) -> str:
    if field.mixture is not None:
        return f"mixture {field.mixture}"
    scale = "" if field.lora_scale == 1.0 else f" x {field.lora_scale:g}"
    made = [f"{kind} {name}" + (scale if kind == "lora" else "") for kind, name in field.references.items()]
    return " over ".join(made) or "base"


def _student_sentence(assembly: Assembly, recipe: Recipe) -> str:
    part = recipe.student
    init = part.init if isinstance(part.init, str) else " + ".join(f"{w:g} {name}" for name, w in part.init.items())
    if part.lora is None:
        return f"all weights, from {init}"
    targets = ", ".join(part.lora.targets or assembly.family.lora_targets)
    start = "over" if part.init_mode == "merged" else "from"
    return (
        f"LoRA of rank {part.lora.rank} and alpha {part.lora.alpha:g} on {targets} "
        f"({len(assembly.student.parameters) // 2} modules), {start} {init}"
    )


def _weight_bytes(assembly: Assembly) -> int:
    """Bytes of all weights held: every network of the fields, and the student's own."""
    parameters = {id(weight): weight for network in _networks(assembly) for weight in network.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())


def _networks(assembly: Assembly) -> list[nn.Module]:
    return [assembly.student.network, *assembly.models]


def check(recipe: Recipe, *, asked: Recipe | None = None) -> Plan:
    """Validate everything before training: load all files, and take small batches of each route through the method.

    The batches run rollout, fields and loss as training does, without a gradient step; nothing is written but the cache
    of encodings. The pool of streaming rollouts is filled for that, whose size it also measures: about P (T - 1) / 2
    network calls.

    asked: see ``plan``.

    Raises:
        RecipeError, WeightsError, AdapterMismatch, ManifestError: for whatever does not fit.
    """
    assembly = assemble(prepare_recipe(recipe, pick_device()), device=pick_device())
    generator = torch.Generator().manual_seed(recipe.train.seed)
    few = recipe.flow_opd.group_size if recipe.method == "flow_opd" else 2
    micro_batch = recipe.train.batch_size // recipe.train.gradient_accumulation_steps
    kept: list[float] = []
    with autocast(torch.device(assembly.method.device), assembly.recipe.train.precision):
        for index in range(len(assembly.method.routes)):
            most = min(micro_batch, assembly.method.most_samples(index) or micro_batch)
            counts = (few, 2 * few) if 2 * few <= most else (min(few, most),)
            found = [_activation_bytes(assembly, index, count, generator) for count in counts]
            kept.append(_extended(counts, found, to=micro_batch))
    activations = None if recipe.train.gradient_checkpointing else max(kept) / 2**20
    carried = sum(tensor.numel() * tensor.element_size() for tensor in assembly.method.state().values()) / 2**20
    return replace(plan(assembly, asked), activation_megabytes=activations, carried_megabytes=carried)


def _activation_bytes(assembly: Assembly, route: int, count: int, generator: torch.Generator) -> int:
    """What the largest backward pass of an update of ``count`` samples of one route keeps."""
    activations = Activations(weight for model in _networks(assembly) for weight in model.parameters())
    with activations.counted():
        assembly.method.step(
            assembly.student.model,
            batch_size=count,
            generator=generator,
            routes=torch.full((count,), route),
            backward=activations.end_pass,
        )
    return activations.peak


def _extended(counts: tuple[int, ...], found: list[int], *, to: int) -> float:
    """Linearly from one or two counts to another; from one, in proportion."""
    slope = found[0] / counts[0] if len(counts) == 1 else (found[1] - found[0]) / (counts[1] - counts[0])
    return found[0] + slope * (to - counts[0])
