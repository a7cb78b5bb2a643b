"""The same method on every family: one update, self-distillation, checkpointed gradients, export."""

from dataclasses import replace

import pytest
import torch
import yaml
from shared_backbones import ALPHA, PROMPTS, RANK, SHAPE, perturb, shared_backbone, twin_backbone
from tiny_pipelines import CASES

import danceopd as d
from danceopd.distill.solver import integrate
from danceopd.families.card import ModelCard
from danceopd.families.export import FILE, export_lora, export_merged, export_peft
from danceopd.fields.adapters import AdapterBackbone, AdapterField, AdapterModel
from danceopd.fields.lora import Lora
from danceopd.fields.weights import WeightsError, file_hash, merge_lora


def method_for(family, field, can_edit: bool) -> d.DanceOPD:
    def samples(count, generator):
        return d.Samples(condition=family.encode((PROMPTS * count)[:count], None), shape=SHAPE)

    def edits(count, generator):
        sources = list(torch.linspace(-1, 1, count * 3 * 16 * 16).view(count, 3, 16, 16))
        return d.Samples(condition=family.encode((PROMPTS * count)[:count], sources), shape=SHAPE)

    routes = [d.Route("t2i", field, samples)] + ([d.Route("edit", field, edits)] if can_edit else [])
    return d.DanceOPD(routes=routes, grid=family.grid(4, shape=SHAPE))


def snapshot(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def test_one_update_lowers_the_loss_and_changes_the_student_alone(case):
    family = case.family(case.pipeline())
    backbone = shared_backbone(family)
    teacher = AdapterField(backbone, family.model, "teacher")
    student = AdapterModel(backbone, family.model, "student")
    method = method_for(family, teacher, case.can_edit)
    parameters = backbone.parameters("student")
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)

    def loss():
        return method.step(student, batch_size=4, generator=torch.Generator().manual_seed(0)).loss

    before, first = snapshot(family.model), loss()
    first.backward()
    optimizer.step()
    assert 0 < float(loss().detach()) < float(first.detach())
    changed = {name for name, value in snapshot(family.model).items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".student." in name for name in changed)
    assert {name for name, value in family.model.named_parameters() if value.grad is not None} >= changed


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("frozen", "fold"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_a_student_that_starts_as_its_teacher_has_zero_loss(case, frozen, fold, autocast):
    """Two adapters: the teacher's own, frozen, and the student's, a copy."""
    family = case.family(case.pipeline().to(frozen))
    backbone = twin_backbone(family, fold=fold)
    assert next(family.network.parameters()).dtype == frozen
    student = AdapterModel(backbone, family.model, "student")
    method = method_for(family, AdapterField(backbone, family.model, "teacher"), case.can_edit)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return method.step(student, batch_size=4, generator=torch.Generator().manual_seed(0))

    result = step()
    assert float(result.loss.detach()) == 0.0
    assert len(result.routes) == len(method.routes)
    perturb(backbone, "student", 0.1, seed=7)
    assert float(step().loss.detach()) > 0.0


@pytest.mark.parametrize(
    ("frozen", "autocast"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)]
)
def test_gradient_checkpointing_changes_no_gradient(case, frozen, autocast):
    family = case.family(case.pipeline().to(frozen))
    backbone = shared_backbone(family)
    perturb(backbone, "student", 0.3, seed=7)
    method = method_for(family, AdapterField(backbone, family.model, "teacher"), case.can_edit)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            family.network.enable_gradient_checkpointing()
        student = AdapterModel(backbone, family.model, "student")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = method.step(student, batch_size=4, generator=torch.Generator().manual_seed(0))
        gradients.append(torch.autograd.grad(result.loss, backbone.parameters("student")))
    assert family.network.is_gradient_checkpointing
    torch.testing.assert_close(gradients[0], gradients[1])
    assert sum(float(gradient.abs().sum()) for gradient in gradients[0]) > 0


def student_lora(backbone: AdapterBackbone) -> Lora:
    weights = {name: weight.detach().clone() for name, weight in backbone.state("student").items()}
    return Lora(rank=RANK, alpha=ALPHA, weights=weights)


def test_an_export_draws_the_students_image_in_a_fresh_pipeline(case, tmp_path):
    case.pipeline().save_pretrained(tmp_path / "base")
    family = case.family(tmp_path / "base")
    backbone = shared_backbone(family)
    perturb(backbone, "student", 0.3, seed=7)
    student = AdapterModel(backbone, family.model, "student")
    difference = export_lora(family, student_lora(backbone), student, tmp_path / "export")
    assert difference <= 1e-5
    assert [path.name for path in (tmp_path / "export").iterdir()] == [FILE]

    fresh = type(family.pipeline).from_pretrained(tmp_path / "base", local_files_only=True)
    fresh.set_progress_bar_config(disable=True)
    options = {"height": 16, "width": 24, "num_inference_steps": 4, "output_type": "pt"} | case.plain

    def pipeline_images():
        return fresh(prompt=list(PROMPTS), generator=torch.Generator().manual_seed(2), **options).images

    base = pipeline_images()
    fresh.load_lora_weights(tmp_path / "export")
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    latents = integrate(student, noise, family.encode(PROMPTS, None), family.grid(4, shape=SHAPE))
    ours = family.decode(latents) / 2 + 0.5
    torch.testing.assert_close(ours, pipeline_images(), rtol=0, atol=1e-5)
    assert float((ours - base).abs().max()) > 1e-3


def test_an_export_that_is_not_the_student_is_not_written(case, tmp_path):
    family = case.family(case.pipeline())
    backbone = shared_backbone(family)
    perturb(backbone, "student", 0.3, seed=7)
    lora, student = student_lora(backbone), AdapterModel(backbone, family.model, "student")
    wrong = Lora(rank=RANK, alpha=2 * ALPHA, weights=lora.weights)
    with pytest.raises(WeightsError, match=r"does not give back the student.*was not written"):
        export_lora(family, wrong, student, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []
    export_lora(family, lora, student, tmp_path / "export")
    with pytest.raises(WeightsError, match="exists already"):
        export_lora(family, lora, student, tmp_path / "export")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.can_edit])
def test_an_export_that_is_not_the_student_for_edits_alone_is_not_written(name, tmp_path):
    family = CASES[name].family(CASES[name].pipeline())
    backbone = shared_backbone(family)
    perturb(backbone, "student", 0.3, seed=7)
    model = AdapterModel(backbone, family.model, "student")

    def student(z, sigma, condition):
        return model(z, sigma, condition) + (0.01 if condition.source is not None else 0.0)

    with pytest.raises(WeightsError, match=r"velocities differ by 0\.01"):
        export_lora(family, student_lora(backbone), student, tmp_path / "export")


@pytest.mark.parametrize("give", [export_lora, export_peft])
def test_a_lora_exports_without_namesakes_of_its_modules(give, tmp_path):
    family = CASES["flux"].family(CASES["flux"].pipeline())
    outputs, inputs = family.network.proj_out.weight.shape
    weights = {"proj_out.lora_A.weight": torch.ones(2, inputs), "proj_out.lora_B.weight": torch.ones(outputs, 2)}
    lora, backbone = Lora(rank=2, alpha=2.0, weights=weights), AdapterBackbone(family.network)
    backbone.add("student", lora)
    assert backbone.state("student").keys() == weights.keys()
    assert "single_transformer_blocks.0.proj_out" in dict(family.network.named_modules())
    give(family, lora, AdapterModel(backbone, family.model, "student"), tmp_path / "export")


def merged_into(network, lora):
    merge_lora(network, lora)
    return network


def test_bfloat16_weights_are_written_only_where_they_hold_the_student(case, tmp_path):
    case.pipeline().save_pretrained(tmp_path / "base")
    family = case.family(tmp_path / "base", dtype=torch.bfloat16)
    backbone = shared_backbone(family)
    student = AdapterModel(backbone, family.model, "student")
    perturb(backbone, "student", 0.01, seed=7)
    with pytest.raises(WeightsError, match=r"100\.0% of what the student changes.*--dtype fp32.*was not written"):
        export_merged(family, family.load_model().network, student, tmp_path / "export")
    perturb(backbone, "student", 0.3, seed=7)
    merged = merged_into(family.load_model().network, student_lora(backbone))
    export_merged(family, merged, student, tmp_path / "export")


def test_a_merged_export_is_compared_bit_for_bit(tmp_path, monkeypatch):
    family = CASES["sd3"].family(CASES["sd3"].pipeline())
    network, cls = family.load_model().network, type(family.network)
    original = cls.save_pretrained

    def nudged(self, *args):
        with torch.no_grad():
            weight = next(self.parameters()).view(-1)
            weight[0] += 1e-6
            original(self, *args)
            weight[0] -= 1e-6

    monkeypatch.setattr(cls, "save_pretrained", nudged)
    with pytest.raises(WeightsError, match=r"loaded again, differs in 1 places.*was not written"):
        export_merged(family, network, family.model, tmp_path / "export")
    assert not (tmp_path / "export").exists()


CARD = ModelCard(
    base="some-lab/some-model",
    fields={"realism": "LoRA realism.safetensors, scale 1", "base": "the base | bare"},
    hashes={"realism.safetensors": "ab" * 32},
    recipe="family: sd3\nnote: '```'\n",
    trained="trained by nobody",
    guidance_scale=3.0,
    num_inference_steps=7,
    size=(16, 24),
    advice=["Keep it dry."],
    scores={"GenEval overall": 0.734},
    limits=["Nothing was measured\nabove 1024 x 1024."],
)


def exported_card(case, folder, card):
    family = case.family(case.pipeline())
    backbone = shared_backbone(family)
    perturb(backbone, "student", 0.3, seed=7)
    export_lora(
        family, student_lora(backbone), AdapterModel(backbone, family.model, "student"), folder / "export", card=card
    )
    return family, (folder / "export" / "README.md").read_text(encoding="utf-8")


def test_a_model_card_says_what_the_lora_is_and_was_made_from(case, tmp_path):
    family, text = exported_card(case, tmp_path, CARD)
    name = type(family.pipeline).__name__
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == CARD.base
    assert yaml.safe_load(front)["pipeline_tag"] == ("image-to-image" if case.can_edit else "text-to-image")
    assert f"LoRA of rank {RANK} and alpha {ALPHA:g} on " in body
    assert f"pipe = {name}.from_pretrained('some-lab/some-model')" in body
    assert "| realism | LoRA realism.safetensors, scale 1 |\n| base | the base \\| bare |" in body
    assert f"| realism.safetensors | {'ab' * 32} |\n| {FILE} | {file_hash(tmp_path / 'export' / FILE)} |" in body
    assert f"````yaml\n{CARD.recipe}````" in body
    assert "| GenEval overall | 0.734 |" in body
    assert "- Nothing was measured above 1024 x 1024.\n- The licences" in body
    assert float(body.split("student's by at most ")[1].split(". The")[0]) <= 1e-5
    assert ("velocities for two prompts, with and without source images differed" in body) == case.can_edit
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["README.md", FILE]


def test_a_card_without_scores_says_so(case, tmp_path):
    _, text = exported_card(case, tmp_path, replace(CARD, scores={}, base="a local model"))
    assert "## Scores\n\nNone were given." in text
    assert "base_model" not in text


def test_a_float32_student_over_a_bf16_base_exports_as_itself(case, tmp_path):
    case.pipeline().save_pretrained(tmp_path / "base")
    family = case.family(tmp_path / "base", dtype=torch.bfloat16)
    backbone = shared_backbone(family)
    perturb(backbone, "student", 0.3, seed=7)
    student = AdapterModel(backbone, family.model, "student")
    assert {parameter.dtype for parameter in backbone.parameters("student")} == {torch.float32}
    assert next(family.network.parameters()).dtype == torch.bfloat16
    export_lora(family, student_lora(backbone), student, tmp_path / "export")

    fresh = AdapterBackbone(family.loaded.own_network())
    fresh.add("exported", family.load_lora(family.resolve(str(tmp_path / "export"))))
    model = family.behind_the_call(fresh.module)
    z, sigma = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2)), torch.tensor([0.9, 0.4])
    condition = family.encode(PROMPTS, None)
    with torch.no_grad():
        ours = student(z, sigma, condition)
    torch.testing.assert_close(AdapterField(fresh, model, "exported").velocity(z, sigma, condition), ours)
    assert float((AdapterField(fresh, model).velocity(z, sigma, condition) - ours).abs().max()) > 1e-2
