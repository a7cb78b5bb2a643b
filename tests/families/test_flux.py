"""Our rollouts of FLUX.1 and Kontext against the unmodified pipelines, and what the family refuses."""

from dataclasses import replace

import pytest
import torch
from tiny_pipelines import TOKENS, flux_family

import danceopd as d
from danceopd.distill.solver import integrate
from danceopd.families.flux import pack, places, unpack
from danceopd.fields.field import ModelField
from danceopd.tiny.pipelines import flux_pipeline, kontext_pipeline

PROMPTS = ["a red circle", "a small blue square beside a green star"]
HEIGHT, WIDTH, STEPS = 32, 16, 5
SHAPE = (4, 16, 8)


@pytest.fixture(scope="module")
def flux():
    return flux_pipeline()


@pytest.fixture(scope="module")
def kontext():
    return kontext_pipeline()


def pipeline_latents(pipeline, **options):
    packed = pipeline(
        prompt=PROMPTS,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(3),
        max_sequence_length=TOKENS,
        output_type="latent",
        **options,
    ).images
    return unpack(packed, torch.Size((len(PROMPTS), *SHAPE)))


def starting_noise():
    return torch.randn(len(PROMPTS), *SHAPE, generator=torch.Generator().manual_seed(3))


def pictures(height, width):
    return torch.rand(len(PROMPTS), 3, height, width, generator=torch.Generator().manual_seed(4))


def rollout(family, condition, velocity=None):
    return integrate(velocity or family.model, starting_noise(), condition, family.grid(STEPS, shape=SHAPE))


def test_the_rollout_is_the_pipelines(flux):
    family = flux_family(flux)
    assert family.embedded_guidance == 3.5
    found = rollout(family, family.encode(PROMPTS, None))
    torch.testing.assert_close(found, pipeline_latents(flux), rtol=0, atol=1e-5)


def test_embedded_guidance_is_a_setting_and_may_differ_by_sample(flux):
    family = flux_family(flux, embedded_guidance=1.5)
    condition = family.encode(PROMPTS, None)
    found = rollout(family, condition)
    torch.testing.assert_close(found, pipeline_latents(flux, guidance_scale=1.5), rtol=0, atol=1e-5)
    strong = pipeline_latents(flux, guidance_scale=6.0)
    assert float((found - strong).abs().max()) > 1e-3
    mixed = rollout(family, replace(condition, guidance=torch.tensor([1.5, 6.0])))
    torch.testing.assert_close(mixed, torch.stack([found[0], strong[1]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("negative", ["", "blurry"])
def test_the_rollout_is_the_pipelines_under_true_guidance(flux, negative):
    family = flux_family(flux)
    field = d.GuidedField(
        ModelField(family.model),
        empty=lambda condition: family.empty(condition, negative),
        guidance_scale=4.0,
        combine=family.guide,
    )
    found = rollout(family, family.encode(PROMPTS, None), field.velocity)
    needed = pipeline_latents(flux, true_cfg_scale=4.0, negative_prompt=[negative] * 2)
    torch.testing.assert_close(found, needed, rtol=0, atol=1e-5)
    assert float((needed - pipeline_latents(flux)).abs().max()) > 1e-3


def test_a_transformer_without_embedded_guidance_and_with_a_static_grid():
    pipeline = flux_pipeline(distilled=False)
    family = flux_family(pipeline)
    condition = family.encode(PROMPTS, None)
    assert condition.guidance is None
    torch.testing.assert_close(rollout(family, condition), pipeline_latents(pipeline), rtol=0, atol=1e-5)
    assert torch.equal(family.grid(STEPS).sigmas, d.shifted_grid(steps=STEPS).sigmas)
    with pytest.raises(ValueError, match=r"takes no embedded guidance, found embedded_guidance 2\.0"):
        flux_family(pipeline, embedded_guidance=2.0)
    with pytest.raises(ValueError, match="needs pooled_embeds and no guidance"):
        rollout(family, replace(condition, guidance=torch.ones(2)))


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (16, 24)])
def test_an_edits_rollout_is_the_pipelines_whatever_the_sources_size(kontext, size):
    family, images = flux_family(kontext), pictures(*size)
    condition = family.encode(PROMPTS, list(2 * images - 1))
    found = rollout(family, condition)
    options = {"max_area": HEIGHT * WIDTH, "_auto_resize": False}
    needed = pipeline_latents(kontext, image=images, **options)
    torch.testing.assert_close(found, needed, rtol=0, atol=1e-5)
    other = pipeline_latents(kontext, image=1 - images, **options)
    assert float((needed - other).abs().max()) > 1e-3


def test_an_edit_under_true_guidance_keeps_its_source_in_the_empty_condition(kontext):
    family, images = flux_family(kontext), pictures(16, 24)
    condition = family.encode(PROMPTS, list(2 * images - 1))
    field = d.GuidedField(ModelField(family.model), empty=family.empty, guidance_scale=3.0, combine=family.guide)
    needed = pipeline_latents(
        kontext,
        image=images,
        true_cfg_scale=3.0,
        negative_prompt=["", ""],
        max_area=HEIGHT * WIDTH,
        _auto_resize=False,
    )
    torch.testing.assert_close(rollout(family, condition, field.velocity), needed, rtol=0, atol=1e-5)


def test_kontext_makes_images_from_text_as_its_pipeline_does(kontext):
    family = flux_family(kontext)
    needed = pipeline_latents(kontext, max_area=HEIGHT * WIDTH)
    torch.testing.assert_close(rollout(family, family.encode(PROMPTS, None)), needed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("edit", [False, True])
def test_each_sample_may_have_its_own_sigma(kontext, edit):
    family, sigma = flux_family(kontext), torch.tensor([0.9, 0.3])
    condition = family.encode(PROMPTS, list(2 * pictures(16, 24) - 1) if edit else None)
    together = family.model(starting_noise(), sigma, condition)
    for index in range(2):
        rows = torch.tensor([index])
        alone = family.model(starting_noise()[rows], sigma[rows], d.states.select(condition, rows))
        torch.testing.assert_close(together[rows], alone, rtol=0, atol=1e-5)


def test_the_grid_depends_on_the_size_of_the_target(flux):
    family = flux_family(flux)
    small, large = (family.grid(STEPS, shape=shape).sigmas for shape in (SHAPE, (4, 16, 16)))
    assert bool((large[1:-1] > small[1:-1]).all())
    torch.testing.assert_close(family.grid(STEPS, shift=2.5).sigmas, d.shifted_grid(steps=STEPS, shift=2.5).sigmas)
    with pytest.raises(ValueError, match=r"depends on the size of the latents: pass shape=\(C, H, W\), or a shift"):
        family.grid(STEPS)


def test_packing_is_undone_and_keeps_places(flux):
    latents = torch.randn(2, 4, 6, 8)
    tokens = pack(latents)
    assert torch.equal(unpack(tokens, latents.shape), latents)
    row, column = 2, 1
    index = row * 4 + column
    assert torch.equal(tokens[:, index], latents[:, :, 4:6, 2:4].flatten(1))
    assert places(latents, image=1)[index].tolist() == [1, row, column]
    with pytest.raises(ValueError, match="even sides are needed, found 6 x 7"):
        pack(latents[..., :7])


def test_edits_are_refused_without_kontext_or_with_sources_that_do_not_fit(flux, kontext):
    sources = [torch.zeros(3, 16, 16)]
    assert not flux_family(flux).can_edit
    with pytest.raises(ValueError, match=r"'flux' with a FluxPipeline .*cannot edit, found 1 source images.*Kontext"):
        flux_family(flux).encode(["make it red"], sources)
    family = flux_family(kontext)
    assert family.can_edit
    with pytest.raises(ValueError, match="found 1 for 2 prompts"):
        family.encode(PROMPTS, sources)
    with pytest.raises(ValueError, match=r"image 1 has shape \(3, 16, 20\)"):
        family.encode(PROMPTS, [*sources, torch.zeros(3, 16, 20)])
    with pytest.raises(ValueError, match="multiples of 4, found 16 x 18"):
        family.encode(["make it red"], [torch.zeros(3, 16, 18)])


def test_an_edit_has_its_sources_size_unless_its_target_has_another(kontext):
    family = flux_family(kontext)
    source, target = torch.zeros(3, 16, 24), torch.zeros(3, 32, 16)
    example = d.data.examples.Example(prompt="make it red", source=source)
    assert family.samples([example]).shape == (4, 8, 12)
    assert family.samples([replace(example, target=target)]).shape == SHAPE
    with pytest.raises(ValueError, match="with and without a source"):
        family.samples([example, replace(example, source=None)])
