"""A recipe's fields made live: what is held, what is shared, what each is told."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from storage import held

from danceopd.exports import export
from danceopd.families.shapes import WEIGHTS, ShapesFamily, ShapesModel
from danceopd.fields.adapters import AdapterMismatch
from danceopd.fields.hub import Located
from danceopd.fields.lora import Lora
from danceopd.fields.offload import OffloadedField
from danceopd.fields.weights import WeightsError, load_lora, merge_lora, save_lora, source_hash
from danceopd.plan import plan
from danceopd.recipe import RecipeError
from danceopd.runs import train
from danceopd.training import fields as live_fields
from danceopd.training.assemble import assemble
from danceopd.training.checkpoint import RunStateError
from danceopd.training.fields import FieldLoader, Sources, adapter_backbone
from danceopd.training.trainer import load_run

CPU = torch.device("cpu")
TEACHERS = ["edit", "local", "global", "realism"] * 2


def bytes_of(parameters):
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


@pytest.mark.parametrize("name", ["train", "attention", "weight"])
def test_a_field_may_be_called_as_a_module_or_a_method_of_torchs_is(tiny, tmp_path, name):
    recipe = tiny("train.steps=1", f"fields.{name}={{lora: 'shapes:global'}}", f"routes.0.field={name}")
    assert export(train(recipe), tmp_path / "student.safetensors") < 1e-3


@pytest.mark.parametrize("fold", [False, True])
def test_eight_lora_teachers_and_the_student_hold_one_backbone(tiny, rng, fold):
    """At most 1.05 x (backbone + adapters) between updates; folded teachers add one copy of the adapted weights."""
    options = [f"fields.t{i}={{lora: 'shapes:{name}'}}" for i, name in enumerate(TEACHERS)]
    assembly = assemble(tiny(*options, "routes.0.field=t0", "routes.1.field=t7", "student.init=base"), device=CPU)
    backbone, network = assembly.base.model.backbone, assembly.family.network
    backbone.fold = fold
    names = [f"t{i}" for i in range(8)]
    assert backbone.names == ["field_edit", *(f"field_{name}" for name in names), "student"]
    adapters = sum(bytes_of(backbone.parameters(name)) for name in backbone.names)
    bare = sum(bytes_of([p]) for key, p in network.named_parameters() if ".lora_" not in key)
    assert bytes_of(network.parameters()) == bare + adapters

    def needed():
        return held(assembly, besides=assembly.family.encoder)

    assert needed() <= 1.05 * (bare + adapters)
    assembly.method.step(assembly.student.model, batch_size=4, generator=rng)
    assert needed() <= 1.05 * (bare + adapters)
    z, sigma, condition = torch.zeros(1, 3, 32, 32), torch.ones(1), assembly.family.encode(["a red circle"], None)
    before = needed()
    for name in names:
        assembly.fields[name].velocity(z, sigma, condition)
    copies = bytes_of({layer.get_base_layer().weight for layer in backbone._layers}) if fold else 0
    assert needed() - before == copies


@pytest.fixture
def checkpoint(tmp_path):
    """A full checkpoint that is not the base."""
    weights = {name: weight.float() * 1.1 for name, weight in load_file(WEIGHTS / "base.safetensors").items()}
    save_file(weights, tmp_path / "full.safetensors")
    return tmp_path / "full.safetensors"


OVER = [
    "fields.full={checkpoint: FULL}",
    "fields.both={checkpoint: FULL, lora: 'shapes:realism', lora_scale: 0.5}",
    "fields.more={checkpoint: FULL, lora: 'shapes:global'}",
    "routes.0.field=both",
    "routes.1.field=full",
]


def velocity(field, family):
    z = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return field(z, torch.tensor([0.9, 0.3]), family.encode(["a red circle", "two blue squares"], None))


def test_a_source_that_does_not_fit_is_refused_by_its_field_and_its_file(tiny, checkpoint, tmp_path):
    foreign = {"attn.lora_A.weight": torch.zeros(2, 4), "attn.lora_B.weight": torch.zeros(4, 2)}
    save_lora(Lora(rank=2, alpha=2.0, weights=foreign), tmp_path / "foreign.safetensors")
    with pytest.raises(AdapterMismatch, match=r"^fields\.other: LoRA 'field_other' adapts 1 modules that"):
        assemble(tiny(f"fields.other={{lora: {tmp_path}/foreign.safetensors}}"), device=CPU)
    with pytest.raises(WeightsError, match=r"^fields\.other: .*full\.safetensors"):
        assemble(tiny(f"fields.other={{lora: {checkpoint}}}"), device=CPU)


def test_loras_over_one_checkpoint_share_one_copy_of_it(tiny, checkpoint):
    assembly = assemble(tiny(*(text.replace("FULL", str(checkpoint)) for text in OVER)), device=CPU)
    family, networks = assembly.family, {id(model): model for model in assembly.models}
    assert len(networks) == 2  # the base and the checkpoint
    whole = ShapesFamily().load_model(checkpoint)
    assert torch.equal(velocity(assembly.fields["full"].velocity, family), velocity(whole, family))
    lora = load_lora(WEIGHTS / "realism.safetensors")
    merge_lora(whole.network, type(lora)(rank=lora.rank, alpha=lora.alpha / 2, weights=lora.weights))
    torch.testing.assert_close(
        velocity(assembly.fields["both"].velocity, family), velocity(whole, family), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(velocity(assembly.base.velocity, family), velocity(ShapesFamily().model, family))
    sentence = plan(assembly).routes[0]
    assert f"taught by lora shapes:realism x 0.5 over checkpoint {checkpoint}" in sentence
    assert set(assembly.hashes) >= {"shapes:base", "shapes:edit", "shapes:realism", "shapes:global", str(checkpoint)}


def test_full_checkpoints_and_loras_merge_into_a_student_of_all_weights(tiny, checkpoint, tmp_path):
    texts = [*OVER, "method=weight_merge", "query={}", "rollout={}", "routing={}", "train={steps: 0, precision: fp32}"]
    merge = "student={init: {t2i: 1.0, both: 2.0, full: 1.0}, lora: null}"
    recipe = tiny(*(text.replace("FULL", str(checkpoint)) for text in [*texts, merge]))
    folder = train(recipe)
    assembly, _ = load_run(folder, device=CPU)
    base, whole = ShapesFamily().load_model().network, ShapesFamily().load_model(checkpoint).network
    both, lora = ShapesFamily().load_model(checkpoint).network, load_lora(WEIGHTS / "realism.safetensors")
    merge_lora(both, replace(lora, alpha=lora.alpha / 2))
    parts = [dict(network.named_parameters()) for network in (base, both, whole)]
    for name, found in assembly.student.network.named_parameters():
        expected = sum(w * part[name].float() for w, part in zip((0.25, 0.5, 0.25), parts, strict=True))
        torch.testing.assert_close(found, expected, msg=name)
    assert export(folder, tmp_path / "merged.safetensors") < 1e-3
    with pytest.raises(RecipeError, match=r"'both' is a full checkpoint, which no LoRA .*student\.lora: null"):
        tiny(*texts, "student={init: {t2i: 1.0, both: 2.0}, init_mode: merged}")


def loader_for(recipe, device):
    sources = Sources()
    family = sources.base(recipe.base, recipe.family, lambda name, base: ShapesFamily(base), own=True)
    backbone = adapter_backbone(family.network, device)
    return FieldLoader(recipe, family, backbone, sources, lambda name, base: ShapesFamily(base), device)


@pytest.mark.parametrize("init", ["full", "both"])
def test_a_student_of_all_weights_starts_from_a_checkpoint_exactly(tiny, checkpoint, init):
    fields = (text.replace("FULL", str(checkpoint)) for text in OVER)
    assembly = assemble(tiny(*fields, f"student.init={init}", "student.lora=null"), device=CPU)
    found, taught = (
        velocity(model, assembly.family) for model in (assembly.student.model, assembly.fields[init].velocity)
    )
    torch.testing.assert_close(found, taught, atol=1e-5, rtol=0)
    other = assembly.fields["both" if init == "full" else "full"].velocity
    assert float((found - velocity(other, assembly.family)).abs().max()) > 1e-2
    with torch.no_grad():
        next(iter(assembly.student.parameters.values())).zero_()
    torch.testing.assert_close(velocity(assembly.fields[init].velocity, assembly.family), taught, atol=0, rtol=0)


def test_a_checkpoint_may_wait_in_main_memory(tiny, checkpoint):
    recipe = tiny(f"fields.full={{checkpoint: {checkpoint}, keep_on: cpu}}")
    elsewhere = torch.device("meta")  # stands for an accelerator; nothing is computed on it
    waiting = loader_for(recipe, elsewhere).load("full", recipe.fields["full"])
    assert isinstance(waiting, OffloadedField)
    assert (waiting.module.network.__class__, waiting.device) == (
        assemble(recipe, device=CPU).family.network.__class__,
        elsewhere,
    )
    assert {parameter.device for parameter in waiting.module.parameters()} == {CPU}
    assert not isinstance(loader_for(recipe, CPU).load("full", recipe.fields["full"]), OffloadedField)
    both = tiny(
        f"fields.full={{checkpoint: {checkpoint}, keep_on: cpu}}",
        f"fields.over={{checkpoint: {checkpoint}, lora: 'shapes:edit'}}",
    )
    with pytest.raises(RecipeError, match=r"fields\.over\.keep_on: found 'accelerator', but another .* on 'cpu'"):
        assemble(both, device=CPU)


def test_a_prefix_is_for_the_field_alone(tiny, tmp_path, rng):
    lines = [{"prompt": "a circle"}, {"prompt": "a cross"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    recipe = tiny(
        "fields.trigger={lora: 'shapes:realism', prompt_prefix: red style, guidance_scale: 2.0, negative_prompt: blue}",
        f"routes.0={{field: trigger, data: {{manifest: {tmp_path / 'prompts.jsonl'}}}}}",
    )
    assembly = assemble(recipe, device=CPU)
    family, (route, plain) = assembly.family, assembly.method.routes
    (samples,) = route.samples(2, rng)
    order = ["a circle", "a cross"]
    if not torch.equal(samples.condition.prompt_embeds, family.encode(order, None).prompt_embeds):
        order.reverse()
    told, taught = family.encode(order, None), family.encode([f"red style {prompt}" for prompt in order], None)
    assert torch.equal(samples.condition.prompt_embeds, told.prompt_embeds)
    assert torch.equal(samples.field_condition.prompt_embeds, taught.prompt_embeds)
    blue = family.encode(["blue"], None).prompt_embeds
    assert torch.equal(route.field_empty(samples.field_condition).prompt_embeds[:1], blue)
    assert torch.equal(route.empty(samples.condition).prompt_embeds[:1], blue)
    assert plain.samples(2, rng)[0].field_condition is None
    z = torch.randn(2, 3, 32, 32)
    expected = route.field.velocity(z, torch.ones(2), taught)
    assert torch.equal(route.field.velocity(z, torch.ones(2), samples.field_condition), expected)
    assert not torch.equal(route.field.velocity(z, torch.ones(2), told), expected)
    assert set(assembly.inputs) == {"trigger"}
    assert float(assembly.method.step(assembly.student.model, batch_size=4, generator=rng).loss.detach()) > 0


def test_any_source_that_changed_since_the_run_began_stops_its_resumption(tiny, tmp_path, checkpoint, monkeypatch):
    weights = load_file(checkpoint)
    names = sorted(weights)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for shard, held_there in shards.items():
        save_file({name: weights[name] for name in held_there}, tmp_path / shard)
    index = tmp_path / "net.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: shard for shard in shards for name in shards[shard]}}))
    save_lora(load_lora(WEIGHTS / "realism.safetensors"), tmp_path / "lora.safetensors")
    commits = ["a" * 40]

    def locate(reference, kind):
        return (
            Located(str(tmp_path / "lora.safetensors"), commits[0]) if reference == "org/lora" else Located(reference)
        )

    monkeypatch.setattr(live_fields, "locate", locate)

    def recipe(steps):
        return tiny(
            f"train.steps={steps}",
            f"fields.full={{checkpoint: {index}, lora: org/lora}}",
            f"fields.local={{lora: {tmp_path / 'lora.safetensors'}}}",
            "routes.0.field=full",
            "routes.1.field=local",
        )

    train(recipe(1))
    changed = tmp_path / "two.safetensors"
    before = changed.read_bytes()
    save_file({name: weights[name] * 2 for name in shards[changed.name]}, changed)
    with pytest.raises(RunStateError, match=r"sources changed since this run began.*net\.safetensors\.index\.json"):
        train(recipe(2), resume=True)
    changed.write_bytes(before)
    commits[0] = "b" * 40
    with pytest.raises(RunStateError, match=r"org/lora: commit: \"aaaa.* then, \"bbbb.* now"):
        train(recipe(2), resume=True)
    commits[0] = "a" * 40
    lora = tmp_path / "lora.safetensors"
    before = lora.read_bytes()
    save_lora(load_lora(WEIGHTS / "local.safetensors"), lora)
    with pytest.raises(RunStateError, match=r"lora\.safetensors: .*org/lora: "):
        train(recipe(2), resume=True)
    lora.write_bytes(before)
    train(recipe(2), resume=True)


def test_a_sources_hash_covers_all_that_it_is_made_of(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    alone = source_hash(tmp_path / "adapter_model.safetensors")
    found = {alone}
    for alpha in (8, 16):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        found.add(source_hash(tmp_path / "adapter_model.safetensors"))
    assert len(found) == 3
    with pytest.raises(WeightsError, match="weight file not found"):
        source_hash(tmp_path / "absent.safetensors")


def test_a_student_of_all_weights_is_float32_over_a_bf16_base(tiny, monkeypatch):
    class HalfFamily(ShapesFamily):
        def load_model(self, path=None) -> ShapesModel:
            return super().load_model(path).bfloat16()

    monkeypatch.setattr("danceopd.training.assemble.open_family", lambda recipe, name, base: HalfFamily(base))
    assembly = assemble(tiny("student={lora: null}"), device=CPU)
    assert {parameter.dtype for parameter in assembly.student.parameters.values()} == {torch.float32}
