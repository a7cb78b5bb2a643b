"""A field of another family teaches a student in the same latent space, and in no other."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tiny_pipelines import CASES, TOKENS

from danceopd.families.flux import FluxCondition
from danceopd.families.latents import latent_space_of
from danceopd.recipe import RecipeError, parse_recipe
from danceopd.tiny.pipelines import kontext_pipeline, sd3_pipeline, vae
from danceopd.training import assemble as assembly_of

PROMPTS = ["a red circle", "a small blue square", "a star"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny_families(monkeypatch):
    """Recipes may name the tiny pipelines' families."""
    names = {"sd3": "sd3", "flux": "kontext", "z_image": "z_image"}
    monkeypatch.setattr(assembly_of, "open_family", lambda recipe, name, base: CASES[names[name]].family(base))


@pytest.fixture
def bases(tmp_path):
    """Folders of tiny pipelines that all have the SD3 one's VAE."""
    shared = sd3_pipeline()
    made = {"sd3": shared, "flux": kontext_pipeline(), "z_image": CASES["z_image"].pipeline()}
    for name, pipeline in made.items():
        pipeline.vae = shared.vae
        pipeline.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in made}


def recipe_for(bases, tmp_path, student, field, *, lines=None, **options):
    lines = lines or [{"prompt": prompt} for prompt in PROMPTS]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    content = {
        "version": 1,
        "family": student,
        "base": str(bases[student]),
        "fields": {"foreign": {"family": field, "base": str(bases[field]), **options}},
        "student": {"lora": {"rank": 2, "alpha": 2.0}},
        "routes": [{"field": "foreign", "data": {"manifest": str(tmp_path / "data.jsonl")}}],
        "rollout": {"num_inference_steps": 3, "shift": 2.0},
        "output": str(tmp_path / "run"),
    }
    return parse_recipe(content, where="the test")


@pytest.mark.parametrize("field", ["flux", "z_image"])
def test_an_sd3_student_learns_from_another_architecture(bases, tmp_path, rng, field):
    recipe = recipe_for(bases, tmp_path, "sd3", field, prompt_prefix="photo,", guidance_scale=2.0)
    assembly = assembly_of.assemble(recipe, device=CPU)
    (samples,) = assembly.method.routes[0].samples(3, rng)
    foreign = CASES["kontext" if field == "flux" else field].family(bases[field])
    order = [
        next(p for p in PROMPTS if same(assembly.family.encode([p], None), samples.condition, i)) for i in range(3)
    ]
    told = foreign.encode([f"photo, {prompt}" for prompt in order], None)
    assert type(samples.field_condition) is type(told)
    z, sigma = torch.randn(3, *samples.shape, generator=rng), torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        conditional, empty = (foreign.model(z, sigma, c) for c in (told, foreign.empty(told)))
    expected = foreign.guide(conditional, empty, 2.0)
    found = assembly.fields["foreign"].velocity(z, sigma, samples.field_condition)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    before = {name: weight.clone() for name, weight in assembly.models[-1].state_dict().items()}
    optimizer = torch.optim.AdamW(assembly.student.parameters.values(), lr=1e-2)
    losses = []
    for _ in range(2):
        result = assembly.method.step(
            assembly.student.model,
            batch_size=4,
            generator=torch.Generator().manual_seed(0),
            routes=torch.zeros(4).long(),
        )
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assembly.buckets["foreign"].load_state({"seed": 0, "epoch": 0, "position": 0, "size": 3})
        losses.append(float(result.loss.detach()))
    assert 0 < losses[1] < losses[0]
    assert all(torch.equal(before[name], weight) for name, weight in assembly.models[-1].state_dict().items())
    assert assembly.hashes.keys() >= {str(bases["sd3"]), str(bases[field]), f"{bases[field]}: vae/config.json"}


def same(one, many, index):
    return torch.equal(one.prompt_embeds[0], many.prompt_embeds[index])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weights", r"fields\.foreign: 'flux' on .* another latent space than .*'sd3' .*found autoencoder \w{16} and"),
        ("scaling", r"found scaling_factor 1\.5 and 0\.9$"),
        ("shift", r"found shift_factor 0\.06 and 0\.0$"),
    ],
)
def test_another_latent_space_is_refused_with_the_difference(bases, tmp_path, change, message):
    other = AutoencoderKL.from_pretrained(bases["flux"] / "vae")
    if change == "weights":
        other = vae()
    elif change == "scaling":
        other.register_to_config(scaling_factor=0.9)
    else:
        other.register_to_config(shift_factor=None)
    other.save_pretrained(bases["flux"] / "vae")
    with pytest.raises(RecipeError, match=message):
        assembly_of.assemble(recipe_for(bases, tmp_path, "sd3", "flux"), device=CPU)


def test_a_vae_is_the_same_in_another_precision_and_not_after_any_change():
    one = vae()
    space = latent_space_of(one, 2)
    config = dict(one.config) | {"sample_size": 999, "force_upcast": False}
    copy = AutoencoderKL.from_config(config)
    copy.load_state_dict(one.state_dict())
    assert latent_space_of(copy.bfloat16(), 2) == space
    with torch.no_grad():
        next(iter(copy.parameters())).flatten()[0] += 1
    assert [text.split()[0] for text in latent_space_of(copy, 2).differences(space)] == ["autoencoder"]


def test_another_size_of_the_students_own_family_may_teach_it(bases, tmp_path):
    larger = sd3_pipeline(seed=3)
    larger.vae = AutoencoderKL.from_pretrained(bases["sd3"] / "vae")
    larger.save_pretrained(tmp_path / "larger")
    recipe = recipe_for(bases | {"larger": tmp_path / "larger"}, tmp_path, "sd3", "sd3", base=str(tmp_path / "larger"))
    assembly = assembly_of.assemble(recipe, device=CPU)
    told = CASES["sd3"].family(larger).encode(PROMPTS, None)
    z, sigma = torch.randn(3, 4, 16, 16), torch.full((3,), 0.5)
    with torch.no_grad():
        expected = CASES["sd3"].family(larger).model(z, sigma, told)
    assert torch.equal(assembly.fields["foreign"].velocity(z, sigma, told), expected)
    assert not torch.equal(assembly.base.velocity(z, sigma, told), expected)


def test_edits_need_a_field_that_can_edit(bases, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "source.png")
    lines = [{"instruction": "make it red", "source": "source.png"}]
    with pytest.raises(RecipeError, match=r"holds edits, and the family of field 'foreign', 'sd3', cannot edit"):
        assembly_of.assemble(recipe_for(bases, tmp_path, "flux", "sd3", lines=lines), device=CPU)
    edits = assembly_of.assemble(
        recipe_for(bases, tmp_path, "flux", "flux", lines=lines, prompt_prefix="photo,"), device=CPU
    )
    condition = edits.method.routes[0].samples(1, torch.Generator())[0].field_condition
    assert isinstance(condition, FluxCondition)
    assert condition.source is not None
    assert condition.prompt_embeds.shape[1] == TOKENS
